"""The command line: parse, one library call, render, exit code.

Exit codes: 0 fine; 1 a budget or a check failed; 2 usage or bad input; 3 internal; 130 interrupted.
An error is one line on standard error. Outputs are written after success only, each through a
temporary file, so a failed or interrupted run leaves existing files as they were.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxprune import commands
from onnxprune.errors import InvalidRecipeError, OnnxPruneError
from onnxprune.interruption import forget_interrupt, interruptible

if TYPE_CHECKING:
    from onnxprune.plan import Plan
    from onnxprune.report.outputs import Outputs
    from onnxprune.result import Result

_UNREPAIRED = (
    "a plan of prune says what goes; weights that were repaired or fine-tuned afterwards are in "
    "the model that prune wrote, not in its plan"
)
FINE, FAILED, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    name="onnxprune",
    help="Make a trained ONNX model smaller and faster, and check that it still works.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class Scope(StrEnum):
    """Which groups may be pruned."""

    exact = "exact"
    all = "all"


ModelIn = Annotated[Path, typer.Argument(metavar="IN.onnx", help="The model to read.")]
ModelOut = Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write the result.")]
PlanIn = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan that prune wrote.")]

BUDGET, CHOICE, DATA, OUTPUT = "Budget (exactly one)", "What to remove", "Data", "Output"
Channels = Annotated[
    float | None,
    typer.Option(help="Every layer keeps this share of its channels.", rich_help_panel=BUDGET),
]
Macs = Annotated[
    float | None,
    typer.Option(help="Keep at most this share of the multiply-adds.", rich_help_panel=BUDGET),
]
Params = Annotated[
    float | None,
    typer.Option(help="Keep at most this share of the parameters.", rich_help_panel=BUDGET),
]
SizeMb = Annotated[
    float | None,
    typer.Option(
        help="Largest size of the file, in MB of 1,000,000 bytes.", rich_help_panel=BUDGET
    ),
]
ScopeOption = Annotated[
    Scope,
    typer.Option(
        help="exact: only channels whose removal equals zeroing them; all: also those behind a "
        "normalization over channels.",
        rich_help_panel=CHOICE,
    ),
]
Criterion = Annotated[
    str | None,
    typer.Option(
        help="How channels are ranked: l1, l2, bn-scale, fpgm, lamp, random; measured on data: "
        "reconstruction, wanda, flap, taylor.",
        rich_help_panel=CHOICE,
        metavar="NAME",
    ),
]
RankingOption = Annotated[
    str | None,
    typer.Option(
        help="global: all channels compete; isomorphic: those of layers of like shape; uniform: "
        "every layer loses the same share. Default: uniform for --channels, else global.",
        rich_help_panel=CHOICE,
        metavar="NAME",
    ),
]
GranularityOption = Annotated[
    str,
    typer.Option(
        help="Pieces to remove, comma-separated: head, or head-dim (the same channels of every "
        "head); expert (whole experts too); vocab (embedding rows too).",
        rich_help_panel=CHOICE,
        metavar="NAMES",
    ),
]
VocabKeep = Annotated[
    Path | None,
    typer.Option(
        help="With vocab: the ids that stay, one a line or a JSON list.",
        rich_help_panel=CHOICE,
        metavar="FILE",
    ),
]
VocabUnknown = Annotated[
    int,
    typer.Option(help="With vocab: the id as which all others are read.", rich_help_panel=CHOICE),
]
RoundTo = Annotated[
    int,
    typer.Option(help="Kept widths are multiples of N where possible.", rich_help_panel=CHOICE),
]
MinKeep = Annotated[
    float, typer.Option(help="Share of each layer that always stays.", rich_help_panel=CHOICE)
]
LosslessOption = Annotated[
    bool | None,
    typer.Option(
        "--lossless/--no-lossless",
        help="Remove what has no effect: dead and repeated channels, idle layers. Needs no budget; "
        "before a budget it happens anyway, unless switched off.",
        rich_help_panel=CHOICE,
        show_default=False,
    ),
]
SimplifyOption = Annotated[
    bool,
    typer.Option(
        "--simplify",
        help="At the end fold and merge layers (by onnxslim): the same answers from fewer nodes.",
        rich_help_panel=OUTPUT,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="Never touch the nodes and weights that this pattern (as in *.fc?) names; repeatable.",
        rich_help_panel=CHOICE,
        metavar="PATTERN",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Data to rebuild and check with: .npz, a folder of images by class, IDX files, or "
        "file.py:function.",
        rich_help_panel=DATA,
        metavar="SRC",
    ),
]
Val = Annotated[
    str | None,
    typer.Option(help="Held-out data to measure with.", rich_help_panel=DATA, metavar="SRC"),
]
RepairOption = Annotated[
    str,
    typer.Option(
        help="How accuracy is won back without labels: auto, reconstruct, moments, bn, bias, none; "
        "without --data, from made-up inputs.",
        rich_help_panel=DATA,
        metavar="NAME",
    ),
]
Finetune = Annotated[
    int,
    typer.Option(
        help="Train this many epochs with the original as teacher; needs --data.",
        rich_help_panel=DATA,
        metavar="EPOCHS",
    ),
]
Tune = Annotated[
    list[str] | None,
    typer.Option(
        help="With --finetune, how: lr, batch_size, optimizer, alpha, temperature, features, "
        "augment, loss, ema, backend and others (README); repeatable.",
        rich_help_panel=DATA,
        metavar="NAME=VALUE",
    ),
]
Steps = Annotated[
    int,
    typer.Option(
        help="Remove in N parts, repair after each, and rank what is left anew.",
        rich_help_panel=DATA,
        metavar="N",
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="Largest loss of accuracy, or without labels of agreement with the original, in "
        "points (1 is 0.01): channels are given back until it holds. Needs no budget.",
        rich_help_panel=DATA,
    ),
]
PlanOut = Annotated[
    Path | None,
    typer.Option("--plan", help="Write the plan.", rich_help_panel=OUTPUT, metavar="P.json"),
]
ReportOut = Annotated[
    Path | None,
    typer.Option("--report", help="Write the report.", rich_help_panel=OUTPUT, metavar="R.json"),
]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Skip the checks of the result.", rich_help_panel=OUTPUT)
]
Layers = Annotated[bool, typer.Option("--layers", help="Show every layer.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=OUTPUT)
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is random.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with.", min=1)]
Why = Annotated[
    bool, typer.Option("--why", help="List every frozen axis, what froze it, and what that costs.")
]
SensitivityOption = Annotated[
    bool,
    typer.Option(
        "--sensitivity",
        help="With --data: how much the outputs change when half of a group goes.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
# Read by `main` from the arguments, so that it also holds for errors while parsing.
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks (also: ONNXPRUNE_DEBUG=1).")]


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Debug = False,
) -> None:
    """Make a trained ONNX model smaller and faster, and check that it still works."""
    if version:
        print(f"onnxprune {_version()}")
        raise typer.Exit(FINE)
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(USAGE)


@app.command("prune")
def prune(
    source: ModelIn,
    target: ModelOut,
    channels: Channels = None,
    macs: Macs = None,
    params: Params = None,
    size_mb: SizeMb = None,
    scope: ScopeOption = Scope.all,
    criterion: Criterion = None,
    round_to: RoundTo = 1,
    min_keep: MinKeep = 0.1,
    ranking: RankingOption = None,
    granularity: GranularityOption = "head",
    vocab_keep: VocabKeep = None,
    vocab_unknown: VocabUnknown = 0,
    keep: Keep = None,
    data: Data = None,
    val: Val = None,
    repair: RepairOption = "auto",
    finetune: Finetune = 0,
    tune: Tune = None,
    steps: Steps = 1,
    max_drop: MaxDrop = None,
    lossless: LosslessOption = None,
    simplify: SimplifyOption = False,
    plan: PlanOut = None,
    report: ReportOut = None,
    no_check: NoCheck = False,
    layers: Layers = False,
    seed: Seed = 0,
    threads: Threads = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Prune a model to a budget, rebuild it with data if there is some, check it, and write it."""
    from onnxprune import pipeline
    from onnxprune.report.outputs import Outputs
    from onnxprune.report.progress import progress

    if max_drop is not None and no_check:
        raise InvalidRecipeError("--max-drop needs the checks: leave out --no-check")
    outputs = Outputs(target, plan, report)
    with progress(quiet) as listener, commands.about(source):
        result = pipeline.prune(
            source,
            channels=channels,
            macs=macs,
            params=params,
            size_mb=size_mb,
            scope=scope.value,
            criterion=criterion,
            round_to=round_to,
            min_keep=min_keep,
            ranking=ranking,
            granularity=granularity,
            vocab_keep=vocab_keep,
            vocab_unknown=vocab_unknown,
            keep=tuple(keep or ()),
            data=data,
            val=val,
            repair=repair,  # type: ignore[arg-type]
            finetune=commands.tuning(finetune, tune, seed=seed, threads=threads),
            steps=steps,
            max_drop=max_drop,
            lossless=lossless,
            simplify=simplify,
            check=not no_check,
            seed=seed,
            threads=threads,
            progress=listener,
        )
    return _finish(result, outputs, layers=layers)


