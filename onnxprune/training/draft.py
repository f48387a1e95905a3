"""The training copy of a model while it is rewritten, and the registry of rewriting rules.

A rule takes one node and gives the nodes that replace it, or None where the node may stay. It
raises `Undifferentiable` with a reason where the node cannot be differentiated; what lies upstream
of the node is then frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Shape = tuple["int | None", ...]
Rule = Callable[[onnx.NodeProto, "Draft"], "list[onnx.NodeProto] | None"]

RULES: dict[str, Rule] = {}
OPSET = 21
INT64 = np.int64


class Undifferentiable(Exception):
    """A node has no gradient; the message is the reason that the report shows."""


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register the rewriting of one or more operators of the default domain."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


@dataclass
class Draft:
    """A graph as lists and dictionaries; `parameters` and `constants` are by tensor name.

    `buffers` are inputs that change in training without a gradient; `updates` names the output
    that holds the next value of each.
    """

    nodes: list[onnx.NodeProto]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    parameters: dict[str, NDArray[Any]]
    constants: dict[str, NDArray[Any]]
    buffers: dict[str, NDArray[Any]] = field(default_factory=dict)
    updates: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    fresh: int = 0

    def name(self, hint: str) -> str:
        """A tensor name that nothing else has."""
        self.fresh += 1
        return f"onnxprune.{hint}.{self.fresh}"

    def constant(self, value: Any, hint: str = "constant") -> str:
        """A new constant; Python floats become float32, Python ints int64."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = self.name(hint)
        self.constants[name] = array
        return name

    def shape(self, tensor: str) -> Shape | None:
        """The shape as far as it is known; None where not even the rank is."""
        for known in (self.parameters, self.constants, self.buffers):
            if tensor in known:
                return tuple(known[tensor].shape)
        return self.shapes.get(tensor)

    def rank(self, node: onnx.NodeProto, tensor: str) -> int:
        """The rank of a tensor that `node` reads."""
        shape = self.shape(tensor)
        if shape is None:
            raise Undifferentiable(f"{node.op_type}: the rank of {tensor!r} is not known")
        return len(shape)

    def static(
        self, node: onnx.NodeProto, tensor: str, axes: Sequence[int] | None = None
    ) -> list[int]:
        """The sizes of the axes (default: all), which must be known."""
        shape = self.shape(tensor)
        if shape is None:
            raise Undifferentiable(f"{node.op_type}: the shape of {tensor!r} is not known")
        sizes = [shape[a] for a in (range(len(shape)) if axes is None else axes)]
        if any(size is None for size in sizes):
            raise Undifferentiable(f"{node.op_type}: the shape {shape} of {tensor!r} is not fixed")
        return [int(size) for size in sizes if size is not None]

    def value(self, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
        """The constant that is input `index`; None where the input is absent.

        Raises:
            Undifferentiable: the input is there but not constant.
        """
        if len(node.input) <= index or not node.input[index]:
            return None
        tensor = node.input[index]
        if tensor not in self.constants:
            raise Undifferentiable(f"{node.op_type}: input {index} ({tensor!r}) is not constant")
        return self.constants[tensor]


class Builder:
    """Collects the replacement of one node."""

    def __init__(self, draft: Draft, node: onnx.NodeProto) -> None:
        self.draft = draft
        self.node = node
        self.nodes: list[onnx.NodeProto] = []

    def op(self, op_type: str, *inputs: Any, output: str | None = None, **attributes: Any) -> str:
        """Append an operator with one output; inputs that are no names become constants."""
        return self.ops(
            op_type, *inputs, outputs=[output or self.draft.name(op_type.lower())], **attributes
        )[0]

    def ops(
        self, op_type: str, *inputs: Any, outputs: Sequence[str], **attributes: Any
    ) -> list[str]:
        """Append an operator with any number of outputs."""
        names = [i if isinstance(i, str) else self.draft.constant(i) for i in inputs]
        index = len(self.nodes)
        label = f"{self.node.name or self.node.output[0]}.{op_type.lower()}{index}"
        self.nodes.append(helper.make_node(op_type, names, list(outputs), name=label, **attributes))
        return list(outputs)

    def done(self, tensor: str, output: int = 0) -> list[onnx.NodeProto]:
        """The replacement, with `tensor` as the output of the replaced node."""
        target = self.node.output[output]
        self.op("Identity", tensor, output=target)
        return self.nodes


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes by name, strings decoded."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in found.items()}


def replaced(
    node: onnx.NodeProto, inputs: Sequence[str] | None = None, **changes: Any
) -> onnx.NodeProto:
    """A copy of a node with other inputs and attributes; an attribute set to None is dropped."""
    kept = {n: v for n, v in {**attributes(node), **changes}.items() if v is not None}
    return helper.make_node(
        node.op_type,
        list(node.input if inputs is None else inputs),
        list(node.output),
        name=node.name,
        domain=node.domain,
        **kept,
    )


def tensor_info(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
    """A graph input for an array."""
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(array.dtype), list(array.shape)
    )


def to_model(draft: Draft) -> onnx.ModelProto:
    """The draft as a model: parameters and buffers are graph inputs, constants initializers."""
    used = {name for node in draft.nodes for name in node.input}
    used |= {output.name for output in draft.outputs}
    fed = {**draft.parameters, **draft.buffers}
    inputs = list(draft.inputs) + [tensor_info(n, a) for n, a in fed.items()]
    outputs = list(draft.outputs)
    outputs += [tensor_info(o, draft.buffers[n]) for n, o in draft.updates.items()]
    constants = [numpy_helper.from_array(a, n) for n, a in draft.constants.items() if n in used]
    graph = helper.make_graph(draft.nodes, "training", inputs, outputs, constants)
    graph.value_info.extend(_pooled_shapes(draft))
    model = helper.make_model(graph, opset_imports=_imports(draft.nodes))
    model.ir_version = 10
    return model


def _pooled_shapes(draft: Draft) -> list[onnx.ValueInfoProto]:
    """Shapes of what MaxPool reads: its gradient relies on them, and the runtime infers fewer."""
    names = {node.input[0] for node in draft.nodes if node.op_type == "MaxPool"}
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, draft.shapes[name])
        for name in sorted(names & draft.shapes.keys())
        if name in draft.producers
    ]


