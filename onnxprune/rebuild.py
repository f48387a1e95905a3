"""The rebuild stage: win accuracy back with data, and measure what each step bought."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx

from onnxprune.options import Options
from onnxprune.progress import Progress

if TYPE_CHECKING:
    from onnxprune.data import Dataset
    from onnxprune.passes.finetune import FinetuneResult

CALIBRATION_SAMPLES = 1024


def rebuild(
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    train: Dataset | None,
    held_out: Dataset | None,
    options: Options,
    progress: Progress,
) -> tuple[onnx.ModelProto, dict[str, float], list[dict[str, Any]]]:
    """Win accuracy back: the model, its metrics, and what each step bought."""
    metrics = measure(pruned, held_out, original, options.threads)
    if train is None:
        return pruned, metrics, []
    steps: list[dict[str, Any]] = [{"step": "pruned", **metrics}]
    model = _reestimate(pruned, train)
    if model is not pruned:
        metrics = measure(model, held_out, original, options.threads)
        steps.append({"step": "reestimate-batchnorm", **metrics})
    if options.finetune:
        from onnxprune.passes.finetune import Finetune

        tune = Finetune(epochs=options.finetune, seed=options.seed, threads=options.threads)
        result = tune(model, teacher=original, data=train, val=held_out, progress=progress)
        model = result.model
        metrics = measure(model, held_out, original, options.threads)
        steps.append(
            {
                "step": "finetune",
                "epochs": options.finetune,
                "best_epoch": result.best_epoch,
                "seconds_per_epoch": _seconds_per_epoch(result),
                "frozen": dict(result.frozen),
                "notes": [f"fine-tuning: {note}" for note in result.notes],
                **metrics,
            }
        )
    return model, metrics, steps


def _seconds_per_epoch(result: FinetuneResult) -> float:
    """Without the set-up before the first; epoch 0 is the model as it came."""
    seconds = [epoch.seconds for epoch in result.history if epoch.epoch]
    return sum(seconds) / max(1, len(seconds))


def _reestimate(model: onnx.ModelProto, data: Dataset) -> onnx.ModelProto:
    if not any(node.op_type == "BatchNormalization" for node in model.graph.node):
        return model
    from onnxprune.passes.reestimate_batchnorm import ReestimateBatchNorm

    return ReestimateBatchNorm(samples=CALIBRATION_SAMPLES)(model, data)


def measure(
    model: onnx.ModelProto,
    data: Dataset | None,
    reference: onnx.ModelProto | None,
    threads: int | None,
) -> dict[str, float]:
    """Task metrics of `model`, and its likeness to `reference`; none without data."""
    if data is None:
        return {}
    from onnxprune.metrics import evaluate

    return evaluate(model, data, threads=threads, reference=reference)
