"""Vectors that several layers share because they are equal get a copy of their steps for each.

Exporters and quantizers store equal biases once. A constant that two layers read is labelled once
for each of them; behind a DequantizeLinear, Cast or Reshape it would be one tensor that ties both
layers' channels together. Matrices stay shared: a tied embedding is meant.
"""

from __future__ import annotations

import onnx

from onnxprune.graph import Graph, Node
from onnxprune.protos import fresh_name

#: Operators on constants that keep a vector a vector.
STEPS = frozenset(
    (
        "Cast",
        "DequantizeLinear",
        "Flatten",
        "QuantizeLinear",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
    )
)


def untie_vectors(graph: Graph) -> Graph:
    """The graph with one copy of such steps for each reader; the same object where none share."""
    shared = {
        node.index: node for node in _vector_steps(graph) if node.outputs[0] not in graph.leaving
    }
    if not any(len(graph.uses.get(n.outputs[0], ())) > 1 for n in shared.values()):
        return graph
    return graph.with_nodes(_with_copies(graph, shared))


def _vector_steps(graph: Graph) -> list[Node]:
    """Nodes outside of bodies that turn constant vectors into vectors."""
    vectors = {n for n, c in graph.constants.items() if c.is_vector and c.size > 1}
    known = set(graph.constants)
    found = []
    for node in graph.top:
        if (
            node.op_type in STEPS
            and node.inputs[0] in vectors
            and all(not name or name in known for name in node.inputs)
        ):
            vectors.add(node.outputs[0])
            known.add(node.outputs[0])
            found.append(node)
    return found


def _with_copies(graph: Graph, shared: dict[int, Node]) -> list[onnx.NodeProto]:
    """Backwards, so that a copy's own inputs are copied as well."""
    taken = {name for node in graph.nodes for name in (*node.inputs, *node.outputs)}
    taken |= graph.constants.keys() | {i.name for i in graph.model.graph.input}
    top = {node.index for node in graph.top}
    inside = {name for n in graph.nodes if n.index not in top for name in n.inputs}
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    made: list[onnx.NodeProto] = []
    for node in reversed(graph.top):
        protos = [onnx.NodeProto()]
        protos[0].CopyFrom(node.proto)
        if node.index in shared:
            protos += _copies(protos[0], readers.get(node.outputs[0], []), taken, inside)
        for proto in protos:
            for slot, name in enumerate(proto.input):
                readers.setdefault(name, []).append((proto, slot))
        made += protos
    return made[::-1]


def _copies(
    step: onnx.NodeProto,
    readers: list[tuple[onnx.NodeProto, int]],
    taken: set[str],
    inside: set[str],
) -> list[onnx.NodeProto]:
    """Copies of `step` for all its readers but one, which keeps it unless bodies read it too."""
    found = []
    for reader, slot in readers if step.output[0] in inside else readers[:-1]:
        copy = onnx.NodeProto()
        copy.CopyFrom(step)
        name = fresh_name(step.output[0], taken)
        copy.name, copy.output[0], reader.input[slot] = name, name, name
        found.append(copy)
    return found
