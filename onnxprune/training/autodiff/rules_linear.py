"""Gradients of matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
import onnx

from onnxprune.training.autodiff.tape import Grad, Tape, vjp
from onnxprune.training.draft import attributes

WINDOWS = 30  # taps of a kernel up to which its gradient is gathered tap by tap


@vjp("Gemm")
def gemm(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = alpha op(a) op(b) + beta c"""
    options = attributes(node)
    (a, b), dy = node.input[:2], grads[0]
    assert dy is not None
    left, right = options.get("transA", 0), options.get("transB", 0)
    alpha, beta = options.get("alpha", 1.0), options.get("beta", 1.0)
    result: list[Grad] = [None, None, None]
    if t.needs(node, 0):
        if left:
            result[0] = t.op("Gemm", b, dy, alpha=alpha, transA=right, transB=1)
        else:
            result[0] = t.op("Gemm", dy, b, alpha=alpha, transB=1 - right)
    if t.needs(node, 1):
        if right:
            result[1] = t.op("Gemm", dy, a, alpha=alpha, transA=1, transB=left)
        else:
            result[1] = t.op("Gemm", a, dy, alpha=alpha, transA=1 - left)
    if t.needs(node, 2):
        scaled = dy if beta == 1 else t.op("Mul", dy, float(beta))
        result[2] = t.unbroadcast(scaled, node, 2)
    return result


