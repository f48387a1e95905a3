"""Plain layers: which of them only layers read, and that what is fitted takes their place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune import runtime, verify
from onnxprune.data import open_data
from onnxprune.errors import BudgetError, InvalidRecipeError
from onnxprune.graph import Graph
from onnxprune.layer_edits import LayerEdit, edited, shadowed
from onnxprune.passes.prune_layers import PruneLayers
from onnxprune.plain import find_plain
from onnxprune.shapes import infer
from tests.graphs import build, mlp, outputs, shapes, weight

IMAGE = "(float[N,4,8,8] x) => (float[N,5,M,L] y)"
THREES = "c = Conv<pads=[1,1,1,1]>"


def dataset(model: onnx.ModelProto, samples: int = 512) -> Any:
    return open_data([runtime.random_feeds(model, batch=samples)], model)


def found(model: onnx.ModelProto) -> list[tuple[str, str, int, bool]]:
    graph = Graph.of(model)
    rows = find_plain(graph, infer(graph))
    return [(p.start, p.end, len(p.readers), p.pool is not None) for p in rows]


CASES = [
    ("a = Relu(c) y = Conv(a, v)", "w:6,4,3,3 v:5,6,1,1", [("x", "a", 1, False)]),
    ("y = Conv(c, v)", "w:6,4,3,3 v:5,6,1,1", [("x", "c", 1, False)]),
    (
        "s = Sigmoid(c) a = Mul(c, s) p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(a) "
        "y = Conv(p, v)",
        "w:6,4,3,3 v:5,6,1,1",
        [("x", "a", 1, False)],
    ),
    (
        "a = Relu(c) d = Conv(a, v) e = Conv(a, u) y = Add(d, e)",
        "w:6,4,3,3 v:5,6,1,1 u:5,6,1,1",
        [("x", "a", 2, False)],
    ),
    ("a = Relu(c) d = Conv(a, v) y = Add(d, a)", "w:5,4,3,3 v:5,5,1,1", []),
    ("a = Relu(c) s = Shape(a) f = Cast<to=1>(s) m = ReduceMax(f) d = Conv(a, v) y = Add(d, m)",
     "w:6,4,3,3 v:5,6,1,1", []),
    ("a = Relu(c) y = Slice(a, s, e, t)", "w:6,4,3,3 s=0 e=5 t=1", []),
]  # fmt: skip


@pytest.mark.parametrize(("body", "weights", "expected"), CASES)
def test_which_layers_can_go(body: str, weights: str, expected: Any) -> None:
    model = build(IMAGE, f"{THREES}(x, w) {body}", weights)
    assert found(model) == expected


def test_a_stride_becomes_a_mean() -> None:
    body = "c = Conv<pads=[1,1,1,1],strides=[2,2]>(x, w) a = Relu(c) y = Conv(a, v)"
    model = build(IMAGE, body, "w:6,4,3,3 v:5,6,1,1")
    assert found(model) == [("x", "a", 1, True)]
    result = PruneLayers(1, threads=1)(model, dataset(model, 64))
    assert [n.op_type for n in result.model.graph.node] == ["AveragePool", "Conv"]
    assert verify.structure_problems(result.model, model) == []


@pytest.mark.parametrize(
    ("signature", "body", "weights", "left"),
    [
        (IMAGE, "c = Conv<pads=[1,1,1,1]>(x, w) d = Conv(c, v) y = Identity(d)",
         "w:6,4,3,3 v:5,6,3,3", 1),
        ("(float[N,4] x) => (float[N,5] y)", "c = Gemm(x, w, b) y = Gemm<transB=1>(c, v, d)",
         "w:4,6 b:6 v:5,6 d:5", 1),
        ("(float[N,S,4] x) => (float[N,S,5] y)", "c = MatMul(x, w) d = Add(c, b) y = MatMul(d, v)",
         "w:4,6 b:6 v:6,5", 2),
        (IMAGE.replace("[N,5,M,L]", "[N,3]"),
         "c = Conv(x, w, b) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, v)",
         "w:6,4,1,1 b:6 v:6,3", 3),
        (IMAGE.replace("[N,5,M,L]", "[N,6,M,L]"),
         "c = Conv<group=2>(x, w) y = Conv<group=2>(c, v)", "w:4,2,1,1 v:6,2,3,3", 1),
    ],
)  # fmt: skip
def test_a_linear_layer_goes_without_loss(
    signature: str, body: str, weights: str, left: int
) -> None:
    model = build(signature, body, weights)
    result = PruneLayers(1, threads=1, kinds="plain")(model, dataset(model))
    assert len(result.model.graph.node) == left
    feeds = runtime.random_feeds(model, seed=3, batch=8)
    error = verify.difference(outputs(result.model, feeds), outputs(model, feeds))
    if "pads" not in body:  # a bias cannot be right at borders and inside
        assert error < 0.02
    assert result.max_error < 1e-5
    assert result.dropped[0].kind == "layer"


def test_every_layer_but_the_last_can_go() -> None:
    model = mlp(6, 12, 12, 12, 4)
    result = PruneLayers(3, threads=1)(model, dataset(model))
    assert result.candidates == 3
    assert {name: dims for name, dims in shapes(result.model).items() if len(dims) == 2} == {
        next(n for n in shapes(result.model) if n.endswith("weight") or "weight_" in n): (4, 6)
    }
    with pytest.raises(BudgetError, match="the model has 3 plain layers: 4 cannot go"):
        PruneLayers(4, threads=1)(model, dataset(model))


def test_a_budget_takes_what_costs_least_for_what_it_saves() -> None:
    model = mlp(8, 64, 8, 16, 4)
    result = PruneLayers(macs=0.5, threads=1)(model, dataset(model))
    assert len(result.dropped) >= 1
    saved = sum(row.macs for row in result.dropped)
    whole = 8 * 64 + 64 * 8 + 8 * 16 + 16 * 4
    assert saved >= 0.5 * whole
    small = PruneLayers(params=0.9, threads=1)(model, dataset(model))
    assert len(small.dropped) == 1
    words = "--macs 0.01 cannot be reached by dropping layers: 0.026 is left without all 3"
    with pytest.raises(BudgetError, match=words):
        PruneLayers(macs=0.01, threads=1)(model, dataset(model))


def test_a_promise_ends_the_run() -> None:
    model = mlp(6, 12, 12, 4)
    feeds = runtime.random_feeds(model, batch=512)
    labels = outputs(model, feeds)[0].argmax(axis=1)
    data = open_data([(feeds, labels)], model)
    free = PruneLayers(max_drop=100.0, threads=1)(model, data)
    assert len(free.dropped) == 2
    with pytest.raises(BudgetError, match="--max-drop 0 is exceeded with 1 of 2 plain layers"):
        PruneLayers(max_drop=0.0, threads=1)(model, data)
    with pytest.raises(BudgetError, match="--max-drop 0 is exceeded with 1 of 2"):
        PruneLayers(2, max_drop=0.0, threads=1)(model, data)


def test_repair_brings_outputs_nearer() -> None:
    model = mlp(6, 24, 24, 24, 4)
    feeds = runtime.random_feeds(model, seed=3, batch=512)
    errors = []
    for repair in (False, True):
        result = PruneLayers(1, threads=1, repair=repair)(model, dataset(model, 1024))
        errors.append(verify.deviation([outputs(result.model, feeds)], [outputs(model, feeds)]))
    assert errors[1] <= errors[0] * 1.01


def test_a_wrong_edit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxprune.passes import prune_layers

    real = edited

    def wrong(model: onnx.ModelProto, edit: LayerEdit) -> onnx.ModelProto:
        changed = real(model, edit)
        tensor = changed.graph.initializer[-1]
        value = np.array(onnx.numpy_helper.to_array(tensor)) + np.float32(0.5)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        return changed

    monkeypatch.setattr(prune_layers, "edited", wrong)
    model = mlp(6, 12, 4)
    with pytest.raises(BudgetError, match="after 0 of the plain layers no other can go") as error:
        PruneLayers(1, threads=1)(model, dataset(model, 64))
    assert "differs from its twin" in str(error.value)


def test_edits_are_data() -> None:
    model = mlp(6, 12, 4)
    result = PruneLayers(1, threads=1, repair=False)(model, dataset(model, 64))
    edit = LayerEdit.from_text(result.dropped[0].edit)
    again = edited(model, edit)
    feeds = runtime.random_feeds(model, seed=3)
    assert verify.difference(outputs(again, feeds), outputs(result.model, feeds)) == 0
    twin = shadowed(model, [edit])
    assert len(twin.graph.node) == len(model.graph.node) + len(edit.nodes) + 2
    assert weight(twin, "w0").shape == (12, 6)
    with pytest.raises(InvalidRecipeError, match="the plan is malformed: an edit of layers"):
        LayerEdit.from_text("@")
    with pytest.raises(InvalidRecipeError, match="the plan was made for another model"):
        edited(build("(float[N,6] x) => (float[N,6] z)", "z = Relu(x)"), edit)


def test_options() -> None:
    for options, words in [
        ({"layers": 1, "macs": 0.5}, "give one of layers, macs, params; got layers and macs"),
        ({"macs": 1.5}, r"macs 1.5: a share must be in \(0, 1\]"),
        ({"max_drop": -1}, r"max_drop -1: must be in \[0, 100\] points"),
        ({"samples": 0}, "samples 0: must be at least 1"),
        ({"kinds": "x"}, "kinds 'x': choose auto, branch, plain, all"),
    ]:
        with pytest.raises(InvalidRecipeError, match=words):
            PruneLayers(**options)  # type: ignore[arg-type]
