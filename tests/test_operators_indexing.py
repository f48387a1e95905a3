"""Operators that look up, write, pad, repeat and regroup, one small graph each."""

from __future__ import annotations

import pytest

from tests.rows import DENSE, Row, case, check_row, flat, image

LOOKUP = [
    Row(
        "gather-elements-index-computed",
        "(float[N,5,6] x, int64[N,3,1] i) => (float[N,3,4] y)",
        """a = MatMul(x, w1)  j = Expand(i, to)  h = GatherElements<axis=1>(a, j)
        y = MatMul(h, w2)""",
        "w1:6,8 w2:8,4 to=1,3,8",
        "w1 w2",
    ),
    Row(
        "gather-elements-own-axis-freezes",
        "(float[N,6] x, int64[N,8] i) => (float[N,4] y)",
        "a = MatMul(x, w1)  h = GatherElements<axis=1>(a, i)  y = MatMul(h, w2)",
        DENSE,
        "",
    ),
    Row(
        "gather-elements-part-freezes",
        "(float[N,5,6] x, int64[N,3,7] i) => (float[N,3,4] y)",
        "a = MatMul(x, w1)  h = GatherElements<axis=1>(a, i)  y = MatMul(h, w2)",
        "w1:6,8 w2:7,4",
        "",
    ),
    Row(
        "scatter-elements",
        "(float[N,5,6] x, int64[N,2,1] i) => (float[N,5,4] y)",
        """a = MatMul(x, w1)  u = Slice(a, zero, two, one)  j = Expand(i, to)
        h = ScatterElements<axis=1>(a, j, u)  y = MatMul(h, w2)""",
        f"{DENSE} zero=0 one=1 two=2 to=1,2,8",
        "w1 w2",
    ),
    Row(
        "scatter-elements-own-axis-freezes",
        "(float[N,6] x, int64[N,2] i) => (float[N,4] y)",
        """a = MatMul(x, w1)  u = MatMul(x, w3)  h = ScatterElements<axis=1>(a, i, u)
        y = MatMul(h, w2)""",
        f"{DENSE} w3:6,2",
        "",
    ),
    Row(
        "gather-nd",
        "(float[7,5,6] x, int64[N,2] i) => (float[N,4] y)",
        "a = MatMul(x, w1)  h = GatherND(a, i)  y = MatMul(h, w2)",
        DENSE,
        "w1 w2",
    ),
    Row(
        "gather-nd-batch",
        "(float[N,5,6] x, int64[N,3,1] i) => (float[N,3,4] y)",
        "a = MatMul(x, w1)  h = GatherND<batch_dims=1>(a, i)  y = MatMul(h, w2)",
        DENSE,
        "w1 w2",
    ),
    Row(
        "gather-nd-channels-freezes",
        "(float[6,5] x, int64[N,1] i) => (float[N,5] y)",
        "a = MatMul(w1, x)  y = GatherND(a, i)",
        "w1:8,6",
        "",
    ),
    Row(
        "scatter-nd",
        "(float[7,6] x, int64[3,1] i, float[3,6] z) => (float[7,4] y)",
        "a = MatMul(x, w1)  u = MatMul(z, w3)  h = ScatterND(a, i, u)  y = MatMul(h, w2)",
        f"{DENSE} w3:6,8",
        "w1 w3 w2",
    ),
    image("compress-space", "h = Compress<axis=2>(a, c)", "c?1,0,1,1,0,1"),
    image("compress-channels", "h = Compress<axis=1>(a, c)", "c?1,0,1,1,0,1,1,0 w2:4,5,1,1"),
    image("compress-part-freezes", "h = Compress<axis=1>(a, c)", "c?1,0,1 w2:4,2,1,1", shrinks=""),
    Row(
        "tensor-scatter",
        "(float[N,5,6] x, float[N,2,6] z, int64[N] i) => (float[N,5,4] y)",
        """a = MatMul(x, w1)  u = MatMul(z, w3)  h = TensorScatter<axis=1>(a, u, i)
        y = MatMul(h, w2)""",
        f"{DENSE} w3:6,8",
        "w1 w3 w2",
        opset=24,
    ),
    image("center-crop-pad", "h = CenterCropPad<axes=[2,3]>(a, to)", "to=4,8"),
    image(
        "center-crop-pad-channels-freezes",
        "h = CenterCropPad<axes=[1,2]>(a, to)",
        "to=8,4",
        shrinks="",
    ),
    Row(
        "trilu",
        "(float[N,3,6] x) => (float[N,3,3] y)",
        """a = MatMul(x, w1)  t = Transpose<perm=[2,0,1]>(a)  u = Unsqueeze(t, three)
        m = Mul(u, square)  r = Trilu(m)  s = ReduceSum<keepdims=0>(r, two)
        h = Transpose<perm=[1,2,0]>(s)  y = MatMul(h, w2)""",
        "w1:6,8 w2:8,3 three=3 two=2 square:3,3",
        "w1 w2",
    ),
    flat(
        "non-zero-freezes",
        "i = NonZero(a)  s = Shape<start=1>(i)  f = Cast<to=1>(s)  h = Add(a, f)",
        shrinks="",
    ),
]

