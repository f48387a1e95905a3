"""The stand-in of a model that onnx-graphsurgeon can edit, and the source that it stands for.

graphsurgeon ties equal names together, crashes on some attributes and drops others, and needs
sorted nodes with unique names; what is written here brings a model into that form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import AttributeProto, numpy_helper

from onnxprune.errors import InvalidModelError
from onnxprune.protos import bodies, copy_fields, reads, topological_order

_SCALARS: Final = (AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.TENSOR)
_LISTS: Final = {AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints"}


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without weights: functions inlined, nodes sorted, domains and names checked."""
    source = onnx.ModelProto()
    copy_fields(model, source, {"graph", "opset_import"})
    for entry in {_domain(entry.domain): entry for entry in model.opset_import}.values():
        source.opset_import.append(entry)
        if entry.domain == "ai.onnx":
            source.opset_import[-1].domain = ""
    copy_fields(model.graph, source.graph, {"initializer"})
    for tensor in model.graph.initializer:
        source.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    for function in source.functions:
        for entry in function.opset_import:
            entry.domain = _domain(entry.domain)
    if source.functions:
        source = onnx.inliner.inline_local_functions(source)
    for graph in _graphs(source.graph):
        for node in graph.node:
            if node.domain == "ai.onnx":
                node.domain = ""
    check_names(source.graph)
    sort_nodes(source.graph)
    return source


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all bodies in it, outer ones first."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from _graphs(body)


def initializer_names(graph: onnx.GraphProto) -> list[str]:
    dense = [tensor.name for tensor in graph.initializer]
    return dense + [tensor.values.name for tensor in graph.sparse_initializer]


def check_names(graph: onnx.GraphProto, outer: frozenset[str] = frozenset()) -> None:
    """Each name is defined once, here and in all scopes around: gs ties equal names together."""
    inputs = {value.name for value in graph.input}
    names = [n for n in initializer_names(graph) if n not in inputs]
    names += [value.name for value in graph.input]
    names += [name for node in graph.node for name in node.output if name]
    defined: set[str] = set()
    for name in names:
        if name in defined:
            raise InvalidModelError(
                f"value '{name}' is defined twice in graph '{graph.name}': give each its own name"
            )
        if name in outer:
            raise InvalidModelError(
                f"value '{name}' in the body '{graph.name}' hides one of the same name outside: "
                "rename it"
            )
        defined.add(name)
    for node in graph.node:
        for body in bodies(node):
            check_names(body, outer | defined)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Sort nodes by dependency, otherwise in the order that they have; bodies too."""
    for node in graph.node:
        for body in bodies(node):
            sort_nodes(body)
    nodes = list(graph.node)
    order = topological_order(
        [node.output for node in nodes], [list(reads(node)) for node in nodes]
    )
    if len(order) < len(nodes):
        stuck = nodes[min(set(range(len(nodes))) - set(order))]
        raise InvalidModelError(
            f"graph '{graph.name}' has a cycle at or before node '{stuck.name}' ({stuck.op_type})"
        )
    if order != sorted(order):
        graph.ClearField("node")
        graph.node.extend(nodes[index] for index in order)


class NodeNames:
    """Unique names for the nodes that have none or share one."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._given = [node.name for g in _graphs(graph) for node in g.node]
        self._taken = set(self._given)
        self._used: set[str] = set()
        self._count = 0

    def name(self, node: onnx.NodeProto) -> str:
        """The node's own name the first time that it comes, a new one otherwise."""
        name = node.name
        while not name or name in self._used or (name != node.name and name in self._taken):
            name = f"{node.name or node.op_type}__{self._count}"
            self._count += 1
        self._used.add(name)
        return name


def strip(graph: onnx.GraphProto, names: NodeNames) -> None:
    """Take away what gs drops or crashes on; what is left is what it can edit."""
    for node in graph.node:
        node.name = names.name(node)
        kept = [attribute for attribute in node.attribute if is_editable(attribute)]
        if len(kept) < len(node.attribute):
            node.ClearField("attribute")
            node.attribute.extend(kept)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                strip(attribute.g, names)
    for values in (graph.input, graph.output, graph.value_info):
        for value in values:
            if not value.type.tensor_type.elem_type:
                value.ClearField("type")


def is_editable(attribute: AttributeProto) -> bool:
    """Whether gs reads this attribute and writes it again."""
    kind = attribute.type
    if attribute.ref_attr_name:
        return False
    if kind in (AttributeProto.STRING, AttributeProto.STRINGS):
        texts = attribute.strings if kind == AttributeProto.STRINGS else [attribute.s]
        return bool(texts) and all(map(_is_text, texts))
    if kind in _LISTS:
        return bool(getattr(attribute, _LISTS[kind]))
    return kind == AttributeProto.GRAPH or kind in _SCALARS


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def dense(sparse: onnx.SparseTensorProto) -> NDArray[Any]:
    """The array that a sparse tensor stands for; its indices are linear or one row a value."""
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    array = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        array.reshape(-1)[indices] = values
    else:
        array[tuple(indices.T)] = values
    return array
