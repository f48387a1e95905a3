"""From load to report: analyse, score, select, apply, check, rebuild, check again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx

from onnxprune import io
from onnxprune.analysis import (
    Analysis,
    analyse,
    inspection,
    planned_frozen,
)
from onnxprune.asking import (
    budget_of,
    check_promise,
    check_ranges,
    check_repair,
    check_steps,
    ranking_of,
    tuning,
)
from onnxprune.calibration.inputs import Calibration, from_data, limited
from onnxprune.choosing import Chooser
from onnxprune.cost import WEIGHT_TYPES
from onnxprune.errors import (
    InvalidDataError,
    InvalidModelError,
    InvalidRecipeError,
    OnnxPruneError,
)
from onnxprune.float32 import float32_copy, float32_feeds, needs_float32
from onnxprune.gradual import between_steps, rebuilding
from onnxprune.granularity import Granularity
from onnxprune.granularity import parse as parse_granularity
from onnxprune.groups import Group
from onnxprune.loop import Attempt, Loop, Rebuilt, Trial
from onnxprune.metrics import Reference
from onnxprune.options import Options, Verified
from onnxprune.passes.simplify import Simplify, require_library
from onnxprune.plan import Plan, PlannedGroup, fingerprint
from onnxprune.preparation import replay_lossless, without_dead
from onnxprune.progress import Progress, Silent
from onnxprune.rebuild import calibrate, measure, rebuild
from onnxprune.reporting import make_report
from onnxprune.result import CheckReport, Inspection, Result
from onnxprune.rewriting import Mask
from onnxprune.scoring import default_criterion
from onnxprune.verify import (
    FLOAT32_NOTE,
    Feeds,
    difference,
    structure_problems,
)

if TYPE_CHECKING:
    from onnxprune.data import Dataset
    from onnxprune.passes.finetune import Finetune

Source = str | os.PathLike[str] | onnx.ModelProto
Scope = Literal["exact", "all"]
#: Samples on which the sensitivity of groups is measured.
SENSED = 256
Repairing = Literal["auto", "none", "reconstruct", "moments", "bn", "bias"]


def prune(
    model: Source,
    *,
    channels: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    size_mb: float | None = None,
    scope: Scope = "all",
    criterion: str | None = None,
    round_to: int = 1,
    min_keep: float = 0.1,
    ranking: str | None = None,
    granularity: str = "head",
    vocab_keep: str | os.PathLike[str] | Iterable[int] | None = None,
    vocab_unknown: int = 0,
    keep: Sequence[str] = (),
    data: Any = None,
    val: Any = None,
    repair: Repairing = "auto",
    finetune: int | Finetune = 0,
    steps: int = 1,
    max_drop: float | None = None,
    lossless: bool | None = None,
    simplify: bool = False,
    check: bool = True,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Prune a model to a budget, rebuild it where there is data, and check it.

    Args:
        model: path or ModelProto; it is left as it is.
        channels: keep this share of every layer's channels.
        macs, params: keep at most this share of all multiply-adds or weights.
        size_mb: the file is at most this large, in 10^6 bytes.
        scope: "exact" leaves out channels that pass through a mean, norm or softmax over them.
        criterion: importance of channels, one of `onnxprune.passes.score.criteria()` or, measured
            on data, of `onnxprune.passes.criteria.MEASURED`. None: the error that repair leaves,
            where there are data or BatchNormalization to make some up from, else "l2".
        round_to: kept widths are multiples of it where the layer is that wide.
        min_keep: the smallest share of a layer that is kept.
        ranking: "global": all channels compete; "isomorphic": those of layers of like shape do;
            "uniform": every layer loses the same share. None: uniform for `channels`, else global.
        granularity: comma-separated: "head" (whole attention heads) or "head-dim" (channels inside
            of heads), "expert" (whole experts too), "vocab" (rows of the input's embedding too).
        vocab_keep: for "vocab": the ids that stay, or a file of them.
        vocab_unknown: the id, one of these, as which all others are read.
        keep: names of nodes or weights that stay whole; shell wildcards.
        data: calibration or training data; see `onnxprune.data.open_data`.
        val: held-out data that the metrics are measured on; default `data`.
        repair: how accuracy is won back without labels and gradients; without `data`, with made-up
            inputs. "auto" takes what brings the outputs nearest to the original's.
        finetune: epochs of fine-tuning, with the original model as teacher; or how it is done.
        steps: in how many parts the channels go; the model is repaired after each, and ranked anew.
            Fine-tuning follows the last, or each: `Finetune(every_step=True)`.
        max_drop: the largest loss of the task's metric, in points (1 is 0.01). Where the budget
            costs more, channels are given back, see `onnxprune.loop`; without a budget as many go
            as this allows. If nothing keeps it, the last of `report.checks` fails.
        lossless: True needs no budget and then only removes what provably does not matter; before
            a budget that happens as well, where it can be checked; False leaves it out.
        simplify: at the end fold and merge layers, where the result then answers the same; needs
            the package onnxslim.
        check: False leaves out the comparison with the masked twin.
        threads: threads of every session; None leaves it to ONNX Runtime.

    Raises:
        InvalidRecipeError: an option is out of range, or not exactly one budget was given.
        BudgetError: the budget cannot be reached; says what can.
        VerificationError: the pruned model is wrong and no group of channels is to blame.
    """
    from onnxprune.passes.select import Limits

    check_promise(max_drop, data if val is None else val)
    check_ranges(min_keep, round_to, scope, seed)
    check_repair(repair, data)
    if simplify:
        require_library("--simplify")
    given = {"channels": channels, "macs": macs, "params": params, "size-mb": size_mb}
    options = Options(
        budget_of(lossless, max_drop, given),
        Limits(round_to, min_keep, scope, ranking_of(ranking)),
        criterion or "",
        tuple(keep),
        parse_granularity(granularity, vocab_keep, vocab_unknown),
        tuning(finetune, data, seed, threads),
        max_drop,
        check,
        seed,
        threads,
        repair=repair,
        steps=check_steps(steps, granularity),
        simplify=simplify,
    )
    run = _Run(options, progress or Silent())
    with run.stage("load"):
        run.load(model, data, val)
    with run.stage("analyse"):
        run.analyse(lossless)
    final, trials = run.prune()
    return run.result(final, trials)


