"""One pass over the nodes that folds small integer values and infers what shapes follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import onnxprune.vendor_fused  # noqa: F401  registers its shape rules
from onnxprune.counted_shapes import COUNTED, most
from onnxprune.elementwise_shapes import BROADCAST, SAME, broadcast
from onnxprune.folding import FOLD_LIMIT, FOLDS, Array
from onnxprune.graph import Graph, Node
from onnxprune.operator_shapes import Cache, Dims, Kind, kind_of
from onnxprune.sequence_shapes import Elements, visit_sequence
from onnxprune.vendor import SHAPE_RULES, output_shapes

#: Operators that onnx's inference passes by: their first output has their first input's shape.
SAME_SHAPE = frozenset(("GroupNormalization", "RMSNormalization", "RotaryEmbedding", "Swish"))


@dataclass(frozen=True)
class Sizing:
    """Shapes and folded values at one assignment of numbers to the free input dimensions."""

    dims: Mapping[str, Dims]
    values: Mapping[str, Array]
    sequences: Mapping[str, Elements]


class Walk:
    """One pass over the nodes that folds small integer values and fills in missing shapes."""

    def __init__(
        self,
        graph: Graph,
        base: Walk | None,
        enter: Callable[[Walk, Node], None],
        cache: Cache,
        made_up: int,
        counting: bool,
    ) -> None:
        self.graph = graph
        self.base = base
        self.enter = enter
        self.cache = cache
        self.recorded: Mapping[str, onnx.ValueInfoProto] = {}
        self.dims: dict[str, Dims] = {}
        self.types: dict[str, int] = dict(base.types) if base else {}
        self.values: dict[str, Array] = {}
        self.sequences: dict[str, Elements] = {}
        self.made_up, self.counting = made_up, counting
        self.counts = False
        self.found = Sizing(self.dims, self.values, self.sequences)

    @cached_property
    def missing(self) -> list[str]:
        """Tensors outside of bodies, sequences aside, whose shape the walk did not find."""
        if self.graph.producer.keys() <= self.dims.keys():
            return []
        names = (name for node in self.graph.top for name in node.outputs if name)
        return [name for name in names if name not in self.dims and name not in self.sequences]

    @property
    def unknown(self) -> int:
        """A length that data decide: the same one for all, as some have to be equal."""
        self.counts = True
        return self.made_up

    def note(self, name: str, kind: Kind | None) -> None:
        """Tensor `name` has this type, and this shape if it is complete."""
        if kind is not None:
            self.types[name], dims = kind
            if dims is not None:
                self.dims[name] = dims

    def _note_recorded(self, node: Node) -> None:
        for name in node.outputs:
            value = self.recorded.get(name)
            if value is not None:
                self.note(name, kind_of(value.type))

    def is_same(self, name: str) -> bool:
        """Whether the other assignment gave tensor `name` this shape and value."""
        assert self.base is not None
        dims = self.dims.get(name)
        return (
            dims is not None
            and dims == self.base.dims.get(name)
            and self.values.get(name) is self.base.values.get(name)
        )

    def copy(self, node: Node) -> None:
        """What the other assignment gave: the node reads nothing that is different here."""
        assert self.base is not None
        tables: tuple[tuple[dict[str, Any], Mapping[str, Any]], ...] = (
            (self.dims, self.base.dims),
            (self.values, self.base.values),
            (self.sequences, self.base.sequences),
        )
        for name in node.outputs:
            for mine, theirs in tables:
                if name in theirs and name not in mine:
                    mine[name] = theirs[name]

    def forget(self, name: str) -> None:
        """What was found about `name` does not hold."""
        if name not in self.graph.constants:
            self.dims.pop(name, None)
            self.values.pop(name, None)

    def value(self, name: str) -> Array | None:
        known = self.values.get(name)
        if known is None:
            constant = self.graph.constants.get(name)
            if constant is None:
                return None
            same = self.base.values.get(name) if self.base else None
            limit = 16 if constant.is_float else FOLD_LIMIT
            if same is not None:
                known = self.values[name] = same
            elif constant.size <= limit and constant.dtype != onnx.TensorProto.STRING:
                known = self.values[name] = constant.array()
        return known

    def visit(self, node: Node) -> None:
        if node.op_type == "Constant":
            return
        if node.bodies:
            self._note_recorded(node)
            self.enter(self, node)
            return
        fold = FOLDS.get(node.op_type) if node.domain == "" else None
        if fold is not None and self._fold(node, fold):
            return
        if node.op_type == "Split" and node.domain == "" and self._split(node):
            return
        if self.recorded:
            self._note_recorded(node)
        visit_sequence(self, node)
        if any(name and name not in self.dims for name in node.outputs):
            if self._elementwise(node):
                return
            self._infer(node)
            self._from_operands(node)
            self._count(node)
            source, out = node.input(0), node.outputs[0]
            if node.op_type in SAME_SHAPE and out not in self.dims and source in self.dims:
                self.dims[out] = self.dims[source]
                self.types[out] = self.types.get(source, onnx.TensorProto.FLOAT)

    def _elementwise(self, node: Node) -> bool:
        """Note the output of an operator that works element by element; False for others."""
        if node.domain != "" or not (node.op_type in SAME or node.op_type in BROADCAST):
            return False
        given = [name for name in node.inputs if name]
        if any(name not in self.dims or name not in self.types for name in given):
            return False
        dims: Dims | None = self.dims[given[0]]
        if node.op_type in BROADCAST:
            dims = broadcast(self.dims[given[0]], self.dims[given[1]])
        if dims is None:
            return False
        self.note(node.outputs[0], (self.types[given[0]], dims))
        return True

    def _apply_shape_rule(self, node: Node) -> None:
        present = [name for name in node.inputs if name]
        if any(name not in self.dims or name not in self.types for name in present):
            return
        inputs = [(self.dims[n], self.types[n]) if n else ((), 0) for n in node.inputs]
        for name, (dims, kind) in zip(node.outputs, output_shapes(node, inputs), strict=False):
            if name:
                self.dims[name], self.types[name] = dims, kind

    def _fold(self, node: Node, fold: Callable[..., Any]) -> bool:
        name = node.outputs[0]
        known = self.base.values.get(name) if self.base else None
        out = known if known is not None and self._is_unchanged(node) else None
        if out is None:
            inputs = self._operands(node)
            if inputs is None:
                return False
            try:
                out = np.asarray(fold(node, *inputs))
            except (ValueError, IndexError, TypeError, ZeroDivisionError, MemoryError):
                return False
            if out.size > FOLD_LIMIT:
                return False
            if known is not None and known.dtype == out.dtype and np.array_equal(known, out):
                out = known
        self.values[name] = out
        self.dims[name] = out.shape
        if name not in self.types:
            value = self.recorded.get(name)
            kind = value.type.tensor_type.elem_type if value else 0
            self.types[name] = kind or helper.np_dtype_to_tensor_dtype(out.dtype)
        return True

    def _split(self, node: Node) -> bool:
        """The parts of a known list of lengths."""
        whole = self.value(node.inputs[0])
        sizes = self.value(node.input(1)) if node.input(1) else node.attr("split")
        if whole is None or whole.ndim != 1 or (node.input(1) and sizes is None):
            return False
        count = len(node.outputs)
        size = -(-whole.size // count)
        ends = np.cumsum([size] * count if sizes is None else sizes)[:-1]
        for name, part in zip(node.outputs, np.split(whole, ends), strict=True):
            if name:
                self.values[name], self.dims[name] = part, part.shape
                self.types[name] = helper.np_dtype_to_tensor_dtype(part.dtype)
        return True

    def _operands(self, node: Node) -> list[Array | None] | None:
        """The values that the node computes from; None where one is not known."""
        if node.op_type in ("Shape", "Size"):
            dims = self.dims.get(node.inputs[0])
            return None if dims is None else [np.array(dims, np.int64)]
        found: list[Array | None] = []
        for name in node.inputs:
            value = self.value(name) if name else None
            if value is None and name:
                return None
            found.append(value)
        return found

    def _is_unchanged(self, node: Node) -> bool:
        """Whether the node computes from what it computes from at the other assignment."""
        assert self.base is not None
        if node.op_type in ("Shape", "Size"):
            dims = self.dims.get(node.inputs[0])
            return dims is not None and dims == self.base.dims.get(node.inputs[0])
        mine, theirs, constants = self.values, self.base.values, self.graph.constants
        for name in node.inputs:
            if name and name not in constants and mine.get(name) is not theirs.get(name, self):
                return False
        return True

    def _from_operands(self, node: Node) -> None:
        """Shapes that follow from an operand's value where onnx's inference does not look at it."""
        source, out = self.dims.get(node.input(0)), node.outputs[0]
        if node.domain or source is None or out in self.dims:
            return
        if node.op_type == "Compress" and node.attr("axis") is not None:
            condition = self.value(node.input(1))
            if condition is not None:
                axis = node.attr("axis") % len(source)
                self.dims[out] = (*source[:axis], int(condition.sum()), *source[axis + 1 :])
        elif node.op_type == "MaxUnpool" and node.input(2):
            shape = self.value(node.input(2))
            if shape is not None:
                self.dims[out] = tuple(int(n) for n in shape)
        if out in self.dims:
            self.types[out] = self.types.get(node.input(0), onnx.TensorProto.FLOAT)

    def _count(self, node: Node) -> None:
        """Shapes of which data decide one length."""
        count = COUNTED.get(node.op_type) if node.domain == "" else None
        source = self.dims.get(node.inputs[0]) if count else None
        if count is None or source is None or not self.counting:
            return
        length = min(self.unknown, most(node, source))
        for name, (dims, kind) in zip(node.outputs, count(node, source), strict=False):
            if name and name not in self.dims:
                self.dims[name] = tuple(length if n is None else n for n in dims)
                self.types[name] = kind or self.types.get(node.inputs[0], onnx.TensorProto.FLOAT)

    def _infer(self, node: Node) -> None:
        if (node.domain, node.op_type) in SHAPE_RULES:
            self._apply_shape_rule(node)
            return
        schema = self.cache.schema(node, self.graph)
        if schema is None:
            return
        given: list[Any] = []
        for name in node.inputs:
            if name and (name not in self.dims or name not in self.types):
                return
            value = self.value(name) if name else None
            content = None if value is None else (value.dtype.str, value.shape, value.tobytes())
            given.append((self.types[name], self.dims[name], content) if name else None)
        present = tuple(map(bool, node.outputs))
        attributes = self.cache.attribute_key(node)
        key = (node.op_type, node.domain, attributes, present, tuple(given))
        if key not in self.cache.outputs:
            self.cache.outputs[key] = self._ask(node, schema)
        for name, kind in zip(node.outputs, self.cache.outputs[key], strict=True):
            if name:
                self.note(name, kind)

    def _ask(self, node: Node, schema: onnx.defs.OpSchema) -> list[Kind | None]:
        """What onnx infers for each output of the node."""
        names = {name for name in node.inputs if name}
        kinds = {n: helper.make_tensor_type_proto(self.types[n], self.dims[n]) for n in names}
        values = {name: self.value(name) for name in names}
        data = {
            name: numpy_helper.from_array(np.asarray(value, order="C"), name)
            for name, value in values.items()
            if value is not None
        }
        try:
            outputs = onnx.shape_inference.infer_node_outputs(
                schema,
                node.proto,
                kinds,
                data,
                opset_imports=list(self.graph.model.opset_import),
                ir_version=self.graph.model.ir_version,
            )
        except Exception:  # a node that cannot be inferred leaves its outputs unknown
            return [None] * len(node.outputs)
        found = (outputs.get(name) for name in node.outputs)
        return [None if kind is None else kind_of(kind) for kind in found]
