"""The rebuild stage: win accuracy back, and measure what each step bought.

Repairs need no labels and no gradients; they need inputs, the user's or made-up ones. A repair that
does not bring the outputs nearer to the original's is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.analysis import Analysis
from onnxprune.calibration.adapt import Adapted, adapt
from onnxprune.calibration.inputs import Calibration, limited
from onnxprune.calibration.sequential import kept_indices
from onnxprune.float32 import Float32Data, float32_copy
from onnxprune.options import Options, Verified
from onnxprune.progress import Progress
from onnxprune.rewriting import Rewriter
from onnxprune.verify import FAILURES, structure_problems

if TYPE_CHECKING:
    from onnxprune.calibration.sequential import Repaired
    from onnxprune.data import Dataset
    from onnxprune.metrics import Reference
    from onnxprune.passes.finetune import FinetuneResult

_log = logging.getLogger(__name__)
Array = NDArray[Any]
Step = dict[str, Any]
Feeds = Mapping[str, Array]
#: What `--repair` takes; auto tries the first and, where it does not help, those after it.
REPAIRS = ("reconstruct", "moments", "bn", "bias")
#: One in so many batches is kept for judging.
JUDGED = 8
#: Weights above which made-up inputs are used only where that is asked for.
LARGE = 50_000_000


def rebuild(
    analysis: Analysis,
    verified: Verified,
    calibration: Calibration | str | None,
    train: Dataset | None,
    held_out: Dataset | None,
    reference: Reference,
    options: Options,
    progress: Progress,
) -> tuple[onnx.ModelProto, dict[str, float], list[Step]]:
    """Win accuracy back: the model, its metrics, and what each step bought."""
    original, model = analysis.model, verified.applied.model
    metrics = measure(model, held_out, reference, options)
    steps: list[Step] = []
    if isinstance(calibration, str):
        steps.append({"step": "pruned", "notes": [calibration], **metrics})
    elif calibration is not None and not verified.keep.all():
        rewriter = Rewriter(analysis.coupling, verified.keep)
        try:
            stage = _Stage(original, rewriter, limited(calibration, analysis.coupling), options)
            error = stage.error(model)
        except FAILURES as failure:
            steps.append({"step": "pruned", "notes": [f"not repaired: {failure}"], **metrics})
        else:
            steps.append({"step": "pruned", "output_error": error, **metrics})
            repaired, facts = stage.repair(model, train, error, progress)
            if repaired is not model:
                model = repaired
                metrics = measure(model, held_out, reference, options)
            steps.append({**facts, **metrics})
    if options.finetune and train is not None:
        steps = steps or [{"step": "pruned", **metrics}]
        model, facts = _finetune(original, model, train, held_out, options, progress)
        metrics = measure(model, held_out, reference, options)
        steps.append({**facts, **metrics})
    return model, metrics, steps


class _Stage:
    """Repairs one pruned model, judged by how far its outputs are from the original's."""

    def __init__(
        self,
        original: onnx.ModelProto,
        rewriter: Rewriter,
        calibration: Calibration,
        options: Options,
    ) -> None:
        self.original, self.rewriter, self.options = original, rewriter, options
        self.calibration = calibration
        self.may_grow = options.budget.kind not in ("params", "size-mb")
        self.fitted, self.judged = parted(calibration.batches)
        self.adapted: Adapted | None = None
        if not calibration.is_real:
            self.adapted = adapt(
                original, calibration.batches, may_grow=self.may_grow, threads=options.threads
            )
        names = self.adapted.norms if self.adapted else ()
        self.kept = {n: at[1] for n in names if 1 in (at := kept_indices(rewriter, n))}
        self.wanted = self._outputs(self.adapted.model if self.adapted else original)

    def repair(
        self, model: onnx.ModelProto, train: Dataset | None, before: float, progress: Progress
    ) -> tuple[onnx.ModelProto, Step]:
        """The first repair that brings the outputs nearer; the model itself where none does."""
        asked = REPAIRS if self.options.repair == "auto" else (self.options.repair,)
        dropped = {}
        for name in asked:
            try:
                result = self._run(name, model, train, progress)
                problems = structure_problems(result.model, self.original)
                after = self.error(result.model)
            except (*FAILURES, np.linalg.LinAlgError) as failure:
                dropped[name] = str(failure)
                continue
            if problems or not after < before:
                dropped[name] = problems[0] if problems else "the outputs came no nearer"
                continue
            notes = [f"repaired without data, with {self.calibration.source}"]
            return result.model, {
                "step": name,
                "inputs": self.calibration.source,
                "samples": self.calibration.samples,
                "solved": result.solved,
                "skipped": dict(result.skipped),
                "output_error": after,
                "notes": [] if self.calibration.is_real else notes,
            }
        _log.info("no repair helped: %s", dropped)
        words = "; ".join(f"{name}: {why}" for name, why in dropped.items())
        return model, {"step": "no repair", "notes": [f"no repair was kept ({words})"]}

    def _run(
        self, name: str, model: onnx.ModelProto, train: Dataset | None, progress: Progress
    ) -> Repaired:
        from onnxprune.calibration.layerwise import LayerwiseRepair
        from onnxprune.calibration.sequential import Repaired
        from onnxprune.passes.compensate import CompensateBias
        from onnxprune.passes.match_moments import MatchMoments
        from onnxprune.passes.reconstruct import Reconstruct

        if name == "bn":
            return Repaired(self._reestimate(model, train))
        passes: dict[str, type[LayerwiseRepair]] = {
            "reconstruct": Reconstruct,
            "moments": MatchMoments,
            "bias": CompensateBias,
        }
        seed, threads = self.options.seed, self.options.threads
        step = passes[name](may_grow=self.may_grow, seed=seed, threads=threads)
        if self.adapted is None:
            return step(model, self.rewriter, self.fitted, progress=progress)
        result = step(
            self.adapted.enter(model, self.kept),
            self.rewriter,
            self.fitted,
            original=self.adapted.model,
            progress=progress,
        )
        return replace(result, model=self.adapted.leave(result.model, self.kept))

    def _reestimate(self, model: onnx.ModelProto, train: Dataset | None) -> onnx.ModelProto:
        from onnxprune.passes.reestimate_batchnorm import ReestimateBatchNorm

        if train is None or not any(
            node.op_type == "BatchNormalization" for node in model.graph.node
        ):
            return model
        return ReestimateBatchNorm(threads=self.options.threads)(model, train)

    def error(self, model: onnx.ModelProto) -> float:
        """Squared distance of the outputs, relative to their variance; infinite if not finite."""
        total = 0.0
        seen = self.adapted.enter(model, self.kept) if self.adapted else model
        wanted, got = self.wanted, self._outputs(seen)
        for name, target in wanted.items():
            spread = sum(float(((t - t.mean()) ** 2).sum()) for t in target)
            gap = sum(
                float(((g - t) ** 2).sum()) if g.shape == t.shape else np.inf
                for g, t in zip(got[name], target, strict=True)
            )
            total += gap / max(spread, 1e-30)
        return total / max(len(wanted), 1) if np.isfinite(total) else np.inf

    def _outputs(self, model: onnx.ModelProto) -> Mapping[str, list[Array]]:
        """Float outputs by name and batch, in float64."""
        session = runtime.session(model, threads=self.options.threads)
        found: dict[str, list[Array]] = {}
        for feeds in self.judged:
            for name, value in runtime.run(session, feeds).items():
                if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                    found.setdefault(name, []).append(value.astype(np.float64))
        return found


