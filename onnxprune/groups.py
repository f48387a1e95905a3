"""Groups: the units that one layer's width is made of, so that a budget can be spread over layers.

Units whose channels are made by the same layers (all channels of a residual stream; all heads of an
attention) form a group. A unit never belongs to two groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
from numpy.typing import NDArray

from onnxprune.coupling import Coupling
from onnxprune.errors import InvalidRecipeError
from onnxprune.labels import Labels

Units = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Group:
    """`units` are unit numbers; `width` is how many channels of its main layer one unit holds."""

    name: str
    units: Units
    width: int
    exact: bool
    producers: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of removable pieces."""
        return int(self.units.size)


def find_groups(coupling: Coupling) -> tuple[Group, ...]:
    """All groups, in the order in which the model makes them."""
    solution = coupling.solution
    count = solution.units
    signature, first, width = _signatures(coupling, count)
    inexact = np.zeros(count, bool)
    inexact[solution.unit[solution.inexact_by > 0]] = True
    candidates = np.flatnonzero((signature != 0) & (np.arange(count) > 0))
    if not candidates.size:
        return ()
    key = np.stack([first[candidates], signature[candidates], inexact[candidates]])
    _, where = np.unique(key, axis=1, return_inverse=True)
    order = np.argsort(where, kind="stable")
    edges = np.flatnonzero(np.diff(where[order])) + 1
    made_by = [(node, labels) for node, labels in coupling.products]
    return tuple(
        _group(coupling, candidates[part].astype(np.int32), inexact, width, made_by, first)
        for part in np.split(order, edges)
    )


def _signatures(coupling: Coupling, count: int) -> tuple[NDArray[np.uint64], Labels, Labels]:
    """Per unit: a number that says which layers make it, the first of them, and its width there."""
    unit = coupling.solution.unit
    signature = np.zeros(count, np.uint64)
    first = np.full(count, np.iinfo(np.int32).max, np.int32)
    width = np.ones(count, np.int32)
    keys = np.random.default_rng(0).integers(1, 1 << 62, len(coupling.products), dtype=np.uint64)
    for i, (_, labels) in enumerate(coupling.products):
        members, times = np.unique(unit[np.maximum(labels, 0)], return_counts=True)
        signature[members] += keys[i]
        fresh = members[first[members] > i]
        first[fresh] = i
        width[fresh] = times[np.isin(members, fresh)]
    return signature, first, width


def _group(
    coupling: Coupling,
    units: Units,
    inexact: NDArray[np.bool_],
    width: Labels,
    made_by: Sequence[tuple[int, Labels]],
    first: Labels,
) -> Group:
    node, _ = made_by[first[units[0]]]
    return Group(
        name=coupling.graph.nodes[node].title,
        units=units,
        width=int(width[units[0]]),
        exact=not bool(inexact[units[0]]),
        producers=(node,),
    )


def isomorphic(groups: Sequence[Group], coupling: Coupling) -> list[int]:
    """A class number for each group; groups of one class are of like shape.

    That is: as many units of the same width, in the same places (operator, input, axis, how many
    channels of it) of weights of the same shapes.
    """
    unit = coupling.solution.unit
    owner = np.full(coupling.solution.units, -1, np.int64)
    for number, group in enumerate(groups):
        owner[group.units] = number
    places: list[list[tuple[object, ...]]] = [[] for _ in groups]
    for name, uses in coupling.constants.items():
        constant = coupling.graph.constants[name]
        for (index, slot), layout in uses.items():
            for block in layout:
                found = owner[unit[np.maximum(block.labels, 0)]]
                numbers, times = np.unique(found[found >= 0], return_counts=True)
                where = (coupling.graph.nodes[index].op_type, slot, block.axes, constant.dims)
                for number, count in zip(numbers, times, strict=True):
                    places[number].append((*where, int(count)))
    classes: dict[object, int] = {}
    shapes = ((g.size, g.width, *sorted(p, key=repr)) for g, p in zip(groups, places, strict=True))
    return [classes.setdefault(shape, len(classes)) for shape in shapes]


def matching_units(coupling: Coupling, patterns: Sequence[str]) -> Units:
    """Units that touch a node or weight whose name matches one of `patterns` (shell wildcards).

    Raises:
        InvalidRecipeError: a pattern matches nothing.
    """
    unit = coupling.solution.unit
    found: set[int] = set()
    graph = coupling.graph
    for pattern in patterns:
        nodes = {
            n.index
            for n in graph.nodes
            if fnmatch(n.proto.name, pattern) or fnmatch(n.title, pattern)
        }
        hit = bool(nodes)
        for name, uses in coupling.constants.items():
            named = fnmatch(name, pattern)
            hit |= named
            for (index, _), layout in uses.items():
                if named or index in nodes:
                    for block in layout:
                        found.update(unit[np.maximum(block.labels, 0)].tolist())
        if not hit:
            raise InvalidRecipeError(
                f"--keep {pattern!r} matches no node and no weight; "
                "`onnxprune inspect` lists their names"
            )
    return np.array(sorted(found - {0}), np.int32)
