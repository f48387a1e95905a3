"""Values computed from the length of a prunable axis, followed to where they are used.

A length that ends as a reshape target, an expand size, a slice bound is rewritten or comes out
right by itself. One that enters other arithmetic (a scale 1/sqrt(d), a position) keeps its old
value, so that removal equals zeroing; where that follows the input's size too, the axis is frozen.
"""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune.coupling import Interpreter, Lengths, Pin
from onnxprune.folding import FOLDS
from onnxprune.graph import Node
from onnxprune.labels import Labels

_INTEGERS = frozenset((onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL))
#: Input slots that take shapes: (operator, slot).
SHAPE_SLOTS = frozenset(
    [
        ("Reshape", 1),
        ("Expand", 1),
        ("ConstantOfShape", 0),
        ("Resize", 3),
        ("Split", 1),
        ("MaxUnpool", 2),
    ]
    + [("Slice", slot) for slot in (1, 2, 3, 4)]
)
_KEEP = frozenset(("Unsqueeze", "Squeeze", "Identity", "Cast", "Reshape", "Flatten"))


def follow(state: Interpreter, node: Node) -> bool:
    """Pass on lengths through integer arithmetic; True where the node needs no other rule."""
    if node.op_type in ("Shape", "Size") and node.domain == "":
        _shape(state, node)
        return True
    out = node.outputs[0]
    integer = state.shapes.types.get(out) in _INTEGERS
    if state.lengths.keys().isdisjoint(node.inputs):
        known = integer and state.shapes.value(out) is not None
        return known and not _has_labels(state, node) and not _is_static(state, node)
    tainted = [s for s, name in enumerate(node.inputs) if name in state.lengths]
    if node.op_type == "Split" and node.domain == "" and tainted == [0] and integer:
        _split(state, node)
        return True
    folds = integer and node.domain == "" and node.op_type in FOLDS and node.op_type != "Range"
    if folds and (node.op_type, tainted[0]) not in SHAPE_SLOTS:
        state.lengths[out] = _combine(state, node, tainted)
        return True
    for slot in tainted:
        if (node.op_type, slot) not in SHAPE_SLOTS:
            _keep_old(state, node, slot)
    return False


def _keep_old(state: Interpreter, node: Node, slot: int) -> None:
    name = node.inputs[slot]
    parts = [labels.ravel() for labels in _all(state.lengths[name])]
    whole = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if state.shapes.value(name) is not None and state.shapes.is_fixed_value(name):
        state.pins.append(Pin(node.index, slot, whole))
    else:
        state.freeze(node, whole, f"its length is used in arithmetic by {node.title}")


def _has_labels(state: Interpreter, node: Node) -> bool:
    return not state.layouts.keys().isdisjoint(node.inputs) and any(
        state.layouts.get(name) for name in node.inputs
    )


def _is_static(state: Interpreter, node: Node) -> bool:
    """Whether the node only reads constants: they may belong to channels."""
    return all(state.is_static(node, slot) for slot, name in enumerate(node.inputs) if name)


def _shape(state: Interpreter, node: Node) -> None:
    name = node.inputs[0]
    rank = len(state.shapes.dims(name) or ())
    found: dict[int, tuple[Labels, ...]] = {}
    for block in state.settle_all(state.layouts.get(name, ()), node):
        if (block.labels > 0).any():
            found[block.axes[0]] = (block.labels,)
    if found:
        whole = tuple(found.get(axis, ()) for axis in range(rank))
        part = whole[node.attr("start", 0) : node.attr("end", None)]
        if node.op_type == "Size":
            part = (tuple(labels for axis in whole for labels in axis),)
        if any(part):
            state.lengths[node.outputs[0]] = part


def _split(state: Interpreter, node: Node) -> None:
    """Each part of a list of lengths depends on what its elements depend on."""
    lengths, start = state.lengths[node.inputs[0]], 0
    for index, name in enumerate(node.outputs):
        end = start + (state.out_dims(node, index) or (len(lengths),))[0]
        if name and any(lengths[start:end]):
            state.lengths[name] = lengths[start:end]
        start = end


def _all(lengths: Lengths) -> list[Labels]:
    return list({id(v): v for element in lengths for v in element}.values())


def _combine(state: Interpreter, node: Node, tainted: list[int]) -> Lengths:
    value = state.shapes.value(node.outputs[0])
    count = value.size if value is not None else max(state.out_dims(node) or (1,))
    first = state.lengths[node.inputs[tainted[0]]]
    if node.op_type in _KEEP and len(first) == count:
        return first
    if node.op_type in ("Gather", "Slice") and tainted == [0]:
        return _select(state, node, first)
    if node.op_type == "Concat":
        parts: list[tuple[Labels, ...]] = []
        for slot, name in enumerate(node.inputs):
            size = max(state.dims(node, slot) or (1,))
            parts += list(state.lengths.get(name, ((),) * size))
        if len(parts) == count:
            return tuple(parts)
    union = tuple(v for slot in tainted for v in _all(state.lengths[node.inputs[slot]]))
    return (union,) * count


def _select(state: Interpreter, node: Node, lengths: Lengths) -> Lengths:
    positions = np.arange(len(lengths))
    rest = [state.shapes.value(name) if name else None for name in node.inputs[1:]]
    try:
        picked = np.ravel(FOLDS[node.op_type](node, positions, *rest))
    except (ValueError, IndexError, TypeError):
        return (tuple(_all(lengths)),) * max(1, len(lengths))
    return tuple(lengths[int(i)] for i in picked)
