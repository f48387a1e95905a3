"""Which units go, so that a budget holds.

`channels` keeps the same share of every layer. `macs`, `params` and `size` rank all units together,
by importance for what they cost, and remove from the bottom until the budget holds; no layer falls
below its floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnxprune.cost import CostModel
from onnxprune.coupling import Coupling
from onnxprune.errors import BudgetError
from onnxprune.groups import Group, Units
from onnxprune.rewriting import Mask

Scores = NDArray[np.float64]
#: How much a layer's cost counts against its importance: 0 not at all, 1 in full.
PRICE_POWER = 0.15
BudgetKind = Literal["channels", "macs", "params", "size-mb"]


@dataclass(frozen=True)
class Budget:
    """What must hold after pruning: a share in (0, 1], or a file size in 10^6 bytes."""

    kind: BudgetKind
    value: float


@dataclass(frozen=True)
class Limits:
    """`round_to`: kept widths are multiples of it where the layer is that wide.

    `min_keep`: the smallest share kept.
    """

    round_to: int = 1
    min_keep: float = 0.1
    scope: Literal["exact", "all"] = "all"


@dataclass(frozen=True)
class _Choice:
    """A prunable group with its units in the order in which they would go."""

    order: Units
    size: int
    width: int
    floor: int


def select(
    coupling: Coupling,
    groups: Sequence[Group],
    scores: Scores,
    cost: CostModel,
    budget: Budget,
    limits: Limits,
    fixed: Units,
) -> Mask:
    """keep[unit] under which `budget` holds; units in `fixed` stay.

    Raises:
        BudgetError: it cannot be reached; says what can.
    """
    choices = [c for g in groups if (c := _choice(g, scores, limits, fixed)) is not None]
    if budget.kind == "channels":
        counts = [_rounded(c, round(c.size * budget.value + 1e-9), limits) for c in choices]
        return _repair(coupling, _mask(cost.units, choices, counts), scores)
    measure = {"macs": cost.macs, "params": cost.params, "size-mb": cost.size_mb}[budget.kind]
    everything = np.ones(cost.units, bool)
    target = budget.value if budget.kind == "size-mb" else budget.value * measure(everything)
    return _global(coupling, choices, scores, cost, budget, limits, target)


def _choice(group: Group, scores: Scores, limits: Limits, fixed: Units) -> _Choice | None:
    if limits.scope == "exact" and not group.exact:
        return None
    free = group.units[~np.isin(group.units, fixed)]
    held = group.size - free.size
    floor = max(1, math.ceil(limits.min_keep * group.size - 1e-9), held)
    if free.size == 0 or group.size < 2:
        return None
    order = free[np.argsort(scores[free], kind="stable")]
    return _Choice(order, group.size, group.width, floor)


def _rounded(choice: _Choice, count: int, limits: Limits) -> int:
    """How many units to keep: at least the floor; a multiple of `round_to` channels if possible."""
    count = max(count, choice.floor)
    step = limits.round_to // math.gcd(limits.round_to, choice.width)
    if step > 1 and choice.size >= step:
        count = max(step, math.ceil(count / step) * step)
    return min(count, choice.size)


def _mask(units: int, choices: Sequence[_Choice], counts: Sequence[int]) -> Mask:
    keep = np.ones(units, bool)
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
    return keep


def _global(
    coupling: Coupling,
    choices: Sequence[_Choice],
    scores: Scores,
    cost: CostModel,
    budget: Budget,
    limits: Limits,
    target: float,
) -> Mask:
    measure = {"macs": cost.macs, "params": cost.params, "size-mb": cost.size_mb}[budget.kind]
    per_unit = cost.macs_per_unit() if budget.kind == "macs" else cost.params_per_unit()
    ranks, owners = [], []
    for i, choice in enumerate(choices):
        able = choice.order[: choice.size - choice.floor]
        price = max(float(per_unit[choice.order].sum()), 1e-12)
        ranks.append(_harm(scores[choice.order], choice.size)[: able.size] / price**PRICE_POWER)
        owners.append(np.full(able.size, i))
    rank = np.concatenate(ranks) if ranks else np.zeros(0)
    owner = np.concatenate(owners) if owners else np.zeros(0, np.int64)
    order = owner[np.argsort(rank, kind="stable")]

    def at(removed: int) -> Mask:
        gone = np.bincount(order[:removed], minlength=len(choices))
        counts = [_rounded(c, c.size - int(g), limits) for c, g in zip(choices, gone, strict=True)]
        return _repair(coupling, _mask(cost.units, choices, counts), scores)

    if measure(at(order.size)) > target * (1 + 1e-9):
        raise _unreachable(
            budget, measure(at(order.size)), measure(np.ones(cost.units, bool)), limits
        )
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
