"""Residual branches: what lies between a tensor and the Add that puts it back in.

Where a block changes the shape, its Add joins two ways from one tensor: the longer is the branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnxprune.graph import FLOATS, Graph, Node
from onnxprune.shapes import Shapes

#: Operators that make a branch worth removing.
LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"))


@dataclass(frozen=True)
class Branch:
    """output = skip + f(skip): `nodes` are those of f; `axis` holds the `width` channels.

    Or output = skip + f(x), where skip itself is made from x by fewer layers.
    """

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
        ways = [(n, s) for s, i in (node.inputs, node.inputs[::-1]) if (n := _between(graph, s, i))]
        for nodes, skip in ways or _longer(graph, *node.inputs):
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


def _longer(graph: Graph, one: str, other: str) -> list[tuple[list[Node], str]]:
    """What only the operand with more layers is made by, and the other operand.

    Nothing where both have as many, or where they do not come from one tensor.
    """
    behind = [_behind(graph, name) for name in (one, other)]
    shared = behind[0] & behind[1]
    own = [[graph.nodes[i] for i in sorted(of - shared)] for of in behind]
    read = [
        {n for node in of for n in node.inputs} - {n for m in of for n in m.outputs} for of in own
    ]
    sources = [{n for n in of if n and n not in graph.constants} for of in read]
    counts = [sum(n.op_type in LAYERS for n in of) for of in own]
    if counts[0] == counts[1] or min(counts) == 0 or not sources[0] & sources[1]:
        return []
    longer = int(counts[1] > counts[0])
    return [(own[longer], (other, one)[longer])]


def _behind(graph: Graph, name: str) -> set[int]:
    """Positions of the nodes outside of bodies that a tensor is made by."""
    found: set[int] = set()
    waiting = [name]
    while waiting:
        node = graph.producer.get(waiting.pop())
        if node is not None and node.index not in found:
            found.add(node.index)
            waiting += node.inputs
    return found


def _channel_axis(shapes: Shapes, nodes: list[Node], skip: str) -> int | None:
    """Axis 1 behind convolutions, else the last; None where its length is not fixed."""
    rank = len(shapes.dims(skip) or ())
    layers = [n for n in nodes if n.op_type in LAYERS]
    axis = 1 if layers[-1].op_type in ("Conv", "ConvTranspose") else rank - 1
    return axis if 0 < axis < rank and shapes.is_fixed(skip, axis) else None