def inspect(model: Source, *, data: Any = None, threads: int | None = None) -> Inspection:
    """Parameters, MACs, groups, and what is frozen and why.

    With `data`, which needs no labels, also how much each group matters to the outputs.
    """
    original = io.load(model)
    analysis = analyse(original)
    found, dataset = inspection(analysis), _open(data, original)
    if dataset is None:
        return found
    from onnxprune.passes.sensitivity import Sensitivity

    batches = limited(from_data(dataset, samples=SENSED), analysis.coupling).batches
    rows = Sensitivity(threads=threads)(analysis.coupling, analysis.groups, batches)
    return replace(found, sensitivity=rows)


def apply(model: Source, plan: Plan) -> onnx.ModelProto:
    """Replay a plan on the model that it was made for.

    Raises:
        InvalidRecipeError: the plan belongs to another model, or contradicts itself.
    """
    from onnxprune.passes.apply import apply_keep

    original = io.load(model)
    if fingerprint(original)["structure_sha256"] != plan.model.get("structure_sha256"):
        raise InvalidRecipeError(
            "the plan was made for another model "
            f"({plan.model.get('name')!r}, {plan.model.get('nodes')} nodes)"
        )
    granularity = Granularity.from_json(plan.options)
    if plan.lossless:
        analysis = replay_lossless(original, granularity)
    else:
        analysis = analyse(original, granularity=granularity)
    keep = _planned_keep(analysis.groups, plan, analysis.everything)
    if keep.all():
        return analysis.model
    applied = apply_keep(analysis.coupling, keep)
    if dict(applied.slices) != dict(plan.initializers):
        raise InvalidRecipeError(
            "the plan contradicts itself: its groups do not give the shapes of its initializers; "
            "make a new plan"
        )
    return applied.model


