"""Loops that build sequences a fixed number of times become straight-line code.

What a loop carries has one shape in all its turns; a sequence that grows has not. Exporters write
such loops for splits into listed parts, where the number of turns is a constant of the file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.graph import Graph, Node
from onnxprune.protos import fresh_name

#: Loops that would become more nodes than this stay.
LIMIT = 256
_MAKERS = ("SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SplitToSequence")


def unroll_sequences(graph: Graph) -> Graph:
    """The graph with such loops unrolled; the same object where there are none.

    Names are unique over all bodies, see `onnxprune.bodies`. Only bodies of loops are copied.
    """
    turns = {node.index: _turns(graph, node) for node in graph.top if node.op_type == "Loop"}
    if not any(turns.values()):
        return graph
    taken = {name for node in graph.nodes for name in (*node.inputs, *node.outputs)}
    taken.update(graph.constants, graph.inputs, graph.outputs)
    nodes: list[onnx.NodeProto] = []
    added: list[onnx.TensorProto] = []
    for node in graph.top:
        if turns.get(node.index):
            nodes += _unrolled(node, turns[node.index], taken, added)
        else:
            nodes.append(node.proto)
    return graph.with_nodes(nodes, added)


def _turns(graph: Graph, node: Node) -> int:
    """How often the loop runs; 0 where it stays."""
    body = node.bodies[0]
    states = len(node.inputs) - 2
    plain = node.domain == "" and not any(inner.bodies for inner in body.nodes)
    grows = any(_is_sequence(graph, node, slot) for slot in range(2, len(node.inputs)))
    limit = _constant(graph, node.inputs[0])
    if not plain or not grows or len(node.outputs) != states or limit is None:
        return 0
    if len(body.proto.input[0].type.tensor_type.shape.dim) > 1 or not _goes_on(graph, node):
        return 0
    turns = int(limit.item())
    return turns if 0 < turns * len(body.nodes) <= LIMIT else 0


def _is_sequence(graph: Graph, node: Node, slot: int) -> bool:
    maker = graph.producer.get(node.inputs[slot])
    declared = node.bodies[0].proto.input[slot].type.HasField("sequence_type")
    return declared or (maker is not None and maker.op_type in _MAKERS)


def _constant(graph: Graph, name: str) -> np.ndarray | None:
    """The value of a constant that no caller can replace."""
    constant = graph.constants.get(name)
    replaceable = any(name == value.name for value in graph.model.graph.input)
    return None if constant is None or replaceable else constant.array()


def _goes_on(graph: Graph, node: Node) -> bool:
    """Whether the condition holds in every turn."""
    body = node.bodies[0]
    name = body.outputs[0]
    while name in graph.producer and graph.producer[name].op_type == "Identity":
        name = graph.producer[name].inputs[0]
    conditions = [name] if name != body.inputs[1] else []
    conditions += [node.inputs[1]] if node.inputs[1] else []
    values = [_constant(graph, condition) for condition in conditions]
    return all(value is not None and bool(value.all()) for value in values)


def _unrolled(
    node: Node, turns: int, taken: set[str], added: list[onnx.TensorProto]
) -> Iterator[onnx.NodeProto]:
    """The nodes of all turns; constants that they read are appended to `added`."""
    body = node.bodies[0]
    added += body.proto.initializer
    rank = len(body.proto.input[0].type.tensor_type.shape.dim)
    states = list(node.inputs[2:])
    for turn in range(turns):
        values = (np.full((1,) * rank, turn, np.int64), np.array(True))
        names = dict(zip(body.inputs[2:], states, strict=True))
        for name, value in zip(body.inputs, values, strict=False):
            names[name] = fresh_name(f"{name}_turn{turn}", taken)
            added.append(numpy_helper.from_array(value, names[name]))
        made = [name for inner in body.nodes for name in inner.outputs if name]
        names |= {name: fresh_name(f"{name}_turn{turn}", taken) for name in made}
        if turn == turns - 1:
            outer = zip(body.outputs[1:], node.outputs, strict=True)
            names |= {inner: name for inner, name in outer if name}
        for inner in body.nodes:
            yield _renamed(inner.proto, names, turn)
        states = [names[name] for name in body.outputs[1:]]


def _renamed(source: onnx.NodeProto, names: dict[str, str], turn: int) -> onnx.NodeProto:
    proto = onnx.NodeProto()
    proto.CopyFrom(source)
    for values in (proto.input, proto.output):
        for i, name in enumerate(values):
            values[i] = names.get(name, name)
    if proto.name:
        proto.name = f"{proto.name}_turn{turn}"
    return proto
