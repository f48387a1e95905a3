"""Shapes of what sequences hold, where how many tensors they hold does not depend on data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from onnxprune.graph import Node

if TYPE_CHECKING:
    from onnxprune.operator_shapes import Dims
    from onnxprune.shape_walk import Walk

#: The shape and element type of each tensor in a sequence.
Elements = list[tuple["Dims", int]]


def visit_sequence(walk: Walk, node: Node) -> None:
    """Note the elements of the sequence, or the shape of the tensor, that `node` makes."""
    visit = VISITS.get(node.op_type)
    if visit is not None:
        visit(walk, node)
    elif node.op_type == "Identity" and node.inputs[0] in walk.sequences:
        walk.sequences[node.outputs[0]] = walk.sequences[node.inputs[0]]


def _elements(walk: Walk, node: Node) -> Elements | None:
    return walk.sequences.get(node.inputs[0])


def _tensor(walk: Walk, name: str) -> tuple[Dims, int] | None:
    if name in walk.dims and name in walk.types:
        return walk.dims[name], walk.types[name]
    return None


def _position(walk: Walk, node: Node, slot: int, default: int) -> int | None:
    if not node.input(slot):
        return default
    value = walk.value(node.input(slot))
    return None if value is None else int(value.item())


def _construct(walk: Walk, node: Node) -> None:
    found = [_tensor(walk, name) for name in node.inputs]
    known = [element for element in found if element is not None]
    if len(known) == len(found):
        walk.sequences[node.outputs[0]] = known


def _empty(walk: Walk, node: Node) -> None:
    walk.sequences[node.outputs[0]] = []


def _insert(walk: Walk, node: Node) -> None:
    elements, tensor = _elements(walk, node), _tensor(walk, node.inputs[1])
    if elements is not None and tensor is not None:
        where = _position(walk, node, 2, len(elements))
        if where is not None:
            longer = list(elements)
            longer.insert(where, tensor)
            walk.sequences[node.outputs[0]] = longer


def _erase(walk: Walk, node: Node) -> None:
    elements = _elements(walk, node)
    if elements:
        where = _position(walk, node, 1, -1)
        if where is not None:
            shorter = list(elements)
            del shorter[where]
            walk.sequences[node.outputs[0]] = shorter


def _at(walk: Walk, node: Node) -> None:
    elements = _elements(walk, node)
    if elements:
        where = _position(walk, node, 1, 0)
        if where is not None or len(set(elements)) == 1:
            dims, kind = elements[where or 0]
            walk.dims[node.outputs[0]], walk.types[node.outputs[0]] = dims, kind


def part_sizes(length: int, split: np.ndarray | None) -> list[int]:
    """How SplitToSequence cuts an axis: into ones, into chunks of a size, or as listed."""
    if split is None:
        return [1] * length
    if split.ndim == 0:
        size = int(split)
        return [min(size, length - start) for start in range(0, length, size)]
    return [int(size) for size in split]


def _split(walk: Walk, node: Node) -> None:
    tensor = _tensor(walk, node.inputs[0])
    split = walk.value(node.input(1)) if node.input(1) else None
    if tensor is None or (node.input(1) and split is None):
        return
    dims, kind = tensor
    axis = node.attr("axis", 0) % len(dims)
    squeezed = not node.input(1) and not node.attr("keepdims", 1)
    walk.sequences[node.outputs[0]] = [
        ((*dims[:axis], *(() if squeezed else (size,)), *dims[axis + 1 :]), kind)
        for size in part_sizes(dims[axis], split)
    ]


def _concat(walk: Walk, node: Node) -> None:
    elements = _elements(walk, node)
    if not elements:
        return
    dims, kind = elements[0]
    if node.attr("new_axis", 0):
        axis = node.attr("axis") % (len(dims) + 1)
        result = (*dims[:axis], len(elements), *dims[axis:])
    else:
        axis = node.attr("axis") % len(dims)
        result = (*dims[:axis], sum(d[axis] for d, _ in elements), *dims[axis + 1 :])
    walk.dims[node.outputs[0]], walk.types[node.outputs[0]] = result, kind


def _length(walk: Walk, node: Node) -> None:
    elements = _elements(walk, node)
    if elements is not None:
        walk.values[node.outputs[0]] = np.array(len(elements), np.int64)
    walk.dims[node.outputs[0]] = ()


VISITS: dict[str, Callable[[Walk, Node], None]] = {
    "SequenceConstruct": _construct,
    "SequenceEmpty": _empty,
    "SequenceInsert": _insert,
    "SequenceErase": _erase,
    "SequenceAt": _at,
    "SplitToSequence": _split,
    "ConcatFromSequence": _concat,
    "SequenceLength": _length,
}
