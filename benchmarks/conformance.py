"""Prune every model of the conformance set to half its channels; compare with the masked twin.

    python -m benchmarks.conformance [NAME ...] [--limit MILLIONS]

Each model is pruned twice: `--scope exact`, and `--scope all`; both must equal their masked twin.
Prints a table (model, twin errors, parameters left, CPU seconds of analysis, scoring and slicing)
and exits with 1 if a model is refused, does not run, or differs by more than its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.table import Table

from models import zoo
from onnxprune import runtime, verify
from onnxprune.analysis import analyse
from onnxprune.cost import count_params
from onnxprune.errors import OnnxPruneError
from onnxprune.passes.apply import Applied, apply_keep
from onnxprune.passes.score import score
from onnxprune.passes.select import Budget, Limits, select

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
    feeds = [runtime.random_feeds(model)]
    params = count_params(model)
    found: dict[str, Any] = {}
    problems: list[str] = []
    seconds = 0.0
    for scope in ("exact", "all"):
        start = time.process_time()
        analysis, keep, applied = prune(model, scope)
        seconds = time.process_time() - start
        found[f"{scope}_left"] = round(count_params(applied.model) / params, 4)
        try:
            problems += verify.structure_problems(applied.model, model)
            error = verify.twin_error(analysis.coupling, keep, applied.model, feeds)
        except OnnxPruneError as failure:
            problems.append(f"{scope}: {failure}")
            error = float("inf")
        found[f"{scope}_error"] = error
        if not error <= verify.default_tolerance(model):
            problems.append(f"{scope}: differs from its twin by {error:.2g}")
    nodes = len(model.graph.node)
    return Row(name, nodes, params, **found, seconds=round(seconds, 3), problem="; ".join(problems))


def prune(model: onnx.ModelProto, scope: Any) -> tuple[Any, Any, Applied]:
    """Analysis, scoring and slicing, as the pipeline does them."""
    analysis = analyse(model)
    coupling = analysis.coupling
    scores = score(coupling)
    limits = Limits(scope=scope)
    fixed = coupling.solution.unit[:0]
    keep = select(coupling, analysis.groups, scores, analysis.cost, BUDGET, limits, fixed)
    return analysis, keep, apply_keep(coupling, keep)


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
    options = parser.parse_args()
    rows = []
    for name in options.names or zoo.names():
        if options.limit and count_params(zoo.load(name)) > options.limit * 1e6:
            continue
        rows.append(measure(name))
        last = rows[-1]
        print(f"{name}: {last.problem or 'ok'} ({last.seconds:.2f} s)", file=sys.stderr, flush=True)
    show(rows)
    if not options.names:
        RESULTS.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    bad = [r.model for r in rows if r.problem]
    print(f"{len(rows) - len(bad)} of {len(rows)} models equal their masked twin")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
