"""Output shapes of operators that onnx's shape inference does not know.

One function per operator: from its node and the shapes and element types of its inputs to those of
its outputs. Shapes are those of ONNX Runtime's contrib operators (docs/ContribOperators.md there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from onnx import TensorProto

from onnxprune.graph import Node

Dims = tuple[int, ...]
#: Of each input: its shape and element type; an absent one is ((), 0).
Inputs = Sequence[tuple[Dims, int]]
Outputs = list[tuple[Dims, int]]
ShapeRule = Callable[[Node, Inputs], Outputs]

MICROSOFT: Final = "com.microsoft"
SHAPE_RULES: dict[tuple[str, str], ShapeRule] = {}


def shape_rule(*op_types: str, domain: str = MICROSOFT) -> Callable[[ShapeRule], ShapeRule]:
    """Register what these operators' outputs look like."""

    def register(function: ShapeRule) -> ShapeRule:
        for op_type in op_types:
            SHAPE_RULES[domain, op_type] = function
        return function

    return register


def output_shapes(node: Node, inputs: Inputs) -> Outputs:
    """The shapes and element types of the first outputs; empty where no rule knows them."""
    rule = SHAPE_RULES.get((node.domain, node.op_type))
    try:
        return rule(node, inputs) if rule is not None else []
    except (ValueError, IndexError, TypeError):  # inputs that do not fit together
        return []


@shape_rule("QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax")
def same(node: Node, inputs: Inputs) -> Outputs:
    """x[*D], ... -> y[*D] of the same type"""
    return [inputs[0]]


@shape_rule("QuantizeLinear")
def quantize(node: Node, inputs: Inputs) -> Outputs:
    """x[*D], scale, zero point -> y[*D] of the zero point's type"""
    return [(inputs[0][0], inputs[2][1] if len(inputs) > 2 else TensorProto.UINT8)]


@shape_rule("DequantizeLinear")
def dequantize(node: Node, inputs: Inputs) -> Outputs:
    """x[*D], scale, zero point -> y[*D] of the scale's type"""
    return [(inputs[0][0], inputs[1][1])]


@shape_rule("QLinearAdd", "QLinearMul")
def quantized_pair(node: Node, inputs: Inputs) -> Outputs:
    """a[*A], scale, zero point, b[*B], scale, zero point, ... -> y[*broadcast(A, B)]"""
    return [(np.broadcast_shapes(inputs[0][0], inputs[3][0]), inputs[0][1])]


@shape_rule("QLinearWhere")
def quantized_where(node: Node, inputs: Inputs) -> Outputs:
    """condition[*C], x[*X], scale, zero point, y[*Y], scale, zero point, ... -> z"""
    dims = np.broadcast_shapes(inputs[0][0], inputs[1][0], inputs[4][0])
    return [(dims, inputs[1][1])]


@shape_rule("QLinearConcat")
def quantized_concat(node: Node, inputs: Inputs) -> Outputs:
    """scale, zero point, then (x[*D], scale, zero point) for each part -> y"""
    parts = [dims for dims, _ in inputs[2::3]]
    out = list(parts[0])
    out[node.attr("axis")] = sum(dims[node.attr("axis")] for dims in parts)
    return [(tuple(out), inputs[2][1])]


@shape_rule("QLinearGlobalAveragePool")
def quantized_global_pool(node: Node, inputs: Inputs) -> Outputs:
    """x[N, C, *S], ... -> y[N, C, 1, ...]; channels last where the attribute says so"""
    dims, kind = inputs[0]
    last = node.attr("channels_last", 0)
    ones = (1,) * (len(dims) - 2)
    return [((dims[0], *ones, dims[-1]) if last else (*dims[:2], *ones), kind)]


