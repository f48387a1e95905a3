"""Prune, rebuild, verify, and give channels back until the promise holds.

The promise is `--max-drop`: the task's metric falls by at most so many points. The first attempt
prunes as far as the budget asks. Where that misses the promise, a bisection over the budget finds
how much has to be given back: the most important of the removed channels first, with their original
weights, and the whole is rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from math import sqrt
from typing import Any

import onnx

from onnxprune.analysis import Analysis, measured_cost
from onnxprune.choosing import Chooser
from onnxprune.metrics import points_lost
from onnxprune.options import Options, Verified
from onnxprune.passes.select import Budget
from onnxprune.preparation import budget_used, scaled
from onnxprune.verify import structure_problems

#: How many models are pruned and rebuilt at most.
ATTEMPTS = 6
# Budgets that lead to a choice that was tried before cost little, but must end.
_BISECTIONS = 24

Step = Mapping[str, Any]
Rebuilt = tuple[onnx.ModelProto, dict[str, float], list[dict[str, Any]]]


@dataclass(frozen=True)
class Trial:
    """An attempt as the report tells it.

    `budget` was asked for and `reached` is what is left, both as shares or in 10^6 bytes. `value`
    is the metric's, in [0, 1], `drop` what it lost in points; None where nothing was measured.
    """

    budget: float
    reached: float
    params: int
    macs: int
    metric: str | None
    value: float | None
    drop: float | None
    passed: bool


@dataclass(frozen=True)
class Attempt:
    """A pruned and rebuilt model with its metrics and the steps that led to it."""

    budget: Budget
    verified: Verified
    model: onnx.ModelProto
    metrics: dict[str, float]
    steps: list[dict[str, Any]]


def search(
    attempt: Callable[[float], Trial | None], goal: float, ceiling: float, limit: int = ATTEMPTS
) -> tuple[Trial, ...]:
    """Try the goal; where it fails, halve the interval between what fails and what holds.

    Halves by ratio: a model of a tenth is told from one of an eighth as is one half from 0.62.

    Args:
        attempt: by budget; it answers with the same object for the same choice, and with None
            where nothing would be removed, which keeps every promise and is no result.
        goal: the budget to start with; 0 is the least possible.
        ceiling: the budget that removes nothing.
        limit: how many different choices are tried.

    Returns:
        The trials in their order.
    """
    first = attempt(goal)
    trials = [] if first is None else [first]
    if first is None or first.passed or first.drop is None:
        return tuple(trials)
    low, high = max(goal, first.reached), ceiling
    for _ in range(_BISECTIONS):
        if len(trials) >= limit or not low < high:
            break
        middle = sqrt(low * high)
        trial = attempt(middle)
        if trial is not None and all(trial is not known for known in trials):
            trials.append(trial)
        low, high = (low, middle) if trial is None or trial.passed else (middle, high)
    return tuple(trials)


class Loop:
    """Attempts at one model; holds the smallest that passed and the largest that did not."""

    def __init__(
        self,
        chooser: Chooser,
        whole: Analysis,
        options: Options,
        metrics: Mapping[str, float],
        rebuild: Callable[[Budget, Verified], tuple[Verified, Rebuilt]],
        stage: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.chooser, self.whole, self.options = chooser, whole, options
        self.metrics, self.rebuild, self.stage = metrics, rebuild, stage
        self.passed: Attempt | None = None
        self.failed: Attempt | None = None
        self._known: dict[bytes, Trial] = {}

    def run(self) -> tuple[Attempt, tuple[Trial, ...]]:
        """The smallest model that keeps the promise, else the largest tried; and the trials."""
        everything = self.chooser.analysis.everything
        ceiling = budget_used(self.whole, self.chooser.analysis, everything, self.options.budget)
        limit = 1 if self.options.max_drop is None else ATTEMPTS
        trials = search(self.attempt, self.options.budget.value, ceiling, limit)
        final = self.passed or self.failed
        assert final is not None
        return final, trials

    def attempt(self, value: float) -> Trial | None:
        """Prune to this budget, rebuild and measure; see `search`."""
        analysis = self.chooser.analysis
        budget = replace(self.options.budget, value=value)
        target = scaled(budget, self.whole, analysis)
        key = self.chooser.select(target).tobytes()
        if key in self._known:
            return self._known[key]
        with self.stage("prune"):
            verified = self.chooser.choose(target)
        key = verified.keep.tobytes()
        if key in self._known:
            return self._known[key]
        if self._known and verified.keep.all() and analysis is self.whole:
            return None
        with self.stage("rebuild"):
            verified, (model, metrics, steps) = self.rebuild(target, verified)
        trial = self._trial(budget, verified, model, metrics)
        found = Attempt(replace(budget, value=trial.budget), verified, model, metrics, steps)
        if trial.passed:
            self.passed = found
        else:
            self.failed = found
        self._known[key] = trial
        return trial

    def _trial(
        self,
        budget: Budget,
        verified: Verified,
        model: onnx.ModelProto,
        metrics: Mapping[str, float],
    ) -> Trial:
        analysis, keep = self.chooser.analysis, verified.keep
        lost = points_lost(self.metrics, metrics)
        limit = self.options.max_drop
        sound = not structure_problems(model, self.whole.model)
        held = limit is None or (lost is not None and lost[1] <= limit + 1e-9)
        cost = measured_cost(analysis, model, keep)
        reached = budget_used(self.whole, analysis, keep, budget)
        return Trial(
            budget=budget.value or reached,
            reached=reached,
            params=cost.params,
            macs=cost.macs,
            metric=None if lost is None else lost[0],
            value=None if lost is None else metrics[lost[0]],
            drop=None if lost is None else lost[1],
            passed=sound and held,
        )


def trail(trials: Sequence[Trial]) -> tuple[dict[str, Any], ...]:
    """The trials for the report; none where there was no choice between several."""
    return tuple(asdict(trial) for trial in trials) if len(trials) > 1 else ()


def shortfall(options: Options, trials: Sequence[Trial]) -> tuple[str, ...]:
    """Says by how much the budget was missed, where channels were given back for the promise."""
    best = min((t.reached for t in trials if t.passed), default=None)
    budget = options.budget
    if options.max_drop is None or best is None or trials[0].passed or not budget.value:
        return ()
    form = "{:.3f} MB" if budget.kind == "size-mb" else "{:.3f}"
    return (
        f"--{budget.kind} {budget.value:g} was not reached: {form.format(best)} is left, "
        f"{form.format(best - budget.value)} more, to keep --max-drop {options.max_drop:g}",
    )
