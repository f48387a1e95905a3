"""What the passes for single weights and whole layers did, on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    import onnx
    from rich.console import Console

    from onnxprune.passes.prune_layers import LayersResult
    from onnxprune.passes.prune_weights import WeightsResult
    from onnxprune.recipe import RecipeResult


def _table(*columns: str) -> Table:
    from rich import box

    table = Table(box=box.MARKDOWN)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def show_weights(
    console: Console,
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    result: WeightsResult,
    metrics: Sequence[Mapping[str, float]],
) -> None:
    """Sparsity by layer, sizes, metrics, and what zeros are worth."""
    from onnxprune.passes.prune_weights import compressed_bytes

    layers = _table("weight", "shape", "zeros", "output error", "")
    for row in result.layers:
        error = "-" if row.error is None else f"{row.error:.2%}"
        shape = "x".join(map(str, row.shape))
        layers.add_row(row.name, shape, f"{row.sparsity:.1%}", error, row.note)
    console.print(layers)
    total = _table("", "before", "after")
    total.add_row("zeros among layers", "", f"{result.sparsity:.1%}")
    total.add_row("file", f"{before.ByteSize():,} B", f"{after.ByteSize():,} B")
    sizes = (f"{compressed_bytes(m):,} B" for m in (before, after))
    total.add_row("file, compressed by zlib", *sizes)
    show_metrics(total, metrics)
    console.print(total)
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
    """The branches that went, and what that changed."""
    from onnxprune.cost import count_params

    rows = _table("dropped branch, by its first layer", "layers", "cosine", "output change", "by")
    for row in result.dropped:
        numbers = (str(len(row.layers)), f"{row.similarity:.3f}", f"{row.output_error:.3f}")
        rows.add_row(row.layers[0], *numbers, row.replacement)
    console.print(rows)
    console.print(f"{len(result.dropped)} of {result.candidates} branches dropped", highlight=False)
    total = _table("", "before", "after")
    total.add_row("parameters", *(f"{count_params(m):,}" for m in (before, result.model)))
    total.add_row("latency", *(f"{t:.3f} ms" for t in latencies_ms))
    show_metrics(total, metrics)
    console.print(total)


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
    total = _table("", "before", "after")
    total.add_row("parameters", *(f"{count_params(m):,}" for m in models))
    total.add_row("file", *(f"{m.ByteSize():,} B" for m in models))
    total.add_row("file, compressed by zlib", *(f"{compressed_bytes(m):,} B" for m in models))
    total.add_row("latency", *(f"{t:.3f} ms" for t in latencies_ms))
    show_metrics(total, metrics)
    console.print(total)


def show_metrics(table: Table, metrics: Sequence[Mapping[str, float]]) -> None:
    """Add the metrics of the model before and after."""
    for name in ("accuracy", "agreement"):
        if name in metrics[1]:
            table.add_row(name, *(f"{100 * m[name]:.2f} %" for m in metrics))
