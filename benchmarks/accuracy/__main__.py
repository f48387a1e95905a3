"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.accuracy.stages import CALIBRATION, Row, dense, own
from benchmarks.accuracy.subjects import SUBJECTS, Samples, samples, trained
from benchmarks.accuracy.table import picture, show
from benchmarks.fashion.run import require_data
from onnxprune import io
from onnxprune.errors import OnnxPruneError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PEERS = Path(".venv-peers/bin/python")


def options() -> argparse.Namespace:
    """The options as given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--macs", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of Fashion-MNIST")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("out"), help="where models are kept")
    parser.add_argument("--peers", type=Path, default=PEERS, help="Python with Torch-Pruning")
    parser.add_argument("--tools", nargs="+", default=["onnxprune", "torch-pruning"])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def measure(name: str, given: argparse.Namespace) -> Iterator[Row]:
    """Every stage of one network, by every tool."""
    subject = SUBJECTS[name]
    if subject.data == "fashion":
        require_data(given.data)
    train, test = (samples(subject, part, given.data, given.cache) for part in ("train", "test"))
    original = trained(name, given.cache, lambda: train, given.threads)
    yield dense(name, original, test, given.threads)
    for budget in given.macs:
        if "onnxprune" in given.tools:
            yield from own(name, subject, original, train, test, budget, given.threads)
        if "torch-pruning" in given.tools and subject.peer and given.peers.exists():
            yield from peer(name, original, train, test, budget, given)


def peer(
    name: str,
    original: onnx.ModelProto,
    train: Samples,
    test: Samples,
    budget: float,
    given: argparse.Namespace,
) -> Iterator[Row]:
    """The stages by Torch-Pruning; none beyond one that fails."""
    key = next(n for n in train if n != "y")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        onnx.save(original, place / "model.onnx")
        np.savez(place / "data.npz", x=train[key], y=train["y"], xt=test[key], yt=test["y"])
        job: dict[str, Any] = {
            "model": str(place / "model.onnx"),
            "data": str(place / "data.npz"),
            "budget": budget,
            "threads": given.threads,
            "calibration": CALIBRATION,
        }
        (place / "job.json").write_text(json.dumps(job))
        script = Path(__file__).with_name("peer.py")
        command = [str(given.peers), str(script), str(place / "job.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"Torch-Pruning, {name} at {budget:.0%}: {done.stderr.strip()[-300:]}")
    for line in done.stdout.splitlines():
        found = json.loads(line)
        if found["stage"] != "original":
            yield Row("torch-pruning", name, budget, **found)


def write(rows: list[Row], folder: Path) -> Path:
    """Write the rows as JSON and as a picture; those of networks not measured now stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "accuracy.json"
    before = [Row(**r) for r in json.loads(path.read_text())] if path.exists() else []
    measured = {_place(r) for r in rows}
    rows = [r for r in before if _place(r) not in measured] + rows
    rows.sort(key=lambda r: (list(SUBJECTS).index(r.model), -r.budget, r.tool))
    io.write_text(path, json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    io.write_text(folder / "accuracy.svg", picture(rows))
    return path


def _place(row: Row) -> tuple[str, float, str]:
    return row.model, row.budget, row.tool


def main() -> int:
    """Run the benchmark; its exit code."""
    given = options()
    rows: list[Row] = []
    try:
        for name in given.models:
            for row in measure(name, given):
                print(f"{name} {row.budget:.0%} {row.tool} {row.stage}: {row.accuracy:.2%}")
                rows.append(row)
    except OnnxPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show(rows)
    print(f"written to {write(rows, given.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
