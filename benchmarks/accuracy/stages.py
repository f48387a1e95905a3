"""Prune, repair, fine-tune; the held-out accuracy after each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

import onnxprune
from benchmarks.accuracy.subjects import Samples
from onnxprune.data import open_data
from onnxprune.metrics import evaluate
from onnxprune.progress import Progress

CALIBRATION = 1024
VALIDATION = 2000
SEED = 0


@dataclass(frozen=True)
class Row:
    """One stage of one network at one budget; `cpu_s` from the original on, workers included."""

    tool: str
    model: str
    budget: float
    macs: float
    stage: str
    accuracy: float
    cpu_s: float


def own(
    name: str,
    original: onnx.ModelProto,
    train: Samples,
    test: Samples,
    budget: float,
    threads: int,
    progress: Progress,
) -> Iterator[Row]:
    """The stages by this project, each by one call of `prune` with its defaults.

    The first two see no data, the repair 1,024 samples without their labels, fine-tuning all
    samples with their labels once. What `prune` measures, it measures on training samples.
    """
    calls: Mapping[str, Mapping[str, Any]] = {
        "pruned": {"repair": "none"},
        "repaired without data": {},
        "repaired": {"data": _part(train, slice(CALIBRATION), "y")},
        "fine-tuned": {"data": train, "val": _part(train, slice(-VALIDATION, None)), "finetune": 1},
    }
    for stage, options in calls.items():
        begun = _cpu_s()
        result = onnxprune.prune(
            original, macs=budget, threads=threads, seed=SEED, progress=progress, **options
        )
        spent = _cpu_s() - begun
        share = result.report.after.macs / result.report.before.macs
        accuracy = _accuracy(result.model, test, threads)
        yield Row("onnxprune", name, budget, share, stage, accuracy, spent)


def dense(name: str, original: onnx.ModelProto, test: Samples, threads: int) -> Row:
    """The original as it is."""
    return Row("", name, 1.0, 1.0, "original", _accuracy(original, test, threads), 0.0)


def _part(samples: Samples, rows: slice, without: str = "") -> Samples:
    return {name: array[rows] for name, array in samples.items() if name != without}


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
