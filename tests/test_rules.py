"""Every operator rule: half of every group around it is removed, as in the masked twin."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper, numpy_helper

from onnxprune import verify
from onnxprune.pipeline import inspect
from tests.graphs import TOLERANCE, build, prune_half, shapes, weight
from tests.rows import CONVS, DENSE, FLAT, Row, case, check_row, flat, image, sequence

CONTRACTIONS = [
    Row(
        "conv-1d",
        "(float[N,3,9] x) => (float[N,4,?] y)",
        "a = Conv(x, w1, b1)  h = Relu(a)  y = Conv(h, w2)",
        "w1:8,3,3 b1:8 w2:4,8,1",
        "w1 b1 w2",
    ),
    image("conv-2d", "h = Relu(a)"),
    Row(
        "conv-3d",
        "(float[N,2,4,4,4] x) => (float[N,4,?,?,?] y)",
        "a = Conv(x, w1)  h = Relu(a)  y = Conv(h, w2)",
        "w1:6,2,3,3,3 w2:4,6,1,1,1",
        "w1 w2",
    ),
    image(
        "conv-grouped", "h = Conv<group=2>(a, wg, bg)", "wg:8,4,1,1 bg:8", shrinks="w1 b1 wg bg w2"
    ),
    image(
        "conv-depthwise",
        "h = Conv<group=8>(a, wg, bg)",
        "wg:8,1,1,1 bg:8",
        shrinks="w1 b1 wg bg w2",
    ),
    image(
        "conv-depthwise-multiplier",
        "h = Conv<group=8>(a, wg)",
        "wg:16,1,1,1 w2:4,16,1,1",
        shrinks="w1 b1 wg w2",
    ),
    image(
        "conv-transpose",
        "h = ConvTranspose<strides=[2,2]>(a, wt, bt)",
        "wt:8,6,2,2 bt:6 w2:4,6,1,1",
        shrinks="w1 b1 wt bt w2",
    ),
    image(
        "conv-transpose-grouped",
        "h = ConvTranspose<group=2>(a, wt, bt)",
        "wt:8,4,2,2 bt:8",
        shrinks="w1 b1 wt bt w2",
    ),
    image(
        "conv-transpose-depthwise",
        "h = ConvTranspose<group=8>(a, wt)",
        "wt:8,1,2,2",
        shrinks="w1 b1 wt w2",
    ),
    Row(
        "gemm",
        FLAT,
        "a = Gemm(x, w1, b1)  h = Relu(a)  y = Gemm(h, w2, b2)",
        f"{DENSE} b1:8 b2:4",
        "w1 b1 w2",
    ),
    Row(
        "gemm-trans-b",
        FLAT,
        "a = Gemm<transB=1>(x, w1, b1)  h = Relu(a)  y = Gemm<transB=1>(h, w2)",
        "w1:8,6 b1:8 w2:4,8",
        "w1 b1 w2",
    ),
    Row(
        "gemm-trans-a",
        "(float[6,5] x) => (float[5,4] y)",
        "a = Gemm<transA=1>(x, w1, b1)  h = Tanh(a)  y = Gemm(h, w2)",
        f"{DENSE} b1:8",
        "w1 b1 w2",
    ),
    Row(
        "gemm-bias-row",
        FLAT,
        "a = Gemm(x, w1, b1)  h = Relu(a)  y = Gemm(h, w2)",
        f"{DENSE} b1:1,8",
        "w1 b1 w2",
    ),
    Row(
        "gemm-bias-scalar",
        FLAT,
        "a = Gemm(x, w1, b1)  h = Relu(a)  y = Gemm(h, w2)",
        f"{DENSE} b1:1",
        "w1 w2",
    ),
    Row(
        "gemm-bias-matrix",
        "(float[5,6] x) => (float[5,4] y)",
        "a = Gemm(x, w1, b1)  h = Relu(a)  y = Gemm(h, w2)",
        f"{DENSE} b1:5,8",
        "w1 b1 w2",
    ),
    Row(
        "gemm-alpha-beta",
        FLAT,
        "a = Gemm<alpha=0.5, beta=2.0>(x, w1, b1)  h = Relu(a)  y = Gemm<alpha=3.0>(h, w2)",
        f"{DENSE} b1:8",
        "w1 b1 w2",
    ),
    flat("matmul", "h = Relu(a)"),
    Row(
        "matmul-weight-left",
        "(float[6,5] x) => (float[4,5] y)",
        "a = MatMul(w1, x)  h = Relu(a)  y = MatMul(w2, h)",
        "w1:8,6 w2:4,8",
        "w1 w2",
    ),
    sequence(
        "matmul-sequence",
        "a = MatMul(x, w1)  h = Gelu(a)  y = MatMul(h, w2)",
        "w1:8,12 w2:12,8",
        "w1 w2",
        opset=20,
    ),
    sequence(
        "einsum-dense",
        """a = Einsum<equation="nsi,io->nso">(x, w1)  h = Relu(a)
        y = Einsum<equation="...o,op->...p">(h, w2)""",
        "w1:8,12 w2:12,8",
        "w1 w2",
    ),
]

NORMALIZATIONS = [
    image(
        "batch-norm",
        "n = BatchNormalization(a, s, b, m, var)  h = Relu(n)",
        "s:8 b:8 m:8 var:8",
        shrinks="w1 b1 s b m var w2",
    ),
    image("instance-norm", "h = InstanceNormalization(a, s, b)", "s:8 b:8", shrinks="w1 b1 s b w2"),
    image(
        "group-norm",
        "h = GroupNormalization<num_groups=4>(a, s, b)",
        "s:8 b:8",
        shrinks="w1 b1 s b w2",
        opset=21,
    ),
    image(
        "group-norm-layer",
        "h = GroupNormalization<num_groups=1>(a, s, b)",
        "s:8 b:8",
        shrinks="w1 b1 s b w2",
        exact="",
        opset=21,
    ),
    Row(
        "group-norm-by-reshape",
        "(float[N,3,8,8] x) => (float[N,4,6,6] y)",
        """a = Conv(x, w1, b1)  g = Reshape(a, to_groups)  i = InstanceNormalization(g, one, zero)
        dims = Shape(a)  n = Reshape(i, dims)  m = Mul(n, s)  h = Add(m, b)  y = Conv(h, w2)""",
        f"{CONVS} to_groups=0,4,-1 one:4 zero:4 s:8,1,1 b:8,1,1",
        "w1 b1 one zero s b w2",
    ),
    flat("layer-norm", "h = LayerNormalization(a, s, b)", "s:8 b:8", shrinks="w1 s b w2", exact=""),
    flat("rms-norm", "h = RMSNormalization(a, s)", "s:8", shrinks="w1 s w2", exact="", opset=23),
    flat(
        "layer-norm-by-parts",
        """m = ReduceMean<axes=[-1]>(a)  d = Sub(a, m)  q = Mul(d, d)
        v = ReduceMean<axes=[-1]>(q)  r = Sqrt(v)  n = Div(d, r)  h = Mul(n, s)""",
        "s:8",
        shrinks="w1 s w2",
        exact="",
        opset=17,
    ),
    flat("lp-normalization", "h = LpNormalization<axis=-1>(a)"),
    flat("softmax", "h = Softmax(a)", exact=""),
    flat("log-softmax-old", "h = LogSoftmax<axis=1>(a)", exact="", opset=11),
    image("softmax-over-space", "h = Softmax<axis=3>(a)"),
    image("lrn", "h = LRN<size=3>(a)", exact=""),
]

ELEMENTWISE = [
    flat("add-row", "h = Add(a, c)", "c:8", shrinks="w1 c w2"),
    flat("mul-matrix-row", "h = Mul(c, a)", "c:1,8", shrinks="w1 c w2"),
    flat("scalar", "h = Mul(a, c)", "c:1"),
    image(
        "scale-per-channel",
        "m = Mul(a, s)  h = Add(m, t)",
        "s:8,1,1 t:1,8,1,1",
        shrinks="w1 b1 s t w2",
    ),
    image("prelu", "h = PRelu(a, s)", "s:8,1,1", shrinks="w1 b1 s w2"),
    image("residual", "c = Conv(x, w3)  h = Add(a, c)", "w3:8,3,3,3", shrinks="w1 b1 w3 w2"),
    image(
        "residual-with-input-width",
        "c = Conv(x, w3)  e = Conv(c, w4)  h = Sum(a, c, e)",
        "w3:8,3,3,3 w4:8,8,1,1",
        shrinks="w1 b1 w3 w4 w2",
    ),
    image(
        "squeeze-excite",
        """p = GlobalAveragePool(a)  q = Conv(p, w3)  r = Relu(q)  t = Conv(r, w4)
        u = Sigmoid(t)  h = Mul(a, u)""",
        "w3:4,8,1,1 w4:8,4,1,1",
        shrinks="w1 b1 w3 w4 w2",
    ),
    flat("gated", "c = MatMul(x, w3)  u = Sigmoid(c)  h = Mul(a, u)", "w3:6,8", shrinks="w1 w3 w2"),
    flat("where", "z = Greater(a, c)  h = Where(z, a, c)", "c:8", shrinks="w1 c w2"),
    flat("max-of-two", "c = MatMul(x, w3)  h = Max(a, c)", "w3:6,8", shrinks="w1 w3 w2"),
    flat("carriers", "d, k = Dropout(a)  i = Identity(d)  e = Cast<to=11>(i)  h = Cast<to=1>(e)"),
    flat(
        "activations",
        """a1 = Sigmoid(a)  a2 = Tanh(a1)  a3 = LeakyRelu(a2)  a4 = Clip(a3)  a5 = Erf(a4)
        a6 = HardSwish(a5)  a7 = Elu(a6)  h = Softplus(a7)""",
    ),
    flat("not-aligned-with-input", "h = Add(a, z)", "z:8", shrinks="w1 z w2"),
    Row(
        "added-to-input",
        "(float[N,8] x) => (float[N,8] y)",
        "a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  y = Add(c, x)",
        "w1:8,12 w2:12,8",
        "w1 w2",
    ),
]

SPATIAL = [
    image("max-pool", "h = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)"),
    image("average-pool", "h = AveragePool<kernel_shape=[2,2]>(a)"),
    image("lp-pool", "h = LpPool<kernel_shape=[2,2]>(a)"),
    image("global-pools", "p = GlobalMaxPool(a)  q = GlobalAveragePool(a)  h = Add(p, q)"),
    image(
        "resize-scales",
        "scales = Constant<value_floats=[1.0, 1.0, 2.0, 2.0]>()  h = Resize(a, , scales)",
    ),
    image("resize-sizes", "h = Resize(a, , , sizes)", "sizes=2,8,12,12"),
    image(
        "resize-computed",
        """d = Shape(a)  nc = Slice(d, zero, two)  s = Concat<axis=0>(nc, hw)
        h = Resize(a, , , s)""",
        "zero=0 two=2 hw=12,12",
    ),
    image("depth-to-space", "h = DepthToSpace<blocksize=2>(a)", "w2:4,2,1,1"),
    image("depth-to-space-crd", 'h = DepthToSpace<blocksize=2, mode="CRD">(a)', "w2:4,2,1,1"),
    image("space-to-depth", "h = SpaceToDepth<blocksize=2>(a)", "w2:4,32,1,1"),
    Row(
        "grid-sample",
        "(float[N,3,8,8] x, float[N,5,5,2] grid) => (float[N,4,5,5] y)",
        "a = Conv(x, w1, b1)  h = GridSample(a, grid)  y = Conv(h, w2)",
        CONVS,
        "w1 b1 w2",
    ),
]

REDUCTIONS = [
    image("mean-over-space", "m = ReduceMean(a, axes)  h = Add(a, m)", "axes=2,3"),
    image(
        "mean-over-space-squeezed",
        "m = ReduceMean<keepdims=0>(a, axes)  h = Unsqueeze(m, axes)",
        "axes=2,3",
    ),
    image("mean-over-channels", "m = ReduceMean(a, axes)  h = Mul(a, m)", "axes=1", exact=""),
    image("max-over-channels", "m = ReduceMax(a, axes)  h = Mul(a, m)", "axes=1", exact=""),
    image("sum-over-channels", "m = ReduceSum(a, axes)  h = Mul(a, m)", "axes=1"),
    image("l2-over-channels", "m = ReduceL2(a, axes)  h = Div(a, m)", "axes=-3"),
    image("mean-old-attribute", "m = ReduceMean<axes=[2,3]>(a)  h = Mul(a, m)", opset=13),
    flat("arg-max-freezes", "i = ArgMax<axis=1>(a)  f = Cast<to=1>(i)  h = Mul(a, f)", shrinks=""),
    flat("cumsum", "h = CumSum(a, one)", "one=1"),
    flat("top-k-freezes", "h, i = TopK(a, k)", "k=8", shrinks=""),
]

INDEXING = [
    image(
        "concat",
        "c = Conv(x, w3)  h = Concat<axis=1>(a, c)",
        "w3:6,3,3,3 w2:4,14,1,1",
        shrinks="w1 b1 w3 w2",
    ),
    image("concat-twice-itself", "h = Concat<axis=-3>(a, a)", "w2:4,16,1,1"),
    image(
        "concat-with-input",
        "p = Pad(a, pads)  h = Concat<axis=1>(x, p)",
        "pads=0,0,1,1,0,0,1,1 w2:4,11,1,1",
    ),
    image("split-even", "p, q = Split<axis=1, num_outputs=2>(a)  h = Add(p, q)", "w2:4,4,1,1"),
    image("split-uneven", "p, q = Split<axis=1>(a, parts)  h = Concat<axis=1>(q, p)", "parts=3,5"),
    image(
        "split-attribute",
        "p, q = Split<axis=1, split=[2,6]>(a)  h = Concat<axis=1>(q, p)",
        opset=11,
    ),
    image("split-default", "p, q = Split<axis=1>(a)  h = Mul(p, q)", "w2:4,4,1,1", opset=13),
    image(
        "slice",
        "p = Slice(a, start, end, axis)  q = Slice(a, end, stop, axis)  h = Concat<axis=1>(q, p)",
        "start=0 end=3 stop=8 axis=1",
    ),
    image("slice-part", "h = Slice(a, start, end, axis)", "start=2 end=-1 axis=1 w2:4,5,1,1"),
    image(
        "slice-strided",
        "h = Slice(a, start, end, axis, step)",
        "start=1 end=8 axis=1 step=2 w2:4,4,1,1",
    ),
    image(
        "slice-reversed",
        "h = Slice(a, start, end, axis, step)",
        "start=-1 end=-9223372036854775807 axis=1 step=-1",
    ),
    image("slice-attribute", "h = Slice<axes=[1], starts=[2], ends=[8]>(a)", "w2:4,6,1,1", opset=9),
    image("slice-space", "h = Slice(a, start, end, axes)", "start=1,1 end=5,5 axes=2,3"),
    image("gather-permuted", "h = Gather<axis=1>(a, index)", "index=7,1,5,0,3,2,6,4"),
    image("gather-part", "h = Gather<axis=1>(a, index)", "index=7,1,5 w2:4,3,1,1"),
    image("gather-negative", "h = Gather<axis=1>(a, index)", "index=-1,-3,0 w2:4,3,1,1"),
    image(
        "gather-repeated",
        "h = Gather<axis=1>(a, index)",
        "index=0,1,2,3,4,5,6,7,7 w2:4,9,1,1",
    ),
    image("tile", "h = Tile(a, repeats)", "repeats=1,2,1,1 w2:4,16,1,1"),
    image("pad-space", "h = Pad(a, pads)", "pads=0,0,1,1,0,0,1,1"),
    image("pad-channels", "h = Pad(a, pads)", "pads=0,1,0,0,0,2,0,0 w2:4,11,1,1"),
    image("pad-reflect", 'h = Pad<mode="reflect">(a, pads)', "pads=0,0,1,1,0,0,1,1"),
    Row(
        "embedding",
        "(int64[N,S] x) => (float[N,S,4] y)",
        "a = Gather(table, x)  h = Relu(a)  y = MatMul(h, w2)",
        "table:10,8 w2:8,4",
        "table w2",
    ),
    Row(
        "embedding-tied",
        "(int64[N,S] x) => (float[N,S,10] y)",
        """a = Gather(table, x)  b = MatMul(a, w1)  h = Tanh(b)
        t = Transpose<perm=[1,0]>(table)  y = MatMul(h, t)""",
        "table:10,8 w1:8,8",
        "table w1",
    ),
]

SHAPING = [
    Row(
        "flatten",
        "(float[N,3,4,4] x) => (float[N,4] y)",
        "a = Conv(x, w1, b1)  f = Flatten(a)  y = MatMul(f, w2)",
        "w1:8,3,3,3 b1:8 w2:32,4",
        "w1 b1 w2",
    ),
    Row(
        "reshape-flatten",
        "(float[N,3,4,4] x) => (float[N,4] y)",
        "a = Conv(x, w1, b1)  f = Reshape(a, to)  y = MatMul(f, w2)",
        "w1:8,3,3,3 b1:8 to=0,32 w2:32,4",
        "w1 b1 w2",
    ),
    Row(
        "reshape-minus-one",
        "(float[N,3,4,4] x) => (float[N,4] y)",
        "a = Conv(x, w1, b1)  f = Reshape(a, to)  y = MatMul(f, w2)",
        "w1:8,3,3,3 b1:8 to=-1,32 w2:32,4",
        "w1 b1 w2",
    ),
    Row(
        "flatten-after-transpose",
        "(float[N,3,4,4] x) => (float[N,4] y)",
        "a = Conv(x, w1, b1)  t = Transpose<perm=[0,2,3,1]>(a)  f = Flatten(t)  y = MatMul(f, w2)",
        "w1:8,3,3,3 b1:8 w2:32,4",
        "w1 b1 w2",
    ),
    Row(
        "reshape-by-shape-chain",
        "(float[N,3,4,4] x) => (float[N,4] y)",
        """a = Conv(x, w1, b1)  d = Shape(a)  n = Gather(d, zero)  s = Concat<axis=0>(n, rest)
        f = Reshape(a, s)  y = MatMul(f, w2)""",
        "w1:8,3,3,3 b1:8 zero=0 rest=-1 w2:32,4",
        "w1 b1 w2",
    ),
    Row(
        "reshape-by-channels-of-shape",
        "(float[N,3,4,4] x) => (float[N,4,4] y)",
        """a = Conv(x, w1, b1)  d = Shape(a)  nc = Slice(d, zero, two)
        s = Concat<axis=0>(nc, rest)  f = Reshape(a, s)  t = Transpose<perm=[0,2,1]>(f)
        y = MatMul(t, w2)""",
        "w1:8,3,3,3 b1:8 zero=0 two=2 rest=-1 w2:8,4",
        "w1 b1 w2",
    ),
    Row(
        "tokens",
        "(float[N,3,8,8] x) => (float[N,16,4] y)",
        """a = Conv<strides=[2,2]>(x, w1, b1)  f = Reshape(a, to)
        t = Transpose<perm=[0,2,1]>(f)  y = MatMul(t, w2)""",
        "w1:8,3,2,2 b1:8 to=0,8,16 w2:8,4",
        "w1 b1 w2",
    ),
    flat("squeeze-unsqueeze", "u = Unsqueeze(a, two)  r = Relu(u)  h = Squeeze(r, two)", "two=2"),
    flat("transpose-twice", "t = Transpose(a)  r = Relu(t)  h = Transpose<perm=[1,0]>(r)"),
    flat(
        "expand-rows", "d = Shape(a)  e = Expand(c, d)  h = Add(a, e)", "c:1,8", shrinks="w1 c w2"
    ),
    flat("expand-fixed", "e = Expand(c, to)  h = Add(a, e)", "c:1,1 to=1,8"),
    flat(
        "constant-of-shape",
        "d = Shape(a)  e = ConstantOfShape<value: tensor = float[1] {2.0}>(d)  h = Mul(a, e)",
    ),
    image(
        "channel-shuffle",
        "g = Reshape(a, five)  t = Transpose<perm=[0,2,1,3,4]>(g)  h = Reshape(t, four)",
        "five=0,2,4,6,6 four=0,8,6,6",
    ),
    image(
        "channel-shuffle-grouped",
        """c = Conv<group=2>(a, wg)  g = Reshape(c, five)  t = Transpose<perm=[0,2,1,3,4]>(g)
        s = Reshape(t, four)  h = Conv<group=8>(s, wd)""",
        "wg:8,4,1,1 wd:8,1,1,1 five=0,2,4,6,6 four=0,8,6,6",
        shrinks="w1 b1 wg wd w2",
    ),
    flat(
        "length-in-arithmetic-keeps-its-value",
        "d = Shape<start=1>(a)  f = Cast<to=1>(d)  q = Sqrt(f)  h = Div(a, q)",
    ),
]

QKV = "q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)"
HEADS = "q1 = Reshape(q0, heads)  k1 = Reshape(k0, heads)  v1 = Reshape(v0, heads)"
TURN = """q = Transpose<perm=[0,2,1,3]>(q1)  k = Transpose<perm=[0,2,3,1]>(k1)
v = Transpose<perm=[0,2,1,3]>(v1)"""
ATTEND = """s = MatMul(q, k)  p = Softmax(s)  o = MatMul(p, v)  o1 = Transpose<perm=[0,2,1,3]>(o)"""
ATTENTION = "wq:8,16 wk:8,16 wv:8,16 wo:16,8"
COMPUTED = """d = Shape(x)  ns = Slice(d, zero, two)  heads = Concat<axis=0>(ns, hd)
back = Concat<axis=0>(ns, all)"""

MODELS = [
    sequence(
        "attention",
        f"{QKV} {HEADS} {TURN} {ATTEND} o2 = Reshape(o1, back) y = MatMul(o2, wo)",
        f"{ATTENTION} heads=0,0,4,4 back=0,0,16",
        "wq wk wv wo",
    ),
    sequence(
        "attention-open-reshape",
        f"{QKV} {HEADS} {TURN} {ATTEND} o2 = Reshape(o1, back) y = MatMul(o2, wo)",
        f"{ATTENTION} heads=0,0,4,-1 back=0,0,-1",
        "wq wk wv wo",
    ),
    sequence(
        "attention-computed-reshape",
        f"{COMPUTED} {QKV} {HEADS} {TURN} {ATTEND} o2 = Reshape(o1, back) y = MatMul(o2, wo)",
        f"{ATTENTION} zero=0 two=2 hd=4,4 all=16",
        "wq wk wv wo",
    ),
    sequence(
        "attention-biased",
        f"""q9 = MatMul(x, wq)  q0 = Add(q9, bq)  k9 = MatMul(x, wk)  k0 = Add(bk, k9)
        v9 = MatMul(x, wv)  v0 = Add(v9, bv)  {HEADS}  {TURN}  {ATTEND}
        o2 = Reshape(o1, back)  y = MatMul(o2, wo)""",
        f"{ATTENTION} bq:16 bk:16 bv:16 heads=0,0,4,4 back=0,0,16",
        "wq wk wv wo bq bk bv",
    ),
    sequence(
        "attention-fused-qkv",
        f"""z = MatMul(x, wqkv)  q0, k0, v0 = Split<axis=-1>(z, parts)  {HEADS}  {TURN}
        {ATTEND}  o2 = Reshape(o1, back)  y = MatMul(o2, wo)""",
        "wqkv:8,48 wo:16,8 parts=16,16,16 heads=0,0,4,4 back=0,0,16",
        "wqkv wo",
    ),
    sequence(
        "attention-fused-5d",
        """i0 = Constant<value_int=0>()  i1 = Constant<value_int=1>()  i2 = Constant<value_int=2>()
             z = MatMul(x, wqkv)  r = Reshape(z, five)  t = Transpose<perm=[2,0,3,1,4]>(r)
             q = Gather(t, i0)  k1 = Gather(t, i1)  v = Gather(t, i2)
             k = Transpose<perm=[0,1,3,2]>(k1)
             s = MatMul(q, k)  p = Softmax(s)  o = MatMul(p, v)  o1 = Transpose<perm=[0,2,1,3]>(o)
             o2 = Reshape(o1, back)  y = MatMul(o2, wo)""",
        "wqkv:8,48 wo:16,8 five=0,0,3,4,4 back=0,0,16",
        "wqkv wo",
    ),
    sequence(
        "attention-grouped-query",
        f"""{QKV} q1 = Reshape(q0, heads)  k1 = Reshape(k0, few)  v1 = Reshape(v0, few)
             q = Transpose<perm=[0,2,1,3]>(q1)  k2 = Transpose<perm=[0,2,1,3]>(k1)
             v2 = Transpose<perm=[0,2,1,3]>(v1)
             d = Shape(x)  n = Slice(d, zero, one)  len = Slice(d, one, two)
             wide = Concat<axis=0>(n, i2, i2, len, i4)  merged = Concat<axis=0>(n, i4, len, i4)
             k3 = Unsqueeze(k2, i2)  k4 = Expand(k3, wide)  k5 = Reshape(k4, merged)
             v3 = Unsqueeze(v2, i2)  v4 = Expand(v3, wide)  v5 = Reshape(v4, merged)
             k = Transpose<perm=[0,1,3,2]>(k5)
             s = MatMul(q, k)  p = Softmax(s)  o = MatMul(p, v5)  o1 = Transpose<perm=[0,2,1,3]>(o)
             o2 = Reshape(o1, back)  y = MatMul(o2, wo)""",
        """
        wq:8,16 wk:8,8 wv:8,8 wo:16,8 heads=0,0,4,4 few=0,0,2,4 back=0,0,16 zero=0 one=1 two=2 i2=2 i4=4""",
        "wq wk wv wo",
    ),
    sequence(
        "attention-einsum",
        f"""{QKV} {HEADS} s = Einsum<equation="bqhd,bkhd->bhqk">(q1, k1)  p = Softmax(s)
             o1 = Einsum<equation="bhqk,bkhd->bqhd">(p, v1)  o2 = Reshape(o1, back)
             y = MatMul(o2, wo)""",
        f"{ATTENTION} heads=0,0,4,4 back=0,0,16",
        "wq wk wv wo",
    ),
    sequence(
        "attention-einsum-weights",
        """q1 = Einsum<equation="bse,ehd->bshd">(x, wq)
        k1 = Einsum<equation="bse,ehd->bshd">(x, wk)
             v1 = Einsum<equation="bse,ehd->bshd">(x, wv)
             s = Einsum<equation="bqhd,bkhd->bhqk">(q1, k1)  p = Softmax(s)
             o1 = Einsum<equation="bhqk,bkhd->bqhd">(p, v1)
             y = Einsum<equation="bshd,hde->bse">(o1, wo)""",
        "wq:8,4,4 wk:8,4,4 wv:8,4,4 wo:4,4,8",
        "wq wk wv wo",
    ),
    sequence(
        "feed-forward-residual",
        """n = LayerNormalization(x, s, b)  a = MatMul(n, w1)  c = Add(a, b1)  g = Gelu(c)
        f = MatMul(g, w2)
             y = Add(x, f)""",
        "s:8 b:8 w1:8,32 b1:32 w2:32,8",
        "w1 b1 w2",
        opset=20,
    ),
]

CELLS = [
    Row(
        f"{cell.lower()}-{direction}",
        "(float[5,N,6] x) => (float[5,N,4] y)",
        f"""h = {cell}<hidden_size=8, direction="{direction}">(x, w, r, b)
        t = Transpose<perm=[0,2,1,3]>(h)  f = Reshape(t, to)  y = MatMul(f, w2)""",
        f"w:{ways},{gates * 8},6 r:{ways},{gates * 8},8 b:{ways},{gates * 16} "
        f"to=5,-1,{8 * ways} w2:{8 * ways},4",
        "w r b w2",
    )
    for cell, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    for direction, ways in (("forward", 1), ("bidirectional", 2))
]
RECURRENT = [
    *CELLS,
    Row(
        "lstm-stacked",
        "(float[5,N,6] x) => (float[1,N,7] y)",
        """h4, s, c = LSTM<hidden_size=8>(x, w, r, b)  h = Squeeze(h4, one)
        g4, y, e = LSTM<hidden_size=7>(h, v, q)""",
        "w:1,32,6 r:1,32,8 b:1,64 one=1 v:1,28,8 q:1,28,7",
        "w r b v",
    ),
    Row(
        "gru-state-to-dense",
        "(float[5,N,6] x) => (float[N,4] y)",
        "h4, s = GRU<hidden_size=8>(x, w, r)  f = Squeeze(s, zero)  y = MatMul(f, w2)",
        "w:1,24,6 r:1,24,8 zero=0 w2:8,4",
        "w r w2",
    ),
]

ROWS = [
    row
    for family in (
        CONTRACTIONS,
        NORMALIZATIONS,
        ELEMENTWISE,
        SPATIAL,
        REDUCTIONS,
        INDEXING,
        SHAPING,
        MODELS,
        RECURRENT,
    )
    for row in family
]


@pytest.mark.parametrize("row", [case(row) for row in ROWS])
def test_half_of_every_group_equals_the_twin(row: Row) -> None:
    check_row(row)


def test_a_bias_shared_through_identity_is_sliced_once_for_each_use() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """b2 = Identity(b1)  a = Gemm(x, w1, b1)  c = Gemm(x, w2, b2)  r = Relu(a)  s = Relu(c)
        d = MatMul(r, w3)  e = MatMul(s, w4)  y = Add(d, e)""",
        "w1:6,8 w2:6,8 b1:8 w3:8,4 w4:8,4",
    )
    pruned = prune_half(model)
    assert pruned.error <= TOLERANCE
    assert weight(pruned.model, "b1").shape == (4,)
    assert weight(pruned.model, "w3").shape == weight(pruned.model, "w4").shape == (4, 4)


def test_a_weight_used_twice_stays_one_weight() -> None:
    model = build(
        "(float[N,6] x, float[N,6] z) => (float[N,4] y)",
        "a = MatMul(x, w1)  b = MatMul(z, w1)  c = Mul(a, b)  y = MatMul(c, w2)",
        "w1:6,8 w2:8,4",
    )
    pruned = prune_half(model)
    assert pruned.error <= TOLERANCE
    assert shapes(pruned.model) == {"w1": (6, 4), "w2": (4, 4)}


def test_weights_in_constant_nodes() -> None:
    model = build("(float[N,6] x) => (float[N,4] y)", "a = MatMul(x, w1)  y = MatMul(a, w2)")
    for name, source in (("w2", "w2:8,4"), ("w1", "w1:6,8")):
        value = build("(float[N,6] x) => (float[N,6] x)", "", source).graph.initializer[0]
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=value))
    onnx.checker.check_model(model, full_check=True)
    pruned = prune_half(model)
    assert pruned.error <= TOLERANCE
    assert pruned.effect > 1e-3
    sizes = {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t).shape
        for node in pruned.model.graph.node
        if node.op_type == "Constant"
    }
    assert sizes == {"w1": (6, 4), "w2": (4, 4)}


def test_initializers_that_are_inputs_too_as_before_ir_4() -> None:
    model = build(
        "(float[N,6] x, float[6,8] w1, float[8,4] w2) => (float[N,4] y)",
        "a = MatMul(x, w1)  r = Relu(a)  y = MatMul(r, w2)",
        "w1:6,8 w2:8,4",
        opset=8,
        ir=3,
    )
    onnx.checker.check_model(model, full_check=True)
    pruned = prune_half(model)
    assert pruned.error <= TOLERANCE
    assert pruned.effect > 1e-3
    assert shapes(pruned.model) == {"w1": (6, 4), "w2": (4, 4)}
    declared = {
        i.name: [d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in pruned.model.graph.input
    }
    assert declared == {"x": [0, 6], "w1": [6, 4], "w2": [4, 4]}
    assert verify.structure_problems(pruned.model, model) == []


def test_an_unknown_operator_freezes_and_says_so() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        "a = MatMul(x, w1)  h = acme.Blend(a)  y = MatMul(h, w2)",
        "w1:6,8 w2:8,4",
        imports=', "acme": 1',
    )
    report = inspect(model)
    assert report.groups == ()
    reasons = {(row.tensor, row.axis): row.reason for row in report.frozen}
    assert reasons["w1", 1] == "no rule for operator Blend"


def test_a_model_with_nothing_to_prune_says_why() -> None:
    model = build("(float[N,6] x) => (float[N,8] y)", "y = MatMul(x, w)", "w:6,8")
    report = inspect(model)
    assert report.groups == ()
    assert {(r.axis, r.node) for r in report.frozen} == {(0, "model"), (1, "model")}
