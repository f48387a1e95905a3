"""Quantized graphs of every form: half of every group is removed, as in the masked twin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxprune import runtime, verify
from onnxprune.analysis import analyse
from onnxprune.graph import Graph
from onnxprune.passes.score import score
from onnxprune.pipeline import inspect
from onnxprune.shapes import infer
from tests.graphs import TOLERANCE, build, prune_half, shapes
from tests.quantized import dq, steps, weights

MICROSOFT = ', "com.microsoft": 1'


@dataclass(frozen=True)
class Row:
    """`shrinks`: the initializers that get smaller under scope "all"; `exact`: under "exact"."""

    name: str
    signature: str
    body: str
    weights: str
    shrinks: str
    exact: str | None = None
    opset: int = 21
    tolerance: float = TOLERANCE


IMAGE = "(float[N,3,8,8] x) => (float[N,4,?,?] y)"
BYTES = "(uint8[N,3,8,8] x) => (uint8[N,4,?,?] y)"
FLAT = "(float[N,6] x) => (float[N,4] y)"
FEW = "(float[N,6] x) => (uint8[N,4] y)"


def image(name: str, middle: str, spec: str, shrinks: str, **more: object) -> Row:
    """A QDQ graph: Conv to 8 channels `a`, `middle` from a to h, Conv to y."""
    body = f"""{steps("x", "xq")}  w1 = DequantizeLinear<axis=0>(w1_q, sw1, zw1)
    b1 = DequantizeLinear<axis=0>(b1_q, sb1)  c = Conv(xq, w1, b1)  r = Relu(c)
    {steps("r", "a")}  {middle}  {dq("w2")}  d = Conv(h, w2)  {steps("d", "y")}"""
    base = "w1_q:i8:8,3,3,3 sw1:f:8 zw1:i8:8 b1_q:i32:8 sb1:f:8 sa:f: za:u8: sw2:f: zw2:i8:"
    base += "" if "w2_q:" in spec else " w2_q:i8:4,8,1,1"
    return Row(name, IMAGE, body, f"{base} {spec}", f"w1_q sw1 zw1 b1_q sb1 {shrinks}", **more)  # type: ignore[arg-type]


QDQ = [
    image("qdq-conv-per-channel", "h = Identity(a)", "", "w2_q"),
    image(
        "qdq-conv-depthwise",
        f"""wg = DequantizeLinear<axis=0>(wg_q, swg, zwg)  g = Conv<group=8>(a, wg)
        {steps("g", "h")}""",
        "wg_q:i8:8,1,1,1 swg:f:8 zwg:i8:8",
        "wg_q swg zwg w2_q",
    ),
    image(
        "qdq-conv-grouped",
        f"{dq('wg')}  g = Conv<group=2>(a, wg)  {steps('g', 'h')}",
        "wg_q:i8:8,4,1,1 swg:f: zwg:i8:",
        "wg_q w2_q",
    ),
    image(
        "qdq-conv-transpose",
        f"""wg = DequantizeLinear<axis=1>(wg_q, swg)  g = ConvTranspose<strides=[2,2]>(a, wg)
        {steps("g", "h")}""",
        "wg_q:i8:8,6,2,2 swg:f:6 w2_q:i8:4,6,1,1",
        "wg_q swg w2_q",
    ),
    image(
        "qdq-residual",
        f"""{dq("wg")}  g = Conv(a, wg)  {steps("g", "e")}  f = Add(a, e)  {steps("f", "h")}""",
        "wg_q:i8:8,8,1,1 swg:f: zwg:i8:",
        "wg_q w2_q",
    ),
    image(
        "qdq-concat",
        f"""{dq("wg")}  g = Conv(a, wg)  {steps("g", "e")}  f = Concat<axis=1>(a, e)
        {steps("f", "h")}""",
        "wg_q:i8:6,8,1,1 swg:f: zwg:i8: w2_q:i8:4,14,1,1",
        "wg_q w2_q",
    ),
    image(
        "qdq-channel-shuffle",
        f"""g = Reshape(a, five)  {steps("g", "g1")}  t = Transpose<perm=[0,2,1,3,4]>(g1)
        {steps("t", "t1")}  f = Reshape(t1, four)  {steps("f", "h")}""",
        "five=0,2,4,6,6 four=0,8,6,6",
        "w2_q",
    ),
    image(
        "qdq-global-pool",
        f"g = GlobalAveragePool(a)  {steps('g', 'h')}",
        "",
        "w2_q",
    ),
    Row(
        "qdq-signed-symmetric",
        FLAT,
        f"""{steps("x", "xq", parameters="sa, zi")}  w1 = DequantizeLinear<axis=1>(w1_q, sw1)
        a = MatMul(xq, w1)  {steps("a", "h", parameters="sa, zi")}
        w2 = DequantizeLinear(w2_q, sw2)  y = MatMul(h, w2)""",
        "w1_q:i8:6,8 sw1:f:8 w2_q:i8:8,4 sw2:f: sa:f: zi:i8:",
        "w1_q sw1 w2_q",
    ),
    Row(
        "qdq-wide-activations",
        FLAT,
        f"""{dq("w1", "w2")}  a = MatMul(x, w1)  r = Relu(a)
        {steps("r", "h", parameters="sa, z16")}  y = MatMul(h, w2)""",
        "w1_q:u8:6,8 sw1:f: zw1:u8: w2_q:u8:8,4 sw2:f: zw2:u8: sa:f: z16:u16:",
        "w1_q w2_q",
    ),
    Row(
        "qdq-gemm-without-zero-points",
        FLAT,
        """w1 = DequantizeLinear<axis=0>(w1_q, sw1)  b1 = DequantizeLinear<axis=0>(b1_q, sw1)
        a = Gemm<transB=1>(x, w1, b1)  h = Relu(a)  w2 = DequantizeLinear(w2_q, sw2)
        y = MatMul(h, w2)""",
        "w1_q:i8:8,6 sw1:f:8 b1_q:i32:8 w2_q:i8:8,4 sw2:f:",
        "w1_q sw1 b1_q w2_q",
    ),
    Row(
        "quantize-a-float-weight",
        FLAT,
        """q = QuantizeLinear<axis=1>(w1, sw1, zw1)  w = DequantizeLinear<axis=1>(q, sw1, zw1)
        a = MatMul(x, w)  h = Relu(a)  y = MatMul(h, w2)""",
        "w1:f:6,8 sw1:f:8 zw1:i8:8 w2:f:8,4",
        "w1 sw1 zw1 w2",
    ),
    Row(
        "qdq-float8",
        FLAT,
        """w1 = DequantizeLinear(w1_q, sw1)  a = MatMul(x, w1)  h = Relu(a)
        w2 = DequantizeLinear(w2_q, sw2)  y = MatMul(h, w2)""",
        "w1_q:f8:6,8 sw1:f: w2_q:f8:8,4 sw2:f:",
        "w1_q w2_q",
        opset=19,
    ),
    Row(
        "qdq-blocks-along-inputs",
        "(float[N,6] x) => (float[N,4] y)",
        """w1 = DequantizeLinear<axis=1>(w1_q, sw1)  a = MatMul(x, w1)  h = Relu(a)
        w2 = DequantizeLinear<axis=0, block_size=16>(w2_q, sw2, zw2)  y = MatMul(h, w2)""",
        "w1_q:i8:6,64 sw1:f:64 w2_q:i4:64,4 sw2:f:4,4 zw2:i4:4,4",
        "w1_q sw1 w2_q sw2 zw2",
    ),
    Row(
        "qdq-partial-block",
        "(float[N,6] x) => (float[N,4] y)",
        """w1 = DequantizeLinear<axis=1>(w1_q, sw1)  a = MatMul(x, w1)  h = Relu(a)
        w2 = DequantizeLinear<axis=0, block_size=16>(w2_q, sw2)  y = MatMul(h, w2)""",
        "w1_q:i8:6,41 sw1:f:41 w2_q:u4:41,4 sw2:f:3,4",
        "w1_q sw1 w2_q sw2",
    ),
    Row(
        "qdq-one-block",
        "(float[N,6] x) => (float[N,4] y)",
        """w1 = DequantizeLinear<axis=0, block_size=16>(w1_q, sw1)  a = MatMul(x, w1)  h = Relu(a)
        w2 = DequantizeLinear<axis=0, block_size=16>(w2_q, sw2)  y = MatMul(h, w2)""",
        "w1_q:i4:6,8 sw1:f:1,8 w2_q:i4:8,4 sw2:f:1,4",
        "w1_q sw1 w2_q",
    ),
    Row(
        "qdq-vendor-domain",
        FLAT,
        """q = com.microsoft.QuantizeLinear(x, sa, z16)
        d = com.microsoft.DequantizeLinear(q, sa, z16)
        w1 = com.microsoft.DequantizeLinear<axis=1>(w1_q, sw1, zw1)  a = MatMul(d, w1)  h = Relu(a)
        w2 = com.microsoft.DequantizeLinear(w2_q, sw2, zw2)  y = MatMul(h, w2)""",
        "sa:f: z16:u16: w1_q:i8:6,8 sw1:f:8 zw1:i8:8 w2_q:i8:8,4 sw2:f: zw2:i8:",
        "w1_q sw1 zw1 w2_q",
    ),
    Row(
        "qdq-lstm",
        "(float[5,N,6] x) => (float[5,N,4] y)",
        f"""{dq("w", "r", zero=False, attributes="<axis=1>")}  h4 = LSTM<hidden_size=8>(x, w, r, b)
        h = Squeeze(h4, one)  {steps("h", "g")}  y = MatMul(g, w2)""",
        "w_q:i8:1,32,6 sw:f:32 r_q:i8:1,32,8 sr:f:32 b:f:1,64 one=1 sa:f: za:u8: w2:f:8,4",
        "w_q sw r_q sr b w2",
    ),
    Row(
        "qdq-embedding",
        "(int64[N,S] x) => (float[N,S,4] y)",
        f"""{dq("t")}  a = Gather(t, x)  {steps("a", "h")}  y = MatMul(h, w2)""",
        "t_q:u8:10,8 st:f: zt:u8: sa:f: za:u8: w2:f:8,4",
        "t_q w2",
    ),
]

CONV = "QLinearConv{}(x, sa, za, w1, sw1, zw1, sa, za, b1)"
SMALL = "w1:i8:8,3,3,3 sw1:f:8 zw1:i8:8 b1:i32:8 sa:f: za:u8: sw2:f: zw2:i8:"


def integers(name: str, middle: str, spec: str = "", shrinks: str = "w2", **more: object) -> Row:
    """QLinearConv to 8 channels `a`, `middle` from a to h, QLinearConv to y."""
    body = f"""a = QLinearConv(x, sa, za, w1, sw1, zw1, sa, za, b1)  {middle}
    y = QLinearConv(h, sa, za, w2, sw2, zw2, sa, za)"""
    base = SMALL + ("" if "w2:" in spec else " w2:i8:4,8,1,1")
    return Row(name, BYTES, body, f"{base} {spec}", f"w1 sw1 zw1 b1 {shrinks}", **more)  # type: ignore[arg-type]


def plain(name: str, middle: str) -> Row:
    """QLinearMatMul to 8 columns `a`, `middle` from a to h, QLinearMatMul to y."""
    body = f"""q = QuantizeLinear(x, sa, za)  a = QLinearMatMul(q, sa, za, w1, sw1, zw1, sa, za)
    {middle}  y = QLinearMatMul(h, sa, za, w2, sw2, zw2, sa, za)"""
    base = "w1:u8:6,8 sw1:f:8 zw1:u8:8 w2:u8:8,4 sw2:f: zw2:u8: sa:f: za:u8:"
    return Row(name, FEW, body, base, "w1 sw1 zw1 w2")


INTEGERS = [
    integers("qlinear-conv", "h = Identity(a)"),
    integers(
        "qlinear-conv-depthwise",
        "h = QLinearConv<group=8>(a, sa, za, wg, swg, zwg, sa, za, bg)",
        "wg:i8:8,1,3,3 swg:f:8 zwg:i8:8 bg:i32:8",
        "wg swg zwg bg w2",
    ),
    integers(
        "qlinear-conv-grouped",
        "h = QLinearConv<group=2>(a, sa, za, wg, sw2, zw2, sa, za)",
        "wg:i8:8,4,1,1",
        "wg w2",
    ),
    integers("qlinear-max-pool", "h = MaxPool<kernel_shape=[2,2]>(a)"),
    integers("qlinear-add", "h = com.microsoft.QLinearAdd(a, sa, za, a, sa, za, sa, za)"),
    integers(
        "qlinear-mul",
        "h = com.microsoft.QLinearMul(a, sa, za, c, sa, za, sa, za)",
        "c:u8:1,8,1,1",
        "c w2",
    ),
    integers(
        "qlinear-concat",
        """g = QLinearConv(x, sa, za, wg, sw2, zw2, sa, za)
        h = com.microsoft.QLinearConcat<axis=1>(sa, za, a, sa, za, g, sa, za)""",
        "wg:i8:6,3,3,3 w2:i8:4,14,1,1",
        "wg w2",
    ),
    integers(
        "qlinear-average-pool",
        "h = com.microsoft.QLinearAveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>"
        "(a, sa, za, sa, za)",
    ),
    integers(
        "qlinear-average-pool-ceil",
        "h = com.microsoft.QLinearAveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>"
        "(a, sa, za, sa, za)",
    ),
    integers(
        "qlinear-global-pool", "h = com.microsoft.QLinearGlobalAveragePool(a, sa, za, sa, za)"
    ),
    integers(
        "qlinear-leaky-relu", "h = com.microsoft.QLinearLeakyRelu<alpha=0.1>(a, sa, za, sa, za)"
    ),
    integers("qlinear-sigmoid", "h = com.microsoft.QLinearSigmoid(a, sa, za, sa, za)"),
    integers(
        "qlinear-where",
        "h = com.microsoft.QLinearWhere(m, a, sa, za, c, sa, za, sa, za)",
        "m:b:1,8,1,1 c:u8:1,8,1,1",
        "m c w2",
    ),
    integers(
        "qlinear-softmax-over-channels",
        "h = com.microsoft.QLinearSoftmax<axis=1, opset=13>(a, sa, za, sa, za)",
        exact="",
    ),
    plain("qlinear-matmul", "h = Identity(a)"),
    plain(
        "qlinear-softmax-rows",
        "h = com.microsoft.QLinearSoftmax<axis=0, opset=13>(a, sa, za, sa, za)",
    ),
    Row(
        "qgemm",
        FEW,
        """q = QuantizeLinear(x, sa, za)
        a = com.microsoft.QGemm<transB=1>(q, sa, za, w1, sw1, zw1, b1, sa, za)
        y = com.microsoft.QGemm<transB=1>(a, sa, za, w2, sw2, zw2, b2, sa, za)""",
        "w1:u8:8,6 sw1:f: zw1:u8: b1:i32:8 w2:u8:4,8 sw2:f: zw2:u8: b2:i32:4 sa:f: za:u8:",
        "w1 b1 w2",
    ),
    Row(
        "conv-integer",
        "(uint8[N,3,8,8] x) => (float[N,4,?,?] y)",
        """i = ConvInteger(x, w1, za, zw1)  f = Cast<to=1>(i)  a = Mul(f, s1)
        q, s, z = DynamicQuantizeLinear(a)  j = ConvInteger(q, w2, z)  y = Cast<to=1>(j)""",
        "w1:u8:8,3,3,3 za:u8: zw1:u8: s1:f:1,8,1,1 w2:u8:4,8,1,1",
        "w1 s1 w2",
        exact="",
    ),
    Row(
        "matmul-integer",
        "(float[N,6] x) => (float[N,4] y)",
        """q, s, z = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w1, z, zw1)  f = Cast<to=1>(i)
        m = Mul(s, sw1)  a = Mul(f, m)  h = Relu(a)  p, t, u = DynamicQuantizeLinear(h)
        j = MatMulInteger(p, w2, u, zw2)  g = Cast<to=1>(j)  n = Mul(t, sw2)  y = Mul(g, n)""",
        "w1:i8:6,8 zw1:i8:8 sw1:f:8 w2:i8:8,4 zw2:i8: sw2:f:",
        "w1 zw1 sw1 w2",
        exact="",
    ),
    Row(
        "matmul-integer-given-range",
        "(float[N,6] x) => (int32[N,4] y)",
        """a = MatMul(x, w1)  q = QuantizeLinear(a, sa, za)  y = MatMulInteger(q, w2, za, zw2)""",
        "w1:f:6,8 sa:f: za:u8: w2:i8:8,4 zw2:i8:4",
        "w1 w2",
    ),
    Row(
        "dynamic-quantize-matmul",
        FLAT,
        """a = com.microsoft.DynamicQuantizeMatMul(x, w1, sw1, zw1, b1)  h = Relu(a)
        y = com.microsoft.DynamicQuantizeMatMul(h, w2, sw2, zw2)""",
        "w1:i8:6,8 sw1:f:8 zw1:i8:8 b1:f:8 w2:i8:8,4 sw2:f: zw2:i8:",
        "w1 sw1 zw1 b1 w2",
        exact="",
    ),
    Row(
        "matmul-integer-to-float",
        FLAT,
        """q, s, z = DynamicQuantizeLinear(x)
        a = com.microsoft.MatMulIntegerToFloat(q, w1, s, sw1, z, zw1, b1)
        p = QuantizeLinear(a, sa, za)
        y = com.microsoft.MatMulIntegerToFloat(p, w2, sa, sw2, za)""",
        "w1:i8:6,8 sw1:f:8 zw1:i8:8 b1:f:8 sa:f: za:u8: w2:i8:8,4 sw2:f:",
        "w1 sw1 zw1 b1 w2",
    ),
    Row(
        "dynamic-quantize-lstm",
        "(float[5,N,6] x) => (float[5,N,4] y)",
        """h4 = com.microsoft.DynamicQuantizeLSTM<hidden_size=8>(x, w, r, b,,,,, sw, ow, sr, or)
        h = Squeeze(h4, one)  y = MatMul(h, w2)""",
        "w:i8:1,6,32 r:i8:1,8,32 b:f:1,64 sw:f:1,32 ow:i8:1,32 sr:f:1 or:i8:1 one=1 w2:f:8,4",
        "w r b sw ow w2",
        exact="",
    ),
]

PACKED = [
    Row(
        "packed-4-bit",
        "(float[N,64] x) => (float[N,5] y)",
        """a = com.microsoft.MatMulNBits<K=64, N=96, bits=4, block_size=16>(x, w1, s1, z1)
        h = Relu(a)
        y = com.microsoft.MatMulNBits<K=96, N=5, bits=4, block_size=16>(h, w2, s2, z2)""",
        "w1:u8:96,4,8 s1:f:384 z1:u8:192 w2:u8:5,6,8 s2:f:30 z2:u8:15",
        "w1 s1 z1 w2 s2 z2",
    ),
    Row(
        "packed-8-bit-with-bias",
        "(float[N,64] x) => (float[N,5] y)",
        """a = com.microsoft.MatMulNBits<K=64, N=48, bits=8, block_size=16>(x, w1, s1,,, b1)
        h = Relu(a)  y = com.microsoft.MatMulNBits<K=48, N=5, bits=8, block_size=16>(h, w2, s2)""",
        "w1:u8:48,4,16 s1:f:48,4 b1:f:48 w2:u8:5,3,16 s2:f:5,3",
        "w1 s1 b1 w2 s2",
    ),
    Row(
        "packed-outputs-alone",
        "(float[N,64] x) => (float[N,5] y)",
        """a = com.microsoft.MatMulNBits<K=64, N=10, bits=4, block_size=16>(x, w1, s1, z1)
        h = Relu(a)  y = MatMul(h, w2)""",
        "w1:u8:10,4,8 s1:f:40 z1:f:10,4 w2:f:10,5",
        "w1 s1 z1 w2",
    ),
    Row(
        "packed-one-block-freezes",
        "(float[N,6] x) => (float[N,4] y)",
        """a = MatMul(x, w1)
        y = com.microsoft.MatMulNBits<K=8, N=4, bits=4, block_size=16>(a, w2, s2)""",
        "w1:f:6,8 w2:u8:4,1,8 s2:f:4",
        "",
    ),
    Row(
        "packed-embedding-nibbles",
        "(int64[N,S] x) => (float[N,S,4] y)",
        """h = com.microsoft.GatherBlockQuantized<block_size=16, quantize_axis=1>(t, x, s, z)
        y = MatMul(h, w2)""",
        "t:i4:10,64 s:f:10,4 z:i4:10,4 w2:f:64,4",
        "t s z w2",
    ),
    Row(
        "packed-embedding-bytes",
        "(int64[N,S] x) => (float[N,S,4] y)",
        """h = com.microsoft.GatherBlockQuantized<block_size=16, quantize_axis=1, bits=4>(t, x, s)
        y = MatMul(h, w2)""",
        "t:u8:10,32 s:f:10,4 w2:f:64,4",
        "t s w2",
    ),
    Row(
        "packed-embedding-with-zero-points-freezes",
        "(int64[N,S] x) => (float[N,S,4] y)",
        """h = com.microsoft.GatherBlockQuantized<block_size=16, quantize_axis=1>(t, x, s, z)
        y = MatMul(h, w2)""",
        "t:u8:10,32 s:f:10,4 z:u8:10,2 w2:f:64,4",
        "",
    ),
]

ROWS = [*QDQ, *INTEGERS, *PACKED]


def model_of(row: Row) -> onnx.ModelProto:
    """The row's model, with its random weights."""
    model = build(row.signature, row.body, opset=row.opset, imports=MICROSOFT, ir=10)
    model.graph.initializer.extend(weights(row.weights))
    return model


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_half_of_every_group_equals_the_twin(row: Row) -> None:
    model = model_of(row)
    for scope in ("all", "exact"):
        wanted = set((row.shrinks if scope == "all" or row.exact is None else row.exact).split())
        pruned = prune_half(model, scope)
        assert verify.structure_problems(pruned.model, model) == []
        assert pruned.error <= row.tolerance
        after = shapes(pruned.model)
        shrunk = {
            n for n, dims in shapes(model).items() if np.prod(after.get(n, dims)) < np.prod(dims)
        }
        assert shrunk == wanted
        assert (pruned.effect > 1e-3) == bool(wanted)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_shapes_are_those_of_onnx_runtime(row: Row) -> None:
    model = model_of(row)
    found = infer(Graph.of(model))
    outputs = [n for node in model.graph.node for n in node.output if n]
    for name in outputs:
        if name not in {o.name for o in model.graph.output}:
            kind = found.types[name]
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    dims = found.dims("x")
    assert dims is not None
    fed = {"x": np.resize(runtime.random_feeds(model)["x"], dims)}
    session = runtime.session(model, threads=1, optimize=False)
    for name, value in runtime.run(session, fed).items():
        assert found.dims(name) == value.shape, name


