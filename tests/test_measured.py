"""Shapes that depend on data are read off two runs, so what is behind them is pruned too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune import verify
from onnxprune.graph import Graph
from onnxprune.measured import peak_bytes
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


def test_a_head_on_pooled_regions_is_pruned() -> None:
    """How many regions there are follows data; channels and bins do not."""
    model = build(
        "(float[1,3,8,8] x, float[5,4] boxes) => (float[M,4] y)",
        """h = Conv(x, w1)  r = Relu(h)  f = ReduceSum<keepdims=0>(boxes, axis)  far = Sub(f, f)
        k = Greater(f, far)  n = NonZero(k)  i = Squeeze(n, nought)  b = Gather(boxes, i)
        s = Shape(i)  where = ConstantOfShape<value = int64[1] {0}>(s)
        p = RoiAlign<output_height=2, output_width=2, mode="avg">(r, b, where)
        m = Shape(p)  c = Gather(m, nought)  t = Concat<axis=0>(c, rest)  q = Reshape(p, t)
        a = MatMul(q, w2)  e = Relu(a)  y = MatMul(e, w3)""",
        "w1:8,3,1,1 w2:32,16 w3:16,4 axis=1 nought=0 rest=-1",
        opset=16,
    )
    found = infer(Graph.of(model))
    assert found.dims("p") == (5, 8, 2, 2)
    assert [found.is_fixed("p", axis) for axis in range(4)] == [False, True, True, True]
    result = prune_half(model)
    assert (shapes(result.model)["w1"][0], shapes(result.model)["w2"]) == (4, (16, 8))
    assert result.error <= TOLERANCE


@pytest.mark.parametrize("limit", [1, 3])
def test_a_limit_on_what_follows_data_fixes_no_length(limit: int) -> None:
    model = build(
        "(float[4,6] x) => (float[M,6] y)",
        """r = ReduceSum<keepdims=0>(x, axis)  far = Sub(r, r)  k = Greater(r, far)
        n = NonZero(k)  i = Squeeze(n, nought)  top = Slice(i, nought, most)
        g = Gather<axis=0>(x, top)  s = Shape(g)  y = Reshape(g, s)""",
        f"axis=1 nought=0 most={limit}",
    )
    found = infer(Graph.of(model))
    assert [found.is_fixed(name, 0) for name in ("top", "g", "y")] == [False] * 3
    assert not found.is_fixed_value("s")
    assert found.is_fixed("r", 0)


def test_lengths_of_unique_and_compressed_elements_are_counts() -> None:
    model = build(
        "(float[4,6] x, bool[4] c) => (float[?] y, float[?,6] z)",
        "y, a, b, d = Unique(x)  z = Compress<axis=0>(x, c)  e = Unique<axis=1>(x)",
    )
    found = infer(Graph.of(model))
    assert [found.dims(n) for n in "yabdze"] == [
        (24,), (24,), (24,), (24,), (4, 6), (4, 6)
    ]  # fmt: skip
    assert [found.is_fixed("z", axis) for axis in range(2)] == [False, True]


def test_a_length_that_is_a_value_is_measured() -> None:
    model = build(
        "(float[N,6] x) => (float[M,4] y)",
        """m = ReduceMax<keepdims=0>(x)  k = Ceil(m)  e = Cast<to=7>(k)  end = Unsqueeze(e, nought)
        g = Slice(x, nought, end, nought)  s = Shape(g)  f = Reshape(g, s)
        a = MatMul(f, w1)  b = Relu(a)  y = MatMul(b, w2)""",
        "w1:6,16 w2:16,4 nought=0",
    )
    found = infer(Graph.of(model))
    assert found.doubted >= {"g", "s", "f", "a"}
    assert not any(found.is_fixed("a", axis) for axis in range(2))
    result = prune_half(model)
    assert shapes(result.model)["w2"] == (8, 4)
    assert result.error <= TOLERANCE


def test_a_model_that_would_take_too_much_memory_is_not_run_for_its_shapes() -> None:
    model = build(
        "(float[N,6] x) => (float[M,6] y)",
        """m = ReduceMax<keepdims=0>(x)  k = Ceil(m)  e = Cast<to=7>(k)  end = Unsqueeze(e, nought)
        wide = Expand(m, huge)  narrow = ReduceMax<keepdims=0>(wide)  z = Add(x, narrow)
        y = Slice(z, nought, end, nought)""",
        "nought=0 huge=1000,1000,600",
    )
    found = infer(Graph.of(model))
    assert found.dims("wide") == (1000, 1000, 600)
    assert found.dims("y") is None


def test_the_peak_counts_what_lives_at_a_time() -> None:
    model = build("(float[4,6] x) => (float[4,6] y)", "a = Relu(x)  b = Relu(a)  y = Add(b, b)")
    found = infer(Graph.of(model))
    assert peak_bytes(Graph.of(model), found.first.dims, found.types) == 2 * 4 * 6 * 4
