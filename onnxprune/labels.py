"""The index algebra: labels, ties between them, the units removed together. Pure numpy.

A label is a positive integer naming one index along one axis. Two labels that are tied live or die
together. Labels of zero and below are frozen: -k carries the reason k, 0 none. An axis whose
indices are the product of several axes (hidden = heads x head size) is related to them by a
`Factor`, of which one axis is chosen to stay prunable when everything else is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.partition import Partition

Labels = NDArray[np.int32]
#: Votes of an axis along which another factor is pruned already.
DECIDED = 1 << 20
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Block:
    """Labels over one axis of a tensor, or jointly over several.

    labels[i, j, ...] is the label of index i of axes[0], j of axes[1], ...
    """

    axes: tuple[int, ...]
    labels: Labels
    origin: Any = None

    @property
    def joint(self) -> bool:
        """Whether more than one axis shares these labels."""
        return len(self.axes) > 1


Layout = tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class Factor:
    """labels[i, j, ...] is removed exactly where one of factors[0][i], factors[1][j], ... is.

    Only one factor may stay removable: the others are frozen when the system is solved.
    """

    labels: Labels
    factors: tuple[Labels, ...]
    node: int


@dataclass(frozen=True)
class Reason:
    """Why something is frozen or inexact: the node (-1: the model's boundary), and the words."""

    node: int
    words: str


@dataclass(frozen=True)
class Solution:
    """unit[label]: the unit, 0 where frozen; frozen_by[label]: the reason number, 0 where free."""

    unit: Labels
    frozen_by: Labels
    inexact_by: Labels

    @property
    def units(self) -> int:
        """The number of units, counting the frozen unit 0."""
        return int(self.unit.max(initial=0)) + 1


class System:
    """Collects labels, ties, freezes and factors, and solves them."""

    def __init__(self) -> None:
        self.size = 1
        self.reasons: list[Reason] = [Reason(-1, "not a channel axis")]
        self.factors: list[Factor] = []
        self._edges: list[tuple[Labels, Labels]] = []
        self._frozen: list[tuple[Labels, Labels]] = []
        self._inexact: list[tuple[Labels, int]] = []
        self._votes: list[tuple[Labels, int]] = []
        self._claims: list[Labels] = []
        self._reserved: list[tuple[Labels, int, str]] = []

    def fresh(self, *shape: int) -> Labels:
        """New labels, tied to nothing."""
        count = int(np.prod(shape, dtype=np.int64))
        labels = np.arange(self.size, self.size + count, dtype=np.int32).reshape(shape)
        self.size += count
        return labels

    def reason(self, node: int, words: str) -> int:
        """Register a reason and return its number."""
        self.reasons.append(Reason(node, words))
        return len(self.reasons) - 1

    def frozen_axis(self, length: int, node: int, words: str) -> Labels:
        """Labels of an axis that cannot be pruned, carrying the reason."""
        return np.full(length, -self.reason(node, words), np.int32)

    def tie(self, a: Labels, b: Labels, node: int, words: str) -> None:
        """Labels a[i] and b[i] live or die together.

        `words` is the reason where one of them is frozen without one.
        """
        if a is b:
            return
        a, b = a.ravel(), b.ravel()
        both = (a > 0) & (b > 0)
        if both.all():
            self._edges.append((a, b))
            return
        self._edges.append((a[both], b[both]))
        number = 0
        for free, other in ((a, b), (b, a)):
            hit = (free > 0) & (other <= 0)
            if hit.any():
                why = -other[hit]
                if (why == 0).any():
                    number = number or self.reason(node, words)
                    why = np.where(why == 0, number, why)
                self._frozen.append((free[hit], why.astype(np.int32)))

    def freeze(self, labels: Labels, node: int, words: str) -> int:
        """Labels that must stay; returns the number of the reason, the first one's if they did."""
        if not (labels > 0).any():
            return int(-labels.min(initial=0))
        number = self.reason(node, words)
        self.freeze_for(labels, number)
        return number

    def freeze_for(self, labels: Labels, number: int) -> None:
        """Labels that must stay for a reason that is known already."""
        free = labels[labels > 0]
        if free.size:
            self._frozen.append((free, np.full(free.size, number, np.int32)))

    def inexact(self, labels: Labels, node: int, words: str) -> None:
        """Labels whose removal is not the same function as setting them to zero."""
        free = labels[labels > 0]
        if free.size:
            self._inexact.append((free, self.reason(node, words)))

    def prefer(self, labels: Labels, weight: int = 1) -> None:
        """Where a factor must be chosen, choose the one with these labels: that with most votes."""
        self._votes.append((labels[labels > 0], weight))

    def claim(self, labels: Labels) -> None:
        """These labels may go as they are: what `reserve` says of them does not hold."""
        self._claims.append(labels[labels > 0])

    def reserve(self, labels: Labels, node: int, words: str) -> None:
        """Labels that stay because of `words` unless they are claimed or part of a factor."""
        self._reserved.append((labels[labels > 0], node, words))

    def solve(self) -> Solution:
        """Choose a factor for every product axis, and number the units."""
        partition = Partition(self.size)
        self._freeze_reserved(partition)
        pending = list(self.factors)
        for stage in ("certain", "voted", "any"):
            again = True
            while pending and again:
                pending, again = self._choose_some(pending, stage, partition)
        return self._number(partition)

    def _choose_some(
        self, pending: Sequence[Factor], stage: str, partition: Partition
    ) -> tuple[list[Factor], bool]:
        """Decide factors that do not bear on each other; those that wait, and whether for others.

        What one factor decides leaves others over the same labels or axes less to choose from: two
        groupings of the same channels must not contradict each other. The most bound go first.
        """
        partition.update(self._edges)
        parts, count = partition.part, partition.count
        frozen = self._first_reasons(partition)
        votes = self._count_votes(partition)
        found = [(f, *_choose(f, parts, frozen, votes, stage)) for f in pending]
        able = [
            (f, choice) for f, choice, n in sorted(found, key=lambda c: c[2]) if choice >= 0 < n
        ]
        bare = [(f, choice) for f, choice, n in found if n == 0]
        live = np.where(frozen > 0, 0, np.arange(count, dtype=np.int32))
        ready = bare + _independent(able, live[parts], count)
        for factor, choice in ready:
            self._decide(factor, choice)
            self.prefer(factor.factors[choice], DECIDED)
        chosen = {id(factor) for factor, _ in ready}
        return [f for f in pending if id(f) not in chosen], len(ready) < len(able) + len(bare)

    def _freeze_reserved(self, partition: Partition) -> None:
        if not self._reserved:
            return
        partition.update(self._edges)
        parts = partition.part
        free = np.zeros(partition.count, bool)
        for labels in self._claims:
            free[parts[labels]] = True
        for factor in self.factors:
            for labels in (factor.labels, *factor.factors):
                free[parts[labels[labels > 0]]] = True
        for labels, node, words in self._reserved:
            self.freeze(labels[~free[parts[labels]]], node, words)

    def _decide(self, factor: Factor, axis: int) -> None:
        labels = np.moveaxis(factor.labels, axis, 0)
        chosen = factor.factors[axis]
        spread = np.broadcast_to(chosen.reshape(-1, *(1,) * (labels.ndim - 1)), labels.shape)
        self.tie(labels, spread, factor.node, "the axis it is part of is kept whole")
        for i, other in enumerate(factor.factors):
            if i != axis:
                self.freeze(
                    other, factor.node, "kept whole: its channels are removed along another factor"
                )

    def _first_reasons(self, partition: Partition) -> Labels:
        """For each part the first reason that froze it, 0 for none."""
        first = np.full(partition.count, np.iinfo(np.int32).max, np.int32)
        if self._frozen:
            labels, why = (np.concatenate(several) for several in zip(*self._frozen, strict=True))
            np.minimum.at(first, partition.part[labels], why)
        first[first == np.iinfo(np.int32).max] = 0
        return first

    def _count_votes(self, partition: Partition) -> NDArray[np.int64]:
        """The votes for each part: one voter counts once, however many of its labels it names."""
        if not self._votes:
            return np.zeros(partition.count, np.int64)
        voter = np.repeat(np.arange(len(self._votes)), [v.size for v, _ in self._votes])
        part = partition.part[np.concatenate([v for v, _ in self._votes])]
        ballot = np.unique(voter * partition.count + part)
        weight = np.array([w for _, w in self._votes])[ballot // partition.count]
        votes = np.bincount(ballot % partition.count, weight, partition.count)
        return votes.astype(np.int64)

    def _number(self, partition: Partition) -> Solution:
        """Units are numbered as parts are: by their first label."""
        partition.update(self._edges)
        parts = partition.part
        reasons = self._first_reasons(partition)
        inexact = np.zeros(partition.count, np.int32)
        for labels, why in reversed(self._inexact):
            inexact[parts[labels]] = why
        free = reasons == 0
        free[0] = False
        unit = np.where(free, np.cumsum(free), 0).astype(np.int32)
        return Solution(unit[parts], reasons[parts], inexact[parts])


def _independent(
    able: Sequence[tuple[Factor, int]], parts: Labels, size: int
) -> list[tuple[Factor, int]]:
    """Decisions that can be made at once: none splits labels otherwise than another, and no axis is
    taken by one and left by another.

    Those over axes of a factor that has to wait do wait, too, unless nothing were left.
    """
    row = np.full(size, -1, np.int32)
    taken, left, waits = (np.zeros(size, bool) for _ in range(3))
    ready: list[tuple[Factor, int]] = []
    for factor, choice in able:
        axes = [_live(axis, parts) for axis in factor.factors]
        others = [axis for i, axis in enumerate(axes) if i != choice]
        own, rows = _rows(factor, choice, parts)
        met = row[own]
        split = ((met >= 0) & (met != rows)).any()
        if split or left[axes[choice]].any() or any(taken[a].any() for a in others):
            for axis in axes:
                waits[axis] = True
            continue
        row[own] = rows
        taken[axes[choice]] = True
        for axis in others:
            left[axis] = True
        ready.append((factor, choice))
    free = [
        (f, choice)
        for f, choice in ready
        if not any(waits[_live(axis, parts)].any() for axis in f.factors)
    ]
    return free or ready[:1]


def _live(labels: Labels, parts: Labels) -> Labels:
    """The components of labels that may go; `parts` is 0 for those that stay."""
    found = parts[np.maximum(labels, 0)]
    return found[found > 0]


def _rows(factor: Factor, axis: int, parts: Labels) -> tuple[Labels, Labels]:
    """The components of a factor's labels, and for each the first one of its index on `axis`."""
    own = np.moveaxis(np.where(factor.labels > 0, parts[np.maximum(factor.labels, 0)], 0), axis, 0)
    grid = own.reshape(own.shape[0], -1)
    first = np.broadcast_to(grid.min(axis=1, keepdims=True), grid.shape)
    live = grid > 0
    return grid[live], first[live]


def _choose(
    factor: Factor, parts: Labels, frozen: Labels, votes: Array, stage: str
) -> tuple[int, int]:
    """The axis of `factor` to prune along, and how many there are to choose from.

    The axis is -1 where that should wait for other decisions.

    Those without an alternative come first, then those for which an operator has spoken: what they
    tie may leave the rest no choice.
    """
    scores = []
    components = np.where(factor.labels > 0, parts[factor.labels], -1)
    dead = (components < 0) | (frozen[components] > 0)
    for axis, own in enumerate(factor.factors):
        rows = np.moveaxis(components, axis, 0).reshape(own.size, -1)
        row_dead = np.moveaxis(dead, axis, 0).reshape(own.size, -1).any(axis=1)
        own_parts = parts[np.maximum(own, 0)]
        alive = ~row_dead & (own > 0) & (frozen[own_parts] == 0)
        units = len(set(rows[alive].min(axis=1).tolist()))
        scores.append((units > 1, int(votes[own_parts[alive]].max(initial=0)), units))
    able = [s for s in scores if s[0]]
    if len(able) > 1 and (stage == "certain" or (stage == "voted" and not any(s[1] for s in able))):
        return -1, len(able)
    return max(range(len(scores)), key=lambda i: (scores[i], -i)), len(able)


def compress(labels: Labels) -> tuple[Labels, list[Array]]:
    """The labels without what repeats its neighbour, and the length of each run along each axis.

    A feature map that was flattened repeats a channel's label for every pixel; what is decided
    about one of them is decided about all.
    """
    lengths = []
    for axis in range(labels.ndim):
        differs = np.diff(labels, axis=axis) != 0
        differs = differs.any(axis=tuple(i for i in range(labels.ndim) if i != axis))
        starts = np.concatenate([[0], np.flatnonzero(differs) + 1])
        lengths.append(np.diff([*starts, labels.shape[axis]]))
        labels = np.take(labels, starts, axis=axis)
    return labels, lengths


def repeat(labels: Labels, lengths: Sequence[Array]) -> Labels:
    """What `compress` left out, put back."""
    for axis, length in enumerate(lengths):
        labels = np.repeat(labels, length, axis=axis)
    return labels


def varying_axes(labels: Labels) -> tuple[int, ...]:
    """The axes along which `labels` differs."""
    vary = []
    for axis in range(labels.ndim):
        first = labels.take([0], axis=axis)
        if labels.shape[axis] > 1 and not np.array_equal(
            np.broadcast_to(first, labels.shape), labels
        ):
            vary.append(axis)
    return tuple(vary)


def reduce_to_varying(labels: Labels, axes: Sequence[int], origin: Any = None) -> Block | None:
    """The block of `labels` (over tensor axes `axes`) without the axes along which it is constant.

    None where all labels are equal: such an axis can only go as a whole, so it is not prunable.
    """
    vary = varying_axes(labels)
    if not vary:
        return None
    index = tuple(slice(None) if a in vary else 0 for a in range(labels.ndim))
    return Block(tuple(axes[a] for a in vary), np.ascontiguousarray(labels[index]), origin)


def runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the shortest runs of axes whose products agree.

    Axes of length 1 are left out.
    """
    a = [i for i, n in enumerate(before) if n != 1]
    b = [i for i, n in enumerate(after) if n != 1]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        m, n = before[a[i]], after[b[j]]
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                if i == len(a):
                    return found
                left.append(a[i])
                m *= before[a[i]]
                i += 1
            else:
                if j == len(b):
                    return found
                right.append(b[j])
                n *= after[b[j]]
                j += 1
        found.append((left, right))
    return found
