"""More operators of the standard, one small graph each."""

from __future__ import annotations

import pytest

from onnxprune.analysis import analyse
from tests.graphs import build
from tests.rows import DENSE, FLAT, Row, case, check_row, flat, image, sequence

SPATIAL = [
    image(
        "max-unpool",
        """p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
        h = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(p, i)""",
    ),
    image(
        "max-unpool-shape",
        """p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
        s = Shape(a)  h = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(p, i, s)""",
    ),
    image(
        "max-pool-indices-freeze",
        """p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
        f = Cast<to=1>(i)  h = Add(p, f)""",
        shrinks="",
    ),
    Row(
        "max-roi-pool",
        "(float[N,3,8,8] x, float[5,5] r) => (float[5,4,2,2] y)",
        "a = Conv(x, w1)  h = MaxRoiPool<pooled_shape=[2,2]>(a, z)  y = Conv(h, w2)",
        "w1:8,3,1,1 w2:4,8,1,1 z:5,5",
        "w1 w2",
    ),
    Row(
        "roi-align",
        "(float[2,3,8,8] x, int64[5] i) => (float[5,4,2,2] y)",
        """a = Conv(x, w1)  h = RoiAlign<output_height=2, output_width=2>(a, roi, i)
        y = Conv(h, w2)""",
        "w1:8,3,1,1 w2:4,8,1,1 roi:5,4",
        "w1 w2",
    ),
    image("global-lp-pool", "h = GlobalLpPool(a)"),
    image("upsample", "h = Upsample<scales=[1.0,1.0,2.0,2.0]>(a)", opset=8),
    image("resize-axes", "h = Resize<axes=[2,3]>(a, , , to)", "to=9,9"),
    image(
        "col-to-im",
        """f = Reshape(a, flat)  h = Col2Im<strides=[2,2]>(f, size, block)""",
        "flat=0,8,36 size=12,12 block=2,2 w2:4,2,1,1",
    ),
    Row(
        "deform-conv",
        "(float[N,3,8,8] x) => (float[N,4,8,8] y)",
        """a = Conv(x, w1, b1)  o = Conv(x, w3)  h = DeformConv(a, wd, o, bd)
        y = Conv(h, w2)""",
        "w1:8,3,1,1 b1:8 w3:2,3,1,1 wd:6,8,1,1 bd:6 w2:4,6,1,1",
        "w1 b1 wd bd w2",
        opset=19,
    ),
    Row(
        "deform-conv-groups",
        "(float[N,3,8,8] x) => (float[N,4,8,8] y)",
        """a = Conv(x, w1)  o = Conv(x, w3)  h = DeformConv<group=2, offset_group=2>(a, wd, o)
        y = Conv(h, w2)""",
        "w1:8,3,1,1 w3:4,3,1,1 wd:8,4,1,1 w2:4,8,1,1",
        "w1 wd w2",
        opset=19,
    ),
    image("lrn-over-space", "h = LRN<size=3>(a)", exact=""),
    image("mean-variance", "h = MeanVarianceNormalization<axes=[0,2,3]>(a)"),
    image("mean-variance-channels", "h = MeanVarianceNormalization<axes=[1,2]>(a)", exact=""),
]

