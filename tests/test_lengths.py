"""Lengths that the graph computes, and what is read at constant positions."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.pipeline import inspect
from tests.graphs import prune_half, weight
from tests.rows import Row

FLAT = "(float[N,6] x) => (float[N,4] y)"


def flat(name: str, middle: str, weights: str = "", shrinks: str = "w1 w2", **more: str) -> Row:
    """MatMul to 8 channels `a`, `middle` from a to h, MatMul to y."""
    body = f"a = MatMul(x, w1)\n{middle}\ny = MatMul(h, w2)"
    signature = more.pop("signature", FLAT)
    return Row(
        name,
        signature,
        body,
        f"w1:6,8 {weights}" + ("" if "w2:" in weights else " w2:8,4"),
        shrinks,
        **more,
    )


ROWS = [
    flat("mean-by-hand", "d = Shape<start=1>(a)  f = Cast<to=1>(d)  h = Div(a, f)"),
    flat("size-in-arithmetic", "d = Size(r)  f = Cast<to=1>(d)  h = Div(a, f)", "r:8"),
    flat(
        "length-and-batch-in-arithmetic-freezes",
        "d = Shape(a)  m = ReduceProd(d)  f = Cast<to=1>(m)  h = Div(a, f)",
        shrinks="",
    ),
    flat(
        "length-in-an-output-freezes",
        "d = Shape<start=1>(a)  h = Relu(a)",
        shrinks="",
        signature="(float[N,6] x) => (float[N,4] y, int64[1] d)",
    ),
    flat(
        "tile-by-the-batch",
        """n = Shape<end=1>(x)  r = Concat<axis=0>(one, n)  t = Tile(v, r)
        u = Reshape(t, eight)  h = Mul(a, u)""",
        "v:1,8 one=1 eight=-1,8",
        "w1 w2 v",
    ),
    flat(
        "split-of-a-shape",
        """d = Shape(a)  n, m = Split<axis=0>(d, ones)  half = Div(m, two)
        g = Slice(a, zero, half, one)  u = Slice(a, half, m, one)  v = Mul(g, u)
        back = Concat<axis=0>(n, half)  h = Reshape(v, back)""",
        "ones=1,1 two=2 zero=0 one=1 w2:4,4",
    ),
    flat(
        "gather-nd-of-constants",
        """t = Transpose<perm=[1,0]>(a)  i = Reshape(index, column)  g = GatherND(t, i)
        u = ReduceSum(g, zero)  v = Transpose<perm=[1,0]>(u)  h = Mul(a, v)""",
        "index=2,5 column=-1,1 zero=0",
    ),
    flat(
        "gather-nd-of-data",
        """t = Transpose<perm=[1,0]>(a)  g = GatherND(t, i)
        u = ReduceSum(g, zero)  v = Transpose<perm=[1,0]>(u)  h = Mul(a, v)""",
        "zero=0",
        "",
        signature="(float[N,6] x, int64[2,1] i) => (float[N,4] y)",
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_half_of_every_group_equals_the_twin(row: Row) -> None:
    row.check()


def test_what_a_constant_index_names_stays() -> None:
    row = next(r for r in ROWS if r.name == "gather-nd-of-constants")
    model = row.model()
    pruned = prune_half(model)
    before, after = weight(model, "w1").T, weight(pruned.model, "w1").T
    kept = {tuple(channel) for channel in after}
    assert {tuple(before[2]), tuple(before[5])} <= kept


def test_a_length_that_follows_the_batch_says_so() -> None:
    row = next(r for r in ROWS if r.name.startswith("length-and-batch"))
    reasons = {(f.tensor, f.axis): f.reason for f in inspect(row.model()).frozen}
    assert reasons["w1", 1] == "its length is used in arithmetic by Cast f"


def test_the_old_length_is_written_down() -> None:
    row = next(r for r in ROWS if r.name == "mean-by-hand")
    pruned = prune_half(row.model()).model
    cast = next(n for n in pruned.graph.node if n.op_type == "Cast")
    np.testing.assert_array_equal(weight(pruned, cast.input[0]), [8])
    assert all(n.op_type != "Shape" for n in pruned.graph.node)
