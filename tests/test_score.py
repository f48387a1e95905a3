"""Every criterion on weights whose importance can be told by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxprune.analysis import Analysis, analyse
from onnxprune.errors import InvalidRecipeError
from onnxprune.passes import score as scoring
from onnxprune.passes.score import Member, criteria, criterion, score
from tests.graphs import build, prune

W1 = np.array([[3.0, 4.0], [0.0, 1.0], [-2.0, 0.0]], np.float32)
W2 = np.array([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]], np.float32)


def _model(middle: str = "h = Relu(a)", extra: str = "") -> onnx.ModelProto:
    model = build(
        "(float[N,2] x) => (float[N,2] y)",
        f"a = Gemm<transB=1>(x, w1, b1)  {middle}  y = Gemm<transB=1>(h, w2)",
        f"w1:3,2 b1:3 w2:2,3 {extra}",
    )
    for tensor in model.graph.initializer:
        values = {"w1": W1, "w2": W2, "s": np.array([0.1, -5.0, 2.0], np.float32)}
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    return model


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(_model())


def _scores(analysis: Analysis, name: str, **options: object) -> NDArray[np.float64]:
    total = score(analysis.coupling, name, **options)  # type: ignore[arg-type]
    assert total[0] == np.inf
    (group,) = analysis.groups
    return total[group.units]


#: What each criterion says of W1's rows and of W2's columns; None where it does not look.
KNOWN = {
    "l2": ([25.0, 1, 4], [1.0, 4, 2]),
    "l1": ([7.0, 1, 2], [1.0, 2, 2]),
    "lamp": ([25 / 25, 1 / 30, 4 / 29], [1 / 7, 4 / 4, 2 / 6]),
    "fpgm": (
        [
            np.hypot(3, 3) + np.hypot(5, 4),
            np.hypot(3, 3) + np.hypot(2, 1),
            np.hypot(5, 4) + np.hypot(2, 1),
        ],
        None,
    ),
}


def _relative(values: list[float] | None) -> list[NDArray[np.float64]]:
    return [] if values is None else [np.array(values) / np.mean(values)]


@pytest.mark.parametrize("name", KNOWN)
def test_known_weights(analysis: Analysis, name: str) -> None:
    makes, reads = KNOWN[name]
    expected = np.mean([*_relative(makes), *_relative(reads)], axis=0)
    np.testing.assert_allclose(_scores(analysis, name), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("reduction", "join"), [("sum", np.sum), ("mean", np.mean), ("max", np.max)]
)
def test_reductions(analysis: Analysis, reduction: str, join: Callable[..., object]) -> None:
    makes, reads = KNOWN["l2"]
    expected = join([*_relative(makes), *_relative(reads)], axis=0)
    np.testing.assert_allclose(_scores(analysis, "l2", reduction=reduction), expected, rtol=1e-6)


def test_the_scale_of_a_weight_does_not_matter(analysis: Analysis) -> None:
    model = _model()
    tensor = next(t for t in model.graph.initializer if t.name == "w2")
    tensor.CopyFrom(onnx.numpy_helper.from_array(100 * W2, "w2"))
    np.testing.assert_allclose(_scores(analyse(model), "l2"), _scores(analysis, "l2"), rtol=1e-6)


def test_bn_scale_looks_at_the_scale() -> None:
    model = build(
        "(float[N,3,4,4] x) => (float[N,2,4,4] y)",
        "a = Conv(x, w1)  h = BatchNormalization(a, s, b, m, var)  y = Conv(h, w2)",
        "w1:3,3,1,1 s:3 b:3 m:3 var:3 w2:2,3,1,1",
    )
    scale = np.array([0.1, -5.0, 2.0], np.float32)
    for tensor in model.graph.initializer:
        if tensor.name in ("s", "b", "m", "var"):
            values = scale if tensor.name == "s" else np.ones(3, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    ranks = _scores(analyse(model), "bn-scale").argsort()
    assert ranks.tolist() == [0, 2, 1]


def test_bn_scale_without_batch_norm_is_l2(analysis: Analysis) -> None:
    np.testing.assert_array_equal(_scores(analysis, "bn-scale"), _scores(analysis, "l2"))


def test_random_follows_the_seed(analysis: Analysis) -> None:
    first, again = (_scores(analysis, "random", seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != _scores(analysis, "random", seed=2)).all()


def test_scores_of_a_permuted_layer_are_permuted() -> None:
    order = np.array([2, 0, 1])
    model = _model()
    for tensor in model.graph.initializer:
        axis = {"w1": 0, "b1": 0, "w2": 1}[tensor.name]
        values = onnx.numpy_helper.to_array(tensor).take(order, axis)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for name in ("l1", "l2", "fpgm", "lamp"):
        mine, theirs = _scores(analyse(model), name), _scores(analyse(_model()), name)
        np.testing.assert_allclose(mine, theirs[order], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(criteria()))
def test_every_criterion_prunes(name: str) -> None:
    result = prune(_model(), channels=0.67, criterion=name)
    assert result.plan.initializers["w1"].shape_after == (2, 2)
    assert result.report.options["criterion"] == name


def test_an_unknown_criterion_lists_the_known(analysis: Analysis) -> None:
    with pytest.raises(InvalidRecipeError, match="no criterion 'luck': choose one of bn-scale"):
        score(analysis.coupling, "luck")


def test_a_new_criterion_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CRITERIA", dict(criteria()))
    seen: list[tuple[str, str, str]] = []

    @criterion("first-goes")
    def first_goes(member: Member) -> NDArray[np.float64] | None:
        seen.append((member.name, member.role, member.node.op_type))
        return np.arange(member.array.shape[0], dtype=np.float64)

    result = prune(_model(), channels=0.67, criterion="first-goes")
    assert result.plan.initializers["w1"].keep == {"0": (1, 2)}
    assert ("w1", "makes", "Gemm") in seen
    assert ("w2", "reads", "Gemm") in seen
    assert ("b1", "scales", "Gemm") in seen


def test_criteria_cannot_be_changed_from_outside() -> None:
    with pytest.raises(TypeError):
        criteria()["mine"] = None  # type: ignore[index]


@pytest.mark.parametrize("block", [1, 50, 1 << 18])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(7,), (6, 35), (5, 3, 4, 2), (1, 9, 1), (2, 2, 30)])
def test_norms_over_every_axis(
    shape: tuple[int, ...], kind: type, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BLOCK", block)
    array = np.random.default_rng(0).normal(size=shape).astype(kind)
    exact = array.astype(np.float64)
    for axis in range(array.ndim):
        rest = tuple(a for a in range(array.ndim) if a != axis)
        member = Member(
            np.moveaxis(array, axis, 0),
            "w",
            "makes",
            None,
            np.random.default_rng(0),  # type: ignore[arg-type]
        )
        for name, values in (("l2", exact**2), ("l1", np.abs(exact))):
            np.testing.assert_allclose(criteria()[name](member), values.sum(rest), rtol=1e-5)


def test_a_mask_of_huge_numbers_says_nothing_about_heads() -> None:
    model = build(
        "(float[N,5,8] x) => (float[N,5,8] y)",
        """q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        a = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v, m)  y = MatMul(a, o)""",
        "wq:8,16 wk:8,16 wv:8,16 o:16,8 m:4,5,5",
        opset=23,
        ir=10,
    )
    without = score(analyse(model).coupling)
    mask = next(t for t in model.graph.initializer if t.name == "m")
    lower = np.triu(np.full((4, 5, 5), np.finfo(np.float32).min, np.float32), 1)
    mask.CopyFrom(numpy_helper.from_array(lower, "m"))
    scores = score(analyse(model).coupling)
    assert np.isfinite(scores[1:]).all()
    assert np.unique(scores[1:]).size == np.unique(without[1:]).size == 4


@pytest.mark.parametrize("name", ["l2", "l1", "lamp"])
def test_a_weight_without_elements_has_no_importance(name: str) -> None:
    member = Member(np.zeros((3, 0), np.float32), "w", "makes", None, np.random.default_rng(0))  # type: ignore[arg-type]
    assert criteria()[name](member).tolist() == [0, 0, 0]  # type: ignore[union-attr]
