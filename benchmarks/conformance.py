"""Prune every model of the conformance set to half its channels; compare with the masked twin.

    python -m benchmarks.conformance [NAME ...] [--limit MILLIONS] [--jobs N]

Each model is pruned twice: `--scope exact`, and `--scope all`; both must equal their masked twin.
Prints a table (model, twin errors, parameters left, CPU seconds of analysis, scoring and slicing)
and exits with 1 if a model is refused, does not run, or differs by more than its tolerance.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.table import Table

from models import zoo
from onnxprune import runtime, verify
from onnxprune.analysis import Analysis, analyse
from onnxprune.cost import count_params
from onnxprune.errors import OnnxPruneError
from onnxprune.passes.apply import Applied, apply_keep
from onnxprune.passes.score import score
from onnxprune.passes.select import Budget, Limits, select
from onnxprune.rewriting import Mask

RESULTS = Path(__file__).parent / "results" / "conformance.json"
BUDGET = Budget("channels", 0.5)


@dataclass(frozen=True)
class Row:
    """What one model showed. Errors are relative to the largest output; seconds are CPU seconds."""

    model: str
    nodes: int
    params: int
    exact_left: float
    exact_error: float
    all_left: float
    all_error: float
    seconds: float
    problem: str = ""


def measure(name: str) -> Row:
    """Prune one model in both scopes."""
    model = zoo.load(name)
    params, nodes = count_params(model), len(model.graph.node)
    start = time.process_time()
    analysis = analyse(model)
    seconds = time.process_time() - start
    found: dict[str, Any] = {
        "exact_left": 1.0,
        "exact_error": 0.0,
        "all_left": 1.0,
        "all_error": 0.0,
    }
    problems: list[str] = []
    try:
        feeds = runtime.working_feeds(model)
    except OnnxPruneError as failure:
        return Row(name, nodes, params, **found, seconds=seconds, problem=str(failure))
    tolerance = verify.default_tolerance(model)
    for scope in ("exact", "all"):
        start = time.process_time()
        keep = choose(analysis, scope)
        apply_keep(analysis.coupling, keep)
        spent = time.process_time() - start
        verdict = verify.examine(analysis.coupling, keep, model, feeds, tolerance)
        problems += [f"{scope}: {problem}" for problem in verdict.problems]
        if verdict.applied is not None:
            found[f"{scope}_left"] = round(count_params(verdict.applied.model) / params, 4)
        found[f"{scope}_error"] = float("inf") if verdict.error is None else verdict.error
    total = round(seconds + spent, 3)
    return Row(name, nodes, params, **found, seconds=total, problem="; ".join(problems))


def isolated(name: str) -> Row:
    """`measure` in a process of its own: none pays for the memory of those before."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(measure(name)))
    process.start()
    theirs.close()
    try:
        row: Row = ours.recv()
    except EOFError:
        bad = float("inf")
        row = Row(name, 0, 0, 1.0, bad, 1.0, bad, 0.0, "its process ended without a result")
    process.join()
    return row


def choose(analysis: Analysis, scope: Any) -> Mask:
    """What stays, as the pipeline chooses it."""
    coupling = analysis.coupling
    limits, fixed = Limits(scope=scope), coupling.solution.unit[:0]
    return select(coupling, analysis.groups, score(coupling), analysis.cost, BUDGET, limits, fixed)


def prune(model: onnx.ModelProto, scope: Any) -> tuple[Analysis, Mask, Applied]:
    """Analysis, scoring and slicing, as the pipeline does them."""
    analysis = analyse(model)
    keep = choose(analysis, scope)
    return analysis, keep, apply_keep(analysis.coupling, keep)


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table(
        "model", "nodes", "params", "exact: left", "error", "all: left", "error", "CPU s", ""
    )
    for r in rows:
        table.add_row(
            r.model,
            str(r.nodes),
            f"{r.params:,}",
            f"{r.exact_left:.3f}",
            f"{r.exact_error:.1e}",
            f"{r.all_left:.3f}",
            f"{r.all_error:.1e}",
            f"{r.seconds:.2f}",
            r.problem,
        )
    Console(width=120).print(table)


def main() -> int:
    """Measure the named models, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument(
        "--limit", type=float, default=0, help="leave out larger models (10^6 weights)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    options = parser.parse_args()
    sizes = {row["name"]: row["parameters"] for row in zoo.manifest()}
    names = options.names or [
        n for n in zoo.names() if not options.limit or sizes[n] <= options.limit * 1e6
    ]
    rows = []
    analyse(zoo.load(min(sizes, key=sizes.__getitem__)))  # imports are no part of the seconds
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(isolated, names):
            rows.append(row)
            words = f"{row.model}: {row.problem or 'ok'} ({row.seconds:.2f} s)"
            print(words, file=sys.stderr, flush=True)
    show(rows)
    if not options.names:
        RESULTS.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    bad = [r.model for r in rows if r.problem]
    print(f"{len(rows) - len(bad)} of {len(rows)} models equal their masked twin")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
