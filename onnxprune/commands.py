"""The commands beside `prune`: single weights, whole layers, recipes. See `onnxprune.cli`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxprune.errors import BudgetError, InvalidModelError, InvalidRecipeError

if TYPE_CHECKING:
    import onnx

    from onnxprune.passes.finetune import Finetune
    from onnxprune.report.outputs import Outputs


class Method(StrEnum):
    """Which weights go."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"


class Allocation(StrEnum):
    """How much each layer loses."""

    layer = "layer"
    everywhere = "global"


class Replacement(StrEnum):
    """What comes in the place of a dropped branch."""

    none = "none"
    affine = "affine"
    linear = "linear"


class Kinds(StrEnum):
    """Which layers may go."""

    auto = "auto"
    branch = "branch"
    plain = "plain"
    all = "all"


class LayerRanking(StrEnum):
    """How branches are ranked."""

    output = "output"
    cosine = "cosine"


ModelIn = Annotated[Path, typer.Argument(metavar="IN.onnx", help="The model to read.")]
ModelOut = Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write the result.")]
Data = Annotated[
    str | None, typer.Option(metavar="SRC", help="Data to calibrate on; labels are not needed.")
]
Val = Annotated[
    str | None, typer.Option(metavar="SRC", help="Held-out data to measure with; default --data.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave alone what this pattern names; repeatable."),
]
Samples = Annotated[int, typer.Option(min=1, help="Samples to calibrate on.")]
MaxDrop = Annotated[
    float | None,
    typer.Option(help="Write nothing if the metric falls by more than this many points."),
]
Reference = Annotated[Path, typer.Argument(metavar="A.onnx", help="The reference model.")]
Candidate = Annotated[Path, typer.Argument(metavar="B.onnx", help="The model to compare.")]
Tolerance = Annotated[
    float | None,
    typer.Option(help="Largest error, relative to the largest output; without it, only reported."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def prune_weights(
    source: ModelIn,
    target: ModelOut,
    sparsity: Annotated[float, typer.Option(help="Share of the weights that become zero.")] = 0.5,
    pattern: Annotated[
        str,
        typer.Option(help="unstructured; N:M, as 2:4 along the inputs; RxC, as blocks of 4x1."),
    ] = "unstructured",
    method: Annotated[
        Method | None,
        typer.Option(help="Which weights go; default sparsegpt with --data, else magnitude."),
    ] = None,
    allocation: Annotated[
        Allocation, typer.Option(help="Every layer alike, or by what each one loses.")
    ] = Allocation.everywhere,
    data: Data = None,
    val: Val = None,
    keep: Keep = None,
    samples: Samples = 1024,
    sparse_file: Annotated[
        bool, typer.Option(help="Store weights with many zeros as sparse initializers.")
    ] = False,
    max_drop: MaxDrop = None,
    threads: Threads = None,
    quiet: Quiet = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> int:
    """Set single weights to zero, and adjust the others to make up for them."""
    from onnxprune import io
    from onnxprune.passes.prune_weights import PruneWeights
    from onnxprune.report.console import stdout_console
    from onnxprune.report.outputs import Outputs
    from onnxprune.report.progress import progress
    from onnxprune.report.steps import show_weights
    from onnxprune.sparse_file import with_sparse_initializers

    chosen = method.value if method else "sparsegpt" if data else "magnitude"
    options = PruneWeights(
        sparsity=sparsity,
        pattern=pattern,
        method=chosen,  # type: ignore[arg-type]
        allocation=allocation.value,
        keep=tuple(keep or ()),
        samples=samples,
        threads=threads,
    )
    _check_promise(max_drop, val or data)
    outputs = Outputs(target)
    with about(source):
        model = io.load(source)
    with progress(quiet) as listener, about(source):
        result = options(model, _data(data, model), progress=listener)
    finished = with_sparse_initializers(result.model) if sparse_file else result.model
    metrics = _measured(model, finished, val or data, threads)
    show_weights(stdout_console(), model, finished, result, metrics)
    return _written(finished, outputs, metrics, max_drop)


def prune_layers(
    source: ModelIn,
    target: ModelOut,
    layers: Annotated[
        int | None, typer.Option(help="How many go; 1 where nothing else says how many.")
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Drop until this share of multiply-adds is left.")
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Drop until this share of parameters is left.")
    ] = None,
    kinds: Annotated[
        Kinds,
        typer.Option(
            help="Residual branches; plain layers, of which only layers read what they give; "
            "all; or auto: branches, without such or for a share also plain layers."
        ),
    ] = Kinds.auto,
    replacement: Annotated[
        Replacement,
        typer.Option(
            help="In a branch's place: nothing, a factor and a shift for each channel, or "
            "a matrix; fitted to the data."
        ),
    ] = Replacement.linear,
    ranking: Annotated[
        LayerRanking,
        typer.Option(help="By what the outputs lose, or by how alike input and output are."),
    ] = LayerRanking.output,
    repair: Annotated[
        bool, typer.Option("--repair/--no-repair", help="Solve the layers behind anew.")
    ] = True,
    data: Data = None,
    val: Val = None,
    samples: Samples = 1024,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Write nothing if the metric falls by more than this many points; where nothing "
            "says how many layers go: drop as many as that allows."
        ),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> int:
    """Drop the residual branches and layers that matter least."""
    from onnxprune import io
    from onnxprune.passes.prune_layers import PruneLayers
    from onnxprune.report.console import stdout_console
    from onnxprune.report.outputs import Outputs
    from onnxprune.report.progress import progress
    from onnxprune.report.steps import show_layers

    options = PruneLayers(
        layers=layers,
        replacement=replacement.value,
        ranking=ranking.value,
        samples=samples,
        threads=threads,
        kinds=kinds.value,
        macs=macs,
        params=params,
        max_drop=max_drop,
        repair=repair,
    )
    _check_promise(max_drop, val or data)
    outputs = Outputs(target)
    with about(source):
        model = io.load(source)
    with progress(quiet) as listener, about(source):
        found, held_out = _data(data, model), _data(val, model)
        result = options(model, found, val=held_out, progress=listener)
    metrics = _measured(model, result.model, val or data, threads)
    show_layers(stdout_console(), model, result, metrics, _latencies(model, result.model, threads))
    return _written(result.model, outputs, metrics, max_drop)


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The steps to run.")],
    source: ModelIn,
    target: ModelOut,
    data: Data = None,
    val: Val = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="P.json", help="Write what was done, to replay it.")
    ] = None,
    max_drop: MaxDrop = None,
    quiet: Quiet = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> int:
    """Run the steps of a recipe on a model."""
    from dataclasses import replace

    from onnxprune.recipe import Recipe, run_recipe
    from onnxprune.report.console import stdout_console
    from onnxprune.report.json import dumps
    from onnxprune.report.outputs import Outputs
    from onnxprune.report.progress import progress
    from onnxprune.report.steps import show_recipe

    asked = Recipe.load(recipe)
    asked = replace(asked, data=data or asked.data, val=val or asked.val)
    _check_promise(max_drop, asked.val or asked.data)
    outputs = Outputs(target, plan)
    with progress(quiet) as listener, about(source):
        result = run_recipe(source, asked, progress=listener)
    metrics = _measured(result.original, result.model, asked.val or asked.data, asked.threads)
    times = _latencies(result.original, result.model, asked.threads)
    show_recipe(stdout_console(), result, metrics, times)
    return _written(result.model, outputs, metrics, max_drop, plan=dumps(result.plan))


def finetune(
    source: ModelIn,
    target: ModelOut,
    data: Annotated[str, typer.Option(metavar="SRC", help="Data to train on.")],
    epochs: Annotated[int, typer.Option(min=1, help="How often all data are seen.")] = 1,
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="T.onnx", help="The model to learn from, as the original."),
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option, as in lr=0.001; repeatable."),
    ] = None,
    val: Val = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is random.")] = 0,
    threads: Threads = None,
    quiet: Quiet = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> int:
    """Train the weights of a model, with labels, the answers of a teacher, or both."""
    from onnxprune import io
    from onnxprune.metrics import evaluate
    from onnxprune.passes.finetune import Finetune
    from onnxprune.report.console import stdout_console
    from onnxprune.report.outputs import Outputs
    from onnxprune.report.progress import progress
    from onnxprune.report.steps import show_finetuned
    from onnxprune.training.options import parse_settings

    chosen = parse_settings(tune or [], epochs)
    options = Finetune(**vars(chosen), seed=seed, threads=threads)
    outputs = Outputs(target)
    with about(source):
        model = io.load(source)
    original = None if teacher is None else io.load(teacher)
    given, held_out = _data(data, model), _data(val, model)
    with progress(quiet) as listener, about(source):
        result = options(model, teacher=original, data=given, val=held_out, progress=listener)
    metrics = [
        evaluate(m, held_out or given, threads=threads, reference=original or model)
        for m in (model, result.model)
    ]
    show_finetuned(stdout_console(), result, metrics)
    return _written(result.model, outputs, metrics, None)


