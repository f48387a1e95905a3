"""What a rewrite may read after pruning is decided, and how it states its changes.

Shapes are data: reshape targets, split sizes, slice bounds, group counts follow from what is left
of the tensors that they describe. Rewrites state edits; `onnxprune.passes.apply` carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxprune.coupling import Coupling, Shuffle
from onnxprune.errors import VerificationError
from onnxprune.graph import Node
from onnxprune.labels import Block, Labels, Layout
from onnxprune.operator_shapes import Dims

Array = NDArray[Any]
Mask = NDArray[np.bool_]


@dataclass
class Edits:
    """Changes to a graph, keyed by node position; `operands` become initializers."""

    attributes: dict[int, dict[str, Any]] = field(default_factory=dict)
    dropped: dict[int, set[str]] = field(default_factory=dict)
    operands: dict[tuple[int, int], Array] = field(default_factory=dict)
    overrides: dict[tuple[int, int], tuple[Array, Array]] = field(default_factory=dict)
    gathers: dict[int, tuple[str, int, Array]] = field(default_factory=dict)
    bypassed: set[int] = field(default_factory=set)
    unrecorded: set[str] = field(default_factory=set)
    reshapes: dict[int, tuple[str, Array]] = field(default_factory=dict)
    remaps: dict[int, Array] = field(default_factory=dict)


class Rewriter:
    """The graph before, and what is left of every axis after: `keep[unit]`."""

    def __init__(self, coupling: Coupling, keep: Mask) -> None:
        self.coupling = coupling
        self.shapes = coupling.shapes
        self.keep_label = keep[coupling.solution.unit]
        self.edits = Edits()
        self._left: dict[int, tuple[Block, dict[int, int]]] = {}
        self._shuffles = {s.target: s for s in coupling.shuffles}

    # -- reading -----------------------------------------------------------------------------------

    def mask(self, labels: Labels) -> Mask:
        """Which of these labels stay; frozen ones always do."""
        kept: Mask = self.keep_label[np.maximum(labels, 0)]
        return kept

    def count(self, labels: Labels) -> int:
        """How many of these labels stay."""
        return int(self.mask(labels).sum())

    def layout(self, node: Node, slot: int) -> Layout:
        """The labels of input `slot`."""
        name = node.input(slot)
        name = self.coupling.aliases.get(name, name)
        uses = self.coupling.constants.get(name)
        if uses is not None:
            return uses.get((node.index, slot), ())
        return self.coupling.layouts.get(name, ())

    def labels(self, node: Node, slot: int, axis: int) -> Labels | None:
        """The labels of one axis of input `slot`."""
        return self._axis_labels(self.layout(node, slot), axis)

    def layout_labels(self, name: str, axis: int) -> Labels | None:
        """The labels of one axis of an activation."""
        return self._axis_labels(self.coupling.layouts.get(name, ()), axis)

    def _axis_labels(self, layout: Layout, axis: int) -> Labels | None:
        for block in layout:
            if axis in block.axes:
                if not block.joint:
                    return block.labels
                settled = self.coupling.settled.get(id(block))
                return settled[1][axis] if settled else None
        return None

    def dims(self, node: Node, slot: int) -> Dims:
        """The shape of input `slot` before pruning."""
        return self.shapes.dims(node.input(slot)) or ()

    def out_dims(self, node: Node, index: int = 0) -> Dims:
        """The shape of output `index` before pruning."""
        return self.shapes.dims(node.outputs[index]) or ()

    def dims_after(self, node: Node, slot: int) -> Dims:
        """The shape of input `slot` after pruning."""
        return self.resized(self.dims(node, slot), self.layout(node, slot))

    def out_dims_after(self, node: Node, index: int = 0) -> Dims:
        """The shape of output `index` after pruning."""
        return self.resized(
            self.out_dims(node, index), self.coupling.layouts.get(node.outputs[index], ())
        )

    def resized(self, dims: Dims, layout: Layout) -> Dims:
        """What is left of a tensor's shape, by its labels."""
        after = list(dims)
        for block in layout:
            known = self._left.get(id(block))
            if known is None:
                known = self._left[id(block)] = (block, self._lengths(block))
            for axis, length in known[1].items():
                after[axis] = length
        return tuple(after)

    def _lengths(self, block: Block) -> dict[int, int]:
        """How many indices are left along each axis of a block."""
        settled = self.coupling.settled.get(id(block)) if block.joint else None
        if settled:
            return {axis: self.count(labels) for axis, labels in settled[1].items()}
        mask = self.mask(block.labels)
        if mask.ndim == 1:
            return {block.axes[0]: int(np.count_nonzero(mask))}
        others = [tuple(j for j in range(mask.ndim) if j != i) for i in range(mask.ndim)]
        lengths = (int(mask.any(axis=rest).sum()) for rest in others)
        return dict(zip(block.axes, lengths, strict=True))

    def value(self, node: Node, slot: int) -> Array | None:
        """The value of input `slot` where it does not depend on the input's size."""
        name = node.input(slot)
        return self.shapes.value(name) if name and self.shapes.is_fixed_value(name) else None

    def value_type(self, node: Node, slot: int) -> np.dtype[Any]:
        """The type of a shape operand."""
        kind = self.shapes.types.get(node.input(slot), onnx.TensorProto.INT64)
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind))

    def positions(self, labels: Labels, index: Array, *, only_kept: bool = True) -> Array:
        """Where the entries of `index` stand among what is left; entries that went are left out."""
        mask = self.mask(labels)
        place = np.cumsum(mask) - 1
        if mask[index].all():
            return np.asarray(place[index])
        return np.asarray(place[index][mask[index]])

    def node(self, index: int) -> Node:
        """The node at this position."""
        return self.coupling.graph.nodes[index]

    def shuffle(self, node: Node) -> Shuffle | None:
        """The shuffle that ends in this node."""
        return self._shuffles.get(node.outputs[0])

    def is_product(self, joint: Labels) -> bool:
        """Whether what is left of a joint block is a box."""
        mask = self.mask(joint)
        box = np.ones((), bool)
        for i in range(mask.ndim):
            others = tuple(j for j in range(mask.ndim) if j != i)
            box = np.logical_and.outer(box, mask.any(axis=others))
        return np.array_equal(box, mask)

    def axes_attribute(self, node: Node) -> list[int] | None:
        """The `axes` attribute, non-negative."""
        axes = node.attr("axes")
        return None if axes is None else [a % len(self.dims(node, 0)) for a in axes]

    # -- stating changes ---------------------------------------------------------------------------

    def set_attribute(self, node: Node, name: str, value: Any) -> None:
        """Attribute `name` gets this value."""
        self.edits.attributes.setdefault(node.index, {})[name] = value

    def drop_attribute(self, node: Node, name: str) -> None:
        """Attribute `name` is left out."""
        self.edits.dropped.setdefault(node.index, set()).add(name)

    def set_operand(self, node: Node, slot: int, value: Array) -> None:
        """Input `slot` becomes this constant."""
        self.edits.operands[node.index, slot] = value

    def replace_by_gather(self, node: Node, axis: int, index: Array, source: str = "") -> None:
        """The node becomes Gather(source or its own input, index, axis)."""
        self.edits.gathers[node.index] = (source or node.inputs[0], axis, index.astype(np.int64))

    def replace_by_reshape(self, node: Node) -> None:
        """The node becomes Reshape(its own input) to what is left of its output's shape."""
        out = node.outputs[0]
        target = [
            n if self.shapes.is_fixed(out, axis) else -1
            for axis, n in enumerate(self.out_dims_after(node))
        ]
        if target.count(-1) > 1:
            self.fail(node, "a reshape with several free lengths")
        self.edits.reshapes[node.index] = (node.inputs[0], np.array(target, np.int64))

    def hoist_gather(
        self, chain: Sequence[int], moves: Sequence[Node], axis: int, index: Array
    ) -> None:
        """The first move of a chain becomes a Gather, the others Identity; the rest follows it."""
        self.replace_by_gather(moves[0], axis, index)
        self.edits.bypassed.update(node.index for node in moves[1:])
        self.edits.unrecorded.update(self.node(i).outputs[0] for i in chain[:-1])

    def fail(self, node: Node, words: str) -> None:
        """The pruned model cannot be expressed: the caller keeps the units concerned."""
        raise VerificationError(
            f"{node.title}: {words} cannot be expressed; please report this model"
        )

    def rewrite_shape(
        self, node: Node, slot: int, axes: Sequence[int] | None, *, reshape: bool = False
    ) -> None:
        """Put pruned lengths into a shape operand, constant or computed."""
        name = node.input(slot)
        before, after = self.out_dims(node), self.out_dims_after(node)
        if before == after and not self._depends_on_removed(name):
            return
        if self.coupling.aliases.get(name, name) in self.coupling.graph.constants:
            old = [int(v) for v in self._operand(name)]
            new = self.new_target(node, old, axes, reshape=reshape)
            if new != old:
                self.set_operand(node, slot, np.array(new, np.int64))
            return
        self._override(node, slot, axes, reshape=reshape)

    def _operand(self, name: str) -> Array:
        constants = self.coupling.graph.constants
        return numpy_helper.to_array(
            constants[self.coupling.aliases.get(name, name)].tensor
        ).ravel()

    def _depends_on_removed(self, name: str) -> bool:
        elements = self.coupling.lengths.get(name, ())
        return any(not self.mask(labels).all() for element in elements for labels in element)

    def new_target(
        self, node: Node, old: list[int], axes: Sequence[int] | None, *, reshape: bool = False
    ) -> list[int]:
        """The shape operand `old` with pruned lengths; -1 and 0 of Reshape and 1 of Expand stay."""
        before, after = self.out_dims(node), self.out_dims_after(node)
        where = list(axes) if axes is not None else list(range(len(before) - len(old), len(before)))
        new = list(old)
        for i, axis in enumerate(where):
            if axis >= 0 and old[i] > 0 and before[axis] != after[axis] and old[i] == before[axis]:
                new[i] = after[axis]
        return new

    def _override(
        self, node: Node, slot: int, axes: Sequence[int] | None, *, reshape: bool
    ) -> None:
        """Replace the fixed entries of a computed shape operand."""
        name, out = node.input(slot), node.outputs[0]
        before, after = self.out_dims(node), self.out_dims_after(node)
        inner = self.dims_after(node, 0)
        value = self.shapes.value(name)
        count = len(after) if value is None else value.size
        where = list(axes) if axes is not None else list(range(len(after) - count, len(after)))
        doubted = out in self.shapes.doubted  # where no length counts as fixed
        fixed = [
            axis < 0 or self.shapes.is_fixed(out, axis) or (doubted and before[axis] != after[axis])
            for axis in where
        ]
        kept_one = [
            value is not None and not reshape and int(value.ravel()[i]) == 1 for i in range(count)
        ]
        target = [
            1 if axis < 0 or one else after[axis] for axis, one in zip(where, kept_one, strict=True)
        ]
        open_ = [i for i, f in enumerate(fixed) if not f]
        if reshape and not node.attr("allowzero", 0):
            copied = [i for i in open_ if i < len(inner) and self._same_axis(node, i)]
            for i in copied:
                target[i] = 0
            open_ = [i for i in open_ if i not in copied]
            if len(open_) == 1:
                target[open_.pop()] = -1
        if not open_:
            self.set_operand(node, slot, np.array(target, np.int64))
        else:
            mask = np.array([i not in open_ for i in range(count)])
            self.edits.overrides[node.index, slot] = (mask, np.array(target, np.int64))

    def _same_axis(self, node: Node, axis: int) -> bool:
        """Whether a free output length is the input's length on the same axis."""
        source, out = node.inputs[0], node.outputs[0]
        first, second = self.shapes.first.dims, self.shapes.second.dims
        return all(
            s.get(source, (-1,) * 9)[axis] == s.get(out, (-2,) * 9)[axis] for s in (first, second)
        ) and (first[out][axis] != second[out][axis])
