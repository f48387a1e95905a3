"""Weights that are computed from constants become constants: pruned exactly, and only where so."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxprune import runtime, verify
from onnxprune.analysis import analyse
from onnxprune.graph import Graph
from onnxprune.pipeline import apply
from onnxprune.plan import Plan
from onnxprune.statics import fold_statics
from tests.graphs import TOLERANCE, build, outputs, prune, prune_half, shapes

IMAGE = "(float[N,3,6,6] x) => (float[N,4,?,?] y)"
FLAT = "(float[N,6] x) => (float[N,4] y)"
STANDARDIZED = """m = ReduceMean<axes=[1,2,3]>(w)  d = Sub(w, m)  q = Mul(d, d)
v = ReduceMean<axes=[1,2,3]>(q)  s = Sqrt(v)  f = Div(d, s)"""

FOLDED = {
    "standardized": (
        IMAGE,
        f"a = Conv(x, w1)  r = Relu(a)  {STANDARDIZED}  c = Conv(r, f)  y = Conv(c, w2)",
        "w1:8,3,1,1 w:6,8,3,3 w2:4,6,1,1",
        "w1 f w2",
    ),
    "standardized by training-mode normalization": (
        IMAGE,
        """a = Conv(x, w1)  r = Relu(a)
        f3, rm, rv = BatchNormalization<training_mode=1>(w, g, b, m, v)
        f = Reshape(f3, four)  c = Conv(r, f)  y = Conv(c, w2)""",
        "w1:8,3,1,1 w:1,6,72 g:6 b:6 m:6 var:6 v:6 four=6,8,3,3 w2:4,6,1,1",
        "w1 f w2",
    ),
    "norm and direction": (
        FLAT,
        """a = MatMul(x, w1)  n = ReduceL2<axes=[0]>(v)  u = Div(v, n)  f = Mul(u, g)
        b = MatMul(a, f)  y = MatMul(b, w2)""",
        "w1:6,8 v:8,10 g:10 w2:10,4",
        "w1 f w2",
    ),
    "low-rank update": (
        FLAT,
        "p = MatMul(l, r)  f = Add(w1, p)  a = MatMul(x, f)  y = MatMul(a, w2)",
        "w1:6,8 l:6,2 r:2,8 w2:8,4",
        "f w2",
    ),
    "part of a bias set to zero": (
        FLAT,
        "i2 = Unsqueeze(i, one)  f = ScatterND(b, i2, z)  a = Gemm(x, w1, f)  y = MatMul(a, w2)",
        "b:8 i=1,3 one=1 z:2 w1:6,8 w2:8,4",
        "w1 f w2",
    ),
}


def _model(name: str) -> tuple[onnx.ModelProto, str]:
    signature, body, weights, shrinks = FOLDED[name]
    return build(signature, body, weights, opset=17), shrinks


@pytest.mark.parametrize("name", FOLDED)
def test_a_computed_weight_is_folded_and_pruned_exactly(name: str) -> None:
    model, shrinks = _model(name)
    graph = fold_statics(Graph.of(model))
    assert "f" in graph.constants
    onnx.checker.check_model(graph.whole(), full_check=True)
    feeds = runtime.random_feeds(model)
    assert verify.difference(outputs(graph.whole(), feeds), outputs(model, feeds)) < 1e-6
    pruned = prune_half(model, "exact")
    assert pruned.error <= TOLERANCE
    assert pruned.effect > 1e-3
    before, after = shapes(graph.whole()), shapes(pruned.model)
    floats = {n for n in shrinks.split() if np.prod(after[n]) < np.prod(before[n])}
    assert floats == set(shrinks.split())
    assert verify.structure_problems(pruned.model, model) == []


@pytest.mark.parametrize("name", FOLDED)
def test_replaying_folds_alike(name: str) -> None:
    model, _ = _model(name)
    result = prune(model, channels=0.5)
    again = apply(model, Plan.from_json(json.dumps(result.plan.to_json())))
    assert again.SerializeToString() == result.model.SerializeToString()
    assert result.plan.initializers["f"].source == "f"


def test_without_removed_channels_the_model_stays_as_it_is() -> None:
    model, _ = _model("standardized")
    result = prune(model, channels=1.0)
    assert result.model is model
    assert apply(model, result.plan) is model


KEPT = {
    "layout alone": ("f = Transpose(w)  a = MatMul(x, f)", "w:8,6"),
    "a larger result": ("f = MatMul(l, r)  a = MatMul(x, f)", "l:6,1 r:1,8"),
    "a weight with another reader": (
        "n = ReduceL2<axes=[0]>(w)  f = Div(w, n)  e = MatMul(x, w)  c = MatMul(x, f)"
        "  a = Add(e, c)",
        "w:6,8",
    ),
    "random numbers": ("r = RandomNormalLike(w)  f = Add(w, r)  a = MatMul(x, f)", "w:6,8"),
    "integers": ("f = Add(s, s)  e = MatMul(x, w)  a = Reshape(e, f)", "s=-1,4 w:6,8"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_folded(name: str) -> None:
    body, weights = KEPT[name]
    model = build("(float[N,6] x) => (float[N,8] a)", body, weights, opset=17)
    graph = Graph.of(model)
    assert fold_statics(graph) is graph


def test_a_quantized_weight_stays_quantized() -> None:
    model = build(
        FLAT,
        "q = QuantizeLinear(w, s, z)  f = DequantizeLinear(q, s, z)  y = MatMul(x, f)",
        "w:6,4 vars:",
    )
    scale = numpy_helper.from_array(np.float32(0.1), "s")
    model.graph.initializer.extend([scale, helper.make_tensor("z", onnx.TensorProto.INT8, [], [0])])
    graph = Graph.of(model)
    assert fold_statics(graph) is graph


def test_a_constant_that_a_caller_can_replace_is_not_folded() -> None:
    model = build(
        "(float[N,6] x, float[6,8] w) => (float[N,8] a)",
        "n = ReduceL2<axes=[0]>(w)  f = Div(w, n)  a = MatMul(x, f)",
        "w:6,8",
        opset=8,
        ir=3,
    )
    graph = Graph.of(model)
    assert fold_statics(graph) is graph


def test_a_constant_that_is_an_output_is_not_folded() -> None:
    model = build(
        "(float[N,6] x) => (float[N,8] a, float[6,8] f)",
        "n = ReduceL2<axes=[0]>(w)  f = Div(w, n)  a = MatMul(x, f)",
        "w:6,8",
        opset=17,
    )
    graph = Graph.of(model)
    assert fold_statics(graph) is graph


def test_half_precision_stays() -> None:
    model = build(
        "(float16[N,6] x) => (float16[N,4] y)",
        "n = ReduceL2<axes=[0]>(w)  f = Div(w, n)  a = MatMul(x, f)  y = MatMul(a, w2)",
        "w:6,8 w2:8,4",
        opset=17,
    )
    for tensor in model.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    graph = fold_statics(Graph.of(model))
    assert graph.constants["f"].dtype == onnx.TensorProto.FLOAT16
    assert analyse(model).groups[0].exact


def test_a_weight_that_a_branch_reads_is_folded() -> None:
    model = build(
        "(float[N,6] x, bool c) => (float[N,4] y)",
        """n = ReduceL2<axes=[0]>(w)  f = Div(w, n)
        a = If(c) <then_branch = g1 () => (float[N,8] t) { t = MatMul(x, f) },
                   else_branch = g2 () => (float[N,8] e) { e = MatMul(x, w1) }>
        y = MatMul(a, w2)""",
        "w:6,8 w1:6,8 w2:8,4",
        opset=17,
    )
    graph = fold_statics(Graph.of(model))
    assert "f" in graph.constants
    pruned = prune_half(model)
    assert pruned.error <= TOLERANCE
    assert shapes(pruned.model)["f"] == (6, 4)
