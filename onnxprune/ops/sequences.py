"""Sequences of tensors: each element keeps its own labels.

In the layout of a sequence, axis `a` of element `k` is number `STRIDE * k + a`. So whatever freezes
or ties a layout does it for all elements.
"""

from __future__ import annotations

import numpy as np

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Block, Labels
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter

STRIDE = 64
Axes = dict[int, Labels]


def _tensor(node: Node, c: Interpreter, slot: int) -> Axes:
    return {b.axes[0]: b.labels for b in c.settle_all(c.layout(node, slot), node)}


def _elements(node: Node, c: Interpreter, slot: int = 0) -> list[Axes] | None:
    """The labels of each element; None, and all frozen, where their number is not known."""
    held = c.shapes.elements(node.input(slot))
    if held is None:
        c.freeze_input(node, slot, f"what {node.title} reads has no fixed number of tensors")
        return None
    found: list[Axes] = [{} for _ in held]
    for axis, labels in _tensor(node, c, slot).items():
        found[axis // STRIDE][axis % STRIDE] = labels
    return found


def _set(node: Node, c: Interpreter, elements: list[Axes]) -> None:
    if c.shapes.elements(node.outputs[0]) is None:
        for element in elements:
            for labels in element.values():
                c.freeze(node, labels, f"{node.title} has no fixed number of tensors")
        return
    blocks = [
        Block((STRIDE * k + axis,), labels)
        for k, element in enumerate(elements)
        for axis, labels in sorted(element.items())
    ]
    c.set_layout(node, tuple(blocks))


def _tie(node: Node, c: Interpreter, elements: list[Axes], *apart: int) -> Axes:
    """All elements are removed alike, but for the axes `apart`."""
    axes = {axis for element in elements for axis in element} - set(apart)
    for axis in sorted(axes):
        for element in elements[1:]:
            c.tie(node, elements[0].get(axis), element.get(axis))
    return {a: v for a, v in elements[0].items() if a not in apart} if elements else {}


@rule("SequenceConstruct", partial=True)
def construct(node: Node, c: Interpreter) -> None:
    """x1, x2, ... -> a sequence of them"""
    _set(node, c, [_tensor(node, c, slot) for slot in range(len(node.inputs))])


@rule("SequenceEmpty", "SequenceLength", partial=True)
def without_labels(node: Node, c: Interpreter) -> None:
    """Nothing, or a sequence's number of tensors, which pruning does not change"""
    for slot in range(len(node.inputs)):
        c.layout(node, slot)


@rule("SequenceInsert", partial=True)
def insert(node: Node, c: Interpreter) -> None:
    """sequence, tensor, position -> the sequence with the tensor in it"""
    elements, added = _elements(node, c), _tensor(node, c, 1)
    where = c.value(node, 2) if node.input(2) else np.array(len(elements or ()))
    if elements is None or where is None:
        _set(node, c, [added, *(elements or ())])
        return
    elements.insert(int(where.item()), added)
    _set(node, c, elements)


@rule("SequenceErase", partial=True)
def erase(node: Node, c: Interpreter) -> None:
    """sequence, position -> the sequence without the tensor there"""
    elements = _elements(node, c)
    where = c.value(node, 1) if node.input(1) else np.array(-1)
    if elements is not None and where is not None:
        del elements[int(where.item())]
        _set(node, c, elements)


@rule("SequenceAt", partial=True)
def at(node: Node, c: Interpreter) -> None:
    """sequence, position -> the tensor there; any of them where the position is not known"""
    elements = _elements(node, c)
    if not elements:
        return
    where = c.value(node, 1)
    found = _tie(node, c, elements) if where is None else elements[int(where.item())]
    if c.out_dims(node):
        c.set(node, {**found})
    else:
        for labels in found.values():
            c.freeze(node, labels, f"a shape around {node.title} is unknown")


@rule("ConcatFromSequence", partial=True)
def concat(node: Node, c: Interpreter) -> None:
    """sequence -> its tensors joined along an axis, or stacked along a new one"""
    elements = _elements(node, c)
    if not elements:
        return
    held, rank = c.shapes.elements(node.inputs[0]) or [], len(c.out_dims(node))
    own = node.attr("axis") % rank
    if node.attr("new_axis", 0):
        c.set(node, {a + (a >= own): v for a, v in _tie(node, c, elements).items()})
        return
    rest = _tie(node, c, elements, own)
    parts = [
        element.get(own, np.zeros(dims[own], np.int32))
        for element, (dims, _) in zip(elements, held, strict=True)
    ]
    joined = np.concatenate(parts)
    c.set(node, {**rest, own: joined if joined.any() else None})


@rule("SplitToSequence", partial=True)
def split(node: Node, c: Interpreter) -> None:
    """x[*D], sizes -> a sequence of parts along one axis"""
    axes, held = _tensor(node, c, 0), c.shapes.elements(node.outputs[0])
    own = node.attr("axis", 0) % max(1, len(c.dims(node, 0)))
    labels = axes.pop(own, None)
    if held is None or (labels is not None and not node.input(1)):
        c.freeze(node, labels, f"{node.title} cuts it into pieces of length 1")
        labels = None
    squeezed = not node.input(1) and not node.attr("keepdims", 1)
    rest = {a - (squeezed and a > own): v for a, v in axes.items()}
    elements, start = [], 0
    for dims, _ in held or ():
        part = None if labels is None else labels[start : start + dims[own]]
        c.must_keep(node, part)
        elements.append(rest if part is None else {**rest, own: part})
        start += 0 if part is None else part.size
    _set(node, c, elements or [rest])


@rewrite("SplitToSequence")
def rewrite_split(node: Node, r: Rewriter) -> None:
    """The sizes of what is left of the parts."""
    own = node.attr("axis", 0) % max(1, len(r.dims(node, 0)))
    held = r.shapes.elements(node.outputs[0])
    if held is None or not node.input(1):
        return
    after = []
    for k, (dims, _) in enumerate(held):
        labels = r.layout_labels(node.outputs[0], STRIDE * k + own)
        after.append(dims[own] if labels is None else r.count(labels))
    if after != [dims[own] for dims, _ in held]:
        r.set_operand(node, 1, np.array(after, np.int64))
