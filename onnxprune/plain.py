"""Plain layers: a linear operator, what follows it place by place, and the layers that read that.

x -> layer -> normalization, activation -> a -> pooling, flattening -> next layers. Such a layer can
go if the next ones, with new weights, make as much of x as they made of a.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from onnxprune.branches import LAYERS
from onnxprune.graph import FLOATS, Graph, Node, captured_by
from onnxprune.shapes import Shapes

#: Operators that may stand between a layer and the next: they treat all channels alike.
TAIL = frozenset(
    "AveragePool Dropout Flatten GlobalAveragePool GlobalMaxPool Identity MaxPool Pad ReduceMax "
    "ReduceMean Reshape Squeeze Transpose Unsqueeze".split()
)
_LINEAR = frozenset(("Conv", "Gemm", "MatMul"))
_NOT_INNER = LAYERS | TAIL - {"Dropout", "Identity"}
#: Inputs of the next layer above which its second moments are not gathered.
MAX_INPUTS = 4096


@dataclass(frozen=True)
class Reader:
    """A layer at node `layer` that reads `source`, and the tensor `output` with its bias added."""

    layer: int
    source: str
    output: str


@dataclass(frozen=True)
class Pool:
    """Attributes of the AveragePool that makes x as small as a is."""

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    ceil_mode: int


@dataclass(frozen=True)
class Plain:
    """a = f(W x + b): node `layer` makes it from `start`, and `end` is a.

    The `tail` nodes lie between a and the `readers`. The channels are on `axis`; `pool` is there
    where a is smaller than x along other axes. `alike`: x and a have the same shape.
    """

    layer: int
    name: str
    start: str
    end: str
    tail: tuple[int, ...]
    readers: tuple[Reader, ...]
    axis: int
    pool: Pool | None
    alike: bool


@dataclass
class _Ends:
    """What is found behind a: the nodes on the way, and the layers."""

    tail: list[int] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)


def find_plain(graph: Graph, shapes: Shapes) -> Iterator[Plain]:
    """Every layer outside of bodies of which what it gives reaches only layers."""
    held = {name for node in graph.top for name in captured_by(node.proto)} | graph.leaving
    for node in graph.top:
        if not _is_layer(graph, shapes, node):
            continue
        end = _end(graph, shapes, node, held)
        ends = _Ends()
        if end is None or not _collect(graph, shapes, end, held, ends) or not ends.readers:
            continue
        found = _plain(graph, shapes, node, end, ends)
        if found is not None:
            yield found


def _is_layer(graph: Graph, shapes: Shapes, node: Node) -> bool:
    """Whether it multiplies a float tensor with a weight of the file."""
    if node.op_type not in _LINEAR or node.domain != "" or len(node.inputs) < 2:
        return False
    weight = graph.constants.get(node.inputs[1])
    spread = node.op_type == "Gemm" and node.attr("transA", 0)
    return (
        weight is not None
        and weight.is_float
        and (node.op_type == "Conv" or len(weight.dims) == 2)
        and not spread
        and node.inputs[0] not in graph.constants
        and shapes.types.get(node.outputs[0]) in FLOATS
    )


def _dims(shapes: Shapes, name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """At both sizings; None where the shape is not known or follows data."""
    first, second = shapes.first.dims.get(name), shapes.second.dims.get(name)
    known = first is not None and second is not None and name not in shapes.doubted
    return (first, second) if known else None  # type: ignore[return-value]


def _end(graph: Graph, shapes: Shapes, layer: Node, held: set[str]) -> str | None:
    """The one tensor through which everything flows that `layer` gives; None where it branches."""
    dims = _dims(shapes, layer.outputs[0])
    reached, read = {layer.outputs[0]}, set()
    for node in graph.top:
        inputs = reached.intersection(node.inputs)
        if node.index <= layer.index or not inputs:
            continue
        inner = (
            node.op_type not in _NOT_INNER
            and not node.bodies
            and not any(node.outputs[1:])
            and all(n in reached or n in graph.constants for n in node.inputs if n)
            and dims is not None
            and _dims(shapes, node.outputs[0]) == dims
        )
        if inner:
            reached.add(node.outputs[0])
        else:
            read |= inputs
    if len(read) != 1 or not held.isdisjoint(reached):
        return None
    return read.pop()


def _collect(graph: Graph, shapes: Shapes, name: str, held: set[str], ends: _Ends) -> bool:
    """Note what reads tensor `name`; False where it is anything but a layer."""
    if name in held:
        return False
    for index, slot in graph.uses.get(name, ()):
        node = graph.nodes[index]
        if slot != 0:
            return False
        if _is_layer(graph, shapes, node):
            output = _with_bias(graph, node, held)
            ends.readers.append(Reader(node.index, name, output))
            continue
        constant = all(n in graph.constants for n in node.inputs[1:] if n)
        if node.op_type not in TAIL or not constant or any(node.outputs[1:]):
            return False
        ends.tail.append(node.index)
        if not _collect(graph, shapes, node.outputs[0], held, ends):
            return False
    return True


def _with_bias(graph: Graph, layer: Node, held: set[str]) -> str:
    """What a MatMul gives once its bias is added; else what the layer gives."""
    output = layer.outputs[0]
    uses = graph.uses.get(output, ())
    if layer.op_type != "MatMul" or len(uses) != 1 or output in held:
        return output
    follower = graph.nodes[uses[0][0]]
    width = graph.constants[layer.inputs[1]].dims[-1]
    other = graph.constants.get(follower.input(1 - uses[0][1]))
    is_bias = follower.op_type == "Add" and other is not None and other.dims == (width,)
    return follower.outputs[0] if is_bias else output


def _plain(graph: Graph, shapes: Shapes, layer: Node, end: str, ends: _Ends) -> Plain | None:
    """None where x cannot take the place of a, or the next layers would be too wide."""
    start = layer.inputs[0]
    old, new = _dims(shapes, start), _dims(shapes, end)
    if old is None or new is None or len(old[0]) != len(new[0]) or start == end:
        return None
    axis = 1 if layer.op_type == "Conv" else len(old[0]) - 1
    if not (shapes.is_fixed(start, axis) and shapes.is_fixed(end, axis)):
        return None
    ratio = old[0][axis] / new[0][axis]
    sizes = [tuple(d[:axis] + d[axis + 1 :] for d in pair) for pair in (old, new)]
    pool = None if sizes[0] == sizes[1] else _pool(layer, old, new)
    if sizes[0] != sizes[1] and pool is None:
        return None
    rigid = any(graph.nodes[i].op_type in ("Reshape", "Pad") for i in ends.tail)
    grouped = any(graph.nodes[r.layer].attr("group", 1) > 1 for r in ends.readers)
    if ratio != 1 and (rigid or grouped):
        return None
    if any(_inputs(graph, r) * ratio > MAX_INPUTS for r in ends.readers):
        return None
    name = layer.proto.name or layer.outputs[0]
    tail, readers = tuple(sorted(ends.tail)), tuple(sorted(ends.readers, key=lambda r: r.layer))
    return Plain(layer.index, name, start, end, tail, readers, axis, pool, old == new)


def _inputs(graph: Graph, reader: Reader) -> int:
    """Numbers that make one number of the reader's output."""
    node = graph.nodes[reader.layer]
    dims = graph.constants[node.inputs[1]].dims
    if node.op_type == "Conv":
        return math.prod(dims[1:])
    return dims[1] if node.op_type == "Gemm" and node.attr("transB", 0) else dims[0]


def _pool(
    layer: Node, old: tuple[tuple[int, ...], ...], new: tuple[tuple[int, ...], ...]
) -> Pool | None:
    """The smallest window of means that takes the sizes of x to those of a, at both sizings."""
    if layer.op_type != "Conv" or any(o[0] != n[0] for o, n in zip(old, new, strict=True)):
        return None
    strides = tuple(layer.attr("strides") or (1,) * (len(old[0]) - 2))
    for ceil_mode in (0, 1):
        kernel = []
        for axis, stride in enumerate(strides, 2):
            pairs = [(o[axis], n[axis]) for o, n in zip(old, new, strict=True)]
            fits = (k for k in range(stride, stride + 16) if _fits(pairs, k, stride, ceil_mode))
            kernel.append(next(fits, 0))
        if all(kernel):
            return Pool(tuple(kernel), strides, ceil_mode)
    return None


def _fits(pairs: list[tuple[int, int]], kernel: int, stride: int, ceil_mode: int) -> bool:
    places = ((n - kernel + (stride - 1) * ceil_mode) // stride + 1 for n, _ in pairs)
    return all(p == m and n >= kernel for p, (n, m) in zip(places, pairs, strict=True))
