"""ONNX Runtime's operators on quantized tensors (domain com.microsoft).

Each is a standard operator with scales and zero points between its operands.
"""

from __future__ import annotations

import numpy as np

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.contraction import affine
from onnxprune.ops.elementwise import aligned
from onnxprune.ops.fused import embed_layer_norm
from onnxprune.ops.quantization import integer_product, read_quantized, tie_parameters
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter
from onnxprune.vendor import MICROSOFT


@rule("QLinearLeakyRelu", "QLinearSigmoid", domain=MICROSOFT)
def unary(node: Node, c: Interpreter) -> None:
    """x[*D], scale, zero point, scale and zero point of y -> y[*D]"""
    c.set_layout(node, c.settle_all(c.layout(node, 0), node))


@rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def pair(node: Node, c: Interpreter) -> None:
    """a[*A], scale, zero point, b[*B], scale, zero point, ... -> y[*broadcast(A, B)]"""
    _broadcast(node, c, [0, 3])


@rule("QLinearWhere", domain=MICROSOFT)
def where(node: Node, c: Interpreter) -> None:
    """condition[*C], x[*X], scale, zero point, y[*Y], scale, zero point, ... -> z"""
    _broadcast(node, c, [0, 1, 4])


def _broadcast(node: Node, c: Interpreter, slots: list[int]) -> None:
    rank = len(c.out_dims(node))
    c.set(node, {axis: aligned(node, c, slots, axis, rank) for axis in range(rank)})


@rule("QLinearConcat", domain=MICROSOFT)
def concat(node: Node, c: Interpreter) -> None:
    """scale, zero point, then (x[*D], scale, zero point) for each part -> y"""
    slots = range(2, len(node.inputs), 3)
    rank = len(c.out_dims(node))
    own = node.attr("axis") % rank
    parts = []
    for slot in slots:
        labels = c.axis(node, slot, own)
        parts.append(np.zeros(c.dims(node, slot)[own], np.int32) if labels is None else labels)
    joined = np.concatenate(parts)
    found: dict[int, Labels | None] = {own: joined if joined.any() else None}
    for axis in range(rank):
        if axis != own and c.out_dims(node)[axis] > 1:
            first, *others = (c.axis(node, slot, axis) for slot in slots)
            for other in others:
                c.tie(node, first, other)
            found[axis] = first
    c.set(node, found)


@rule("QLinearAveragePool", "QLinearGlobalAveragePool", domain=MICROSOFT)
def pool(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], ... -> y[N, C, *S'], or channels last"""
    rank = len(c.dims(node, 0))
    own = rank - 1 if node.attr("channels_last", 0) else 1
    channels = c.axis(node, 0, own)
    c.prefer(channels)
    for axis in range(1, rank):
        if axis != own:
            c.freeze(node, c.axis(node, 0, axis), f"spatial axis of {node.title}")
    c.set(node, {0: c.axis(node, 0, 0), own: channels})


@rule("QLinearSoftmax", domain=MICROSOFT)
def softmax(node: Node, c: Interpreter) -> None:
    """x[*D], ... -> y[*D]; sums over one axis (of opset 12 and before over all from it on)"""
    rank = len(c.dims(node, 0))
    first = node.attr("axis", -1) % rank
    for axis in range(rank):
        labels = c.axis(node, 0, axis)
        if axis == first or (node.attr("opset", 13) < 13 and axis > first):
            c.inexact(node, labels, f"{node.title} normalizes over it")
        else:
            c.prefer(labels)
    c.set_layout(node, c.settle_all(c.layout(node, 0), node))


@rule("QGemm", domain=MICROSOFT)
def gemm(node: Node, c: Interpreter) -> None:
    """A[M, K], scale, zero point, B[K, N], scale, zero point, bias, ... -> y[M, N]"""
    affine(node, c, right=3, bias=6, zero=2)
    columns = 0 if node.attr("transB", 0) else 1
    tie_parameters(node, c, 3, columns, 4, 5)
    read_quantized(node, c, 3, 4, 5, columns)


@rule("MatMulIntegerToFloat", domain=MICROSOFT)
def product_to_float(node: Node, c: Interpreter) -> None:
    """A[*B, M, K], B[*B, K, N], scales, zero points, bias[N] -> y[*B, M, N]"""
    integer_product(node, c, slot=1, zero=4)
    tie_parameters(node, c, 0, -2, 2, 4)
    tie_parameters(node, c, 1, -1, 3, 5, 6)
    read_quantized(node, c, 1, 3, 5, -1)


@rule("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_product(node: Node, c: Interpreter) -> None:
    """A[*B, M, K] float, B[K, N], scale, zero point, bias[N] -> y[*B, M, N]"""
    integer_product(node, c, slot=1)
    for block in c.settle_all(c.layout(node, 0), node):
        c.inexact(node, block.labels, f"{node.title} measures its range over it")
    tie_parameters(node, c, 1, -1, 2, 3, 4)
    read_quantized(node, c, 1, 2, 3, -1)


@rule("QEmbedLayerNormalization", domain=MICROSOFT)
def quantized_embedding(node: Node, c: Interpreter) -> None:
    """ids[B, S], segments[B, S], tables[V, D] of words, positions and segments, gamma[D], beta[D],
    mask, then their scales and zero points -> y[B, S, D], mask index[B]
    """
    embed_layer_norm(node, c)
    for slot in (2, 3, 4):
        read_quantized(node, c, slot, slot + 6, slot + 11, -1)


@rule("DynamicQuantizeLSTM", domain=MICROSOFT)
def dynamic_cell(node: Node, c: Interpreter) -> None:
    """x[T, N, I], W[D, I, 4*H], R[D, H, 4*H], b[D, 8*H], lengths, h[D, N, H], c[D, N, H],
    P[D, 3*H], scales and zero points of W and R [D] or [D, 4*H] -> Y[T, D, N, H], Y_h, Y_c
    """
    directions, inner, rows = c.dims(node, 1)
    hidden = c.system.fresh(rows // 4)
    x = c.axis(node, 0, 2)
    c.tie(node, x, c.axis(node, 1, 1))
    for labels in (x, hidden):
        c.inexact(node, labels, f"{node.title} measures its range over it")
    c.tie(node, hidden, c.axis(node, 2, 1))
    for slot, axis, copies in ((1, 2, 4), (2, 2, 4), (3, 1, 8), (7, 1, 3), (5, 2, 1), (6, 2, 1)):
        if node.input(slot):
            c.tie(node, np.tile(hidden, copies), c.axis(node, slot, axis))
    for slot in (8, 9, 10, 11):
        if len(c.dims(node, slot)) == 2:
            c.tie(node, np.tile(hidden, 4), c.axis(node, slot, 1))
    for index, axis in enumerate((3, 2, 2)):
        c.set(node, {axis: hidden}, index)
    c.produce(node, hidden)
    steps = c.dims(node, 0)[0] * c.dims(node, 0)[1] * directions * rows
    c.layer(node, 1, steps * inner, hidden, x)
    c.layer(node, 2, steps * hidden.size, hidden, hidden)


@rewrite("DynamicQuantizeLSTM", domain=MICROSOFT)
def rewrite_dynamic_cell(node: Node, r: Rewriter) -> None:
    """The number of hidden units that are left."""
    left = r.dims_after(node, 2)[1]
    if left != node.attr("hidden_size"):
        r.set_attribute(node, "hidden_size", left)
