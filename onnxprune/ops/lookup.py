"""Operators that read or write at positions that are data."""

from __future__ import annotations

import numpy as np

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.numbers import numbered
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter


@rule("GatherElements")
def gather_elements(node: Node, c: Interpreter) -> None:
    """x[*D], index[*D'] -> y[*D'], looked up along one axis"""
    own = node.attr("axis", 0) % len(c.dims(node, 0))
    found: dict[int, Labels | None] = {}
    for axis in range(len(c.dims(node, 0))):
        if axis == own:
            if not numbered(node, c, 1, c.axis(node, 0, axis)):
                c.freeze(node, c.axis(node, 0, axis), f"{node.title} looks it up by number")
            found[axis] = c.axis(node, 1, axis)
        else:
            found[axis] = _common(node, c, axis, 0, 1)
    c.set(node, found)


def _common(node: Node, c: Interpreter, axis: int, *slots: int) -> Labels | None:
    """Tie one axis of tensors that run side by side; frozen where their lengths differ."""
    labels = [c.axis(node, slot, axis) for slot in slots]
    if len({c.dims(node, slot)[axis] for slot in slots}) > 1:
        for own in labels:
            c.freeze(node, own, f"{node.title} uses a part of it")
        return None
    for other in labels[1:]:
        c.tie(node, labels[0], other)
    return labels[0]


@rule("ScatterElements", "Scatter")
def scatter_elements(node: Node, c: Interpreter) -> None:
    """x[*D], index[*D'], updates[*D'] -> y[*D], written along one axis"""
    own = node.attr("axis", 0) % len(c.dims(node, 0))
    found: dict[int, Labels | None] = {}
    for axis in range(len(c.dims(node, 0))):
        if axis != own:
            found[axis] = _common(node, c, axis, 0, 1, 2)
            continue
        if numbered(node, c, 1, c.axis(node, 0, axis)):
            found[axis] = c.axis(node, 0, axis)
        for slot in range(0 if found.get(axis) is None else 1, 3):
            c.freeze(node, c.axis(node, slot, axis), f"{node.title} writes it by number")
    c.set(node, found)


@rule("GatherND")
def gather_nd(node: Node, c: Interpreter) -> None:
    """x[*B, *K, *R], index[*B, *I, len(K)] -> y[*B, *I, *R]; what a constant index names stays"""
    batch = node.attr("batch_dims", 0)
    index, value = c.dims(node, 1), c.value(node, 1)
    first = batch + index[-1]
    found = {axis: _common(node, c, axis, 0, 1) for axis in range(batch)}
    for axis in range(batch, first):
        labels = c.axis(node, 0, axis)
        if labels is not None and value is not None:
            labels = labels[value[..., axis - batch].ravel()]
        c.freeze(node, labels, f"{node.title} looks it up by number")
    found |= {axis: c.axis(node, 1, axis) for axis in range(batch, len(index) - 1)}
    c.freeze(node, c.axis(node, 1, -1), f"positions of {node.title}")
    shift = len(index) - 1 - first
    rank = len(c.dims(node, 0))
    c.set(node, found | {axis + shift: c.axis(node, 0, axis) for axis in range(first, rank)})


@rewrite("GatherND")
def rewrite_gather_nd(node: Node, r: Rewriter) -> None:
    """Positions among what is left."""
    batch, index = node.attr("batch_dims", 0), r.value(node, 1)
    if index is None:
        return
    new = index.copy()
    for column in range(index.shape[-1]):
        labels = r.labels(node, 0, batch + column)
        if labels is not None:
            new[..., column] = r.positions(labels, index[..., column] % labels.size)
    if not np.array_equal(new, index):
        r.set_operand(node, 1, new)


@rule("ScatterND")
def scatter_nd(node: Node, c: Interpreter) -> None:
    """x[*K, *R], index[*I, len(K)], updates[*I, *R] -> y[*K, *R]"""
    first = c.dims(node, 1)[-1]
    rank = len(c.dims(node, 0))
    shift = len(c.dims(node, 2)) - rank
    found: dict[int, Labels | None] = {}
    for axis in range(rank):
        labels = c.axis(node, 0, axis)
        if axis < first:
            c.freeze(node, labels, f"{node.title} writes to it by number")
        else:
            c.tie(node, labels, c.axis(node, 2, axis + shift))
            found[axis] = labels
    for axis in range(len(c.dims(node, 2)) - (rank - first)):
        c.freeze(node, c.axis(node, 2, axis), f"{node.title} writes it by number")
    c.set(node, found)


