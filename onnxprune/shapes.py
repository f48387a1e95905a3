"""Every tensor's shape and every small integer value, at two sizes of the free dimensions.

Shapes are data in ONNX: exporters compute reshape targets by long Shape/Gather/Concat chains. With
every free input dimension given a number, such chains fold to constants, and each shape becomes
known. Doing so at two sizes tells which dimensions are fixed (equal at both) and which follow the
input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import ArrayLike

from onnxprune.body_shapes import visit_bodies
from onnxprune.counted_shapes import COUNTED
from onnxprune.folding import FOLD_LIMIT, Array
from onnxprune.graph import Constant, Graph
from onnxprune.measured import LIMIT_BYTES, Known, Numbers, Pair, measure, peak_bytes
from onnxprune.operator_shapes import Cache, Dims, kind_of
from onnxprune.protos import reads
from onnxprune.sequence_shapes import Elements
from onnxprune.shape_walk import Sizing, Walk
from onnxprune.skeleton import Skeleton

#: With one Shape node among so many nodes or fewer, shapes are taken to be computed in the graph.
NODES_PER_SHAPE = 40
#: Lengths put in for what data decide, at either assignment, where there are as many elements.
MADE_UP = (1000, 1)
#: Numbers tried for (first, other) dimensions of the inputs; they differ in every free dimension.
SIZES = (((2, 64), (3, 96)), ((2, 16), (3, 32)), ((1, 224), (2, 256)))


@dataclass(frozen=True)
class Shapes:
    """Shapes at two assignments. A dimension with the same number in both is fixed.

    Not so in `doubted` tensors, whose shapes were read off two runs, or follow data within limits:
    what follows data may be the same by chance, or because both reached a limit.
    """

    first: Sizing
    second: Sizing
    types: Mapping[str, int]
    constants: Mapping[str, Constant]
    doubted: frozenset[str] = frozenset()

    def dims(self, name: str) -> Dims | None:
        """The shape at the first assignment, None where even the rank is unknown."""
        return self.first.dims.get(name)

    def value(self, name: str) -> Array | None:
        """The folded value at the first assignment, None for what depends on data."""
        value = self.first.values.get(name)
        if value is None and name in self.constants and self.constants[name].size <= FOLD_LIMIT:
            return self.constants[name].array()
        return value

    @cached_property
    def known(self) -> frozenset[str]:
        """The tensors of known shape, and the name of what is left out."""
        return frozenset(("", *self.first.dims))

    def elements(self, name: str) -> Elements | None:
        """What a sequence holds, where its number of tensors does not follow the input."""
        a, b = self.first.sequences.get(name), self.second.sequences.get(name)
        return a if a is not None and b is not None and len(a) == len(b) else None

    def is_fixed_value(self, name: str) -> bool:
        """Whether the folded value is the same at both assignments."""
        if name in self.constants:
            return True
        if name in self.doubted:
            return False
        a, b = self.first.values.get(name), self.second.values.get(name)
        return a is not None and (a is b or (b is not None and np.array_equal(a, b)))

    def is_fixed(self, name: str, axis: int) -> bool:
        """Whether axis `axis` has one length whatever the input."""
        a, b = self.first.dims.get(name), self.second.dims.get(name)
        if a is None or b is None or name in self.doubted:
            return False
        return len(a) == len(b) and a[axis] == b[axis]


def infer(graph: Graph) -> Shapes:
    """Find the shape of every tensor of `graph`."""
    walks = _Walks(graph)
    tried: list[tuple[tuple[Numbers, Numbers], Walk, Walk]] = []
    for small, large in SIZES:
        sizes: tuple[Numbers, Numbers] = (walks.assign(*small), walks.assign(*large))
        tried.append((sizes, *walks.pair(sizes)))
        if not tried[-1][1].missing or not walks.free:
            break
    sizes, first, second = min(tried, key=lambda t: len(t[1].missing))
    doubted: frozenset[str] = frozenset()
    if first.missing:
        found = walks.measured(sizes)
        if found is not None:
            return found
    elif first.counts:
        doubted = _doubted(graph, first, second, walks.at(sizes[0], first, made_up=0))
    return Shapes(first.found, second.found, first.types, graph.constants, doubted)


class _Walks:
    """Walks over one graph, with what is remembered between them."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.skeleton, self.cache = graph, Skeleton(graph), Cache()
        self.free = _free_dims(graph)

    def assign(self, lead: int, other: int) -> dict[tuple[str, int], int]:
        """Numbers for the free dimensions: of the first axes, and of all others."""
        numbers: dict[str, int] = {}
        for symbol, leads in self.free.values():
            numbers.setdefault(symbol, lead if leads else other)
        return {where: numbers[symbol] for where, (symbol, _) in self.free.items()}

    def pair(
        self, sizes: tuple[Numbers, Numbers], known: Pair = ({}, {}), counting: bool = True
    ) -> tuple[Walk, Walk]:
        """Walks at both assignments; the same one where no length can differ."""
        one, other = MADE_UP
        first = self.at(sizes[0], known=known[0], made_up=one, counting=counting)
        if not self.free and not first.counts and not known[0]:
            return first, first
        return first, self.at(sizes[1], first, known[1], made_up=other, counting=counting)

    def measured(self, sizes: tuple[Numbers, Numbers]) -> Shapes | None:
        """Shapes with those read off two runs that cannot be inferred; None where it fails."""
        walk = self.at(sizes[0], counting=False)
        missing = walk.missing
        if peak_bytes(self.graph, walk.dims, walk.types) > LIMIT_BYTES:
            return None
        known = measure(self.graph, missing, sizes)
        if known is None:
            return None
        first, second = self.pair(sizes, known, counting=False)
        behind = _behind(self.graph, missing)
        return Shapes(first.found, second.found, first.types, self.graph.constants, behind)

    def at(
        self,
        numbers: Numbers,
        base: Walk | None = None,
        known: Known = MappingProxyType({}),
        made_up: int = MADE_UP[0],
        counting: bool = True,
    ) -> Walk:
        """Shapes with `numbers` put in; unchanged values of `base`, another walk, are reused.

        Where shapes are computed in the graph, onnx's inference of the whole does not get far: the
        walk goes alone, and only what it leaves open is asked of onnx as well. `known` are shapes
        that were measured.
        """
        graph, inputs = self.graph, _inputs(self.graph, numbers)
        make = partial(Walk, graph, base, visit_bodies, self.cache, made_up, counting)
        computed = sum(node.op_type == "Shape" for node in graph.top)
        if computed * NODES_PER_SHAPE > len(graph.top):
            walk = _walk(make(), inputs, (), known)
            if not walk.missing:
                return walk
        return _walk(make(), inputs, self.skeleton.inferred(inputs), known)