def _imports(nodes: Sequence[onnx.NodeProto]) -> list[onnx.OperatorSetIdProto]:
    domains = {node.domain for node in nodes} - {"", "ai.onnx"}
    return [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in sorted(domains))]


def infer(draft: Draft) -> None:
    """Bring shapes, types, uses and producers up to date."""
    inferred = onnx.shape_inference.infer_shapes(to_model(draft), data_prop=True)
    draft.shapes, draft.types = {}, {}
    graph = inferred.graph
    for info in [*graph.input, *graph.value_info, *graph.output]:
        tensor = info.type.tensor_type
        draft.types[info.name] = tensor.elem_type
        if tensor.HasField("shape"):
            dims = tensor.shape.dim
            draft.shapes[info.name] = tuple(
                d.dim_value if d.HasField("dim_value") else None for d in dims
            )
    for name, array in draft.constants.items():
        draft.types[name] = helper.np_dtype_to_tensor_dtype(array.dtype)
    draft.uses = {}
    for node in draft.nodes:
        for name in node.input:
            draft.uses[name] = draft.uses.get(name, 0) + 1
    for info in draft.outputs:
        draft.uses[info.name] = draft.uses.get(info.name, 0) + 1
    draft.trained = _trained(draft)
    draft.producers = {output: node for node in draft.nodes for output in node.output if output}


def _trained(draft: Draft) -> set[str]:
    """Float tensors that depend on a parameter."""
    reached = set(draft.parameters)
    for node in draft.nodes:
        if any(name in reached for name in inputs_of(node)):
            reached |= {o for o in node.output if o and is_float(draft, o)}
    return reached


def is_float(draft: Draft, tensor: str) -> bool:
    """Whether a tensor is of a float type, as far as is known."""
    return draft.types.get(tensor, TensorProto.FLOAT) in FLOATS


def inputs_of(node: onnx.NodeProto) -> Iterator[str]:
    """Every tensor a node reads, those that its subgraphs capture included."""
    yield from node.input
    for attribute in node.attribute:
        graphs = list(attribute.graphs)
        if attribute.type == onnx.AttributeProto.GRAPH:
            graphs.append(attribute.g)
        for graph in graphs:
            for inner in graph.node:
                yield from inputs_of(inner)
            yield from (o.name for o in graph.output)


FLOATS: Mapping[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