REDUCTIONS = [
    flat("cumsum-exclusive", "h = CumSum<exclusive=1, reverse=1>(a, one)", "one=1"),
    flat("cumsum-rows", "h = CumSum(a, zero)", "zero=0"),
    flat("cumprod", "h = CumProd(a, one)", "one=1", exact="", opset=26),
    flat("log-sum", "b = Abs(a)  s = ReduceLogSum(b, one)  h = Mul(a, s)", "one=1"),
    flat("log-sum-exp", "s = ReduceLogSumExp(a, one)  h = Mul(a, s)", "one=1", exact=""),
    flat("sum-of-squares", "s = ReduceSumSquare(a, one)  h = Mul(a, s)", "one=1"),
    flat("l1", "s = ReduceL1(a, one)  h = Mul(a, s)", "one=1"),
    flat("prod", "s = ReduceProd(a, one)  h = Mul(a, s)", "one=1", exact=""),
    flat("min", "s = ReduceMin(a, one)  h = Mul(a, s)", "one=1", exact=""),
    flat("sum-everything", "s = ReduceSum(a)  h = Mul(a, s)"),
    flat("sum-nothing", "s = ReduceSum<noop_with_empty_axes=1>(a)  h = Mul(a, s)"),
    flat("mean-of-nothing", "s = ReduceMean<noop_with_empty_axes=1>(a)  h = Mul(a, s)"),
    sequence(
        "top-k-over-time",
        """a = MatMul(x, w1)  t, i = TopK<axis=0>(a, one)
        s = ReduceMax(t, zero)  h = Add(a, s)  y = MatMul(h, w2)""",
        "w1:8,12 w2:12,8 one=1 zero=0",
        "w1 w2",
    ),
    Row(
        "reverse-sequence",
        "(float[5,3,6] x, int64[3] n) => (float[5,3,4] y)",
        "a = MatMul(x, w1)  h = ReverseSequence(a, n)  y = MatMul(h, w2)",
        DENSE,
        "w1 w2",
    ),
    image("arg-max-over-space", "i = ArgMax<axis=2>(a)  f = Cast<to=1>(i)  h = Mul(a, f)"),
    flat("hardmax", "m = Hardmax(a)  h = Add(a, m)", exact=""),
]

CONTRACTIONS = [
    flat(
        "matmul-vector",
        "v = MatMul(a, u)  e = Unsqueeze(v, one)  h = Mul(a, e)",
        "u:8 one=1",
        shrinks="w1 u w2",
    ),
    Row(
        "vector-matmul",
        "(float[6] x) => (float[4] y)",
        "a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w2)",
        DENSE,
        "w1 w2",
    ),
    Row(
        "vector-by-vector",
        "(float[6] x) => (float y)",
        "a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, u)",
        "w1:6,8 u:8",
        "w1 u",
    ),
    Row(
        "vector-behind-a-transpose-that-is-fused-wrongly",
        "(float[N,6,5] x) => (float[N,5] y)",
        "a = MatMul(w1, x)  t = Transpose<perm=[0,2,1]>(a)  y = MatMul(t, u)",
        "w1:8,6 u:8",
        "w1 u",
    ),
    Row(
        "gemm-both-trans",
        "(float[6,5] x) => (float[5,4] y)",
        "a = Gemm<transA=1, transB=1>(x, w1, b1)  h = Relu(a)  y = Gemm<transB=1>(h, w2)",
        "w1:8,6 b1:8 w2:4,8",
        "w1 b1 w2",
    ),
    Row(
        "gemm-of-transposed",
        "(float[N,6] x) => (float[4,N] y)",
        "a = Gemm<transB=1>(w1, x, b1)  h = Relu(a)  y = Gemm<transA=1>(w2, h)",
        "w1:8,6 b1:8,1 w2:8,4",
        "w1 b1 w2",
    ),
    flat("einsum-scale", 'h = Einsum<equation="ij,j->ij">(a, s)', "s:8", shrinks="w1 s w2"),
    flat(
        "einsum-ellipsis",
        'h = Einsum<equation="...j,jk->...k">(a, w3)',
        "w3:8,8",
        shrinks="w1 w3 w2",
    ),
    flat(
        "einsum-three",
        'h = Einsum<equation="ij,jk,k->ik">(a, w3, s)',
        "w3:8,8 s:8",
        shrinks="w1 w3 s w2",
    ),
    Row(
        "einsum-diagonal",
        FLAT,
        """a = MatMul(x, w1)  b = MatMul(x, w3)  o = Einsum<equation="ni,nj->nij">(a, b)
        h = Einsum<equation="nii->ni">(o)  y = MatMul(h, w2)""",
        f"{DENSE} w3:6,8",
        "w1 w3 w2",
    ),
    Row(
        "einsum-trace",
        "(float[N,6] x) => (float[N,4] y)",
        """a = MatMul(x, w1)  b = MatMul(x, w3)  o = Einsum<equation="ni,nj->nij">(a, b)
        t = Einsum<equation="nii->n">(o)  e = Unsqueeze(t, one)  h = Mul(a, e)
        y = MatMul(h, w2)""",
        f"{DENSE} w3:6,8 one=1",
        "w1 w3 w2",
    ),
    flat(
        "einsum-outer",
        """o = Einsum<equation="ij,k->ikj">(a, s)
        h = Einsum<equation="ikj,k->ij">(o, s)""",
        "s:5",
        shrinks="w1 s w2",
    ),
    image(
        "conv-groups-uneven",
        "h = Conv<group=2>(a, wg)",
        "wg:6,4,1,1 w2:4,6,1,1",
        shrinks="w1 b1 wg w2",
    ),
    image(
        "conv-transpose-multiplier",
        "h = ConvTranspose<group=4>(a, wt)",
        "wt:8,3,1,1 w2:4,12,1,1",
        shrinks="w1 b1 wt w2",
    ),
]

