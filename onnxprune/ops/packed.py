"""Weights packed in blocks of 2- to 8-bit codes (domain com.microsoft).

Codes of one block share a scale and lie in the same bytes: along the packed axis whole blocks are
removed, along the other axes anything is.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxprune.coupling import Interpreter
from onnxprune.graph import Constant, Node
from onnxprune.labels import Labels
from onnxprune.ops.quantization import read_quantized
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter
from onnxprune.vendor import MICROSOFT

Array = NDArray[Any]


@rule("MatMulNBits", domain=MICROSOFT)
def packed_product(node: Node, c: Interpreter) -> None:
    """A[*B, M, K], packed B[N, blocks, bytes], scales[N, blocks], zero points, order of K, bias[N]
    -> y[*B, M, N]
    """
    parameters = [s for s in (1, 2, 3) if node.input(s)]
    arranged = node.input(4) or node.attr("weight_prepacked", 0)
    if arranged or any(c.constant(node, s) is None for s in parameters):
        for slot in (0, 1, 5):
            c.freeze_input(node, slot, f"the blocks of {node.title} are computed or reordered")
        return
    size, rank = node.attr("block_size"), len(c.dims(node, 0))
    out, blocks = c.axis(node, 1, 0), c.axis(node, 1, 1)
    x = c.contract(node, 0, rank - 1)
    if blocks is None:
        c.freeze(node, x, f"all inputs of {node.title} are one packed block")
    else:
        c.tie(node, x, np.repeat(blocks, size)[: node.attr("K")])
    if node.input(5):
        c.tie(node, out, c.axis(node, 5, 0))
    c.set(node, {**{a: c.axis(node, 0, a) for a in range(rank - 1)}, rank - 1: out})
    c.produce(node, out)
    c.layer(node, 1, math.prod(c.out_dims(node)) * node.attr("K"), out, blocks)
    scales, zeros = (_constant(c, node, slot) for slot in (2, 3))
    bits = node.attr("bits", 4)
    c.decode(node, 1, partial(unpacked, bits=bits, scales=scales, zeros=zeros))


def _constant(c: Interpreter, node: Node, slot: int) -> Array | None:
    constant = c.constant(node, slot)
    return None if constant is None else constant.array()


def codes(packed: Array, bits: int) -> Array:
    """Codes[*D, n * 8 / bits] of bytes[*D, n], the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    split = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return np.asarray(split.reshape(*packed.shape[:-1], -1))


def unpacked(packed: Array, *, bits: int, scales: Array | None, zeros: Array | None) -> Array:
    """The weights[N, blocks, size] of bytes[N, blocks, bytes]."""
    rows, blocks = packed.shape[:2]
    zero = np.full((rows, blocks), 2 ** (bits - 1), np.float32)
    if zeros is not None:
        zero = _by_block(zeros, rows, blocks, bits).astype(np.float32)
    scale = np.ones((rows, blocks)) if scales is None else scales.reshape(rows, blocks)
    shifted = codes(packed, bits).astype(np.float32) - zero[..., None]
    return np.asarray(shifted * scale.astype(np.float32)[..., None])


def _by_block(zeros: Array, rows: int, blocks: int, bits: int) -> Array:
    """Zero points[N, blocks]; integers are packed like the codes, each row in whole bytes."""
    if zeros.dtype != np.uint8:
        return zeros.reshape(rows, blocks)
    return codes(zeros.reshape(rows, -1), bits)[:, :blocks]


def _packed(values: Array, bits: int) -> Array:
    """Codes[N, blocks] in bytes, each row in whole bytes."""
    per = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per)))
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    grouped = padded.reshape(values.shape[0], -1, per) << shifts
    return np.asarray(np.bitwise_or.reduce(grouped, axis=-1).astype(np.uint8))


@rewrite("MatMulNBits", domain=MICROSOFT)
def rewrite_packed_product(node: Node, r: Rewriter) -> None:
    """What is left of N and K, and the scales and zero points of the blocks that are left."""
    out, blocks = r.labels(node, 1, 0), r.labels(node, 1, 1)
    rows, columns, _ = r.dims(node, 1)
    kept = (
        np.ones(rows, bool) if out is None else r.mask(out),
        np.ones(columns, bool) if blocks is None else r.mask(blocks),
    )
    if kept[0].all() and kept[1].all():
        return
    r.set_attribute(node, "N", int(kept[0].sum()))
    r.set_attribute(node, "K", r.dims_after(node, 0)[-1])
    bits = node.attr("bits", 4)
    for slot in (2, 3):
        constant = _stored(r, node, slot)
        if constant is None:
            continue
        array = constant.array()
        integers = slot == 3 and array.dtype == np.uint8
        grid = _by_block(array, rows, columns, bits) if integers else array.reshape(rows, columns)
        part = grid[np.ix_(*kept)]
        part = _packed(part, bits) if integers else part
        r.set_operand(node, slot, part.ravel() if array.ndim == 1 else part)


def _stored(r: Rewriter, node: Node, slot: int) -> Constant | None:
    name = node.input(slot)
    return r.coupling.graph.constants.get(r.coupling.aliases.get(name, name))


@rule("GatherBlockQuantized", domain=MICROSOFT)
def packed_lookup(node: Node, c: Interpreter) -> None:
    """data[*A, n, *B], index[*I], scales, zero points -> y[*A, *I, *B]"""
    rank, extra = len(c.dims(node, 0)), len(c.dims(node, 1)) - 1
    looked_up = node.attr("gather_axis", 0) % rank
    found: dict[int, Labels | None] = {}
    for axis in range(rank):
        if axis != looked_up:
            labels = _lookup_axis(node, c, axis, rank)
            c.prefer(labels)
            found[axis if axis < looked_up else axis + extra] = labels
            if axis > looked_up:
                c.produce(node, labels)
    c.set(node, found)
    whole = node.attr("bits", 4) == 8 or c.shapes.types.get(node.input(0)) != TensorProto.UINT8
    if whole:
        own = node.attr("quantize_axis", 1)
        read_quantized(node, c, 0, 2, 3, own, node.attr("block_size", 128))


def _lookup_axis(node: Node, c: Interpreter, axis: int, rank: int) -> Labels | None:
    """The labels of one axis of the result; None where bytes hold several of its indices."""
    packed = c.shapes.types.get(node.input(0)) == TensorProto.UINT8 and node.attr("bits", 4) < 8
    per = 8 // node.attr("bits", 4) if packed and axis == rank - 1 else 1
    own = axis == node.attr("quantize_axis", 1) % rank
    if packed and own and node.input(3):
        return None  # zero points of several blocks share a byte
    scales = c.axis(node, 2, axis)
    if per == 1 and (not own or scales is None):
        data = c.axis(node, 0, axis)
        if scales is not None:
            c.tie(node, data, scales)
        if node.input(3) and scales is not None:
            c.tie(node, data, c.axis(node, 3, axis))
        return data
    if not own or scales is None:
        return None
    length = c.dims(node, 0)[axis] * per
    spread = np.repeat(scales, node.attr("block_size", 128))[:length]
    c.tie(node, c.axis(node, 0, axis), np.ascontiguousarray(spread[::per]))
    if node.input(3):
        c.tie(node, scales, c.axis(node, 3, axis))
    return spread
