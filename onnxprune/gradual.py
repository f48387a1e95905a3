"""Prune in steps: a part goes, the rest is repaired, and what goes next is measured on that.

After Zhu and Gupta, 2017, for channels. Each choice is made among the original's units, so that the
budget, the limits of every layer and the plan are those of the original; only the importance comes
from the repaired model, which is what is cut further. Two things are checked at each step: the
repaired model, cut, equals its own masked twin; and it has the indices of every weight that cutting
the original at once leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from onnxprune.analysis import Analysis, analyse
from onnxprune.calibration.inputs import Calibration
from onnxprune.choosing import Chooser
from onnxprune.errors import OnnxPruneError
from onnxprune.groups import Group, Units
from onnxprune.loop import Rebuilt
from onnxprune.options import Options, Verified
from onnxprune.passes.apply import Applied, apply_keep
from onnxprune.passes.select import Budget
from onnxprune.plan import Slice
from onnxprune.preparation import budget_used
from onnxprune.rewriting import Mask
from onnxprune.scoring import Ranked, rank_units
from onnxprune.verify import examine

Rebuild = Callable[[Verified, bool], Rebuilt]
#: What is still there is worth at least this, so that it goes after what is gone already.
LEAST = 1e-30


def rebuilding(
    chooser: Chooser, calibration: Calibration | None, rebuild: Rebuild
) -> Callable[[Budget, Verified], tuple[Verified, Rebuilt]]:
    """What makes a rebuilt model of a pruned one: at once, or in the steps that were asked for."""
    gradual = Gradual(chooser, calibration, rebuild)

    def reach(budget: Budget, at_once: Verified) -> tuple[Verified, Rebuilt]:
        if chooser.options.steps == 1 or at_once.keep.all():
            return at_once, rebuild(at_once, True)
        return gradual(budget, at_once)

    return reach


def between_steps(options: Options) -> Options:
    """How the model is rebuilt after a step that is not the last."""
    tune = options.finetune
    return options if tune is not None and tune.every_step else replace(options, finetune=None)


class _Stuck(Exception):
    """The steps cannot go on; says why."""


@dataclass(frozen=True)
class _State:
    """After some steps: what is left of the original, and the repaired model."""

    verified: Verified
    model: onnx.ModelProto


class Gradual:
    """Reaches a budget in `options.steps` steps of equal ratio.

    `rebuild` makes a repaired model from a pruned one, and is told whether it is the last.
    """

    def __init__(self, chooser: Chooser, calibration: Calibration | None, rebuild: Rebuild) -> None:
        self.chooser, self.calibration, self.rebuild = chooser, calibration, rebuild

    def __call__(self, budget: Budget, at_once: Verified) -> tuple[Verified, Rebuilt]:
        """The pruned and the rebuilt model; where the steps cannot go on, from `at_once`.

        Raises:
            TrainingError: fine-tuning failed.
        """
        told: list[dict[str, Any]] = []
        budgets = self._budgets(budget, at_once)
        verified, rebuilt = at_once, None
        try:
            for number, part in enumerate(budgets, 1):
                last = number == len(budgets)
                state = None if rebuilt is None else _State(verified, rebuilt[0])
                verified = self._advanced(part, state)
                rebuilt = self.rebuild(verified, last)
                told += self._told(rebuilt[2], f"{number} of {len(budgets)}", verified)
        except _Stuck as reason:
            note = f"pruned in one step, not in {len(budgets)}: {reason}"
            verified = replace(at_once, notes=(*at_once.notes, note))
            return verified, self.rebuild(verified, True)
        assert rebuilt is not None
        return verified, (rebuilt[0], rebuilt[1], told)

    def _budgets(self, budget: Budget, at_once: Verified) -> list[Budget]:
        """From the whole to the budget, each the same share of the one before."""
        steps, whole = (
            self.chooser.options.steps,
            self._used(self.chooser.analysis.everything, budget),
        )
        ratio = max(self._used(at_once.keep, budget), 1e-12) / max(whole, 1e-12)
        parts = [replace(budget, value=whole * ratio ** (k / steps)) for k in range(1, steps)]
        return [*parts, budget]

    def _used(self, keep: Mask, budget: Budget) -> float:
        analysis = self.chooser.analysis
        return budget_used(analysis, analysis, keep, budget)

    def _told(
        self, steps: list[dict[str, Any]], part: str, verified: Verified
    ) -> list[dict[str, Any]]:
        cost = self.chooser.analysis.cost
        left = cost.macs(verified.keep) / max(cost.macs(self.chooser.analysis.everything), 1.0)
        return [{**step, "part": part, "macs_left": left} for step in steps]

    def _advanced(self, budget: Budget, state: _State | None) -> Verified:
        try:
            return self._next(budget, state)
        except OnnxPruneError as error:
            raise _Stuck(str(error)) from error

    def _next(self, budget: Budget, state: _State | None) -> Verified:
        """What is left after one more step, and the model cut to that."""
        if state is None:
            return self.chooser.choose(budget)
        before = state.verified.keep
        granularity = self.chooser.options.granularity
        analysis = analyse(state.model, granularity=granularity)
        pairs = _pairs(self.chooser.analysis, before, analysis)
        ranked = rank_units(analysis, self.chooser.options, self.calibration)
        chooser = self.chooser.ranked_by(*_carried(ranked, pairs, before))
        chosen = chooser.choose(budget)
        if (chosen.keep & ~before).any():
            raise _Stuck("what had gone would have to come back")
        if (chosen.keep == before).all():
            return replace(chosen, applied=Applied(state.model, chosen.applied.slices))
        model = self._cut(analysis, pairs, chosen, state)
        return replace(chosen, applied=Applied(model, chosen.applied.slices))

    def _cut(
        self,
        analysis: Analysis,
        pairs: list[tuple[Any, Group]],
        chosen: Verified,
        state: _State,
    ) -> onnx.ModelProto:
        """The repaired model without what was chosen."""
        keep = analysis.everything.copy()
        for left, group in pairs:
            keep[group.units] = chosen.keep[left]
        step = self._applied(analysis, keep)
        before = state.verified.applied.slices
        wrong = differing(before, step.slices, chosen.applied.slices)
        if wrong is not None:
            raise _Stuck(f"the repaired model's {wrong} was cut in another way")
        return step.model

    def _applied(self, analysis: Analysis, keep: Mask) -> Applied:
        """The repaired model cut to `keep`, and compared with its masked twin."""
        options = self.chooser.options
        if not options.check:
            return apply_keep(analysis.coupling, keep)
        verdict = examine(
            analysis.coupling,
            keep,
            analysis.model,
            self.chooser.feeds,
            self.chooser.tolerance,
            options.threads,
            options.as_float32,
        )
        if verdict.applied is None or not verdict.sound:
            raise _Stuck("; ".join(verdict.problems))
        return verdict.applied


def _pairs(whole: Analysis, keep: Mask, part: Analysis) -> list[tuple[Any, Group]]:
    """Units of `whole` that are left, and the group of `part` that consists of them, in order."""
    named: dict[str, list[Group]] = {}
    for group in part.groups:
        named.setdefault(group.name, []).append(group)
    pairs = []
    for group in whole.groups:
        left = group.units[keep[group.units]]
        same = [g for g in named.get(group.name, []) if g.size == left.size]
        twins = sum(g.name == group.name for g in whole.groups)
        if twins == len(named.get(group.name, [])) == 1 and same:
            pairs.append((left, same[0]))
    return pairs


def _carried(ranked: Ranked, pairs: list[tuple[Any, Group]], before: Mask) -> tuple[Ranked, Units]:
    """Importance of the original's units, none of what is gone; and those that must stay.

    Units that the repaired model does not have as a group of their own stay.
    """
    scores, known = np.zeros(before.size), ~before
    for left, group in pairs:
        scores[left] = np.maximum(ranked.scores[group.units], LEAST)
        known[left] = True
    known[0] = True
    return replace(ranked, scores=scores), np.flatnonzero(~known).astype(np.int32)


def differing(
    before: Mapping[str, Slice], step: Mapping[str, Slice], whole: Mapping[str, Slice]
) -> str | None:
    """A weight of which two cuts in turn leave other indices than one does; None: there is none."""
    for name, at_once in whole.items():
        second = step.get(name)
        first = before.get(name if second is None else second.source)
        if _composed(first, second, len(at_once.shape_before)) != _axes(at_once):
            return name
        source = second.source if first is None and second is not None else None
        if (first.source if first is not None else source) != at_once.source:
            return name
    return next((name for name in before if name not in whole), None)


def _axes(cut: Slice) -> dict[int, tuple[int, ...]]:
    return {int(axis): kept for axis, kept in cut.keep.items()}


def _composed(first: Slice | None, second: Slice | None, rank: int) -> dict[int, tuple[int, ...]]:
    """What both leave, by axis, in terms of what the first was applied to."""
    one = _axes(first) if first is not None else {}
    two = _axes(second) if second is not None else {}
    return {
        axis: tuple(one[axis][i] for i in two[axis])
        if axis in one and axis in two
        else one.get(axis, two.get(axis, ()))
        for axis in range(rank)
        if axis in one or axis in two
    }