ELEMENTWISE = [
    flat(f"unary-{op.split('<')[0].lower()}", f"b = {before}(a)  h = {op}(b)", opset=24)
    for op, before in (
        ("Abs", "Neg"),
        ("Ceil", "Exp"),
        ("Celu<alpha=0.5>", "Sin"),
        ("Cos", "Atan"),
        ("Floor", "Exp"),
        ("Gelu", "Selu"),
        ("HardSigmoid", "Softsign"),
        ("Log", "Exp"),
        ("Mish", "Tanh"),
        ("Reciprocal", "Exp"),
        ("Round", "Sinh"),
        ("Shrink", "Asinh"),
        ("Sign", "Tan"),
        ("Sqrt", "Abs"),
        ("Swish", "Cosh"),
        ("ThresholdedRelu<alpha=0.1>", "Erf"),
        ("Acos", "Tanh"),
        ("Asin", "Tanh"),
        ("Atanh", "Sigmoid"),
        ("Acosh", "Cosh"),
    )
] + [
    flat("prelu-per-channel", "h = PRelu(a, s)", "s:8", shrinks="w1 s w2"),
    flat("prelu-shared", "h = PRelu(a, s)", "s:1"),
    flat("clip-tensors", "n = Neg(varh)  h = Clip(a, n, varh)", "varh:"),
    flat("mean-of-three", "h = Mean(a, c, a)", "c:8", shrinks="w1 c w2"),
    flat(
        "pow-and-mod",
        "p = Abs(a)  q = Pow(p, e)  h = Mod<fmod=1>(q, varm)",
        "e: varm:8",
        shrinks="w1 varm w2",
    ),
    flat(
        "bitwise",
        """b = MatMul(x, w3)  i = Cast<to=6>(a)  k = Cast<to=6>(b)  s = BitwiseAnd(i, k)
        t = BitwiseNot(s)  f = Cast<to=1>(t)  h = Mul(f, a)""",
        "w3:6,8",
        shrinks="w1 w3 w2",
    ),
    flat(
        "logic",
        """p = Greater(a, c)  q = Less(a, d)  o = Or(p, q)  n = Not(o)  r = Xor(n, p)
        h = Where(r, a, z)""",
        "c:8 d: z:1",
        shrinks="w1 c w2",
    ),
    flat("is-nan", "n = IsNaN(a)  i = IsInf(a)  o = Or(n, i)  h = Where(o, z, a)", "z:"),
]