def _doubted(graph: Graph, first: Walk, second: Walk, none: Walk) -> frozenset[str]:
    """Tensors that look fixed, but have another shape or value where data leave nothing.

    A limit (at most two are kept, at least one) hides that a length follows data. What is not known
    there and is computed from such a tensor is doubted too.
    """
    hidden = frozenset(_hidden(first, second, none))
    lost = first.values.keys() - none.values.keys()
    behind = _behind(graph, hidden)
    return hidden | {name for name in behind if name not in none.dims or name in lost}


def _hidden(first: Walk, second: Walk, none: Walk) -> Iterator[str]:
    walks = (first, second, none)
    for tables in ([w.dims for w in walks], [w.values for w in walks]):
        one, other, third = tables
        for name, found in third.items():
            if one.get(name) is not found and _hides(one.get(name), other.get(name), found):
                yield name


def _hides(one: ArrayLike | None, other: ArrayLike | None, none: ArrayLike) -> bool:
    """Whether something is equal in the first two, and not in the third."""
    a, b, c = np.asarray(one), np.asarray(other), np.asarray(none)
    if one is None or other is None or a.shape != b.shape:
        return False
    return a.shape != c.shape or bool(((a == b) & (a != c)).any())


def _behind(graph: Graph, names: Iterable[str]) -> frozenset[str]:
    """`names`, and all that is computed from them."""
    found = set(names)
    for node in graph.nodes:
        if not found.isdisjoint(reads(node.proto)):
            found.update(node.outputs)
            found.update(name for body in node.bodies for name in body.inputs)
    return frozenset(found)


def _free_dims(graph: Graph) -> dict[tuple[str, int], tuple[str, bool]]:
    """(input, axis) of each free dimension -> (its symbol, whether it leads its input)."""
    free: dict[tuple[str, int], tuple[str, bool]] = {}
    for value in graph.model.graph.input:
        if value.name in graph.constants:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") or dim.dim_value <= 0:
                symbol = dim.dim_param or f"{value.name}.{axis}"
                free[value.name, axis] = (symbol, axis == 0)
    return free


def _inputs(
    graph: Graph, numbers: Mapping[tuple[str, int], int]
) -> tuple[onnx.ValueInfoProto, ...]:
    inputs = onnx.GraphProto(input=graph.model.graph.input).input
    for value in inputs:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, axis) in numbers:
                dim.dim_value = numbers[value.name, axis]
    return tuple(inputs)


def _walk(
    walk: Walk,
    inputs: Iterable[onnx.ValueInfoProto],
    recorded: Iterable[onnx.ValueInfoProto],
    known: Known,
) -> Walk:
    graph, base = walk.graph, walk.base
    walk.recorded = {v.name: v for v in recorded if v.name not in known}
    for value in inputs:
        walk.note(value.name, kind_of(value.type))
    for constant in graph.constants.values():
        walk.dims[constant.name] = constant.dims
        walk.types[constant.name] = constant.dtype
    for name, (dims, kind) in known.items():
        walk.dims[name], walk.types[name] = dims, kind
    same = {"", *graph.constants} if base else set()
    same.update(v.name for v in inputs if base and walk.is_same(v.name))
    for node in graph.top:
        if node.op_type == "Constant":
            continue
        copied = base and not node.bodies and node.op_type not in COUNTED
        if copied and same.issuperset(node.inputs):
            walk.copy(node)
        else:
            walk.visit(node)
        if base and known.keys().isdisjoint(node.outputs):
            same.update(name for name in node.outputs if walk.is_same(name))
    return walk
