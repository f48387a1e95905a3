"""Shapes that depend on data are read off two runs, so what is behind them is pruned too."""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune import verify
from onnxprune.graph import Graph
from onnxprune.pipeline import inspect
from onnxprune.shapes import infer
from tests.graphs import TOLERANCE, build, prune_half, shapes

#: An expert's hidden layer sees only the rows that the router sends to it.
EXPERT = build(
    "(float[N,6] x) => (float[N,6] y)",
    """r = MatMul(x, route)  zero = Sub(r, r)  k = Greater(r, zero)
    f = Squeeze(k, one)  n = NonZero(f)
    i = Squeeze(n, nought)  j = Transpose(n)  g = Gather<axis=0>(x, i)
    shape = Shape(g)  flat = Reshape(g, shape)
    a = MatMul(flat, w1)  b = Relu(a)  c = MatMul(b, w2)
    y = ScatterND(x, j, c)""",
    "route:6,1 one=1 nought=0 w1:6,16 w2:16,6",
)


def test_an_expert_behind_a_router_is_pruned() -> None:
    result = prune_half(EXPERT, seed=3)
    after = shapes(result.model)
    assert (after["w1"], after["w2"]) == ((6, 8), (8, 6))
    assert result.error <= TOLERANCE
    assert result.effect > 1e-3
    assert not verify.structure_problems(result.model, EXPERT)


def test_lengths_that_follow_data_are_not_fixed() -> None:
    found = infer(Graph.of(EXPERT))
    assert found.dims("g") is not None
    assert not found.is_fixed("g", 0)
    assert not found.is_fixed_value("shape")


def test_a_length_that_a_limit_makes_the_same_is_not_fixed() -> None:
    """At most two rows are taken: as many in every run on many rows, fewer on few."""
    model = build(
        "(float[N,6] x) => (float[M,4] y)",
        """r = ReduceSum<keepdims=0>(x, axis)  far = Sub(r, r)  k = Greater(r, far)
        n = NonZero(k)  i = Squeeze(n, nought)  top = Slice(i, nought, two)
        g = Gather<axis=0>(x, top)  a = MatMul(g, w1)  s = Shape(a)  c = Gather(s, nought)
        t = Concat<axis=0>(c, halves)  b = Reshape(a, t)  d = Transpose<perm=[0,2,1]>(b)
        e = Reshape(d, s)  y = MatMul(e, w2)""",
        "w1:6,8 w2:8,4 axis=1 nought=0 two=2 halves=2,4",
    )
    result = prune_half(model)
    assert shapes(result.model)["w1"] == (6, 4)
    assert result.error <= TOLERANCE
    for rows in (1, 2, 9):
        feeds = {"x": np.abs(np.random.default_rng(rows).normal(size=(rows, 6))).astype(np.float32)}
        coupling, keep = result.analysis.coupling, result.keep
        assert verify.twin_error(coupling, keep, result.model, [feeds]) <= TOLERANCE


def test_a_model_that_does_not_run_keeps_its_shapes_unknown() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(EXPERT)
    next(n for n in model.graph.node if n.output[0] == "i").op_type = "NoSuchOperator"
    assert infer(Graph.of(model)).dims("a") is None
    assert {row.reason for row in inspect(model).frozen} >= {"a shape around MatMul a is unknown"}


def test_counting_by_non_zero_is_folded() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """ones = ConstantOfShape<value = int64[1] {1}>(eight)  n = NonZero(ones)
        i = Squeeze(n, nought)  a = MatMul(x, w1)  b = Gather<axis=1>(a, i)  y = MatMul(b, w2)""",
        "eight=8 nought=0 w1:6,8 w2:8,4",
    )
    found = infer(Graph.of(model))
    np.testing.assert_array_equal(found.value("n"), [np.arange(8)])
    assert shapes(prune_half(model).model)["w2"] == (4, 4)


def test_a_length_of_batch_and_channels_together_is_computed() -> None:
    """Unfolding into patches puts batch, channels and rows into one axis (MobileViT)."""
    model = build(
        "(float[N,3,4,4] x) => (float[N,4,4,4] y)",
        """a = Conv(x, w1)  s = Shape(a)  n = Gather(s, nought)  c = Gather(s, one)
        m = Mul(n, c)  r = Mul(m, two)  t = Concat<axis=0>(r, patch)  p = Reshape(a, t)
        q = Transpose<perm=[0,2,1,3]>(p)  u = Transpose<perm=[0,2,1,3]>(q)
        h = Reshape(u, s)  y = Conv(h, w2)""",
        "w1:8,3,1,1 w2:4,8,1,1 nought=0 one=1 two=2 patch=2,2,2",
    )
    result = prune_half(model)
    assert shapes(result.model)["w1"][0] == 4
    assert result.error <= TOLERANCE
