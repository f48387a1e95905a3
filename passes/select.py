"""Which units go, so that a budget holds.

Units are put in one order and removed from its start until the budget holds; no layer falls below
its floor. A ranking makes that order:

* global: by importance for what the units cost, all against all;
* isomorphic: groups of like shape compete among themselves, and every such class loses the same
  share (Fang et al., Isomorphic Pruning, 2024);
* uniform: every group loses the same share.

`channels` keeps the same share of every layer, unless a ranking says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnxprune.cost import CostModel
from onnxprune.coupling import Coupling
from onnxprune.errors import BudgetError
from onnxprune.groups import Group, Units, isomorphic
from onnxprune.rewriting import Mask

Scores = NDArray[np.float64]
#: How much a layer's cost counts against its importance: 0 not at all, 1 in full.
PRICE_POWER = 0.15
BudgetKind = Literal["channels", "macs", "params", "size-mb", "lossless"]
Ranking = Literal["global", "isomorphic", "uniform"]
RANKINGS: tuple[Ranking, ...] = ("global", "isomorphic", "uniform")
NONE: Units = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Budget:
    """What must hold after pruning: a share in (0, 1], or a file size in 10^6 bytes.

    0: as little is left as the limits allow.
    """

    kind: BudgetKind
    value: float


@dataclass(frozen=True)
class Limits:
    """`round_to`: kept widths are multiples of it where the layer is that wide.

    `min_keep`: the smallest share kept. `ranking`: None is uniform for channels, else global.
    """

    round_to: int = 1
    min_keep: float = 0.1
    scope: Literal["exact", "all"] = "all"
    ranking: Ranking | None = None


@dataclass(frozen=True)
class _Choice:
    """A prunable group with its units in the order in which they would go."""

    group: Group
    order: Units
    floor: int

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def width(self) -> int:
        return self.group.width

    @property
    def able(self) -> int:
        """How many of `order` may go."""
        return self.size - self.floor


def default_ranking(budget: Budget) -> Ranking:
    """The ranking where none was asked for."""
    return "uniform" if budget.kind == "channels" else "global"


def select(
    coupling: Coupling,
    groups: Sequence[Group],
    scores: Scores,
    cost: CostModel,
    budget: Budget,
    limits: Limits,
    fixed: Units,
    gone: Units = NONE,
    *,
    losses: bool = False,
) -> Mask:
    """keep[unit] under which `budget` holds; units in `fixed` stay, those in `gone` go.

    `losses`: the scores are errors that compare between layers, as each unit goes in its turn.

    Raises:
        BudgetError: it cannot be reached; says what can.
    """
    decided = np.union1d(fixed, gone)
    choices = [c for g in groups if (c := _choice(g, scores, limits, decided)) is not None]
    whole = np.ones(cost.units, bool)
    base = whole.copy()
    base[gone] = False
    ranking = limits.ranking or default_ranking(budget)
    if budget.kind == "channels" and ranking == "uniform":
        counts = [_rounded(c, round(c.size * budget.value + 1e-9), limits) for c in choices]
        return _repair(coupling, _mask(base, choices, counts), scores)
    ranked = [g for g in groups if not np.isin(g.units, gone).any()]
    measure = _measure(budget, ranked, cost)
    target = budget.value if budget.kind == "size-mb" else budget.value * measure(whole)
    order = _order(coupling, choices, scores, cost, budget, ranking, losses)

    def at(removed: int) -> Mask:
        gone_by_choice = np.bincount(order[:removed], minlength=len(choices))
        left = (c.size - int(g) for c, g in zip(choices, gone_by_choice, strict=True))
        counts = [_rounded(c, n, limits) for c, n in zip(choices, left, strict=True)]
        return _repair(coupling, _mask(base, choices, counts), scores)

    if not budget.value:
        return at(order.size)
    if measure(at(order.size)) > target * (1 + 1e-9):
        raise _unreachable(budget, measure(at(order.size)), measure(whole), limits)
    if measure(at(0)) <= target * (1 + 1e-9):
        return at(0)
    low, high = 0, order.size  # a bias cut in two ways costs a little more: high always holds
    while low < high:
        middle = (low + high) // 2
        if measure(at(middle)) <= target * (1 + 1e-9):
            high = middle
        else:
            low = middle + 1
    return at(high)


def _measure(budget: Budget, groups: Sequence[Group], cost: CostModel) -> Callable[[Mask], float]:
    """What the budget limits."""

    def channels(keep: Mask) -> float:
        return float(sum(int(keep[g.units].sum()) * g.width for g in groups))

    by_kind: dict[str, Callable[[Mask], float]] = {
        "macs": cost.macs,
        "params": cost.params,
        "size-mb": cost.size_mb,
        "channels": channels,
    }
    return by_kind[budget.kind]


def _choice(group: Group, scores: Scores, limits: Limits, decided: Units) -> _Choice | None:
    if limits.scope == "exact" and not group.exact:
        return None
    free = group.units[~np.isin(group.units, decided)]
    held = group.size - free.size
    floor = max(1, math.ceil(limits.min_keep * group.size - 1e-9), held)
    if free.size == 0 or group.size < 2:
        return None
    return _Choice(group, free[np.argsort(scores[free], kind="stable")], floor)


def _rounded(choice: _Choice, count: int, limits: Limits) -> int:
    """How many units to keep: at least the floor; a multiple of `round_to` channels if possible."""
    count = max(count, choice.floor)
    step = limits.round_to // math.gcd(limits.round_to, choice.width)
    if step > 1 and choice.size >= step:
        count = max(step, math.ceil(count / step) * step)
    return min(count, choice.size)


def _mask(base: Mask, choices: Sequence[_Choice], counts: Sequence[int]) -> Mask:
    keep = base.copy()
    for choice, count in zip(choices, counts, strict=True):
        keep[choice.order[: choice.size - count]] = False
    return keep


def _repair(coupling: Coupling, keep: Mask, scores: Scores) -> Mask:
    """No part of a split or slice may end up empty: its best unit comes back."""
    unit = coupling.solution.unit
    for labels in coupling.keepers:
        members = unit[np.maximum(labels, 0)]
        if members.size and not keep[members].any():
            keep[members[np.argmax(scores[members])]] = True
    for labels, least in coupling.quotas:
        members = np.unique(unit[np.maximum(labels, 0)])
        out = members[~keep[members]]
        missing = min(least, members.size) - int(keep[members].sum())
        if missing > 0:
            keep[out[np.argsort(-scores[out], kind="stable")[:missing]]] = True
    return keep


def _order(
    coupling: Coupling,
    choices: Sequence[_Choice],
    scores: Scores,
    cost: CostModel,
    budget: Budget,
    ranking: Ranking,
    losses: bool,
) -> NDArray[np.int64]:
    """The choice that gives its next unit, at each step."""
    if ranking == "uniform":
        ranks = [np.arange(1, c.able + 1) / c.size for c in choices]
    else:
        per_unit = cost.macs_per_unit() if budget.kind == "macs" else cost.params_per_unit()
        price = _loss_per_cost if losses else _priced
        ranks = [price(c, scores, per_unit) for c in choices]
    if ranking == "isomorphic":
        ranks = _within_classes(ranks, isomorphic([c.group for c in choices], coupling))
    owner = np.repeat(np.arange(len(choices)), [c.able for c in choices])
    rank = np.concatenate(ranks) if ranks else np.zeros(0)
    return np.asarray(owner[np.argsort(rank, kind="stable")], np.int64)


def _priced(choice: _Choice, scores: Scores, per_unit: Scores) -> Scores:
    price = max(float(per_unit[choice.order].sum()), 1e-12)
    harm = _harm(scores[choice.order], choice.size)[: choice.able]
    return np.asarray(harm / price**PRICE_POWER, np.float64)


def _loss_per_cost(choice: _Choice, scores: Scores, per_unit: Scores) -> Scores:
    price = max(float(per_unit[choice.order].mean()), 1e-12)
    return np.maximum.accumulate(scores[choice.order])[: choice.able] / price


def _within_classes(ranks: Sequence[Scores], classes: Sequence[int]) -> list[Scores]:
    """Ranks as shares of their class: position / size, in [0, 1]."""
    lengths = [r.size for r in ranks]
    rank = np.concatenate(ranks) if ranks else np.zeros(0)
    owner = np.repeat(np.asarray(classes, np.int64), lengths)
    share = np.empty(rank.size)
    for number in np.unique(owner):
        members = np.flatnonzero(owner == number)
        order = members[np.argsort(rank[members], kind="stable")]
        share[order] = np.arange(1, order.size + 1) / order.size
    return np.split(share, np.cumsum(lengths)[:-1]) if ranks else []


def _harm(importance: Scores, size: int) -> Scores:
    """What each next removal costs its group: its share of the importance that is left by then.

    The share grows as a group empties, so that no layer is drained while others are full (the idea
    of LAMP, Lee et al., 2021).
    """
    left = np.cumsum(importance[::-1])[::-1]
    return np.maximum.accumulate(size * importance / np.maximum(left, np.finfo(np.float64).tiny))


def _unreachable(budget: Budget, least: float, whole: float, limits: Limits) -> BudgetError:
    if budget.kind == "size-mb":
        reach = f"{least:.3f} MB (of {whole:.3f} MB)"
        asked = f"{budget.value:g} MB"
    else:
        reach, asked = f"{math.ceil(1000 * least / whole) / 1000:.3f}", f"{budget.value:g}"
    advice = "lower --min-keep"
    advice += ", use --scope all" if limits.scope == "exact" else ""
    advice += ", lower --round-to" if limits.round_to > 1 else ""
    return BudgetError(
        f"--{budget.kind} {asked} cannot be reached: the least is {reach} "
        f"with --min-keep {limits.min_keep:g} and "
        f"--scope {limits.scope}; ask for more, or {advice}"
    )