def check(
    a: Source,
    b: Source,
    *,
    data: Any = None,
    tolerance: float | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> CheckReport:
    """Compare model `b` with its original `a`: sound, same inputs and outputs, how close.

    Without `tolerance` the size of the difference is reported and does not fail the check.
    """
    from onnxprune import runtime
    from onnxprune.metrics import evaluate

    original, candidate = io.load(a), io.load(b)
    problems = structure_problems(candidate, original)
    sound = not problems
    dataset = _open(data, original)
    as_float32 = needs_float32(original, threads)
    feeds = _feeds(original, dataset, seed, threads, as_float32)
    error: float | None = None
    metrics: Mapping[str, float] = {}
    try:
        models = [float32_copy(m) if as_float32 else m for m in (original, candidate)]
        sessions = [runtime.session(m, threads=threads) for m in models]
        outputs = [[list(runtime.run(s, f).values()) for f in feeds] for s in sessions]
        error = max(difference(y, x) for x, y in zip(*outputs, strict=True))
        if dataset is not None and not as_float32:
            metrics = evaluate(sessions[1], dataset, threads=threads, reference=sessions[0])
    except OnnxPruneError as failure:
        sound = False
        problems.append(str(failure))
    if tolerance is not None and error is not None and not error <= tolerance:
        problems.append(f"outputs differ by {error:.3g} of the largest, more than {tolerance:g}")
    return CheckReport(
        passed=not problems,
        structure=sound,
        max_error=error,
        tolerance=tolerance,
        feeds=len(feeds),
        reference="the original model" + (FLOAT32_NOTE if as_float32 else ""),
        agreement=metrics.get("agreement"),
        metrics=metrics,
        problems=tuple(problems),
    )


# -- stages ----------------------------------------------------------------------------------------


class _Run:
    """One run of `prune`: what its stages hand on."""

    original: onnx.ModelProto
    train: Dataset | None
    held_out: Dataset | None
    whole: Analysis
    analysis: Analysis
    first: Verified
    feeds: list[Feeds]
    calibration: Calibration | str | None
    old: Mapping[str, float]
    reference: Reference

    def __init__(self, options: Options, progress: Progress) -> None:
        self.options, self.progress = options, progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tell of a stage and count its seconds."""
        self.progress.stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def load(self, model: Source, data: Any, val: Any) -> None:
        """The model, and what it is trained and measured on."""
        self.original = io.load(model)
        self.train = _open(data, self.original)
        self.held_out = _open(val if val is not None else data, self.original)

    def analyse(self, lossless: bool | None) -> None:
        """What can go, on which inputs that is checked, and how good the model is."""
        options, original, threads = self.options, self.original, self.options.threads
        self.whole = analyse(original, granularity=options.granularity)
        _check_prunable(self.whole)
        budget = options.budget
        if not budget.value and not self.whole.cost.macs(self.whole.everything):
            budget = replace(budget, kind="params")
        options = replace(options, budget=budget, as_float32=needs_float32(original, threads))
        self.feeds = _feeds(original, self.train, options.seed, threads, options.as_float32)
        self.analysis, self.first = without_dead(self.whole, lossless, self.feeds, options)
        macs = self.whole.cost.macs(self.whole.everything)
        self.calibration = calibrate(original, macs, self.train, options)
        criterion = options.criterion or default_criterion(self._seen)
        self.options = replace(options, criterion=criterion)
        self.old = measure(original, self.held_out, None, options)
        shown = float32_copy(original) if options.as_float32 else original
        self.reference = Reference(shown, threads=threads)

    @property
    def _seen(self) -> Calibration | None:
        """What channels are ranked on: as the repair, or the data where there is no repair."""
        from onnxprune.passes.criteria import MEASURED

        if isinstance(self.calibration, Calibration):
            return self.calibration
        if self.train is None or self.options.criterion not in MEASURED:
            return None
        return from_data(self.train, seed=self.options.seed)

    def prune(self) -> tuple[Attempt, tuple[Trial, ...]]:
        """The model that is kept, and what was tried for it."""
        if self.options.budget.kind == "lossless":
            self.train = None
            return Attempt(self.options.budget, self.first, *self._rebuilt(self.first)), ()
        with self.stage("prune"):
            chooser = Chooser(self.analysis, self.options, self.feeds, self._seen)
        reach = rebuilding(chooser, self._seen, self._rebuilt)
        loop = Loop(chooser, self.whole, self.options, self.old, reach, self.stage)
        final, trials = loop.run()
        notes = (*self.first.notes, *final.verified.notes)
        return replace(final, verified=replace(final.verified, notes=notes)), trials

    def _rebuilt(self, verified: Verified, last: bool = True) -> Rebuilt:
        """The model won back; between steps without measuring it."""
        return rebuild(
            self.analysis,
            verified,
            self.calibration,
            self.train,
            self.held_out if last else None,
            self.reference,
            self.options if last else between_steps(self.options),
            self.progress,
        )

    def result(self, final: Attempt, trials: tuple[Trial, ...]) -> Result:
        """The model with its plan and report."""
        analysis, options, whole = self.analysis, self.options, self.whole
        plan = _plan(analysis, final.verified, replace(options, budget=final.budget))
        plan = replace(plan, model=fingerprint(self.original), lossless=analysis is not whole)
        if options.simplify:
            with self.stage("simplify"):
                final = self._simplified(final)
        with self.stage("check"):
            report = make_report(analysis, final, options, self.feeds, whole, self.old, trials)
        return Result(final.model, plan, replace(report, seconds=dict(self.seconds)))

    def _simplified(self, final: Attempt) -> Attempt:
        """The same with fewer nodes, and a note on that."""
        run = Simplify(self.options.threads, self.options.as_float32)
        found = run(final.model, self.feeds)
        verified = replace(final.verified, notes=(*final.verified.notes, found.note))
        return replace(final, model=found.model, verified=verified)


def _check_prunable(analysis: Analysis) -> None:
    constants = analysis.coupling.graph.constants.values()
    if not any(c.dtype in WEIGHT_TYPES and c.size for c in constants):
        raise InvalidModelError(
            "the model has no weights of a type that can be pruned "
            "(float or 8- and 4-bit integers): "
            "export it with its weights"
        )


def _open(source: Any, model: onnx.ModelProto) -> Dataset | None:
    if source is None:
        return None
    from onnxprune.data import open_data

    return open_data(source, model)


def _feeds(
    model: onnx.ModelProto, data: Dataset | None, seed: int, threads: int | None, as_float32: bool
) -> list[Feeds]:
    """Inputs for the checks: random ones at two batch sizes, and real ones where there are some.

    A length that was baked in shows at another batch size.

    Raises:
        InvalidDataError: the model does not run on the data.
    """
    from onnxprune import runtime

    first = None if data is None else next(iter(data.batches(4)), None)
    real: list[Feeds] = [] if first is None else [first.feeds]
    if as_float32:
        model, real = float32_copy(model), [float32_feeds(feeds) for feeds in real]
    target = runtime.session(model, threads=threads)
    try:
        for feeds in real:
            runtime.run(target, feeds)
    except (InvalidDataError, InvalidModelError) as failure:
        raise InvalidDataError(f"the model does not run on the data: {failure}") from failure
    try:
        made = runtime.working_feeds(model, seed=seed, threads=threads, target=target)
        return [*made, *real]
    except InvalidDataError:
        if not real:
            raise
        return real


def _planned_keep(groups: Sequence[Group], plan: Plan, everything: Mask) -> Mask:
    keep = everything.copy()
    if [(g.name, g.size, g.width) for g in groups] != [
        (p.name, p.units, p.width) for p in plan.groups
    ]:
        raise InvalidRecipeError(
            "the plan's groups are not this model's; it was made by another version"
        )
    for group, planned in zip(groups, plan.groups, strict=True):
        if (
            any(not 0 <= i < group.size for i in planned.removed)
            or len(planned.removed) >= group.size
        ):
            raise InvalidRecipeError(
                f"the plan removes units that group {group.name!r} does not have"
            )
        keep[group.units[list(planned.removed)]] = False
    return keep


def _plan(analysis: Analysis, verified: Verified, options: Options) -> Plan:
    from onnxprune.passes.select import default_ranking

    groups = tuple(
        PlannedGroup(
            g.name,
            g.size,
            g.width,
            g.exact,
            tuple(np.flatnonzero(~verified.keep[g.units]).tolist()),
        )
        for g in analysis.groups
    )
    return Plan(
        fingerprint(analysis.model),
        dict(verified.applied.slices),
        groups,
        planned_frozen(analysis),
        {
            "budget": {options.budget.kind: options.budget.value},
            "scope": options.limits.scope,
            "criterion": options.criterion,
            "ranking": options.limits.ranking or default_ranking(options.budget),
            **options.granularity.to_json(),
        },
    )