CELLS = [
    Row(
        "lstm-everything",
        "(float[5,2,6] x, int32[2] n) => (float[5,2,4] y)",
        """h, s, c = LSTM<hidden_size=8, direction="bidirectional">(x, w, r, b, n, h0, c0, p)
        t = Transpose<perm=[0,2,1,3]>(h)  f = Reshape(t, to)  y = MatMul(f, w2)""",
        "w:2,32,6 r:2,32,8 b:2,64 h0:2,2,8 c0:2,2,8 p:2,24 to=5,-1,16 w2:16,4",
        "w r b h0 c0 p w2",
    ),
    Row(
        "gru-linear-before-reset",
        "(float[5,N,6] x) => (float[5,N,4] y)",
        """h, s = GRU<hidden_size=8, linear_before_reset=1>(x, w, r, b)  f = Squeeze(h, one)
        y = MatMul(f, w2)""",
        "w:1,24,6 r:1,24,8 b:1,48 one=1 w2:8,4",
        "w r b w2",
    ),
    Row(
        "rnn-reverse",
        "(float[5,N,6] x) => (float[5,N,4] y)",
        """h, s = RNN<hidden_size=8, direction="reverse", activations=["Relu"]>(x, w, r, b)
        f = Squeeze(h, one)  y = MatMul(f, w2)""",
        "w:1,8,6 r:1,8,8 b:1,16 one=1 w2:8,4",
        "w r b w2",
    ),
    Row(
        "lstm-of-states",
        "(float[5,N,6] x) => (float[N,4] y)",
        """h, s, c = LSTM<hidden_size=8, input_forget=1, clip=3.0>(x, w, r)  a = Add(s, c)
        f = Squeeze(a, zero)  y = MatMul(f, w2)""",
        "w:1,32,6 r:1,32,8 zero=0 w2:8,4",
        "w r w2",
    ),
    Row(
        "bidirectional-stacked",
        "(float[5,N,6] x) => (float[5,N,4] y)",
        """h, s = GRU<hidden_size=8, direction="bidirectional">(x, w, r)
        t = Transpose<perm=[0,2,1,3]>(h)  f = Reshape(t, to)
        g, u = GRU<hidden_size=6, direction="bidirectional">(f, v, q)
        k = Transpose<perm=[0,2,1,3]>(g)  m = Reshape(k, t2)  y = MatMul(m, w2)""",
        "w:2,24,6 r:2,24,8 to=5,-1,16 v:2,18,16 q:2,18,6 t2=5,-1,12 w2:12,4",
        "w r v q w2",
    ),
    Row(
        "cell-with-computed-weights",
        "(float[5,N,6] x) => (float[5,N,4] y)",
        """w0 = Unsqueeze(w, zero)  r0 = Unsqueeze(r, zero)  b1 = Concat<axis=0>(b, d)
        b0 = Unsqueeze(b1, zero)  h, s, c = LSTM<hidden_size=8>(x, w0, r0, b0)
        f = Squeeze(h, one)  y = MatMul(f, w2)""",
        "w:32,6 r:32,8 b:32 d:32 zero=0 one=1 w2:8,4",
        "w r b d w2",
    ),
]

SIGNAL = [
    Row(
        "dft-over-time",
        "(float[N,5,6] x) => (float[N,5,4] y)",
        """a = MatMul(x, w1)  u = Unsqueeze(a, three)  d = DFT<axis=1>(u)
        s = ReduceSumSquare<keepdims=0>(d, three)  y = MatMul(s, w2)""",
        f"{DENSE} three=3",
        "w1 w2",
    ),
    Row(
        "dft-of-channels-freezes",
        "(float[N,5,6] x) => (float[N,5,4] y)",
        """a = MatMul(x, w1)  u = Unsqueeze(a, three)  d = DFT<axis=2>(u)
        s = ReduceSumSquare<keepdims=0>(d, three)  y = MatMul(s, w2)""",
        f"{DENSE} three=3",
        "",
    ),
    Row(
        "det",
        "(float[N,6] x) => (float[N,4] y)",
        """a = MatMul(x, w1)  p = Unsqueeze(a, axes)  q = Mul(p, square)  h = Det(q)
        y = MatMul(h, w2)""",
        f"{DENSE} axes=2,3 square:3,3",
        "w1 w2",
    ),
]

ROWS = [*SPATIAL, *REDUCTIONS, *CONTRACTIONS, *ELEMENTWISE, *CELLS, *SIGNAL]


@pytest.mark.parametrize("row", [case(row) for row in ROWS])
def test_half_of_every_group_equals_the_twin(row: Row) -> None:
    check_row(row)


def test_swiglu_is_a_gate() -> None:
    """No runtime has it yet: the channels of both halves are tied."""
    model = build(
        FLAT,
        "a = MatMul(x, w1)  b = MatMul(x, w3)  h = SwiGLU(a, b)  y = MatMul(h, w2)",
        f"{DENSE} w3:6,8",
        opset=28,
        ir=13,
    )
    (group,) = analyse(model).groups
    assert (group.size, group.exact) == (8, True)
