"""Weights that the graph computes from constants alone become constants.

Weight standardization, weight normalization, spectral normalization, low-rank updates: what a
statistic over a pruned axis of a *weight* says is settled in the file, not at run time. Each
connected part of such arithmetic is run once in ONNX Runtime and replaced by its results, wherever
these take no more room than the constants that only it read. Layout alone (a Transpose, a Concat)
stays, as labels follow it; quantizers stay, as their integers are the weights; so does randomness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.errors import OnnxPruneError
from onnxprune.graph import FLOATS, Graph, Node

#: Operators that move or repeat elements and compute none.
LAYOUT = frozenset(
    (
        "Cast",
        "Concat",
        "ConstantOfShape",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Range",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")
_DOMAINS = ("", "com.microsoft")
#: Parts that read no more than this run in one session.
BATCH_BYTES = 1 << 24


@dataclass(frozen=True)
class _Part:
    """Connected static nodes, the values of them that others read, the constants that go."""

    nodes: tuple[Node, ...]
    results: tuple[str, ...]
    freed: frozenset[str]


def fold_statics(graph: Graph) -> Graph:
    """The graph with computed weights as constants; the same object where there are none."""
    folded: dict[str, onnx.TensorProto] = {}
    gone: set[int] = set()
    freed: set[str] = set()
    for batch in _batches(graph, _parts(graph)):
        found = _run(graph, batch)
        for part in batch:
            tensors = _folded(graph, part, found)
            if tensors is not None:
                folded.update(tensors)
                gone.update(node.index for node in part.nodes)
                freed |= part.freed
    if not folded:
        return graph
    holders = (graph.constants[name].node for name in freed)
    gone |= {node.index for node in holders if node is not None}
    return graph.without(gone, freed, folded.values())


def _static_nodes(graph: Graph) -> list[Node]:
    """Nodes of which every input is a constant that no caller can replace, or computed so."""
    known = graph.constants.keys() - {i.name for i in graph.model.graph.input}
    found: list[Node] = []
    for node in graph.top:
        if not node.inputs or (node.inputs[0] and node.inputs[0] not in known):
            continue
        if (
            all(not name or name in known for name in node.inputs)
            and node.domain in _DOMAINS
            and not node.op_type.startswith(_RANDOM)
            and not node.bodies
        ):
            known |= {name for name in node.outputs if name}
            found.append(node)
    return found


def _parts(graph: Graph) -> list[_Part]:
    """The connected parts of static arithmetic that are worth folding."""
    static = _static_nodes(graph)
    if all(node.op_type in LAYOUT for node in static):
        return []
    readers = _readers(graph, static)
    parts = (_part(graph, nodes, readers) for nodes in _connected(static))
    return [part for part in parts if part is not None and _has_weights(graph, part)]


def _has_weights(graph: Graph, part: _Part) -> bool:
    return any(graph.constants[name].is_float for name in _constants(graph, part.nodes))


def _readers(graph: Graph, nodes: Sequence[Node]) -> Mapping[str, list[int]]:
    """The positions of the nodes that read what `nodes` read and make."""
    readers: dict[str, list[int]] = {n: [] for node in nodes for n in (*node.inputs, *node.outputs)}
    for node in graph.nodes:
        for name in node.inputs:
            if name in readers:
                readers[name].append(node.index)
    return readers


def _connected(nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes that pass values to each other, in the order of their first node."""
    maker = {name: node.index for node in nodes for name in node.outputs if name}
    root = {node.index: node.index for node in nodes}

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    for node in nodes:
        for name in node.inputs:
            if name in maker:
                a, b = sorted((find(maker[name]), find(node.index)))
                root[b] = a
    parts: dict[int, list[Node]] = {}
    for node in nodes:
        parts.setdefault(find(node.index), []).append(node)
    return list(parts.values())


def _part(graph: Graph, nodes: Sequence[Node], readers: Mapping[str, list[int]]) -> _Part | None:
    """The part that `nodes` are; None where nothing is computed, or a quantizer is among them."""
    if all(n.op_type in LAYOUT for n in nodes) or any("uantize" in n.op_type for n in nodes):
        return None
    inside = {node.index for node in nodes}
    results = [
        name
        for node in nodes
        for name in node.outputs
        if name and (_read_outside(readers[name], inside) or name in graph.leaving)
    ]
    if not results or any(name in graph.leaving for name in results):
        return None
    freed = {
        name
        for name in _constants(graph, nodes)
        if not _read_outside(readers[name], inside) and name not in graph.leaving
    }
    return _Part(tuple(nodes), tuple(dict.fromkeys(results)), frozenset(freed))


def _read_outside(readers: Sequence[int], inside: set[int]) -> bool:
    return any(index not in inside for index in readers)


def _batches(graph: Graph, parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """The parts in order, as many at a time as read no more than `BATCH_BYTES`."""
    batch: list[_Part] = []
    room = 0
    for part in parts:
        size = sum(_nbytes(graph, name) for name in _constants(graph, part.nodes))
        if batch and room + size > BATCH_BYTES:
            yield batch
            batch, room = [], 0
        batch.append(part)
        room += size
    if batch:
        yield batch


def _run(graph: Graph, parts: Sequence[_Part]) -> dict[str, np.ndarray]:
    """The results of these parts; where they do not run together, of those that run alone."""
    from onnxprune import runtime

    try:
        session = runtime.session(_program(graph, parts), threads=1, optimize=False)
        return {name: np.asarray(value) for name, value in runtime.run(session, {}).items()}
    except OnnxPruneError:
        if len(parts) == 1:
            return {}
    found: dict[str, np.ndarray] = {}
    for part in parts:
        found |= _run(graph, [part])
    return found


def _folded(
    graph: Graph, part: _Part, found: Mapping[str, np.ndarray]
) -> dict[str, onnx.TensorProto] | None:
    """The results as tensors; None where they are no weights, take more room, or did not run.

    Vectors count nothing: a bias that several layers share is cut once for each anyway.
    """
    if any(name not in found for name in part.results):
        return None
    values = {name: found[name] for name in part.results}
    room = sum(_nbytes(graph, name) for name in part.freed)
    size = sum(v.nbytes for v in values.values() if v.size > max(v.shape, default=1))
    tensors = {name: numpy_helper.from_array(value, name) for name, value in values.items()}
    weights = all(t.data_type in FLOATS for t in tensors.values())
    return (
        tensors if weights and size <= room and max(v.size for v in values.values()) > 1 else None
    )


def _nbytes(graph: Graph, name: str) -> int:
    constant = graph.constants[name]
    return constant.size * _itemsize(constant.dtype)


def _constants(graph: Graph, nodes: Sequence[Node]) -> set[str]:
    return {name for node in nodes for name in node.inputs if name in graph.constants}


def _itemsize(kind: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _program(graph: Graph, parts: Sequence[_Part]) -> onnx.ModelProto:
    """A model without inputs that computes the results."""
    source = graph.model
    model = onnx.ModelProto(ir_version=source.ir_version)
    model.opset_import.extend(source.opset_import)
    model.graph.name = "statics"
    nodes = sorted((node for part in parts for node in part.nodes), key=lambda node: node.index)
    model.graph.node.extend(node.proto for node in nodes)
    for name in dict.fromkeys(n for node in nodes for n in node.inputs):
        constant = graph.constants.get(name)
        if constant is not None:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(constant.tensor)
            tensor.name = name
    for name in (name for part in parts for name in part.results):
        model.graph.output.append(helper.make_empty_tensor_value_info(name))
    return model
