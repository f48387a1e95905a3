"""Choices of what goes, each applied and compared with its masked twin."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.calibration.inputs import Calibration
from onnxprune.errors import VerificationError
from onnxprune.groups import Group, Units, matching_units
from onnxprune.options import Options, Verified
from onnxprune.passes.apply import Applied, apply_keep
from onnxprune.passes.select import Budget, select
from onnxprune.result import CheckReport
from onnxprune.rewriting import Mask
from onnxprune.scoring import Ranked, rank_units
from onnxprune.verify import (
    FLOAT32_NOTE,
    Feeds,
    Verdict,
    default_tolerance,
    examine,
    find_faulty,
    units_of,
)
from onnxprune.vocabulary import decided_rows

MAX_REPAIRS = 8


class Chooser:
    """Ranks the units of one model once, and chooses among them for as many budgets as asked.

    All choices follow one order, from the original weights: what a smaller budget keeps, a larger
    one keeps as well. Groups that failed the check once stay whole in every later choice.
    """

    def __init__(
        self,
        analysis: Analysis,
        options: Options,
        feeds: Sequence[Feeds],
        calibration: Calibration | None,
    ) -> None:
        self.analysis, self.options, self.feeds = analysis, options, feeds
        self.ranked = rank_units(analysis, options, calibration)
        self.tolerance = default_tolerance(analysis.model, options.as_float32)
        stay, self.gone = decided_rows(analysis.coupling)
        fixed = matching_units(analysis.coupling, options.keep)
        self.fixed = np.union1d(fixed, stay).astype(np.int32)
        self.faulty: list[Group] = []

    def select(self, budget: Budget) -> Mask:
        """What stays under `budget`, not checked.

        Raises:
            BudgetError: it cannot be reached.
        """
        return select(
            self.analysis.coupling,
            self.analysis.groups,
            self.ranked.scores,
            self.analysis.cost,
            budget,
            self.options.limits,
            self.fixed,
            self.gone,
            losses=self.ranked.losses,
        )

    def choose(self, budget: Budget) -> Verified:
        """Select and apply; where the result differs from its twin, keep the faulty groups, again.

        Raises:
            BudgetError: the budget cannot be reached.
            VerificationError: the result is wrong and no group is to blame.
        """
        coupling = self.analysis.coupling
        for _ in range(MAX_REPAIRS):
            keep = self.select(budget)
            if keep.all():
                notes = (*self.notes, _nothing(self.options))
                return Verified(keep, Applied(self.analysis.model, {}), None, notes)
            if not self.options.check:
                return Verified(keep, apply_keep(coupling, keep), None, self.notes)
            verdict = self._judge(keep)
            if verdict.applied is not None and verdict.sound:
                return Verified(keep, verdict.applied, self._report(verdict), self.notes)
            blamed = find_faulty(self.analysis.groups, keep, lambda k: self._judge(k).sound)
            if not blamed:
                raise VerificationError("; ".join(verdict.problems))
            self.faulty += blamed
            self.fixed = np.union1d(self.fixed, units_of(blamed)).astype(np.int32)
            self.gone = np.setdiff1d(self.gone, self.fixed)
        raise VerificationError(f"the pruned model was still wrong after {MAX_REPAIRS} repairs")

    def ranked_by(self, ranked: Ranked, fixed: Units) -> Chooser:
        """A chooser by another ranking, for which these units stay too."""
        other = copy(self)
        other.ranked, other.faulty = ranked, list(self.faulty)
        other.fixed = np.union1d(self.fixed, fixed).astype(np.int32)
        return other

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the ranking and the checks so far."""
        kept = (f"group {g.name} was kept: its pruning failed the check" for g in self.faulty)
        return (*self.ranked.notes, *kept)

    def _judge(self, keep: Mask) -> Verdict:
        return examine(
            self.analysis.coupling,
            keep,
            self.analysis.model,
            self.feeds,
            self.tolerance,
            self.options.threads,
            self.options.as_float32,
        )

    def _report(self, verdict: Verdict) -> CheckReport:
        return CheckReport(
            passed=verdict.sound,
            structure=verdict.error is not None,
            max_error=verdict.error,
            tolerance=self.tolerance,
            feeds=len(self.feeds),
            reference="the masked twin" + (FLOAT32_NOTE if self.options.as_float32 else ""),
            problems=verdict.problems,
            faulty=tuple(g.name for g in self.faulty),
        )


def _nothing(options: Options) -> str:
    advice = "; --scope all reaches more" if options.limits.scope == "exact" else ""
    return (
        f"nothing was removed: the budget holds already, or no channel may go in --scope "
        f"{options.limits.scope}{advice}; `onnxprune inspect --why` says what holds them"
    )