@vjp("MatMul")
def matmul(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = a b, batched: da = dy b^T, db = a^T dy, summed over repeated batch axes"""
    (a, b), dy = node.input, grads[0]
    ranks = t.rank(a), t.rank(b)
    if min(ranks) < 2:
        return _with_vector(node, dy, t, ranks)
    da = db = None
    if t.needs(node, 0):
        turned = t.op("Transpose", b, perm=_turned(ranks[1]))
        da = _sum_batch(t, t.op("MatMul", dy, turned), node, 0, ranks)
    if not t.needs(node, 1):
        return [da]
    if ranks[1] == 2 and ranks[0] > 2:  # one product over all rows, not one for each
        rows = t.op("Concat", np.array([-1]), t.size_of(a, ranks[0] - 1), axis=0)
        width = t.op("Concat", np.array([-1]), t.size_of(b, 1), axis=0)
        flat = t.op("Reshape", a, rows), t.op("Reshape", dy, width)
        db = t.op("Gemm", *flat, transA=1)
    else:
        turned = t.op("Transpose", a, perm=_turned(ranks[0]))
        db = _sum_batch(t, t.op("MatMul", turned, dy), node, 1, ranks)
    return [da, db]


def _with_vector(node: onnx.NodeProto, dy: Grad, t: Tape, ranks: tuple[int, int]) -> Sequence[Grad]:
    """A vector is a matrix with an axis of length 1, which y lacks."""
    a, b = node.input
    if ranks == (1, 1):
        return [t.op("Mul", dy, b), t.op("Mul", dy, a)]
    if ranks[0] == 1:
        row = t.op("Unsqueeze", dy, np.array([-2]))
        turned = t.op("Transpose", b, perm=_turned(ranks[1]))
        da = t.op("MatMul", row, turned)
        da = t.op("ReduceSum", da, np.arange(ranks[1] - 1), keepdims=0)
        return [da, t.op("MatMul", t.op("Unsqueeze", a, np.array([1])), row)]
    column = t.op("Unsqueeze", dy, np.array([-1]))
    da = t.op("Mul", column, b)
    return [da, t.op("ReduceSum", t.op("Mul", column, a), np.arange(ranks[0] - 1), keepdims=0)]


def _turned(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _sum_batch(t: Tape, grad: str, node: onnx.NodeProto, index: int, ranks: tuple[int, int]) -> str:
    """Sum over the batch axes along which an operand was repeated."""
    own, other = t.shape(node.input[index]), t.shape(node.input[1 - index])
    if own is not None and other is not None and own[:-2] == other[:-2] and None not in own[:-2]:
        return grad
    if len(ranks) == 2 and ranks[index] == 2 and ranks[1 - index] == 2:
        return grad
    if other is not None and not other[:-2]:
        return grad
    lead = max(ranks) - ranks[index]
    axes = list(range(lead))
    for axis, size in enumerate((own or ())[:-2]):
        full = (other or ())[-len(own or ()) :][axis] if len(other or ()) >= len(own or ()) else 0
        if size == 1 and full != 1 and len(other or ()) >= len(own or ()) - axis:
            axes.append(lead + axis)
        elif not isinstance(size, int) and size != full:
            return t.sum_to(grad, node.input[index])
    if not axes:
        return grad
    summed = t.op("ReduceSum", grad, np.array(axes), keepdims=1)
    return t.op("Reshape", summed, t.shape_of(node.input[index]))


@vjp("Conv")
def conv(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """x[N, C, *S], w[M, C / g, *K], b[M] -> y[N, M, *S']"""
    x, w = node.input[:2]
    window = _Window(node, t)
    dy = grads[0]
    assert dy is not None
    dx = _data_gradient(t, dy, w, x, window) if t.needs(node, 0) else None
    dw = _weight_gradient(t, dy, node, window) if t.needs(node, 1) else None
    db = None
    if t.needs(node, 2):
        axes = np.array([0, *range(2, window.rank + 2)])
        db = t.op("ReduceSum", dy, axes, keepdims=0)
    return [dx, dw, db]


class _Window:
    """The attributes of a convolution with their defaults."""

    def __init__(self, node: onnx.NodeProto, t: Tape) -> None:
        options = attributes(node)
        shape = t.static(node.input[1])
        if shape is None:
            raise ValueError(f"Conv ({node.name}): the shape of its weight is not known")
        self.weight = shape
        self.kernel = shape[2:]
        self.rank = len(self.kernel)
        self.strides = [int(s) for s in options.get("strides", [1] * self.rank)]
        self.dilations = [int(d) for d in options.get("dilations", [1] * self.rank)]
        self.pads = [int(p) for p in options.get("pads", [0] * 2 * self.rank)]
        self.group = int(options.get("group", 1))
        if options.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            raise ValueError(f"Conv ({node.name}): auto_pad has no gradient rule")

    @property
    def attributes(self) -> dict[str, Any]:
        return {"strides": self.strides, "dilations": self.dilations, "group": self.group}


def _data_gradient(t: Tape, dy: str, w: str, x: str, window: _Window) -> str:
    """The transposed convolution, cut or filled with zeros at the ends to the size of x."""
    r = window.rank
    begin, end = window.pads[:r], window.pads[r:]
    sizes = (t.shape(x) or (None,) * (r + 2))[2:]
    if all(isinstance(size, int) for size in sizes):
        more = []
        for i, size in enumerate(sizes):
            assert isinstance(size, int)
            reach = (window.kernel[i] - 1) * window.dilations[i]
            count = (size + begin[i] + end[i] - reach - 1) // window.strides[i] + 1
            more.append(size + begin[i] - ((count - 1) * window.strides[i] + reach + 1))
        if all(m <= 0 for m in more):
            pads = [*begin, *(-m for m in more)]
            return t.op("ConvTranspose", dy, w, pads=pads, **window.attributes)
    whole = t.op("ConvTranspose", dy, w, pads=[*begin, *[0] * r], **window.attributes)
    missing = t.op("Sub", t.op("Shape", x), t.op("Shape", whole))
    tail = t.op("Slice", missing, np.array([2]), np.array([r + 2]))
    pads_name = t.op("Concat", np.zeros(r + 4, np.int64), tail, axis=0)
    return t.op("Pad", whole, pads_name)


def _weight_gradient(t: Tape, dy: str, node: onnx.NodeProto, window: _Window) -> str:
    if prod(window.kernel) > WINDOWS and window.group == 1:
        return _by_convolution(t, dy, node.input[0], window)
    return _by_windows(t, dy, node, window)


def _by_convolution(t: Tape, dy: str, x: str, window: _Window) -> str:
    """x^T * dy^T: batch and channels change places, strides become dilations."""
    turn = [1, 0, *range(2, window.rank + 2)]
    result = t.op(
        "Conv",
        t.op("Transpose", x, perm=turn),
        t.op("Transpose", dy, perm=turn),
        pads=window.pads,
        dilations=window.strides,
        strides=window.dilations,
    )
    r = window.rank
    cut = t.op("Slice", result, np.zeros(r, np.int64), np.array(window.kernel), np.arange(2, r + 2))
    return t.op("Transpose", cut, perm=turn)


def _by_windows(t: Tape, dy: str, node: onnx.NodeProto, window: _Window) -> str:
    """One product of all windows of x with dy: [g, C / g * K, N S'] x [g, N S', M / g].

    Channels come first, so that a window is a slice, and the windows lie in one matrix.
    """
    r, g = window.rank, window.group
    turn = [1, 0, *range(2, r + 2)]
    x, y = node.input[0], node.output[0]
    padded = t.op("Transpose", x, perm=turn)
    if any(window.pads):
        pads = np.array([0, 0, *window.pads[:r], 0, 0, *window.pads[r:]])
        padded = t.op("Pad", padded, pads)
    columns = []
    for tap in product(*(range(k) for k in window.kernel)):
        columns.append(t.op("Unsqueeze", _tap(t, padded, y, tap, window), np.array([1])))
    channels = window.weight[1]
    depth = channels * prod(window.kernel)
    stacked = columns[0] if len(columns) == 1 else t.op("Concat", *columns, axis=1)
    filters = window.weight[0] // g
    turned = t.op("Transpose", dy, perm=turn)
    if g == 1:
        rows = t.op("Reshape", stacked, np.array([depth, -1]))
        flat = t.op("Reshape", turned, np.array([filters, -1]))
        result = t.op("Gemm", rows, flat, transB=1)
        moved = t.op("Transpose", result, perm=[1, 0])
    else:
        rows = t.op("Reshape", stacked, np.array([g, depth, -1]))
        flat = t.op("Reshape", turned, np.array([g, filters, -1]))
        moved = t.op("MatMul", flat, t.op("Transpose", rows, perm=[0, 2, 1]))
    return t.op("Reshape", moved, np.array(window.weight))


def _tap(t: Tape, padded: str, y: str, tap: Sequence[int], window: _Window) -> str:
    """What one tap of the kernel reads: [C, N, *S']."""
    r = window.rank
    begin = np.array([i * d for i, d in zip(tap, window.dilations, strict=True)])
    strides = np.array(window.strides)
    sizes = (t.shape(y) or (None,) * (r + 2))[2:]
    if all(isinstance(size, int) for size in sizes):
        known = np.array([size for size in sizes if isinstance(size, int)])
        end: Any = begin + (known - 1) * strides + 1
    else:
        count = t.op("Slice", t.op("Shape", y), np.array([2]), np.array([r + 2]))
        end = t.op("Add", t.op("Mul", t.op("Sub", count, np.array([1])), strides), begin + 1)
    return t.op("Slice", padded, begin, end, np.arange(2, r + 2), strides)
