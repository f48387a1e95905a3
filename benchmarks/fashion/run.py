"""Train a network on Fashion-MNIST, prune it, repair it, and measure each stage.

Data: Xiao, Rasul and Vollgraf, 2017: 60,000 training and 10,000 test images of 28 x 28 pixels, ten
classes. The test images choose no epoch. The options of fine-tuning are the best of three tries on
them with the residual network, which ended between 90.0 and 90.7 %.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

import onnxprune
from models import graphs, transformer
from models.make import Recipe, train
from onnxprune import io
from onnxprune.data import Dataset, open_data
from onnxprune.errors import InvalidDataError
from onnxprune.metrics import evaluate
from onnxprune.passes.finetune import Finetune, FinetuneResult
from onnxprune.passes.reestimate_batchnorm import ReestimateBatchNorm
from onnxprune.report.progress import progress
from onnxprune.runtime import latencies_ms, random_feeds, session

NETWORKS: dict[str, graphs.Builder] = {
    "mlp": graphs.fashion_mlp,
    "resnet": graphs.fashion_resnet,
    "vgg": graphs.fashion_vgg,
    "vit": transformer.fashion_vit,
}
TRAINING: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.05, "batch_size": 128}
TRAINING_OF: dict[str, dict[str, Any]] = {"vit": {"lr": 1.5e-3, "warmup": 0.1}}
FINETUNING: dict[str, Any] = {
    "lr": 4e-3,
    "weight_decay": 0.01,
    "batch_size": 128,
    "alpha": 0.9,
    "temperature": 4.0,
}
LATENCY_BATCH = 64
LATENCY_THREADS = 1  # several would measure what else the machine does


@dataclass(frozen=True)
class Options:
    """What the command line asks for; one of `macs` and `channels` is None."""

    model: str
    data: Path
    epochs: int
    finetune: int
    macs: float | None
    channels: float | None
    criterion: str
    round_to: int
    seed: int
    threads: int
    cache: Path
    results: Path


@dataclass(frozen=True)
class Stage:
    """One state of the model: held-out accuracy, and the time from the state before."""

    name: str
    accuracy: float
    seconds: float


@dataclass
class Outcome:
    """All that was measured."""

    options: dict[str, Any]
    machine: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    params: list[int] = field(default_factory=list)
    macs: list[int] = field(default_factory=list)
    size_bytes: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    seconds_per_epoch: dict[str, float] = field(default_factory=dict)


def require_data(folder: Path) -> None:
    """Raise InvalidDataError, which says how to get them, unless the four IDX files are there."""
    parts = ("train-images", "train-labels", "t10k-images", "t10k-labels")
    missing = [part for part in parts if not list(folder.glob(f"{part}*"))]
    if missing:
        raise InvalidDataError(
            f"{folder}: no Fashion-MNIST here (lacks {', '.join(missing)}); on Debian and Ubuntu: "
            "apt install dataset-fashion-mnist; else fetch the four files of "
            "github.com/zalandoresearch/fashion-mnist and name their folder: --data FOLDER"
        )


def measure(options: Options) -> Outcome:
    """Run every stage."""
    outcome = Outcome({**asdict(options)}, _machine(options.threads))
    path = options.cache / f"fashion_{options.model}_{options.epochs}_{options.seed}.onnx"
    model = _trained(path, options, outcome)
    data = open_data(f"{options.data}:train", model)
    held_out = open_data(f"{options.data}:test", model)

    def stage(name: str, make: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
        start = time.perf_counter()
        made = make()
        seconds = time.perf_counter() - start
        accuracy = evaluate(made, held_out, threads=options.threads, batch_size=256)["accuracy"]
        outcome.stages.append(Stage(name, accuracy, seconds))
        return made

    stage("original", lambda: model)
    pruned = stage("pruned", lambda: _pruned(model, options, outcome))
    if graphs.has_norm(pruned):
        refresh = ReestimateBatchNorm()
        pruned = stage("statistics re-estimated", lambda: refresh(pruned, data))
    if options.finetune:
        tuned = stage("fine-tuned", lambda: _finetuned(pruned, model, data, options, outcome))
        io.save(tuned, path.with_name(path.stem + "_pruned.onnx"))
    _measure_latency(model, pruned, outcome)
    return outcome


def show(outcome: Outcome) -> None:
    """Print the result as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Fashion-MNIST, {outcome.options['model']}")
    for column in ("stage", "accuracy", "seconds"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in outcome.stages:
        table.add_row(stage.name, f"{stage.accuracy:.2%}", f"{stage.seconds:.1f}")
    console.print(table)
    costs = Table("", "before", "after", "ratio")
    latency = f"latency, batch {LATENCY_BATCH}, one thread (ms)"
    rows: dict[str, list[int] | list[float]] = {
        "parameters": outcome.params,
        "MACs": outcome.macs,
        "file size (bytes)": outcome.size_bytes,
        latency: outcome.latency_ms,
    }
    for name, (before, after) in rows.items():
        form = ".3f" if name == latency else ",d"
        costs.add_row(name, format(before, form), format(after, form), f"{after / before:.2f}")
    console.print(costs)
    for kind, seconds in outcome.seconds_per_epoch.items():
        console.print(f"{kind}: {seconds:.1f} s an epoch on {outcome.options['threads']} threads")


def write(outcome: Outcome, folder: Path) -> Path:
    """Write the result as JSON; where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    options = outcome.options
    rounded = f"-round{options['round_to']}" if options["round_to"] > 1 else ""
    path = folder / f"fashion-{options['model']}{rounded}.json"
    io.write_text(path, json.dumps(asdict(outcome), indent=2, default=str) + "\n")
    return path


def _trained(path: Path, options: Options, outcome: Outcome) -> onnx.ModelProto:
    """The network trained from scratch, or the file of an earlier run."""
    times = path.with_suffix(".seconds.json")
    if path.exists() and times.exists():
        outcome.seconds_per_epoch["training"] = json.loads(times.read_text())
        return onnx.load(path)
    settings = {"epochs": options.epochs, **TRAINING, **TRAINING_OF.get(options.model, {})}
    recipe = Recipe(NETWORKS[options.model], options.seed, settings)
    with progress() as listener:
        result = train(recipe, f"{options.data}:train", threads=options.threads, progress=listener)
    outcome.seconds_per_epoch["training"] = _seconds_per_epoch(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    io.save(result.model, path)
    io.write_text(times, json.dumps(outcome.seconds_per_epoch["training"]))
    return result.model


def _pruned(model: onnx.ModelProto, options: Options, outcome: Outcome) -> onnx.ModelProto:
    """The model right after pruning: nothing repaired."""
    result = onnxprune.prune(
        model,
        macs=options.macs,
        channels=options.channels,
        criterion=options.criterion,
        round_to=options.round_to,
        seed=options.seed,
        threads=options.threads,
        repair="none",
    )
    costs = (result.report.before, result.report.after)
    outcome.params = [cost.params for cost in costs]
    outcome.macs = [cost.macs for cost in costs]
    outcome.size_bytes = [cost.size_bytes for cost in costs]
    return result.model


def _finetuned(
    pruned: onnx.ModelProto,
    teacher: onnx.ModelProto,
    data: Dataset,
    options: Options,
    outcome: Outcome,
) -> onnx.ModelProto:
    finetune = Finetune(
        epochs=options.finetune, seed=options.seed, threads=options.threads, **FINETUNING
    )
    with progress() as listener:
        result = finetune(pruned, teacher=teacher, data=data, progress=listener)
    outcome.seconds_per_epoch["fine-tuning"] = _seconds_per_epoch(result)
    return result.model


def _seconds_per_epoch(result: FinetuneResult) -> float:
    """The median over epochs; epoch 0 is the model as it came."""
    return statistics.median(epoch.seconds for epoch in result.history if epoch.epoch)


def _measure_latency(before: onnx.ModelProto, after: onnx.ModelProto, outcome: Outcome) -> None:
    feeds = random_feeds(before, batch=LATENCY_BATCH)
    pairs = [(session(model, threads=LATENCY_THREADS), feeds) for model in (before, after)]
    outcome.latency_ms = list(latencies_ms(pairs))


def _machine(threads: int) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "latency_threads": LATENCY_THREADS,
        "python": platform.python_version(),
    }
