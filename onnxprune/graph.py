"""A read-only index over a ModelProto: nodes in topological order, constants, producers and uses.

The proto stays the source of truth; nothing here copies weights or mutates the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxprune.errors import InvalidModelError
from onnxprune.protos import bodies, copy_fields, may_hold_graphs, topological_order

Array = NDArray[Any]
FLOATS = frozenset(
    getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
)
_VALUE_FIELDS = ("value_int", "value_ints", "value_float", "value_floats")


#: How values of the common types are read from an attribute.
_DECODERS: dict[int, Callable[[onnx.AttributeProto], Any]] = {
    onnx.AttributeProto.FLOAT: lambda a: a.f,
    onnx.AttributeProto.INT: lambda a: a.i,
    onnx.AttributeProto.STRING: lambda a: a.s,
    onnx.AttributeProto.TENSOR: lambda a: a.t,
    onnx.AttributeProto.INTS: lambda a: list(a.ints),
    onnx.AttributeProto.FLOATS: lambda a: list(a.floats),
}
#: How the common element types lie in `raw_data`.
RAW_TYPES: dict[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype("<f4"),
    onnx.TensorProto.FLOAT16: np.dtype("<f2"),
    onnx.TensorProto.DOUBLE: np.dtype("<f8"),
    onnx.TensorProto.INT64: np.dtype("<i8"),
    onnx.TensorProto.INT32: np.dtype("<i4"),
}


def _decode(attribute: onnx.AttributeProto) -> Any:
    decode = None if attribute.ref_attr_name else _DECODERS.get(attribute.type)
    return helper.get_attribute_value(attribute) if decode is None else decode(attribute)


class Node:
    """One operator call.

    `inputs` and `outputs` are tensor names, empty where an optional one is absent.
    """

    __slots__ = (
        "_attributes",
        "bodies",
        "domain",
        "index",
        "inputs",
        "op_type",
        "outputs",
        "proto",
    )

    def __init__(self, proto: onnx.NodeProto) -> None:
        self.index = -1
        self.proto = proto
        self.op_type: str = proto.op_type
        domain = proto.domain
        self.domain: str = "" if domain == "ai.onnx" else domain
        self.inputs: tuple[str, ...] = tuple(proto.input)
        self.outputs: tuple[str, ...] = tuple(proto.output)
        self.bodies: tuple[Body, ...] = ()
        self._attributes: dict[str, Any] | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """Attribute values by name, decoded on first use."""
        if self._attributes is None:
            self._attributes = {a.name: _decode(a) for a in self.proto.attribute}
        return self._attributes

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of attribute `name`, or `default`."""
        return self.attributes.get(name, default)

    @property
    def title(self) -> str:
        """How reports name this node."""
        return f"{self.op_type} {self.proto.name or self.outputs[0] or self.index}"

    def input(self, slot: int) -> str:
        """The tensor name in input `slot`, empty where absent."""
        return self.inputs[slot] if slot < len(self.inputs) else ""


@dataclass(frozen=True)
class Body:
    """A graph in an attribute of a control-flow node: a branch, or what a loop repeats."""

    attribute: str
    proto: onnx.GraphProto
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor whose value is in the file: an initializer, or the output of a Constant node."""

    name: str
    dims: tuple[int, ...]
    dtype: int
    tensor: onnx.TensorProto
    node: Node | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def is_vector(self) -> bool:
        """At most one axis is longer than 1: biases, scales and other per-channel parameters."""
        return self.size == max(self.dims, default=1)

    @property
    def is_float(self) -> bool:
        """A floating point type, as trained weights are."""
        return self.dtype in FLOATS

    def array(self) -> Array:
        """The value; a view where the proto allows it."""
        kind = RAW_TYPES.get(self.dtype)
        if kind is None or not self.tensor.HasField("raw_data"):
            return numpy_helper.to_array(self.tensor)
        return np.frombuffer(self.tensor.raw_data, kind).reshape(self.dims)


@dataclass(frozen=True)
class Graph:
    """The index over `model`.

    `nodes` holds every node, those in bodies behind the node that they belong to; `node.index` is
    the position in it. `top` are the nodes outside of bodies, in topological order. Names are
    unique over all bodies (see `onnxprune.bodies`). `leaving` are the outputs of the model and of
    all bodies.

    `model` is where all the rest is; after `without` it has no nodes and initializers of its own,
    so that weights are never copied. `initializers` are those outside of bodies.
    """

    model: onnx.ModelProto
    initializers: tuple[onnx.TensorProto, ...]
    nodes: tuple[Node, ...]
    top: tuple[Node, ...]
    constants: Mapping[str, Constant]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opsets: Mapping[str, int]
    leaving: frozenset[str]

    @classmethod
    def of(
        cls, model: onnx.ModelProto, initializers: Iterable[onnx.TensorProto] | None = None
    ) -> Graph:
        """Index `model`; its initializers may be given apart.

        Raises:
            InvalidModelError: the graph has a cycle or a tensor that nothing produces.
        """
        own = model.graph.initializer if initializers is None else initializers
        return cls._index(model, _read(model.graph.node), tuple(own))

    @classmethod
    def _index(
        cls,
        model: onnx.ModelProto,
        top: tuple[Node, ...],
        initializers: tuple[onnx.TensorProto, ...],
        known: Mapping[str, Constant] = MappingProxyType({}),
    ) -> Graph:
        """Index these parts; `known` are constants that were read before."""
        nodes: list[Node] = []
        _number(top, nodes)
        found = [body for node in nodes for body in node.bodies]
        constants: dict[str, Constant] = {}
        for several in (initializers, *(body.proto.initializer for body in found)):
            for tensor in several:
                name = tensor.name
                constants[name] = known.get(name) or _initializer(tensor)
        for node in nodes:
            if node.op_type == "Constant" and node.domain == "":
                value = known.get(node.outputs[0]) or _constant_node(node)
                if value is not None:
                    constants[value.name] = value
        outputs = tuple(o.name for o in model.graph.output)
        return cls(
            model=model,
            initializers=initializers,
            nodes=tuple(nodes),
            top=top,
            constants=constants,
            inputs=tuple(n for n in (i.name for i in model.graph.input) if n not in constants),
            outputs=outputs,
            opsets={
                ("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import
            },
            leaving=frozenset(outputs).union(*(body.outputs for body in found)),
        )

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """The node that makes a tensor."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def uses(self) -> Mapping[str, tuple[tuple[int, int], ...]]:
        """Who reads a tensor: (position of the node, input slot)."""
        uses: dict[str, list[tuple[int, int]]] = {}
        for node in self.nodes:
            for slot, name in enumerate(node.inputs):
                if name:
                    uses.setdefault(name, []).append((node.index, slot))
        return {name: tuple(where) for name, where in uses.items()}

    def without(
        self, nodes: Set[int], tensors: Set[str], added: Iterable[onnx.TensorProto]
    ) -> Graph:
        """The graph without these nodes (by position) and initializers, with others added.

        It takes the nodes over: they get new positions, and this graph is used up.
        """
        made = {name for index in nodes for name in self.nodes[index].outputs}
        top = tuple(node for node in self.top if node.index not in nodes)
        kept = (tensor for tensor in self.initializers if tensor.name not in tensors)
        return Graph._index(head(self.model, made), top, (*kept, *added), self.constants)

    def with_nodes(
        self, protos: Iterable[onnx.NodeProto], added: Iterable[onnx.TensorProto] = ()
    ) -> Graph:
        """The graph with these nodes outside of bodies in place of its own, and more tensors."""
        top = _read(protos)
        return Graph._index(head(self.model), top, (*self.initializers, *added))

    def whole(self) -> onnx.ModelProto:
        """The model with all nodes and initializers: `model` itself where it has them."""
        if self.model.graph.node:
            return self.model
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.graph.node.extend(node.proto for node in self.top)
        model.graph.initializer.extend(self.initializers)
        return model

    @property
    def opset(self) -> int:
        """The version of the standard operator set."""
        return self.opsets.get("", 1)