@shape_rule("QLinearAveragePool")
def quantized_pool(node: Node, inputs: Inputs) -> Outputs:
    """x[N, C, *S], ... -> y[N, C, *S']"""
    dims, kind = inputs[0]
    kernel = node.attr("kernel_shape")
    rank = len(kernel)
    strides, pads = node.attr("strides", [1] * rank), node.attr("pads", [0] * 2 * rank)
    auto, up = node.attr("auto_pad", b"NOTSET"), bool(node.attr("ceil_mode", 0))
    if node.attr("channels_last", 0):
        return []
    space = []
    for i, (size, k, step) in enumerate(zip(dims[2:], kernel, strides, strict=True)):
        if auto.startswith(b"SAME"):
            space.append(-(-size // step))
            continue
        room = size - k + (0 if auto == b"VALID" else pads[i] + pads[i + rank])
        space.append((-(-room // step) if up else room // step) + 1)
    return [((*dims[:2], *space), kind)]


@shape_rule("QGemm")
def quantized_gemm(node: Node, inputs: Inputs) -> Outputs:
    """a[M, K], scale, zero point, b[K, N], scale, zero point, bias, scale, zero point -> y[M, N]"""
    m = inputs[0][0][1 if node.attr("transA", 0) else 0]
    n = inputs[3][0][0 if node.attr("transB", 0) else 1]
    whole = len(inputs) > 7 and inputs[7][1] != 0
    return [((m, n), inputs[0][1] if whole else TensorProto.FLOAT)]


def product_dims(a: Dims, b: Dims) -> Dims:
    """The shape of the matrix product of a[*A, M, K] and b[*B, K, N]."""
    rows, columns = (a[-2:-1] if len(a) > 1 else ()), (b[-1:] if len(b) > 1 else ())
    return (*np.broadcast_shapes(a[:-2], b[:-2]), *rows, *columns)


@shape_rule("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
def integer_product(node: Node, inputs: Inputs) -> Outputs:
    """a[*A, M, K], b[*B, K, N], ... -> y[*broadcast(A, B), M, N], of the scales' type"""
    return [(product_dims(inputs[0][0], inputs[1][0]), inputs[2][1] or TensorProto.FLOAT)]


@shape_rule("MatMulNBits", "MatMulBnb4")
def packed_product(node: Node, inputs: Inputs) -> Outputs:
    """a[*A, K], packed b[N, blocks, bytes], ... -> y[*A, N]"""
    dims, kind = inputs[0]
    return [((*dims[:-1], node.attr("N")), kind)]


@shape_rule("GatherBlockQuantized")
def block_quantized_gather(node: Node, inputs: Inputs) -> Outputs:
    """data[*D], indices[*I], scales -> y, I in the place of the gathered axis"""
    data, kind = inputs[0]
    rank, bits = len(data), node.attr("bits", 4)
    axis = node.attr("gather_axis", 0) % rank
    dims = list(data)
    if kind == TensorProto.UINT8 and bits < 8:
        dims[-1] *= 8 // bits
    return [((*dims[:axis], *inputs[1][0], *dims[axis + 1 :]), inputs[2][1])]


@shape_rule("DynamicQuantizeLSTM")
def quantized_cell(node: Node, inputs: Inputs) -> Outputs:
    """x[T, N, I], w[D, I, 4*H], ... -> Y[T, D, N, H], Y_h[D, N, H], Y_c[D, N, H]"""
    steps, batch = inputs[0][0][:2]
    directions, hidden = inputs[1][0][0], node.attr("hidden_size")
    state = ((directions, batch, hidden), TensorProto.FLOAT)
    return [((steps, directions, batch, hidden), TensorProto.FLOAT), state, state]


@shape_rule("QEmbedLayerNormalization")
def quantized_embedding(node: Node, inputs: Inputs) -> Outputs:
    """ids[B, S], segments, words[V, D], ... -> y[B, S, D], mask index[B]"""
    batch, length = inputs[0][0]
    return [((batch, length, inputs[2][0][1]), inputs[8][1]), ((batch,), TensorProto.INT32)]


@shape_rule("QAttention")
def quantized_attention(node: Node, inputs: Inputs) -> Outputs:
    """x[N, S, I], w[I, 3*H], bias[3*H], input scale, ... -> y[N, S, H], present"""
    batch, length = inputs[0][0][:2]
    return [((batch, length, inputs[1][0][1] // 3), inputs[3][1])]
