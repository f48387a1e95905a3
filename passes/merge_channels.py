"""Channels that are multiples of others: who reads them reads the first of them instead."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.editing import Edit
from onnxprune.facts import Facts
from onnxprune.liveness import Read
from onnxprune.numbering import Numbers, number_channels
from onnxprune.rewriting import Mask

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def merged(
    analysis: Analysis, facts: Facts, reads: Sequence[Read], keep: Mask, edit: Edit | None
) -> Edit | None:
    """`edit`, or a new one, after which repeated channels are no longer read.

    A unit repeats another if at every read its channels are the same multiples of the other's.
    """
    numbering = number_channels(facts)
    sites: list[tuple[Read, Numbers]] = []
    barred = np.array(keep == 0)
    barred[0] = True
    for read in reads:
        if _own_business(analysis, read):
            continue
        x = numbering.input(read.node, read.slot)
        if x is None or x.axis != _axis(read, facts) or not _editable(analysis, read):
            barred[read.units] = True
        else:
            sites.append((read, x))
    for first, others in _repeats(analysis, sites, barred):
        edit = edit or Edit(analysis.coupling.graph.whole())
        for read, x in sites:
            goal = np.flatnonzero(read.units == first)
            for other in others if goal.size else ():
                place = np.flatnonzero(read.units == other)
                edit.redirect(read.node.index, place, goal, x.factor[place] / x.factor[goal])
    return edit


def _axis(read: Read, facts: Facts) -> int:
    """The axis of the read input that is summed."""
    rank = len(facts.dims(read.node, 0))
    return 1 if read.node.op_type.startswith("Conv") else rank - 1


def _own_business(analysis: Analysis, read: Read) -> bool:
    """Whether each channel is read for its own unit alone, as in a depthwise Conv."""
    node = read.node
    if node.op_type != "Conv" or node.attr("group", 1) != read.units.size:
        return False
    coupling = analysis.coupling
    out = [b.labels for b in coupling.layouts.get(node.outputs[0], ()) if b.axes == (1,)]
    if not out:
        return False
    units = coupling.solution.unit[np.maximum(out[0], 0)]
    return np.array_equal(units, np.repeat(read.units, units.size // read.units.size))


def _editable(analysis: Analysis, read: Read) -> bool:
    """Whether the weight that reads is a matrix of this node alone."""
    graph, node = analysis.coupling.graph, read.node
    constant = graph.constants.get(node.input(1))
    return (
        node.op_type in _LAYERS
        and read.slot == 0
        and node.attr("group", 1) == 1
        and node.attr("transA", 0) == 0
        and constant is not None
        and constant.is_float
        and (node.op_type != "MatMul" or len(constant.dims) == 2)
        and len(graph.uses.get(node.input(1), ())) == 1
        and node.input(1) not in graph.leaving
        and node in graph.top
    )


def _repeats(
    analysis: Analysis, sites: Sequence[tuple[Read, Numbers]], barred: NDArray[np.bool_]
) -> list[tuple[int, list[int]]]:
    """Units with the others that repeat them."""
    signs: dict[int, list[Hashable]] = {}
    base: dict[int, float] = {}
    for number, (read, x) in enumerate(sites):
        order = np.argsort(read.units, kind="stable")
        edges = np.flatnonzero(np.diff(read.units[order])) + 1
        for place in np.split(order, edges):
            unit = int(read.units[place[0]])
            if barred[unit]:
                continue
            scale = base.setdefault(unit, float(x.factor[place[0]]))
            shares = tuple(f"{v:.5e}" for v in x.factor[place] / scale)
            signs.setdefault(unit, []).append((number, tuple(x.number[place].tolist()), shares))
    groups: dict[Any, list[int]] = {}
    for group in analysis.groups:
        for unit in group.units.tolist():
            if unit in signs:
                groups.setdefault((group.name, tuple(signs[unit])), []).append(unit)
    return [(units[0], units[1:]) for units in groups.values() if len(units) > 1]