@rule("Compress")
def compress(node: Node, c: Interpreter) -> None:
    """x[*D], condition[n] -> y[*D'], the indices of one axis where the condition holds"""
    rank = len(c.dims(node, 0))
    condition = c.value(node, 1)
    if node.attr("axis") is None:
        c.freeze_input(node, 0, f"{node.title} flattens it")
        return
    own = node.attr("axis") % rank
    found = {axis: c.axis(node, 0, axis) for axis in range(rank) if axis != own}
    labels = c.axis(node, 0, own)
    if condition is None or c.constant(node, 1) is None or labels is None:
        c.freeze(node, labels, f"the condition of {node.title} is computed at run time")
    elif condition.size != labels.size:
        c.freeze(node, labels, f"the condition of {node.title} covers a part of it")
    else:
        c.tie(node, labels, c.axis(node, 1, 0))
        found[own] = labels[condition]
        c.must_keep(node, found[own])
    c.set(node, found)


@rule("OneHot")
def one_hot(node: Node, c: Interpreter) -> None:
    """index[*D], depth, values[2] -> y[*D with one more axis of length depth]"""
    rank = len(c.out_dims(node))
    own = node.attr("axis", -1) % rank
    labels, depth = c.numbers.get(node.inputs[0]), c.value(node, 1)
    found = {a if a < own else a + 1: c.axis(node, 0, a) for a in range(rank - 1)}
    if labels is not None and depth is not None and int(np.ravel(depth)[0]) == labels.size:
        found[own] = labels
    else:
        c.freeze(node, labels, f"{node.title} depends on its order")
    c.set(node, found)


@rewrite("OneHot")
def rewrite_one_hot(node: Node, r: Rewriter) -> None:
    """The length of the new axis."""
    own = node.attr("axis", -1) % len(r.out_dims(node))
    before, after = r.out_dims(node)[own], r.out_dims_after(node)[own]
    if before != after:
        r.set_operand(node, 1, np.full(r.dims(node, 1), after, r.value_type(node, 1)))


@rule("NonZero", "Unique", "NonMaxSuppression", "Range", "EyeLike", "Size")
@rule("ArrayFeatureExtractor", domain="ai.onnx.ml")
def data_dependent(node: Node, c: Interpreter) -> None:
    """outputs whose shape or meaning depends on positions: inputs stay as they are"""
    for slot in range(len(node.inputs)):
        c.freeze_input(node, slot, f"{node.title} depends on its order")


@rule("RandomNormalLike", "RandomUniformLike", "RandomNormal", "RandomUniform", "Multinomial")
@rule("Bernoulli")
def random(node: Node, c: Interpreter) -> None:
    """fresh random values: with another shape they would come out in another order"""
    for slot in range(len(node.inputs)):
        c.freeze_input(node, slot, f"{node.title} draws as many numbers as it has elements")


@rule("Trilu")
def trilu(node: Node, c: Interpreter) -> None:
    """x[*B, M, N] -> y[*B, M, N], a triangle zeroed"""
    rank = len(c.dims(node, 0))
    for axis in (rank - 2, rank - 1):
        c.freeze(node, c.axis(node, 0, axis), f"{node.title} depends on its order")
    c.set(node, {a: c.axis(node, 0, a) for a in range(rank - 2)})


@rule("CenterCropPad")
def center_crop_pad(node: Node, c: Interpreter) -> None:
    """x[*D], shape -> y[*D'], cut or padded along some axes"""
    rank = len(c.dims(node, 0))
    own = {a % rank for a in node.attr("axes", range(rank))}
    for axis in own:
        c.freeze(node, c.axis(node, 0, axis), f"{node.title} cuts or pads it")
    c.set(node, {a: c.axis(node, 0, a) for a in range(rank) if a not in own})
