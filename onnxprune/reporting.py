"""The last stage: measure the finished model, check how it behaves, and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx

from onnxprune.analysis import Analysis, layer_rows, measured_cost
from onnxprune.loop import Attempt, Trial, shortfall, trail
from onnxprune.metrics import points_lost
from onnxprune.options import Options
from onnxprune.preparation import budget_used
from onnxprune.result import CheckReport, Cost, LayerRow, Report
from onnxprune.rewriting import Mask
from onnxprune.verify import Feeds, structure_problems

#: Channels that ONNX Runtime computes at a time on most processors.
BLOCK = 8
#: Ratio of latencies that is no noise of the measurement.
SLOWER = 1.1


def make_report(
    analysis: Analysis,
    final: Attempt,
    options: Options,
    feeds: Sequence[Feeds],
    whole: Analysis,
    old: Mapping[str, float],
    trials: Sequence[Trial] = (),
) -> Report:
    """Everything measured on the way to the `final` model.

    `whole` is the analysis of the original and `old` its metrics; `analysis` is that of what the
    final attempt chose from.
    """
    from onnxprune.passes.select import default_ranking

    original, rebuilt, new = whole.model, final.model, final.metrics
    verified, keep = final.verified, final.verified.keep
    before = measured_cost(whole, original, whole.everything)
    after = measured_cost(analysis, rebuilt, keep)
    checks = [c for c in (verified.report,) if c is not None]
    before, after = _with_latency(original, rebuilt, before, after, feeds, options)
    if options.check:
        checks.append(_behaviour(original, rebuilt, old, new, options, len(feeds), len(trials)))
    target = options.budget
    return Report(
        before=replace(before, metrics=old),
        after=replace(after, metrics=new),
        layers=_layers(whole, analysis, keep),
        budget={
            "kind": target.kind,
            "target": target.value or trials[0].reached,
            "reached": budget_used(whole, analysis, keep, target),
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
            "finetune": options.finetune.epochs if options.finetune else 0,
            "steps": options.steps,
            "max_drop": options.max_drop,
            "seed": options.seed,
        },
        checks=tuple(checks),
        rebuild=tuple(final.steps),
        attempts=trail(trials),
        notes=(
            *verified.notes,
            *shortfall(options, trials),
            *(note for step in final.steps for note in step.get("notes", ())),
            *_slower(before, after, options),
        ),
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


def _slower(before: Cost, after: Cost, options: Options) -> tuple[str, ...]:
    """What to do where a model that computes less takes longer."""
    old, new = before.latency_ms, after.latency_ms
    if old is None or new is None or new < SLOWER * old or options.limits.round_to >= BLOCK:
        return ()
    if after.macs >= before.macs:
        return ()
    return (
        "it computes less but took longer: ONNX Runtime computes channels in blocks; "
        f"--round-to {BLOCK} keeps whole ones",
    )


def _behaviour(
    original: onnx.ModelProto,
    rebuilt: onnx.ModelProto,
    old: Mapping[str, float],
    new: Mapping[str, float],
    options: Options,
    feeds: int,
    attempts: int,
) -> CheckReport:
    """Level 3: the finished model answers as the original does, within the asked budget."""
    problems = structure_problems(rebuilt, original)
    sound = not problems
    if options.max_drop is not None:
        problems += _broken_promise(points_lost(old, new), options.max_drop, attempts)
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


def _broken_promise(lost: tuple[str, float] | None, limit: float, attempts: int) -> list[str]:
    if lost is None:
        return ["--max-drop was given, but there is no metric: add --val data with labels"]
    metric, drop = lost
    if drop <= limit + 1e-9:
        return []
    missed = f"{metric} fell by {drop:.2f} points, more than --max-drop {limit:g}"
    if attempts < 2:
        return [missed]
    return [f"no model was found that keeps the promise in {attempts} attempts: {missed}"]
