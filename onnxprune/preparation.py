"""Before anything is chosen: the model without what does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnxprune.analysis import Analysis, analyse
from onnxprune.errors import OnnxPruneError
from onnxprune.granularity import HEADS, Granularity
from onnxprune.options import Options, Verified
from onnxprune.result import CheckReport
from onnxprune.rewriting import Mask
from onnxprune.verify import Feeds

if TYPE_CHECKING:
    from onnxprune.passes.select import Budget


def without_dead(
    whole: Analysis, wanted: bool | None, feeds: Sequence[Feeds], options: Options
) -> tuple[Analysis, Verified]:
    """The analysis to go on with, and what happened; `whole` itself where nothing was found.

    Raises:
        VerificationError: it was asked for, and its result is not equal to the model.
    """
    from onnxprune.passes.apply import Applied
    from onnxprune.passes.lossless import Lossless

    same = Verified(whole.everything, Applied(whole.model, {}), None, ())
    if wanted is False:
        return whole, same
    try:
        found = Lossless(threads=options.threads, check=options.check)(whole.model, feeds)
    except OnnxPruneError as error:
        if wanted:
            raise
        return whole, replace(same, notes=(f"nothing was removed beforehand: {error}",))
    if not found.modified:
        notes = ("no channel and no operator is without effect",) if wanted else ()
        return whole, replace(same, notes=notes)
    words = f"removed without loss: {found.channels} channels and {found.layers} operators"
    check = CheckReport(
        passed=True,
        structure=True,
        max_error=found.max_error,
        tolerance=found.tolerance,
        feeds=len(feeds),
        reference="the original model",
    )
    analysis = analyse(found.model, granularity=options.granularity)
    report = check if options.check else None
    return analysis, Verified(analysis.everything, Applied(found.model, {}), report, (words,))


def replay_lossless(model: onnx.ModelProto, granularity: Granularity = HEADS) -> Analysis:
    """The analysis of `model` without what does not matter, as a plan was made for it."""
    from onnxprune.passes.lossless import Lossless

    return analyse(Lossless()(model).model, granularity=granularity)


def scaled(budget: Budget, whole: Analysis, analysis: Analysis) -> Budget:
    """A share of the whole model as a share of what is left of it."""
    if whole is analysis or budget.kind not in ("macs", "params"):
        return budget
    costs = [getattr(a.cost, budget.kind)(a.everything) for a in (whole, analysis)]
    return replace(budget, value=min(1.0, budget.value * costs[0] / max(costs[1], 1.0)))


def budget_used(whole: Analysis, analysis: Analysis, keep: Mask, budget: Budget) -> float:
    """What `keep` leaves, in terms of `budget`: a share of the whole model, or 10^6 bytes."""
    from onnxprune.vocabulary import decided_rows

    cost, full = analysis.cost, whole.cost
    if budget.kind == "macs":
        return cost.macs(keep) / max(full.macs(whole.everything), 1.0)
    if budget.kind == "params":
        return cost.params(keep) / max(full.params(whole.everything), 1.0)
    if budget.kind == "size-mb":
        return cost.size_mb(keep)
    _, gone = decided_rows(analysis.coupling)
    groups = [g for g in analysis.groups if not np.isin(g.units, gone).any()]
    left = sum(int(keep[g.units].sum()) * g.width for g in groups)
    return left / sum(g.size * g.width for g in groups) if groups else 1.0
