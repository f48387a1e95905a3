"""Quantization: steps to and from integers, and products of integers.

x = (q - zero point) * scale: what stands for zero is the zero point, one number or one per channel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Layout
from onnxprune.ops.contraction import convolve, product, rewrite_groups
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter
from onnxprune.vendor import MICROSOFT

Array = NDArray[Any]


@rule("QuantizeLinear", "DequantizeLinear")
@rule("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
def step(node: Node, c: Interpreter) -> None:
    """x[*D], scale, zero point -> y[*D]; parameters of one number, [D[axis]], or D in blocks"""
    rank = len(c.dims(node, 0))
    axis = node.attr("axis", 1) % max(rank, 1)
    wide = {s for s in (1, 2) if np.prod(c.dims(node, s), dtype=np.int64) > 1}
    layout = c.layout(node, 0)
    blocked = len(c.dims(node, 1)) == rank > 1
    if wide:
        layout = c.settle_all(layout, node)
    for slot in wide:
        for own in range(rank) if blocked else (axis,):
            _tie_parameter(node, c, layout, slot, own, own if blocked else 0)
    c.set_layout(node, c.carried(node, layout))
    if node.op_type == "DequantizeLinear":
        read_quantized(node, c, 0, 1, 2, axis, node.attr("block_size", 0))


def _tie_parameter(
    node: Node, c: Interpreter, layout: Layout, slot: int, axis: int, own: int
) -> None:
    """Axis `own` of a scale or zero point belongs to `axis` of x, one entry for each block."""
    length, entries = c.dims(node, 0)[axis], c.dims(node, slot)[own]
    if entries <= 1:
        return
    labels = c.axis(node, slot, own)
    if labels is not None and entries < length:
        labels = np.repeat(labels, node.attr("block_size", 1))[:length]
    known = next((b.labels for b in layout if b.axes == (axis,)), None)
    c.tie(node, known, labels)


@rule("DynamicQuantizeLinear")
def dynamic_step(node: Node, c: Interpreter) -> None:
    """x[*D] -> y[*D], scale, zero point; the range of x is measured over all of it"""
    layout = c.settle_all(c.layout(node, 0), node)
    for block in layout:
        c.inexact(node, block.labels, f"{node.title} measures its range over it")
    c.set_layout(node, layout)


@rule("ConvInteger")
def integer_conv(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], W[M, C/g, *K], zero points of x and W -> y[N, M, *S']"""
    convolve(node, c, weight=1, bias=-1, zero=2)
    tie_parameters(node, c, 1, 0, 3)
    read_quantized(node, c, 1, -1, 3, 0)


@rule("QLinearConv")
def quantized_conv(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], scale, zero point, W[M, C/g, *K], scale, zero point,
    scale and zero point of y, b[M] -> y[N, M, *S']"""
    convolve(node, c, weight=3, bias=8, zero=2)
    tie_parameters(node, c, 3, 0, 4, 5)
    read_quantized(node, c, 3, 4, 5, 0)


@rewrite("ConvInteger")
def rewrite_integer_conv(node: Node, r: Rewriter) -> None:
    """The number of groups follows from what is left of C and C/g."""
    rewrite_groups(node, r, weight=1)


@rewrite("QLinearConv")
def rewrite_quantized_conv(node: Node, r: Rewriter) -> None:
    """The number of groups follows from what is left of C and C/g."""
    rewrite_groups(node, r, weight=3)


@rule("MatMulInteger")
def integer_matmul(node: Node, c: Interpreter) -> None:
    """A[*B, M, K], B[*B, K, N], zero points of A and B -> y[*B, M, N]"""
    integer_product(node, c, slot=1, zero=2)
    tie_parameters(node, c, 0, -2, 2)
    tie_parameters(node, c, 1, -1, 3)
    read_quantized(node, c, 1, -1, 3, -1)


@rule("QLinearMatMul")
def quantized_matmul(node: Node, c: Interpreter) -> None:
    """A[*B, M, K], scale, zero point, B[*B, K, N], scale, zero point,
    scale and zero point of y -> y[*B, M, N]"""
    integer_product(node, c, slot=3, zero=2)
    tie_parameters(node, c, 0, -2, 1, 2, 6, 7)
    tie_parameters(node, c, 3, -1, 4, 5)
    read_quantized(node, c, 3, 4, 5, -1)


def integer_product(node: Node, c: Interpreter, *, slot: int, zero: int = -1) -> None:
    """A matrix product of input 0, whose zero point is in input `zero`, and input `slot`."""
    left, right = (range(len(c.dims(node, s))) for s in (0, slot))
    product(node, c, left, right, slot=slot, zero=zero)


def tie_parameters(node: Node, c: Interpreter, target: int, axis: int, *slots: int) -> None:
    """Scales and zero points go with the axes of input `target`; vectors with its axis `axis`."""
    rank = len(c.dims(node, target))
    for slot in slots:
        dims = c.dims(node, slot)
        for own, length in enumerate(dims):
            place = axis % rank if len(dims) == 1 else rank - len(dims) + own
            if length > 1:
                c.tie(node, c.axis(node, target, place), c.axis(node, slot, own))


def read_quantized(
    node: Node, c: Interpreter, slot: int, scale: int, zero: int, axis: int, block: int = 0
) -> None:
    """Importance reads the weight in `slot` through the parameters in `scale` and `zero`."""
    values = [c.constant(node, s) if s >= 0 else None for s in (scale, zero)]
    arrays = [None if v is None else np.asarray(v.array(), np.float32) for v in values]
    decoder = partial(dequantize, scale=arrays[0], zero=arrays[1], axis=axis, block=block)
    c.decode(node, slot, decoder)


def dequantize(
    q: Array, *, scale: Array | None, zero: Array | None, axis: int, block: int = 0
) -> Array:
    """(q - zero) * scale; parameters are one number, one for each index of `axis`, or one for each
    `block` indices of it.
    """
    x = np.asarray(q, np.float32)
    if zero is not None:
        x = x - _fitted(zero, x.shape, axis, block)
    return x if scale is None else x * _fitted(scale, x.shape, axis, block)


def _fitted(parameter: Array, dims: tuple[int, ...], axis: int, block: int) -> Array:
    """A parameter in a shape that broadcasts to `dims`."""
    axis %= max(len(dims), 1)
    if parameter.size == 1:
        return parameter.reshape(())
    if parameter.ndim == 1:
        return parameter.reshape([-1 if a == axis else 1 for a in range(len(dims))])
    if block and parameter.ndim == len(dims) and parameter.shape[axis] < dims[axis]:
        return np.repeat(parameter, block, axis=axis).take(range(dims[axis]), axis=axis)
    return parameter
