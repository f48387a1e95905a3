"""Cost of a training step beside PyTorch, of the whole networks and of their pruned halves.

    make benchmark-training
    python -m benchmarks.training [NETWORK ...] [--tools ...] [--python PYTHON WITH TORCH]

Both train the same network on the same batches with the same optimizer and loss, with one thread:
by labels alone, and by labels and the original's answers. They take turns of some seconds, so that
other load hits both; the figure is their mean. CPU seconds are those of all processes
of a tool; memory is the sum of the most that each of them held. PyTorch normalizes batches by
their own statistics, as is usual there. Runs on Linux. Results: benchmarks/results/training.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

import onnxprune
from benchmarks.training.export import export
from models import graphs, transformer

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "training.json"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
NETWORKS: dict[str, graphs.Builder] = {
    "resnet": graphs.fashion_resnet,
    "vgg": graphs.fashion_vgg,
    "mlp": graphs.fashion_mlp,
    "vit": transformer.fashion_vit,
}
STEPS = {"resnet": 20, "vgg": 10, "mlp": 75, "vit": 15}
TOOLS = ("torch", "worker", "builtin")
SETTINGS: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "alpha": 0.9,
    "temperature": 4.0,
}
ONE_THREAD = {f"{lib}_NUM_THREADS": "1" for lib in ("OMP", "OPENBLAS", "MKL")}


class Contestant:
    """A process that trains when it is told to."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
        )
        self.last = self._hear()
        self.start_s = self.last["cpu_s"]

    def turn(self) -> float:
        """CPU seconds of one turn."""
        assert self._process.stdin is not None
        before = self.last["cpu_s"]
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.last = self._hear()
        return float(self.last["cpu_s"] - before)

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _hear(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended early")
        return dict(json.loads(line))


def measure(
    job: dict[str, Any], tools: Sequence[str], python: Path, turns: int
) -> dict[str, dict[str, float]]:
    """CPU ms of a step, CPU seconds before the first, and peak MB, of each tool."""
    path = Path(job["folder"]) / "job.json"
    path.write_text(json.dumps(job))
    commands = {
        "torch": [str(python), str(Path(__file__).with_name("peer.py")), str(path)],
        **{
            backend: [sys.executable, "-m", "benchmarks.training.ours", str(path), backend]
            for backend in ("worker", "builtin")
        },
    }
    contestants = {tool: Contestant(commands[tool]) for tool in tools}
    spent: dict[str, list[float]] = {tool: [] for tool in tools}
    for _ in range(turns):
        for tool, contestant in contestants.items():
            spent[tool].append(contestant.turn())
    rows = {}
    for tool, contestant in contestants.items():
        rows[tool] = {
            "step_ms": statistics.mean(spent[tool][1:]) / job["steps_per_turn"] * 1e3,
            "start_s": contestant.start_s,
            "peak_mb": contestant.last["peak_mb"],
        }
        contestant.close()
    return rows


def write_images(folder: Path, count: int, shape: Sequence[int]) -> None:
    """Noise as IDX files, one byte a pixel: what is in the images costs nothing."""
    rng = np.random.default_rng(0)
    for name, size in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
        values = rng.integers(0, 256 if len(size) == 3 else 10, size, np.uint8)
        head = bytes([0, 0, 8, len(size)]) + b"".join(n.to_bytes(4, "big") for n in size)
        (folder / f"train-{name}-ubyte").write_bytes(head + values.tobytes())


def compare(name: str, form: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one network, whole or pruned: with and without a teacher."""
    original = NETWORKS[name](0)
    student = original
    if form == "half":
        student = onnxprune.prune(
            original, macs=0.5, ranking="uniform", repair="none", lossless=False, threads=1
        ).model
    rows = []
    for teacher in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            shape = [d.dim_value for d in original.graph.input[0].type.tensor_type.shape.dim[1:]]
            steps = max(1, STEPS[name] * 128 // options.batch)
            count = options.batch * steps * options.turns
            write_images(Path(folder), count, shape)
            for part, model in (("student", student), ("teacher", original)):
                onnx.save(model, Path(folder) / f"{part}.onnx")
                export(model, Path(folder) / f"{part}.json")
            job = {
                **SETTINGS,
                "folder": folder,
                "shape": shape,
                "count": count,
                "batch": options.batch,
                "steps_per_turn": steps,
                "teacher": teacher,
            }
            row = measure(job, options.tools, options.python, options.turns)
            rows.append({"model": name, "form": form, "teacher": teacher, **row})
    return rows


def show(rows: list[dict[str, Any]], tools: Sequence[str]) -> None:
    """Print the table."""
    own = [tool for tool in tools if tool != "torch"]
    table = Table("model", "form", "teacher", "torch: ms, s, MB")
    for tool in own:
        table.add_column(f"{tool}: ms, s, MB")
        table.add_column("time")
        table.add_column("memory")
    for row in rows:
        cells = [row["model"], row["form"], "yes" if row["teacher"] else "no"]
        cells.append(_cell(row.get("torch")))
        for tool in own:
            cells += [
                _cell(row[tool]),
                *(_ratio(row, tool, fact) for fact in ("step_ms", "peak_mb")),
            ]
        table.add_row(*cells)
    Console(width=130).print(table)
    print("ms: CPU time of a step; s: CPU time before the first; time, memory: shares of torch's")


def _cell(facts: dict[str, float] | None) -> str:
    if facts is None:
        return ""
    return f"{facts['step_ms']:.2f}, {facts['start_s']:.1f}, {facts['peak_mb']:.0f}"


def _ratio(row: dict[str, Any], tool: str, fact: str) -> str:
    return f"{row[tool][fact] / row['torch'][fact]:.2f}" if "torch" in row else ""


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training")
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--forms", nargs="+", choices=("dense", "half"), default=["dense", "half"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--python", type=Path, default=PEERS, help="a Python that has torch")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.networks:
        for form in options.forms:
            rows += compare(name, form, options)
            show(rows, options.tools)
    options.results.write_text(json.dumps({"batch": options.batch, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