@pytest.mark.parametrize("name", ["qdq-conv-per-channel", "qlinear-conv", "packed-4-bit"])
def test_importance_reads_the_numbers_that_integers_stand_for(name: str) -> None:
    model = model_of(next(row for row in ROWS if row.name == name))
    coupling = analyse(model).coupling
    weight = "w1_q" if name.startswith("qdq") else "w1"
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    values = coupling.decoders[weight](stored[weight])
    if name == "packed-4-bit":
        low, high = stored["w1"] & 15, stored["w1"] >> 4
        points = stored["z1"].reshape(96, 2)
        zeros = np.stack([points & 15, points >> 4], axis=-1).reshape(96, 4, 1)
        expected = np.stack([low, high], axis=-1).reshape(96, 4, 16).astype(np.float32) - zeros
        expected *= stored["s1"].reshape(96, 4, 1)
    else:
        shift, scale = (stored[k].reshape(8, 1, 1, 1) for k in ("zw1", "sw1"))
        expected = (stored[weight].astype(np.float32) - shift) * scale
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    norms = np.square(values).reshape(len(values), -1).sum(axis=1)
    uses = coupling.constants[weight]
    rows = next(b.labels for layout in uses.values() for b in layout if b.axes == (0,))
    scores = score(coupling, "l2")[coupling.solution.unit[rows]]
    if name != "packed-4-bit":  # there 16 rows share a score
        assert np.corrcoef(scores, norms)[0, 1] > 0.5


def test_frozen_quantized_weights_are_listed_with_their_reason() -> None:
    model = model_of(next(row for row in ROWS if row.name == "packed-one-block-freezes"))
    reasons = {(row.tensor, row.axis): row.reason for row in inspect(model).frozen}
    words = "all inputs of MatMulNBits y are one packed block"
    assert reasons["w1", 1] == words