@app.command("inspect")
def inspect(
    source: ModelIn,
    why: Why = False,
    layers: Layers = False,
    json: Json = False,
    sensitivity: SensitivityOption = False,
    data: Data = None,
    threads: Threads = None,
    debug: Debug = False,
) -> int:
    """Show what a model costs, what can be pruned, and what is frozen and why."""
    from onnxprune import pipeline
    from onnxprune.report.console import show_inspection, stdout_console
    from onnxprune.report.json import inspection_json

    if sensitivity and data is None:
        raise InvalidRecipeError("--sensitivity measures outputs: add --data SRC")
    with commands.about(source):
        inspection = pipeline.inspect(source, data=data if sensitivity else None, threads=threads)
    if json:
        print(inspection_json(inspection), end="")
    else:
        show_inspection(stdout_console(), inspection, why=why, layers=layers)
    return FINE


@app.command("apply")
def apply(
    source: ModelIn,
    plan: PlanIn,
    target: ModelOut,
    debug: Debug = False,
) -> int:
    """Replay a plan on the model that it was made for."""
    from onnxprune import pipeline
    from onnxprune.report.outputs import Outputs

    outputs = Outputs(target)
    of_recipe = commands.recipe_plan(plan)
    with commands.about(source):
        if of_recipe is not None:
            from onnxprune.recipe import replay

            model = replay(source, of_recipe)
        else:
            model = pipeline.apply(source, _read_plan(plan))
    outputs.write(model)
    if of_recipe is None:
        print(f"note: {_UNREPAIRED}")
    print(f"wrote {outputs.names}")
    return FINE


