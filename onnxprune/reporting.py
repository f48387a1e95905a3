"""The last stage: measure the finished model, check how it behaves, and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxprune.analysis import Analysis, layer_rows, measured_cost
from onnxprune.options import Options, Verified
from onnxprune.rebuild import measure
from onnxprune.result import CheckReport, Cost, LayerRow, Report
from onnxprune.rewriting import Mask
from onnxprune.verify import Feeds, structure_problems

if TYPE_CHECKING:
    from onnxprune.data import Dataset


def make_report(
    analysis: Analysis,
    verified: Verified,
    rebuilt: onnx.ModelProto,
    held_out: Dataset | None,
    options: Options,
    feeds: Sequence[Feeds],
    new: Mapping[str, float],
    steps: Sequence[Mapping[str, Any]],
    whole: Analysis,
) -> Report:
    """Everything measured; `new` are the rebuilt model's metrics, `steps` those on the way.

    `whole` is the analysis of the original, `analysis` that of what `verified` chose from.
    """
    from onnxprune.passes.select import default_ranking

    original, keep = whole.model, verified.keep
    before = measured_cost(whole, original, whole.everything)
    after = measured_cost(analysis, rebuilt, keep)
    checks = [c for c in (verified.report,) if c is not None]
    old = measure(original, held_out, None, options.threads)
    before, after = _with_latency(original, rebuilt, before, after, feeds, options)
    if options.check:
        checks.append(_behaviour(original, rebuilt, old, new, options, len(feeds)))
    target = options.budget
    return Report(
        before=replace(before, metrics=old),
        after=replace(after, metrics=new),
        layers=_layers(whole, analysis, keep),
        budget={
            "kind": target.kind,
            "target": target.value,
            "reached": _reached(whole, analysis, keep, options),
        },
        options={
            "scope": options.limits.scope,
            "criterion": options.criterion,
            "ranking": options.limits.ranking or default_ranking(options.budget),
            "granularity": options.granularity.names,
            "round_to": options.limits.round_to,
            "min_keep": options.limits.min_keep,
            "keep": list(options.keep),
            "repair": options.repair,
            "finetune": options.finetune,
            "max_drop": options.max_drop,
            "seed": options.seed,
        },
        checks=tuple(checks),
        rebuild=tuple(steps),
        notes=(*verified.notes, *(note for step in steps for note in step.get("notes", ()))),
        seconds={},
    )


def _layers(whole: Analysis, analysis: Analysis, keep: Mask) -> tuple[LayerRow, ...]:
    """The layers that are left, with what they were in the original."""
    rows = layer_rows(analysis, keep)
    if whole is analysis:
        return rows
    before = {row.name: row for row in layer_rows(whole, whole.everything)}
    return tuple(
        replace(
            row,
            shape_before=(old := before.get(row.name, row)).shape_before,
            params_before=old.params_before,
            macs_before=old.macs_before,
        )
        for row in rows
    )


def _reached(whole: Analysis, analysis: Analysis, keep: Mask, options: Options) -> float:
    from onnxprune.vocabulary import decided_rows

    cost, full = analysis.cost, whole.cost
    if options.budget.kind == "macs":
        return cost.macs(keep) / max(full.macs(whole.everything), 1.0)
    if options.budget.kind == "params":
        return cost.params(keep) / max(full.params(whole.everything), 1.0)
    if options.budget.kind == "size-mb":
        return cost.size_mb(keep)
    _, gone = decided_rows(analysis.coupling)
    groups = [g for g in analysis.groups if not np.isin(g.units, gone).any()]
    left = sum(int(keep[g.units].sum()) * g.width for g in groups)
    return left / sum(g.size * g.width for g in groups) if groups else 1.0


def _with_latency(
    original: onnx.ModelProto,
    rebuilt: onnx.ModelProto,
    before: Cost,
    after: Cost,
    feeds: Sequence[Feeds],
    options: Options,
) -> tuple[Cost, Cost]:
    """Both latencies, measured in turns so that they share what else the machine does."""
    from onnxprune import runtime

    if options.as_float32:
        return before, after
    sessions = [runtime.session(m, threads=options.threads) for m in (original, rebuilt)]
    times = runtime.latencies_ms([(s, feeds[0]) for s in sessions])
    return replace(before, latency_ms=times[0]), replace(after, latency_ms=times[1])


def _behaviour(
    original: onnx.ModelProto,
    rebuilt: onnx.ModelProto,
    old: Mapping[str, float],
    new: Mapping[str, float],
    options: Options,
    feeds: int,
) -> CheckReport:
    """Level 3: the finished model answers as the original does, within the asked budget."""
    problems = structure_problems(rebuilt, original)
    sound = not problems
    metric = next((m for m in ("accuracy", "agreement") if m in new), None)
    if options.max_drop is not None:
        if metric is None:
            problems.append(
                "--max-drop was given, but there is no metric: add --val data with labels"
            )
        else:
            drop = 100 * (old.get(metric, 1.0) - new[metric])
            if drop > options.max_drop + 1e-9:
                problems.append(
                    f"{metric} fell by {drop:.2f} points, more than --max-drop {options.max_drop:g}"
                )
    return CheckReport(
        passed=not problems,
        structure=sound,
        max_error=None,
        tolerance=None,
        feeds=feeds,
        reference="the original model",
        agreement=new.get("agreement"),
        metrics=new,
        problems=tuple(problems),
    )
