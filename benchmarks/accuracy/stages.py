"""Prune, repair, fine-tune; the held-out accuracy after each."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import onnx

import onnxprune
from benchmarks.accuracy.subjects import Samples, Subject
from onnxprune.data import open_data
from onnxprune.metrics import evaluate
from onnxprune.passes.finetune import Finetune

CALIBRATION = 1024
SEED = 0


@dataclass(frozen=True)
class Row:
    """One stage of one network at one budget; `cpu_s` from the stage before, workers included."""

    tool: str
    model: str
    budget: float
    macs: float
    stage: str
    accuracy: float
    cpu_s: float


def own(
    name: str,
    subject: Subject,
    original: onnx.ModelProto,
    train: Samples,
    test: Samples,
    budget: float,
    threads: int,
) -> list[Row]:
    """The stages by this project.

    The first two see no data, the repair (and the choice of channels, which knows it) 1,024
    samples without their labels, fine-tuning all samples with their labels once.
    """
    rows: list[Row] = []
    unlabelled = {n: a[:CALIBRATION] for n, a in train.items() if n != "y"}
    clock = _cpu_s()

    def row(stage: str, model: onnx.ModelProto) -> None:
        nonlocal clock
        spent = _cpu_s() - clock
        accuracy = _accuracy(model, test, threads)
        rows.append(Row("onnxprune", name, budget, share, stage, accuracy, spent))
        clock = _cpu_s()

    options: dict[str, Any] = {"macs": budget, "threads": threads, "seed": SEED}
    pruned = onnxprune.prune(original, repair="none", **options)
    share = pruned.report.after.macs / pruned.report.before.macs
    row("pruned", pruned.model)
    row("repaired without data", onnxprune.prune(original, **options).model)
    repaired = onnxprune.prune(original, data=unlabelled, **options).model
    row("repaired", repaired)
    if subject.finetuning:
        tune = Finetune(epochs=1, seed=SEED, threads=threads, **subject.finetuning)
        tuned = tune(repaired, teacher=original, data=open_data(train, repaired)).model
        row("fine-tuned", tuned)
    return rows


def dense(name: str, original: onnx.ModelProto, test: Samples, threads: int) -> Row:
    """The original as it is."""
    return Row("", name, 1.0, 1.0, "original", _accuracy(original, test, threads), 0.0)


def _accuracy(model: onnx.ModelProto, test: Samples, threads: int) -> float:
    data = open_data(test, model)
    return float(evaluate(model, data, threads=threads, batch_size=250)["accuracy"])


def _cpu_s() -> float:
    """CPU seconds of this process and of the children that have ended."""
    try:
        import resource
    except ImportError:  # not on Windows
        return time.process_time()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