commands.register(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv`, by default the process's own, and return the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or os.environ.get("ONNXPRUNE_DEBUG", "0") not in ("", "0")
    with interruptible() as interruption:
        try:
            code = int(app(args, standalone_mode=False, prog_name="onnxprune") or FINE)
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BrokenPipeError:  # the reader has gone; what is still buffered must not fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except Exception as error:
            if not interruption.came:
                return _fail(error, debug)
            code = INTERRUPTED
        if code == INTERRUPTED:
            forget_interrupt()
            _say("interrupted; existing files are as they were")
        return code


def _fail(error: Exception, debug: bool) -> int:
    """Say what went wrong in one line, after a traceback if asked, and return the exit code."""
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OnnxPruneError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, typer.TyperException):
        _say(f"{error.format_message()} (onnxprune --help lists commands and options)")
        return USAGE
    if isinstance(error, OSError):
        where = f"'{error.filename}': " if error.filename else ""
        _say(f"{where}{error.strerror or error}")
        return USAGE
    _say(
        f"internal: {type(error).__name__}: {error} at {_place(error)} "
        f"(onnxprune {_version()}); please report this line, the model, and what --debug adds"
    )
    return INTERNAL


def _say(message: str) -> None:
    """Print one error line."""
    print(f"onnxprune: error: {' '.join(message.split())}", file=sys.stderr)


def _place(error: Exception) -> str:
    """The file and line that raised `error`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "unknown place"
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _version() -> str:
    """The installed version."""
    from importlib.metadata import version

    return version("onnxprune")


def _read_plan(path: Path) -> Plan:
    """The plan in the file at `path`.

    Raises:
        InvalidRecipeError: there is none.
    """
    from onnxprune.plan import Plan

    if not path.is_file():
        raise InvalidRecipeError(f"plan '{path}': no such file")
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        problem = "this is not text"
    except InvalidRecipeError as error:
        problem = str(error)
    raise InvalidRecipeError(f"plan '{path}': {problem}; give a file that prune --plan wrote")


def _finish(result: Result, outputs: Outputs, *, layers: bool) -> int:
    """Show what a run measured and write its files, unless its last check failed."""
    from onnxprune.report.console import show_report, stdout_console

    show_report(stdout_console(), result.report, layers=layers)
    checks = result.report.checks
    if checks and not checks[-1].passed:
        _say(f"the pruned model failed its check; {outputs.names} not written")
        return FAILED
    outputs.write(result.model, result)
    print(f"wrote {outputs.names}")
    return FINE


if __name__ == "__main__":  # `python -m onnxprune.cli` must not do nothing and call it success
    sys.exit(main())