def _initializer(tensor: onnx.TensorProto) -> Constant:
    return Constant(tensor.name, tuple(tensor.dims), tensor.data_type, tensor)


def _constant_node(node: Node) -> Constant | None:
    name = node.outputs[0]
    for attribute in node.proto.attribute:
        if attribute.name == "value":
            t = attribute.t
            return Constant(name, tuple(t.dims), t.data_type, t, node)
        if attribute.name in _VALUE_FIELDS:
            kind = np.int64 if "int" in attribute.name else np.float32
            value = np.asarray(helper.get_attribute_value(attribute), kind)
            tensor = numpy_helper.from_array(value, name)
            return Constant(name, value.shape, tensor.data_type, tensor, node)
    return None


def head(model: onnx.ModelProto, made: Set[str] = frozenset()) -> onnx.ModelProto:
    """A copy without nodes, initializers, and what is recorded about the tensors in `made`."""
    copy = onnx.ModelProto()
    copy_fields(model, copy, {"graph"})
    copy_fields(model.graph, copy.graph, {"node", "initializer", "value_info"})
    recorded = model.graph.value_info
    copy.graph.value_info.extend(value for value in recorded if value.name not in made)
    return copy


def _read(protos: Iterable[onnx.NodeProto]) -> tuple[Node, ...]:
    """Nodes in topological order, with those of the bodies in them."""
    nodes = _topological([Node(proto) for proto in protos])
    for node in nodes:
        if may_hold_graphs(node.domain, node.op_type):
            node.bodies = tuple(
                _body(attribute.name, inner)
                for attribute in node.proto.attribute
                for inner in ((attribute.g,) if attribute.HasField("g") else attribute.graphs)
            )
    return nodes


def _body(attribute: str, graph: onnx.GraphProto) -> Body:
    inputs, outputs = (tuple(v.name for v in values) for values in (graph.input, graph.output))
    return Body(attribute, graph, _read(graph.node), inputs, outputs)


def _number(own: Iterable[Node], nodes: list[Node]) -> None:
    """Append nodes, and behind each those of its bodies, to `nodes`."""
    for node in own:
        node.index = len(nodes)
        nodes.append(node)
        for body in node.bodies:
            _number(body.nodes, nodes)


def captured_by(proto: onnx.NodeProto) -> Iterator[str]:
    """Names that the bodies of a control-flow node take from outside."""
    for body in bodies(proto):
        yield from _free_names(body)


def _free_names(body: onnx.GraphProto) -> Iterator[str]:
    known = {i.name for i in body.input} | {i.name for i in body.initializer}
    known |= {name for node in body.node for name in node.output}
    for node in body.node:
        yield from (name for name in node.input if name and name not in known)
        yield from (name for name in captured_by(node) if name not in known)
    yield from (o.name for o in body.output if o.name not in known)


def _topological(nodes: Sequence[Node]) -> tuple[Node, ...]:
    reads = [
        (*node.inputs, *captured_by(node.proto))
        if may_hold_graphs(node.domain, node.op_type)
        else node.inputs
        for node in nodes
    ]
    order = topological_order([node.outputs for node in nodes], reads)
    if len(order) < len(nodes):
        stuck = nodes[min(set(range(len(nodes))) - set(order))]
        raise InvalidModelError(
            f"the graph has a cycle through node {stuck.proto.name or stuck.op_type!r}"
        )
    return tuple(nodes[i] for i in order)
