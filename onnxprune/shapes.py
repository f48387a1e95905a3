"""Every tensor's shape and every small integer value, at two sizes of the free dimensions.

Shapes are data in ONNX: exporters compute reshape targets by long Shape/Gather/Concat chains. With
every free input dimension given a number, such chains fold to constants, and each shape becomes
known. Doing so at two sizes tells which dimensions are fixed (equal at both) and which follow the
input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import onnxprune.vendor_fused  # noqa: F401  registers its shape rules
from onnxprune.elementwise_shapes import BROADCAST, SAME, broadcast
from onnxprune.folding import FOLD_LIMIT, FOLDS
from onnxprune.graph import Constant, Graph, Node
from onnxprune.measured import Numbers, measure
from onnxprune.operator_shapes import Cache, Kind, kind_of
from onnxprune.protos import reads
from onnxprune.sequence_shapes import Elements, visit_sequence
from onnxprune.skeleton import Skeleton
from onnxprune.vendor import SHAPE_RULES, output_shapes

Array = NDArray[Any]
Dims = tuple[int, ...]
#: Operators that onnx's inference passes by: their first output has their first input's shape.
SAME_SHAPE = frozenset(("GroupNormalization", "RMSNormalization", "RotaryEmbedding", "Swish"))
#: With one Shape node among so many nodes or fewer, shapes are taken to be computed in the graph.
NODES_PER_SHAPE = 40
#: Numbers tried for (first, other) dimensions of the inputs; they differ in every free dimension.
SIZES = (((2, 64), (3, 96)), ((2, 16), (3, 32)), ((1, 224), (2, 256)))


@dataclass(frozen=True)
class Sizing:
    """Shapes and folded values at one assignment of numbers to the free input dimensions."""

    dims: Mapping[str, Dims]
    values: Mapping[str, Array]
    sequences: Mapping[str, Elements]


@dataclass(frozen=True)
class Shapes:
    """Shapes at two assignments. A dimension with the same number in both is fixed.

    Not so in `measured` tensors, whose shapes were read off two runs: what follows data may be the
    same by chance, or because both runs reached a limit.
    """

    first: Sizing
    second: Sizing
    types: Mapping[str, int]
    constants: Mapping[str, Constant]
    measured: frozenset[str] = frozenset()

    def dims(self, name: str) -> Dims | None:
        """The shape at the first assignment, None where even the rank is unknown."""
        return self.first.dims.get(name)

    def value(self, name: str) -> Array | None:
        """The folded value at the first assignment, None for what depends on data."""
        value = self.first.values.get(name)
        if value is None and name in self.constants and self.constants[name].size <= FOLD_LIMIT:
            return self.constants[name].array()
        return value

    @cached_property
    def known(self) -> frozenset[str]:
        """The tensors of known shape, and the name of what is left out."""
        return frozenset(("", *self.first.dims))

    def elements(self, name: str) -> Elements | None:
        """What a sequence holds, where its number of tensors does not follow the input."""
        a, b = self.first.sequences.get(name), self.second.sequences.get(name)
        return a if a is not None and b is not None and len(a) == len(b) else None

    def is_fixed_value(self, name: str) -> bool:
        """Whether the folded value is the same at both assignments."""
        if name in self.constants:
            return True
        if name in self.measured:
            return False
        a, b = self.first.values.get(name), self.second.values.get(name)
        return a is not None and (a is b or (b is not None and np.array_equal(a, b)))

    def is_fixed(self, name: str, axis: int) -> bool:
        """Whether axis `axis` has one length whatever the input."""
        a, b = self.first.dims.get(name), self.second.dims.get(name)
        if a is None or b is None or name in self.measured:
            return False
        return len(a) == len(b) and a[axis] == b[axis]


def infer(graph: Graph) -> Shapes:
    """Find the shape of every tensor of `graph`."""
    skeleton, cache = Skeleton(graph), Cache()
    free = _free_dims(graph)
    tried: list[tuple[list[str], Shapes, tuple[Numbers, Numbers]]] = []
    for small, large in SIZES:
        sizes: tuple[Numbers, Numbers] = (_assign(free, *small), _assign(free, *large))
        first = _at(graph, skeleton, sizes[0], cache)
        second = first if not free else _at(graph, skeleton, sizes[1], cache, first)
        found = Shapes(first.found, second.found, first.types, graph.constants)
        tried.append((first.missing, found, sizes))
        if not tried[-1][0] or not free:
            break
    missing, best, sizes = min(tried, key=lambda t: len(t[0]))
    known = measure(graph, missing, sizes) if missing else None
    if known is None:
        return best
    first = _at(graph, skeleton, sizes[0], cache, known=known[0])
    second = _at(graph, skeleton, sizes[1], cache, first, known[1])
    measured = _behind(graph, missing)
    return Shapes(first.found, second.found, first.types, graph.constants, measured)


def _behind(graph: Graph, names: Iterable[str]) -> frozenset[str]:
    """`names`, and all that is computed from them."""
    found = set(names)
    for node in graph.nodes:
        if not found.isdisjoint(reads(node.proto)):
            found.update(node.outputs)
            found.update(name for body in node.bodies for name in body.inputs)
    return frozenset(found)


def _free_dims(graph: Graph) -> dict[tuple[str, int], tuple[str, bool]]:
    """(input, axis) of each free dimension -> (its symbol, whether it leads its input)."""
    free: dict[tuple[str, int], tuple[str, bool]] = {}
    for value in graph.model.graph.input:
        if value.name in graph.constants:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") or dim.dim_value <= 0:
                symbol = dim.dim_param or f"{value.name}.{axis}"
                free[value.name, axis] = (symbol, axis == 0)
    return free


def _assign(
    free: Mapping[tuple[str, int], tuple[str, bool]], lead: int, other: int
) -> dict[tuple[str, int], int]:
    numbers: dict[str, int] = {}
    for symbol, leads in free.values():
        numbers.setdefault(symbol, lead if leads else other)
    return {where: numbers[symbol] for where, (symbol, _) in free.items()}


def _at(
    graph: Graph,
    skeleton: Skeleton,
    numbers: Mapping[tuple[str, int], int],
    cache: Cache,
    base: Walk | None = None,
    known: Mapping[str, tuple[Dims, int]] = MappingProxyType({}),
) -> Walk:
    """Shapes with `numbers` put in; unchanged values of `base`, the other one, are reused.

    Where shapes are computed in the graph, onnx's inference of the whole does not get far: the walk
    goes alone, and only what it leaves open is asked of onnx as well. `known` are shapes that were
    measured.
    """
    inputs = _inputs(graph, numbers)
    computed = sum(node.op_type == "Shape" for node in graph.top)
    if computed * NODES_PER_SHAPE > len(graph.top):
        walk = _walk(graph, inputs, (), cache, base, known)
        if not walk.missing:
            return walk
    return _walk(graph, inputs, skeleton.inferred(inputs), cache, base, known)


def _inputs(
    graph: Graph, numbers: Mapping[tuple[str, int], int]
) -> tuple[onnx.ValueInfoProto, ...]:
    inputs = onnx.GraphProto(input=graph.model.graph.input).input
    for value in inputs:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, axis) in numbers:
                dim.dim_value = numbers[value.name, axis]
    return tuple(inputs)


def _walk(
    graph: Graph,
    inputs: Iterable[onnx.ValueInfoProto],
    recorded: Iterable[onnx.ValueInfoProto],
    cache: Cache,
    base: Walk | None,
    known: Mapping[str, tuple[Dims, int]],
) -> Walk:
    from onnxprune.body_shapes import visit_bodies

    walk = Walk(graph, base, visit_bodies, cache)
    walk.recorded = {v.name: v for v in recorded if v.name not in known}
    for value in inputs:
        walk.note(value.name, kind_of(value.type))
    for constant in graph.constants.values():
        walk.dims[constant.name] = constant.dims
        walk.types[constant.name] = constant.dtype
    for name, (dims, kind) in known.items():
        walk.dims[name], walk.types[name] = dims, kind
    same = {"", *graph.constants} if base else set()
    same.update(v.name for v in inputs if base and walk.is_same(v.name))
    for node in graph.top:
        if node.op_type == "Constant":
            continue
        if base and not node.bodies and same.issuperset(node.inputs):
            walk.copy(node)
        else:
            walk.visit(node)
        if base and known.keys().isdisjoint(node.outputs):
            same.update(name for name in node.outputs if walk.is_same(name))
    return walk


class Walk:
    """One pass over the nodes that folds small integer values and fills in missing shapes."""

    def __init__(
        self,
        graph: Graph,
        base: Walk | None,
        enter: Callable[[Walk, Node], None],
        cache: Cache,
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
        self.found = Sizing(self.dims, self.values, self.sequences)

    @cached_property
    def missing(self) -> list[str]:
        """Tensors outside of bodies, sequences aside, whose shape the walk did not find."""
        if self.graph.producer.keys() <= self.dims.keys():
            return []
        names = (name for node in self.graph.top for name in node.outputs if name)
        return [name for name in names if name not in self.dims and name not in self.sequences]

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
            name: numpy_helper.from_array(np.ascontiguousarray(value), name)
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
