"""Residual branches: found in the graph, ranked, dropped, replaced by what fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune import runtime, verify
from onnxprune.branches import find_branches
from onnxprune.data import open_data
from onnxprune.errors import BudgetError, InvalidRecipeError
from onnxprune.graph import Graph
from onnxprune.passes.prune_layers import PruneLayers
from onnxprune.shapes import infer
from tests.graphs import build, outputs

CONVS = (
    "(float[N,4,6,6] x) => (float[N,4,6,6] y)",
    "a = Conv<pads=[1,1,1,1]>(x, w1) r = Relu(a) b = Conv<pads=[1,1,1,1]>(r, w2) s = Add(b, x) "
    "t = Relu(s) c = Conv(t, w3) u = Add(t, c) d = Conv<pads=[1,1,1,1]>(u, w4) y = Add(u, d)",
    "w1:4,4,3,3 w2:4,4,3,3 w3:4,4,1,1 w4:4,4,3,3",
)
TOKENS = (
    "(float[N,S,8] x) => (float[N,S,8] y)",
    "n = LayerNormalization(x, g, h) q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv) "
    "kt = Transpose<perm=[0,2,1]>(k) l = MatMul(q, kt) p = Softmax(l) o = MatMul(p, v) "
    "m = MatMul(o, wo) s = Add(x, m) f = MatMul(s, w1) e = Gelu(f) z = MatMul(e, w2) y = Add(s, z)",
    "g:8 h:8 wq:8,8 wk:8,8 wv:8,8 wo:8,8 w1:8,16 w2:16,8",
)


def branches(model: onnx.ModelProto) -> list[tuple[str, str, int]]:
    graph = Graph.of(model)
    return [(b.output, b.skip, len(b.layers)) for b in find_branches(graph, infer(graph))]


def dataset(model: onnx.ModelProto, samples: int = 256) -> Any:
    return open_data([runtime.random_feeds(model, batch=samples)], model)


def test_branches_of_convolutions() -> None:
    assert branches(build(*CONVS)) == [("s", "x", 2), ("u", "t", 1), ("y", "u", 1)]


def test_branches_of_attention_and_mlp() -> None:
    assert branches(build(*TOKENS, opset=20)) == [("s", "x", 6), ("y", "s", 2)]


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Conv(x, w1) b = Conv(x, w2) y = Add(a, b)", "w1:4,4,1,1 w2:4,4,1,1"),
        ("a = Relu(x) y = Add(a, x)", ""),
        ("a = Conv(x, w1) y = Add(a, c)", "w1:4,4,1,1 c:4,1,1"),
        ("a = Conv(x, w1) b = ReduceMean<keepdims=1>(a, ax) y = Add(b, x)", "w1:4,4,1,1 ax=2,3"),
    ],
)
def test_what_is_no_branch(body: str, weights: str) -> None:
    found = branches(build("(float[N,4,6,6] x) => (float[N,4,6,6] y)", body, weights))
    assert found == [] or found == [("y", "x", 1)]
    assert bool(found) is ("ReduceMean" in body)


@pytest.mark.parametrize("replacement", ["none", "affine", "linear"])
@pytest.mark.parametrize("ranking", ["output", "cosine"])
@pytest.mark.parametrize("text", [CONVS, TOKENS], ids=["convs", "tokens"])
def test_dropped_models_run(text: tuple[str, str, str], replacement: Any, ranking: Any) -> None:
    model = build(*text, opset=20)
    count = len(branches(model))
    result = PruneLayers(count, replacement=replacement, ranking=ranking, threads=1)(
        model, dataset(model)
    )
    assert len(result.dropped) == result.candidates == count
    assert verify.structure_problems(result.model, model) == []
    kinds = {node.op_type for node in result.model.graph.node}
    assert "Softmax" not in kinds
    assert "Identity" not in kinds or replacement == "none"
    feeds = runtime.random_feeds(model, seed=3)
    assert outputs(result.model, feeds)[0].shape == outputs(model, feeds)[0].shape


def test_a_linear_branch_is_replaced_without_loss() -> None:
    model = build(
        "(float[N,S,6] x) => (float[N,S,6] y)",
        "a = MatMul(x, w1) b = MatMul(a, w2) c = Add(b, t) y = Add(x, c)",
        "w1:6,24 w2:24,6 t:6",
    )
    result = PruneLayers(1, threads=1)(model, dataset(model))
    feeds = runtime.random_feeds(model, seed=3)
    error = verify.difference(outputs(result.model, feeds), outputs(model, feeds))
    assert error < 0.01
    assert len(result.model.graph.node) == 2
    assert result.dropped[0].output_error < 0.01


def test_the_branch_that_does_least_goes_first() -> None:
    model = build(*CONVS)
    tensor = next(t for t in model.graph.initializer if t.name == "w4")
    small = np.array(onnx.numpy_helper.to_array(tensor)) * 0.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(small, "w4"))
    for ranking in ("output", "cosine"):
        options = PruneLayers(1, ranking=ranking, replacement="none", threads=1)  # type: ignore[arg-type]
        result = options(model, dataset(model))
        assert result.dropped[0].output == "y"
        assert result.dropped[0].similarity > 0.99


def test_errors() -> None:
    model = build(*CONVS)
    with pytest.raises(InvalidRecipeError, match="prune-layers needs data to calibrate on"):
        PruneLayers(1)(model, None)
    with pytest.raises(BudgetError, match="the model has 3 residual branches: 4 cannot go"):
        PruneLayers(4)(model, dataset(model))
    with pytest.raises(InvalidRecipeError, match="layers 0: must be at least 1"):
        PruneLayers(0)
    with pytest.raises(InvalidRecipeError, match="replacement 'x': choose none, affine, linear"):
        PruneLayers(1, replacement="x")  # type: ignore[arg-type]
