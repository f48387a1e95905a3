"""Which units matter: those from which something that is not zero reaches an output.

A read of channel k, somewhere summed over, contributes only if the channel's value and what it is
multiplied with both differ from zero, in a result that matters itself. The largest set of units
without a contribution is found by assuming that none matters and following contributions back from
what must stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.coupling import Contraction, Coupling
from onnxprune.fact_rules import is_padded
from onnxprune.facts import Facts
from onnxprune.graph import Graph, Node
from onnxprune.labels import Labels
from onnxprune.rewriting import Mask

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Operand:
    """What one operand brings to a read: nonzero[k, ...], and the units of its other axes."""

    nonzero: Bools
    units: tuple[Labels | None, ...]

    def live(self, alive: Mask) -> Bools:
        """Per index k of the summed axis: whether anything beside it matters."""
        left = self.nonzero
        for axis, units in enumerate(self.units, 1):
            if units is not None and left.shape[axis] == units.size:
                left = np.compress(alive[units], left, axis=axis)
        return np.asarray(left.reshape(left.shape[0], -1).any(axis=1))


@dataclass(frozen=True, eq=False)
class Read:
    """One contraction: `units[k]` is read at `node`; `fixed[k]`: its value there, NaN if open.

    `folds`: what a fixed value contributes can go into the node's bias.
    """

    node: Node
    slot: int
    units: Labels
    operands: tuple[Operand, ...]
    fixed: NDArray[Any]
    folds: bool

    def contributes(self, alive: Mask) -> Bools:
        """Per index: whether it changes a result that matters."""
        found = np.ones(self.units.size, bool)
        for operand in self.operands:
            found &= operand.live(alive)
        return found & ~np.isfinite(self.fixed) if self.folds else found


def find_reads(coupling: Coupling, facts: Facts) -> list[Read]:
    """Every place where channels are summed over."""
    return [_read(coupling, facts, c) for c in coupling.contractions]


def _read(coupling: Coupling, facts: Facts, c: Contraction) -> Read:
    node = coupling.graph.nodes[c.node]
    units = coupling.solution.unit[np.maximum(c.labels, 0)]
    places = _places(node, c, facts)
    if node.op_type == "Conv" and node.attr("group", 1) > 1:
        operands = [_operand(coupling, facts, node, 0, 1), _grouped(coupling, facts, node)]
    else:
        operands = [_operand(coupling, facts, node, slot, axis) for slot, axis in places]
    if node.op_type in ("LSTM", "GRU", "RNN") and c.slot == 2 and node.outputs[0]:
        state = facts.of(node.outputs[0])
        operands.append(Operand(_first(state.nonzero, 3, c.labels.size), ()))
    return Read(
        node,
        c.slot,
        units,
        tuple(operands),
        _fixed(facts, node, c),
        _folds(node, facts, coupling.graph),
    )


def _places(node: Node, c: Contraction, facts: Facts) -> list[tuple[int, int]]:
    """The operands that are multiplied along the summed axis, and that axis in each."""
    rank = len(facts.dims(node, 1)) if len(node.inputs) > 1 else 0
    partner = {
        "Conv": (1, 1),
        "ConvTranspose": (1, 0),
        "Gemm": (1, 1 if node.attr("transB", 0) else 0),
        "MatMul": (1, max(rank - 2, 0)),
        "LSTM": (1, 2),
        "GRU": (1, 2),
        "RNN": (1, 2),
    }.get(node.op_type)
    own = (c.slot, c.axis)
    return [own, partner] if partner is not None and c.slot == 0 else [own]


def _first(nonzero: Bools, axis: int, length: int) -> Bools:
    """The axis in front, written out."""
    moved = np.moveaxis(nonzero, axis, 0)
    return np.broadcast_to(moved, (length, *moved.shape[1:]))


def _operand(coupling: Coupling, facts: Facts, node: Node, slot: int, axis: int) -> Operand:
    length = facts.dims(node, slot)[axis]
    fact = facts.input(node, slot)
    labels = _labels(coupling, node, slot, fact.rank)
    nonzero = _first(fact.nonzero, axis, length)
    rest = [v for a, v in enumerate(labels) if a != axis]
    plain = tuple(a for a, v in enumerate(rest, 1) if v is None)
    return Operand(np.asarray(nonzero.any(axis=plain, keepdims=True)), tuple(rest))


def _labels(coupling: Coupling, node: Node, slot: int, rank: int) -> list[Labels | None]:
    """The units along each axis of an input, None where it has no labels of its own."""
    name = coupling.aliases.get(node.input(slot), node.input(slot))
    uses = coupling.constants.get(name)
    layout = coupling.layouts.get(name, ()) if uses is None else uses.get((node.index, slot), ())
    found: list[Labels | None] = [None] * rank
    for block in layout:
        if not block.joint:
            found[block.axes[0]] = coupling.solution.unit[np.maximum(block.labels, 0)]
    return found


def _grouped(coupling: Coupling, facts: Facts, node: Node) -> Operand:
    """The filters of a grouped Conv: nonzero[C, M/g], with the units of the filters."""
    groups, channels = node.attr("group", 1), facts.dims(node, 0)[1]
    weight = facts.input(node, 1)
    rows, inner = facts.dims(node, 1)[:2]
    nonzero = np.broadcast_to(weight.nonzero, facts.dims(node, 1)).reshape(rows, inner, -1).any(2)
    own = _labels(coupling, node, 1, weight.rank)[0]
    out = np.zeros(rows, np.int32) if own is None else own
    grid = np.moveaxis(nonzero.reshape(groups, rows // groups, inner), 1, 2)
    of_rows = np.repeat(out.reshape(groups, 1, -1), inner, axis=1)
    return _Grouped(
        grid.reshape(channels, -1), (None,), of_rows.reshape(channels, -1).astype(np.int32)
    )


@dataclass(frozen=True, eq=False)
class _Grouped(Operand):
    """As an operand, but each channel has filters of its own: `rows[k, i]` are their units."""

    rows: Labels

    def live(self, alive: Mask) -> Bools:
        return np.asarray((self.nonzero & alive[self.rows]).any(axis=1))


def _fixed(facts: Facts, node: Node, c: Contraction) -> NDArray[Any]:
    """The value of each channel where it is the same at every position of every input."""
    fact = facts.input(node, c.slot)
    whole = fact.over([a for a in range(fact.rank) if a != c.axis]).full(c.axis, c.labels.size)
    return np.where(whole.constant, whole.low, np.nan).ravel()


def _folds(node: Node, facts: Facts, graph: Graph) -> bool:
    """Whether a constant input channel is a constant in the result, everywhere."""
    known = node.op_type in ("Conv", "Gemm", "MatMul") and node.input(1) in graph.constants
    if not known or node not in graph.top:
        return False
    if node.op_type == "MatMul":
        return len(facts.dims(node, 1)) == 2 and len(facts.dims(node, 0)) >= 2
    if node.op_type == "Gemm":
        bias = graph.constants.get(node.input(2))
        return not node.attr("transA", 0) and (not node.input(2) or bias is not None)
    known_bias = not node.input(2) or node.input(2) in graph.constants
    return not is_padded(node) and known_bias


def living(coupling: Coupling, reads: Sequence[Read]) -> Mask:
    """keep[unit]: the units that matter, and one of every axis that would be empty without."""
    solution = coupling.solution
    alive = np.ones(solution.units, bool)
    for labels in (labels for _, labels in coupling.products):
        alive[solution.unit[np.maximum(labels, 0)]] = False
    alive[solution.unit[solution.inexact_by > 0]] = True
    alive[0] = True
    ordered = sorted(reads, key=lambda r: -r.node.index)
    while True:
        before = int(alive.sum())
        for read in ordered:
            if not alive[read.units].all():
                alive[read.units[read.contributes(alive)]] = True
        for labels in (*(labels for _, labels in coupling.products), *coupling.keepers):
            members = solution.unit[np.maximum(labels, 0)]
            if members.size and not alive[members].any():
                alive[members[0]] = True
        if int(alive.sum()) == before:
            return alive