def check(
    reference: Reference,
    candidate: Candidate,
    data: Annotated[str | None, typer.Option(metavar="SRC", help="Data to measure with.")] = None,
    tolerance: Tolerance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is random.")] = 0,
    threads: Threads = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> int:
    """Check that B is a sound model which answers as A does."""
    from onnxprune import pipeline
    from onnxprune.report.console import show_check, stdout_console

    if tolerance is not None and not tolerance >= 0:
        raise InvalidRecipeError(f"--tolerance {tolerance:g}: must not be negative")
    outcome = pipeline.check(
        reference, candidate, data=data, tolerance=tolerance, seed=seed, threads=threads
    )
    show_check(stdout_console(), outcome)
    return 0 if outcome.passed else 1


def setup_training(
    quiet: Quiet = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> int:
    """Install the runtime that fine-tuning needs, in a folder of its own (once, about 32 MB)."""
    from onnxprune.report.progress import progress
    from onnxprune.training import setup_training as install

    with progress(quiet) as listener:
        folder = install(progress=listener)
    print(f"training runtime: {folder}")
    return 0


def tuning(
    epochs: int, settings: list[str] | None, *, seed: int, threads: int | None
) -> Finetune | int:
    """What `--finetune` and `--tune` ask for.

    Raises:
        InvalidRecipeError: a setting is malformed, or there is nothing that it could be of.
    """
    if not settings:
        return epochs
    if epochs < 1:
        raise InvalidRecipeError("--tune says how --finetune trains: add --finetune EPOCHS")
    from onnxprune.passes.finetune import Finetune
    from onnxprune.training.options import parse_settings

    return Finetune(**vars(parse_settings(settings, epochs)), seed=seed, threads=threads)


def _latencies(before: onnx.ModelProto, after: onnx.ModelProto, threads: int | None) -> list[float]:
    from onnxprune import runtime

    feeds = runtime.working_feeds(before, threads=threads)[0]
    return runtime.latencies_ms(
        [(runtime.session(m, threads=threads), feeds) for m in (before, after)]
    )


def _data(source: str | None, model: onnx.ModelProto) -> Any:
    if source is None:
        return None
    from onnxprune.data import open_data

    return open_data(source, model)


def _measured(
    before: onnx.ModelProto, after: onnx.ModelProto, source: str | None, threads: int | None
) -> list[dict[str, float]]:
    """Metrics of both models; none without data.

    Raises:
        VerificationError: the second model is not sound.
    """
    from onnxprune.verify import require_sound

    require_sound(after, before, threads)
    if source is None:
        return [{}, {}]
    from onnxprune.metrics import evaluate

    data = _data(source, before)
    return [
        evaluate(before, data, threads=threads, reference=before),
        evaluate(after, data, threads=threads, reference=before),
    ]


def _check_promise(max_drop: float | None, data: str | None) -> None:
    """Refuse a promise that could not be checked, before the work starts.

    Raises:
        InvalidRecipeError: says what is wrong.
    """
    if max_drop is None:
        return
    if not 0 <= max_drop <= 100:
        raise InvalidRecipeError(f"--max-drop {max_drop:g}: must be in [0, 100] points")
    if data is None:
        raise InvalidRecipeError("--max-drop needs data to measure with: add --val SRC")


@contextmanager
def about(source: Path) -> Iterator[None]:
    """Name the model in errors that do not: the library may not know where it came from."""
    try:
        yield
    except InvalidModelError as error:
        if source.name in str(error):
            raise
        raise InvalidModelError(f"{source}: {error}") from error


def _written(
    model: onnx.ModelProto,
    outputs: Outputs,
    metrics: list[dict[str, float]],
    max_drop: float | None,
    *,
    plan: str | None = None,
) -> int:
    """Write the files unless the model misses what was asked for.

    Raises:
        BudgetError: the metric fell by more than `max_drop` points.
    """
    from onnxprune.metrics import points_lost

    lost = points_lost(*metrics)
    if max_drop is not None and lost is not None and lost[1] > max_drop + 1e-9:
        raise BudgetError(
            f"{lost[0]} fell by {lost[1]:.2f} points, more than --max-drop {max_drop:g}; "
            f"{outputs.names} not written"
        )
    outputs.write(model, plan=plan)
    print(f"wrote {outputs.names}")
    return 0


def recipe_plan(path: Path) -> Any:
    """The plan of a recipe, or None where the file is none."""
    import json

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    from onnxprune.recipe import is_recipe_plan

    return value if is_recipe_plan(value) else None


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("check")(check)
    app.command("setup-training")(setup_training)
    app.command("prune-weights")(prune_weights)
    app.command("prune-layers")(prune_layers)
    app.command("finetune")(finetune)
    app.command("run")(run)
