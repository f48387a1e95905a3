"""Prune half of all channels with onnxprune, Torch-Pruning and onnxsim; compare cost and effect.

    make benchmark-peers                       # a few networks
    make benchmark-peers ARGS=--all            # all classifiers of torchvision, hours
    python -m benchmarks.peers [NAME ...]

Every measurement has a process of its own and one thread. CPU seconds are those from the model in
memory to the pruned model in memory, after a first run on a toy; memory is the most that the
process held. Torch-Pruning gets the torch module, the others its export (from the conformance set
where it is there).
Results go to benchmarks/results/peers.json, .csv and .png.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
WORK = Path(__file__).with_name("work.py")
TOOLS = ("onnxprune", "torch-pruning", "onnxsim")
FEW = (
    "resnet18 resnet50 mobilenet_v2 efficientnet_b0 densenet121 regnet_y_400mf squeezenet1_0 "
    "shufflenet_v2_x1_0 convnext_tiny vgg11_bn"
).split()
TIMEOUT_S = 180
ONE_THREAD = {f"{lib}_NUM_THREADS": "1" for lib in ("OMP", "OPENBLAS", "MKL")}


def work(python: str | Path, task: str, name: str = "", path: str = "") -> dict[str, Any]:
    """Run one task in a process of its own; an error is a result."""
    command = [str(python), str(WORK), task, name, path]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, **ONE_THREAD},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {TIMEOUT_S} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return dict(json.loads(lines[-1]))


def compare(name: str, peers: Path) -> dict[str, Any]:
    """The row of one network."""
    row: dict[str, Any] = {"model": name}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        if not work(sys.executable, "zoo", name, path).get("found"):
            exported = work(peers, "torch", name, path)
            if "error" in exported:
                return row | {tool: {"error": f"export: {exported['error']}"} for tool in TOOLS}
        row["torch-pruning"] = work(peers, "torch-pruning", name, path)
        for tool, python in (("onnxprune", sys.executable), ("onnxsim", peers)):
            row[tool] = work(python, tool, name, path)
            if "error" not in row[tool]:
                ran = work(sys.executable, "run", name, f"{path}.pruned")
                row[tool] |= {"runs": ran.get("runs", False), "why": ran.get("error", "")}
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table and the ratios that sum it up."""
    table = Table(
        "model", "params", *(f"{t}: CPU s" for t in TOOLS), "MB", "left", "time", "memory"
    )
    for row in rows:
        cells = [_cell(row[tool]) for tool in TOOLS]
        ours, theirs = row["onnxprune"], row["torch-pruning"]
        table.add_row(
            row["model"],
            f"{ours.get('params', 0):,}",
            *cells,
            " / ".join(f"{row[t].get('peak_mb', 0):.0f}" for t in TOOLS),
            " / ".join(f"{row[t].get('params_left', 1):.2f}" for t in TOOLS),
            _ratio(ours, theirs, "cpu_s"),
            _ratio(ours, theirs, "peak_mb"),
        )
    Console(width=150).print(table)
    print("time, memory: onnxprune / torch-pruning. MB, left: " + " / ".join(TOOLS))
    for tool in TOOLS[1:]:
        ratios = [
            r["onnxprune"]["cpu_s"] / r[tool]["cpu_s"]
            for r in rows
            if "cpu_s" in r["onnxprune"] and r[tool].get("runs")
        ]
        if ratios:
            print(
                f"CPU seconds, onnxprune / {tool}: median 1/{1 / statistics.median(ratios):.1f}, "
                f"worst 1/{1 / max(ratios):.1f} ({len(ratios)} networks)"
            )
    for tool in TOOLS:
        print(f"{tool}: {sum(bool(r[tool].get('runs')) for r in rows)} of {len(rows)} run")


def _cell(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"[red]{result['error'].split(':')[0]}[/]"
    return f"{result['cpu_s']:.3f}" + ("" if result.get("runs") else " (does not run)")


def _ratio(ours: dict[str, Any], theirs: dict[str, Any], key: str) -> str:
    return f"{ours[key] / theirs[key]:.3f}" if key in ours and theirs.get("runs") else ""


def write(rows: list[dict[str, Any]], peers: Path) -> None:
    """Results as JSON and CSV, and drawn."""
    source = RESULTS / "peers.json"
    source.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    with (RESULTS / "peers.csv").open("w", newline="", encoding="utf-8") as stream:
        columns = ("cpu_s", "loaded_mb", "peak_mb", "params", "params_left", "runs", "why", "error")
        out = csv.writer(stream, lineterminator="\n")
        out.writerow(["model", "tool", *columns])
        for row in rows:
            for tool in TOOLS:
                out.writerow([row["model"], tool, *(row[tool].get(c, "") for c in columns)])
    plot = Path(__file__).with_name("plot.py")
    subprocess.run([str(peers), str(plot), str(source), str(RESULTS / "peers.png")], check=True)


def main() -> int:
    """Compare on the named networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true", help="all classifiers of torchvision")
    parser.add_argument("--peers", type=Path, default=PEERS, help="the peers' Python")
    options = parser.parse_args()
    if not options.peers.exists():
        parser.error(f"{options.peers} does not exist: run `make benchmark-peers`")
    names = options.names or FEW
    if options.all:
        names = work(options.peers, "list")["names"]
    rows = []
    for name in names:
        rows.append(compare(name, options.peers))
        print(name, *(_cell(rows[-1][tool]) for tool in TOOLS), file=sys.stderr, flush=True)
    show(rows)
    if not options.names:
        write(rows, options.peers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