SHAPES = [
    image("pad-crop-channels", "h = Pad(a, pads)", "pads=0,-2,0,0,0,-1,0,0 w2:4,5,1,1"),
    image("pad-crop-and-add", "h = Pad(a, pads, v)", "pads=0,-2,0,0,0,3,0,0 v: w2:4,9,1,1"),
    image("pad-value", "h = Pad(a, pads, v)", "pads=0,1,0,0,0,2,0,0 v: w2:4,11,1,1"),
    image("pad-axes", "h = Pad(a, pads, , axes)", "pads=-3,0 axes=1 w2:4,5,1,1"),
    image(
        "pad-edge-channels-freezes",
        'h = Pad<mode="edge">(a, pads)',
        "pads=0,1,0,0,0,0,0,0 w2:4,9,1,1",
        shrinks="",
    ),
    image("pad-edge-space", 'h = Pad<mode="edge">(a, pads, , axes)', "pads=1,-1,0,2 axes=3,2"),
    image("pad-attribute", "h = Pad<pads=[0,-2,0,0,0,1,0,0]>(a)", "w2:4,7,1,1", opset=10),
    flat("tile-of-one", "t = Tile(c, repeats)  h = Add(a, t)", "c:1,1 repeats=1,8"),
    flat("expand-mask", "e = Expand(c, to)  z = Greater(a, e)  h = Where(z, a, c)", "c:1,1 to=1,8"),
    flat("cast-like", "b = CastLike(c, a)  h = Add(a, b)", "c:8", shrinks="w1 c w2"),
    flat("dropout-with-mask", "d, k = Dropout(a)  f = Cast<to=1>(k)  h = Mul(d, f)"),
    flat(
        "dropout-in-training-freezes",
        "t = Constant<value = bool {1}>()  h = Dropout(a, r, t)",
        "r:",
        shrinks="",
    ),
    flat("bit-cast", "i = BitCast<to=6>(a)  h = BitCast<to=1>(i)", opset=26),
    flat(
        "roll",
        """p = Slice(a, three, eight, one)  q = Slice(a, zero, three, one)
        h = Concat<axis=1>(p, q)""",
        "zero=0 one=1 three=3 eight=8",
    ),
    flat(
        "glu-by-slices",
        """p = Slice(a, zero, four, one)  q = Slice(a, four, eight, one)
        s = Sigmoid(q)  h = Mul(p, s)""",
        "zero=0 one=1 four=4 eight=8 w2:4,4",
    ),
    flat(
        "cast-inside-a-shuffle",
        """g = Reshape(a, split)  e = Cast<to=11>(g)
        t = Transpose<perm=[0,2,1]>(e)  m = Reshape(t, merge)  h = Cast<to=1>(m)""",
        "split=0,2,4 merge=0,8",
    ),
    flat(
        "relu-inside-a-shuffle",
        """g = Reshape(a, split)  e = Relu(g)
        t = Transpose<perm=[0,2,1]>(e)  h = Reshape(t, merge)""",
        "split=0,2,4 merge=0,8",
    ),
    flat(
        "relu-inside-a-split",
        "g = Reshape(a, split)  e = Relu(g)  h = Reshape(e, merge)",
        "split=0,2,4 merge=0,8",
    ),
    flat(
        "split-axis-read-twice",
        """g = Reshape(a, split)  t = Transpose<perm=[0,2,1]>(g)
        u = Mul(t, s)  v = Mul(g, z)  w = Transpose<perm=[0,2,1]>(u)  q = Add(v, w)
        h = Reshape(q, merge)""",
        "split=0,4,2 merge=0,8 s:2,1 z:4,1",
        shrinks="w1 z w2",
    ),
    image(
        "windows",
        """p = Pad(a, pads)  r = Reshape(p, six)  t = Transpose<perm=[0,2,4,3,5,1]>(r)
        k = Reshape(t, rows)  m = MatMul(k, w3)  b = Reshape(m, back)
        u = Transpose<perm=[0,5,1,3,2,4]>(b)  h = Reshape(u, whole)""",
        "pads=0,0,0,0,0,0,2,2 six=-1,8,2,4,2,4 rows=-1,16,8 w3:8,6 back=-1,2,2,4,4,6 "
        "whole=-1,6,8,8 w2:4,6,1,1",
        shrinks="w1 b1 w3 w2",
    ),
]

ROWS = [*LOOKUP, *SHAPES]


@pytest.mark.parametrize("row", [case(row) for row in ROWS])
def test_half_of_every_group_equals_the_twin(row: Row) -> None:
    check_row(row)
