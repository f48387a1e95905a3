"""Residual branches: what lies between a tensor and the Add that puts it back in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnxprune.graph import FLOATS, Graph, Node
from onnxprune.shapes import Shapes

#: Operators that make a branch worth removing.
LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"))


@dataclass(frozen=True)
class Branch:
    """output = skip + f(skip): `nodes` are those of f; `axis` holds the `width` channels."""

    output: str
    skip: str
    nodes: tuple[int, ...]
    layers: tuple[str, ...]
    axis: int
    width: int


def find_branches(graph: Graph, shapes: Shapes) -> Iterator[Branch]:
    """Every Add outside of bodies of which one operand is made from the other, of equal shape."""
    for node in graph.top:
        if node.op_type != "Add" or node.domain != "":
            continue
        for skip, inner in (node.inputs, node.inputs[::-1]):
            nodes = _between(graph, skip, inner)
            layers = tuple(n.proto.name or n.outputs[0] for n in nodes if n.op_type in LAYERS)
            if layers and _alike(shapes, skip, node.outputs[0]):
                axis = _channel_axis(shapes, nodes, skip)
                if axis is not None:
                    dims = shapes.dims(skip) or ()
                    numbers = tuple(n.index for n in nodes)
                    yield Branch(node.outputs[0], skip, numbers, layers, axis, dims[axis])
                break


def _alike(shapes: Shapes, a: str, b: str) -> bool:
    """Whether two tensors always have the same shape, and hold floats."""
    sizings = (shapes.first.dims, shapes.second.dims)
    same = all(s.get(a) is not None and s.get(a) == s.get(b) for s in sizings)
    return same and shapes.types.get(b) in FLOATS


def _between(graph: Graph, start: str, end: str) -> list[Node]:
    """The nodes on the ways from tensor `start` to tensor `end`; none where there is no way."""
    first = graph.producer[start].index if start in graph.producer else -1
    if start == end or start in graph.constants or end not in graph.producer:
        return []
    behind: set[int] = set()
    reached = {start}
    last = graph.producer[end].index
    for node in graph.top:
        if first < node.index <= last and not reached.isdisjoint(node.inputs):
            reached.update(name for name in node.outputs if name)
            behind.add(node.index)
    if end not in reached:
        return []
    needed = {end}
    found = []
    for node in reversed(graph.top):
        if node.index in behind and not needed.isdisjoint(node.outputs):
            needed.update(name for name in node.inputs if name in reached)
            found.append(node)
    return found[::-1]


def _channel_axis(shapes: Shapes, nodes: list[Node], skip: str) -> int | None:
    """Axis 1 behind convolutions, else the last; None where its length is not fixed."""
    rank = len(shapes.dims(skip) or ())
    layers = [n for n in nodes if n.op_type in LAYERS]
    axis = 1 if layers[-1].op_type in ("Conv", "ConvTranspose") else rank - 1
    return axis if 0 < axis < rank and shapes.is_fixed(skip, axis) else None
