"""Metrics agree with scikit-learn's, and stream over batches of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from sklearn import metrics as sk

from onnxprune import metrics
from onnxprune.data import open_data
from onnxprune.errors import InvalidDataError
from onnxprune.metrics import Reference, class_axis, cosines, evaluate, ranks


def identity(*shape: Any, scale: float = 1.0) -> onnx.ModelProto:
    """scores -> scores * scale: the data decides what the model answers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)
    factor = helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "scale"], ["out"])], "g", [x], [y], [factor]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    """A session of one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options)


def measure(scores: np.ndarray, labels: np.ndarray | None, **kwargs: Any) -> dict[str, float]:
    """The metrics of a model that answers `scores`."""
    proto = identity("N", *scores.shape[1:])
    arrays = {"x": scores.astype(np.float32)} | ({} if labels is None else {"y": labels})
    return evaluate(session(proto), open_data(arrays, proto), **kwargs)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([2, 3, 7, 12]), st.booleans())
def test_classification_equals_scikit_learn(seed: int, count: int, k: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (count, k)) if ties else rng.normal(size=(count, k))
    labels = rng.integers(0, k, count)
    got = measure(scores, labels, batch_size=7)
    guess = scores.argmax(axis=1)
    macro: dict[str, Any] = {"average": "macro", "zero_division": 0}
    expected = {
        "accuracy": sk.accuracy_score(labels, guess),
        "precision": sk.precision_score(labels, guess, **macro),
        "recall": sk.recall_score(labels, guess, **macro),
        "f1": sk.f1_score(labels, guess, **macro),
    }
    if k > 5 and not ties:
        expected["top5"] = sk.top_k_accuracy_score(labels, scores, k=5, labels=np.arange(k))
    assert set(got) == set(expected) | ({"top5"} if k > 5 else set())
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(
    ("shape", "labels"),
    [((6, 4, 1, 1), (6,)), ((6, 5, 4), (6, 5)), ((6, 4, 2, 3), (6, 2, 3)), ((6, 4), (6, 1))],
)
def test_class_scores_on_other_axes(shape: tuple[int, ...], labels: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    scores, wanted = rng.normal(size=shape), rng.integers(0, 4, labels)
    axis = 2 if len(shape) == 3 else 1
    expected = (scores.argmax(axis).reshape(wanted.shape) == wanted).mean()
    assert measure(scores, wanted, batch_size=4)["accuracy"] == pytest.approx(expected)


def test_labels_below_zero_do_not_count() -> None:
    scores = np.eye(3)
    assert measure(scores, np.array([0, -100, 1]))["accuracy"] == 0.5
    assert measure(scores, np.array([-1, -1, -1])) == {}


def test_scores_that_are_no_numbers_are_never_right() -> None:
    scores = np.full((4, 8), np.nan)
    got = measure(scores, np.arange(4))
    assert got["top5"] == 0


def test_numbers_as_labels() -> None:
    rng = np.random.default_rng(0)
    output, wanted = rng.normal(size=(9, 1)), rng.normal(size=9)
    got = measure(output, wanted, batch_size=4)
    assert got == {"mse": pytest.approx(((output[:, 0] - wanted) ** 2).mean(), rel=1e-5)}


def test_against_a_reference() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(10, 4)).astype(np.float32)
    proto = identity("N", 4)
    same = measure(scores, None, reference=session(proto), batch_size=4)
    assert same == {"mse": 0, "cosine": pytest.approx(1), "agreement": 1}
    flipped = measure(scores, None, reference=session(identity("N", 4, scale=-1)))
    assert flipped["mse"] == pytest.approx(4 * (scores.astype(float) ** 2).mean(), rel=1e-5)
    assert flipped["cosine"] == pytest.approx(-1)
    assert flipped["agreement"] == 0
    both = measure(scores, np.zeros(10, np.int64), reference=session(proto))
    assert {"accuracy", "agreement", "cosine"} <= set(both)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.eye(3), np.array([0, 1, 3]), r"label 3 but the model's output has 3 classes \(0 to 2"),
        (np.eye(3), np.zeros((3, 5), np.int64), r"labels int64 \[3, 5\] fit no output .*'out'"),
        (np.eye(3), np.array(["a", "b", "c"]), "fit no output of the model"),
    ],
)
def test_labels_that_do_not_fit(scores: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidDataError, match=message):
        measure(scores, labels)


def test_outputs_of_another_shape() -> None:
    proto = identity("N", "K")
    transposed = helper.make_model(
        helper.make_graph(
            [helper.make_node("Transpose", ["x"], ["out"], perm=[1, 0])],
            "g",
            list(proto.graph.input),
            list(proto.graph.output),
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    data = open_data({"x": np.zeros((4, 2), np.float32)}, proto)
    with pytest.raises(InvalidDataError, match=r"output 'out' has shape \[4, 2\], the reference"):
        evaluate(session(proto), data, reference=session(transposed))


def test_models_and_paths_get_their_session(tmp_path: Any) -> None:
    proto = identity("N", 3)
    data = open_data({"x": np.eye(3, dtype=np.float32), "y": np.arange(3)}, proto)
    onnx.save(proto, tmp_path / "m.onnx")
    for target in (proto, tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        assert evaluate(target, data, threads=1)["accuracy"] == 1


def test_no_samples() -> None:
    class Empty:
        def __len__(self) -> int:
            return 0

        def batches(self, size: int, *, rng: Any = None) -> Any:
            return iter(())

    with pytest.raises(InvalidDataError, match="no samples to evaluate"):
        evaluate(session(identity("N", 3)), Empty())


def test_ranks_break_ties_like_argmax() -> None:
    scores = np.array([[1.0, 1.0, 0.0]] * 3)
    assert ranks(scores, np.arange(3)).tolist() == [0, 1, 2]


def test_cosines_of_zeros() -> None:
    a, b = np.array([[0.0, 0], [0, 0], [2, 0]]), np.array([[0.0, 0], [1, 0], [1, 1]])
    np.testing.assert_allclose(cosines(a, b), [1, 0, 0.5**0.5])


@pytest.mark.parametrize(
    ("shape", "dtype", "axis"),
    [
        ((2, 3), "f4", 1),
        ((2, 1), "f4", None),
        ((2,), "f4", None),
        ((2, 5, 3), "f4", 2),
        ((2, 3, 4, 4), "f4", 1),
        ((2, 3), "i8", None),
    ],
)
def test_class_axis(shape: tuple[int, ...], dtype: str, axis: int | None) -> None:
    assert class_axis(np.zeros(shape, dtype)) == axis


def test_a_reference_is_run_once_for_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    inner = metrics._run
    monkeypatch.setattr(metrics, "_run", lambda *a: runs.append(1) or inner(*a))
    proto, half = identity("N", 3), identity("N", 3, scale=0.5)
    scores = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    data = open_data({"x": scores}, proto)
    first = evaluate(half, data, reference=proto)
    runs.clear()
    reference = Reference(proto)
    assert [evaluate(half, data, reference=reference) for _ in range(3)] == [first] * 3
    assert len(runs) == 3 * 2 + 2
    monkeypatch.setattr(metrics, "ROOM", 64 * 3 * 4)  # one of the two batches
    runs.clear()
    reference = Reference(proto)
    assert [evaluate(half, data, reference=reference) for _ in range(3)] == [first] * 3
    assert len(runs) == 3 * 2 + 1 + 3
