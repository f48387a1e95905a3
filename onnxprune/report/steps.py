"""What the passes for single weights and whole layers did, on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from onnxprune.report.console import bytes_text, new_table, show_table

if TYPE_CHECKING:
    import onnx
    from rich.console import Console
    from rich.table import Table

    from onnxprune.passes.finetune import FinetuneResult
    from onnxprune.passes.prune_layers import LayersResult
    from onnxprune.passes.prune_weights import WeightsResult
    from onnxprune.recipe import RecipeResult


def show_weights(
    console: Console,
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    result: WeightsResult,
    metrics: Sequence[Mapping[str, float]],
) -> None:
    """Sparsity by layer, sizes, metrics, and what zeros are worth."""
    from onnxprune.passes.prune_weights import compressed_bytes

    noted = any(row.note for row in result.layers)
    heads = ("weight", "shape", "zeros", "output error", *(["note"] if noted else []))
    layers = new_table(console, heads, left=1)
    for row in result.layers:
        error = "-" if row.error is None else f"{row.error:.2%}"
        shape = "x".join(map(str, row.shape))
        layers.add_row(
            row.name, shape, f"{row.sparsity:.1%}", error, *([row.note] if noted else [])
        )
    show_table(console, layers)
    total = new_table(console, ("", "before", "after"), left=1)
    total.add_row("zeros in these weights", "", f"{result.sparsity:.1%}")
    total.add_row("file size", *(bytes_text(m.ByteSize()) for m in (before, after)))
    sizes = (bytes_text(compressed_bytes(m)) for m in (before, after))
    total.add_row("compressed by zlib", *sizes)
    show_metrics(total, metrics)
    show_table(console, total)
    console.print(
        "note: ONNX Runtime computes with zeros as with any number, so the model is not faster; "
        "TensorRT gains from 2:4 on GPUs with sparse tensor cores. `prune` removes whole channels, "
        "which every runtime gains from.",
        soft_wrap=True,
        highlight=False,
    )


def show_layers(
    console: Console,
    before: onnx.ModelProto,
    result: LayersResult,
    metrics: Sequence[Mapping[str, float]],
    latencies_ms: Sequence[float],
) -> None:
    """The branches and layers that went, and what that changed."""
    from onnxprune.cost import count_params

    heads = (
        "dropped, by its first layer",
        "kind",
        "layers",
        "MACs",
        "cosine",
        "output error",
        "by",
    )
    rows = new_table(console, heads, left=2)
    for row in result.dropped:
        likeness = f"{row.similarity:.3f}" if row.similarity else "-"
        numbers = (str(len(row.layers)), f"-{row.macs:,.0f}", likeness, f"{row.output_error:.2%}")
        rows.add_row(row.layers[0], row.kind, *numbers, row.replacement)
    show_table(console, rows)
    gone = f"{len(result.dropped)} of {result.candidates} that could go were dropped"
    console.print(gone, highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    total = new_table(console, ("", "before", "after"), left=1)
    total.add_row("parameters", *(f"{count_params(m):,}" for m in (before, result.model)))
    total.add_row("latency", *(f"{t:.3f} ms" for t in latencies_ms))
    show_metrics(total, metrics)
    show_table(console, total)


def show_finetuned(
    console: Console, result: FinetuneResult, metrics: Sequence[Mapping[str, float]]
) -> None:
    """The epochs, what stood still, and what that changed."""
    rows = new_table(console, ("epoch", "loss", "seconds"), left=1)
    for epoch in result.history:
        if epoch.loss is not None:
            kept = " (kept)" if epoch.epoch == result.best_epoch else ""
            rows.add_row(f"{epoch.epoch}{kept}", f"{epoch.loss:.4f}", f"{epoch.seconds:.1f}")
    show_table(console, rows)
    total = new_table(console, ("", "before", "after"), left=1)
    show_metrics(total, metrics)
    show_table(console, total)
    words = f"{len(result.trained)} weights trained, peak learning rate {result.lr:.3g}"
    notes = [words, *(f"{name} was not trained: {why}" for name, why in result.frozen.items())]
    for note in [*notes, *result.notes]:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)


def show_recipe(
    console: Console,
    result: RecipeResult,
    metrics: Sequence[Mapping[str, float]],
    latencies_ms: Sequence[float],
) -> None:
    """The steps that ran, and what they changed together."""
    from onnxprune.cost import count_params
    from onnxprune.passes.prune_weights import compressed_bytes

    console.print("steps: " + ", ".join(step["step"] for step in result.plan["steps"]))
    models = (result.original, result.model)
    total = new_table(console, ("", "before", "after"), left=1)
    total.add_row("parameters", *(f"{count_params(m):,}" for m in models))
    total.add_row("file size", *(bytes_text(m.ByteSize()) for m in models))
    total.add_row("compressed by zlib", *(bytes_text(compressed_bytes(m)) for m in models))
    total.add_row("latency", *(f"{t:.3f} ms" for t in latencies_ms))
    show_metrics(total, metrics)
    show_table(console, total)


def show_metrics(table: Table, metrics: Sequence[Mapping[str, float]]) -> None:
    """Add the metrics of the model before and after."""
    for name in ("accuracy", "agreement"):
        if name in metrics[1]:
            table.add_row(name, *(f"{100 * m[name]:.2f} %" for m in metrics))