def parted(batches: Sequence[Feeds]) -> tuple[Sequence[Feeds], Sequence[Feeds]]:
    """The batches to fit on, and those that judge; one alone does both."""
    if len(batches) < 2:
        return batches, batches
    share = -(-len(batches) // JUDGED)
    return batches[:-share], batches[-share:]


def _finetune(
    original: onnx.ModelProto,
    model: onnx.ModelProto,
    train: Dataset,
    held_out: Dataset | None,
    options: Options,
    progress: Progress,
) -> tuple[onnx.ModelProto, Step]:
    tune = options.finetune
    assert tune is not None
    result = tune(model, teacher=original, data=train, val=held_out, progress=progress)
    return result.model, {
        "step": "finetune",
        "epochs": tune.epochs,
        "best_epoch": result.best_epoch,
        "lr": result.lr,
        "seconds_per_epoch": _seconds_per_epoch(result),
        "frozen": dict(result.frozen),
        "notes": [f"fine-tuning: {note}" for note in result.notes],
    }


def _seconds_per_epoch(result: FinetuneResult) -> float:
    """Without the set-up before the first; epoch 0 is the model as it came."""
    seconds = [epoch.seconds for epoch in result.history if epoch.epoch]
    return sum(seconds) / max(1, len(seconds))


def calibrate(
    original: onnx.ModelProto, macs: float, train: Dataset | None, options: Options
) -> Calibration | str | None:
    """What the repair will see; None where none is asked for, words where there can be none.

    `macs`: multiply-adds of one sample.
    """
    from onnxprune.calibration.inputs import from_data, made_up
    from onnxprune.cost import count_params

    if options.repair == "none" or options.budget.kind == "lossless":
        return None
    if options.as_float32:
        return "not repaired: ONNX Runtime does not run the model's own types on the CPU"
    if train is not None:
        return from_data(train, seed=options.seed)
    if options.repair == "auto" and count_params(original) > LARGE:
        return (
            f"not repaired: the model has more than {LARGE // 1_000_000} million weights and "
            "there is no --data; --repair reconstruct does it with made-up inputs"
        )
    try:
        return made_up(original, macs=macs, seed=options.seed, threads=options.threads)
    except FAILURES as failure:
        return f"not repaired: no inputs can be made up ({failure})"


def measure(
    model: onnx.ModelProto,
    data: Dataset | None,
    reference: Reference | None,
    options: Options,
) -> dict[str, float]:
    """Task metrics of `model`, and its likeness to `reference`; none without data."""
    if data is None:
        return {}
    from onnxprune.metrics import evaluate

    if options.as_float32:
        model, data = float32_copy(model), Float32Data(data)
    return evaluate(model, data, threads=options.threads, reference=reference)
