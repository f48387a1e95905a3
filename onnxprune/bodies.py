"""Bodies of control-flow nodes, brought into a form in which one flat analysis can follow them.

A name may be defined in several bodies, and a body may hand out a tensor of the graph around it.
Afterwards every name is defined once in the whole model, and each output of a body is made by a
node of that body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
from onnx import helper

from onnxprune.graph import Body, Graph
from onnxprune.protos import bodies, fresh_name


def separate_bodies(graph: Graph) -> Graph:
    """The graph with unique names; the same object where they are, as without bodies.

    Nodes with bodies are copied, no other node and no weight outside of bodies.
    """
    found = [body for node in graph.nodes for body in node.bodies]
    if not found or _is_separate(graph, found):
        return graph
    taken = _names(graph)
    protos = []
    for node in graph.top:
        proto = node.proto
        if node.bodies:
            proto = onnx.NodeProto()
            proto.CopyFrom(node.proto)
            for body in bodies(proto):
                _rename(body, taken, {})
        protos.append(proto)
    return graph.with_nodes(protos)


def _names(graph: Graph) -> set[str]:
    """What is defined outside of bodies."""
    proto = graph.model.graph
    taken = {value.name for value in proto.input} | {tensor.name for tensor in graph.initializers}
    taken.update(tensor.values.name for tensor in proto.sparse_initializer)
    taken.update(name for node in graph.top for name in node.outputs if name)
    return taken


def _is_separate(graph: Graph, found: Sequence[Body]) -> bool:
    """Whether `_rename` would change nothing."""
    taken = _names(graph)
    for body in found:
        own = list(dict.fromkeys(_defined(body.proto)))
        made = {name for node in body.nodes for name in node.outputs}
        if not taken.isdisjoint(own) or len(made.intersection(body.outputs)) < len(body.outputs):
            return False
        taken.update(own)
    return True


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (name for node in graph.node for name in node.output if name)


def _rename(body: onnx.GraphProto, taken: set[str], outer: Mapping[str, str]) -> None:
    names = {**outer, **{name: fresh_name(name, taken) for name in dict.fromkeys(_defined(body))}}
    made: set[str] = set()
    for value in (*body.input, *body.initializer, *body.value_info):
        value.name = names.get(value.name, value.name)
    for tensor in body.sparse_initializer:
        tensor.values.name = names.get(tensor.values.name, tensor.values.name)
    for node in body.node:
        for names_of in (node.input, node.output):
            for i, name in enumerate(names_of):
                names_of[i] = names.get(name, name)
        made.update(node.output)
        for inner in bodies(node):
            _rename(inner, taken, names)
    for value in body.output:
        name = names.get(value.name, value.name)
        if name not in made:
            value.name = fresh_name(f"{name}_out", taken)
            body.node.append(helper.make_node("Identity", [name], [value.name], name=value.name))
        else:
            made.discard(name)  # a second output of the same name gets a node of its own
            value.name = name
