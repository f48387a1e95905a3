"""Accuracy after every stage of pruning, beside Torch-Pruning.

The rows of a network are written as soon as they are known; --resume measures what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx

from benchmarks.accuracy import peers
from benchmarks.accuracy.results import Results, Unit, machine
from benchmarks.accuracy.stages import Row, dense, own
from benchmarks.accuracy.subjects import SUBJECTS, Samples, samples, trained
from benchmarks.accuracy.table import show
from benchmarks.fashion.run import require_data
from onnxprune.errors import OnnxPruneError
from onnxprune.progress import Progress
from onnxprune.report.progress import progress

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PEERS = Path(".venv-peers/bin/python")
TOOLS = ("onnxprune", "torch-pruning")


def options() -> argparse.Namespace:
    """The options as given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--macs", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of Fashion-MNIST")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("out"), help="where models are kept")
    parser.add_argument("--peers", type=Path, default=PEERS, help="Python with Torch-Pruning")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--readme", type=Path, help="page that gets the table")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the result file already has"
    )
    return parser.parse_args()


@dataclass
class Network:
    """A trained network and its data, each read when it is needed first."""

    name: str
    given: argparse.Namespace
    listener: Progress

    @cached_property
    def train(self) -> Samples:
        """What it is trained and fine-tuned on."""
        return samples(SUBJECTS[self.name], "train", self.given.data, self.given.cache)

    @cached_property
    def test(self) -> Samples:
        """What its accuracy is measured on."""
        return samples(SUBJECTS[self.name], "test", self.given.data, self.given.cache)

    @cached_property
    def original(self) -> onnx.ModelProto:
        """The dense network."""
        threads, listener = self.given.threads, self.listener
        return trained(self.name, self.given.cache, lambda: self.train, threads, listener)

    def measure(self, budget: float, tool: str) -> Iterator[Row]:
        """The rows of one unit of the results."""
        threads = self.given.threads
        start = dense(self.name, self.original, self.test, threads)
        if not tool:
            yield start
        elif tool == "onnxprune":
            yield from own(
                self.name, self.original, self.train, self.test, budget, threads, self.listener
            )
        else:
            python = self.given.peers
            yield from peers.rows(
                python, self.name, self.original, self.train, self.test, budget, start, threads
            )


def units(given: argparse.Namespace) -> list[Unit]:
    """All that is to be measured, in the order of the networks."""
    found: list[Unit] = []
    for name in given.models:
        found.append((name, 1.0, ""))
        for tool in given.tools:
            if tool != "torch-pruning" or SUBJECTS[name].peer:
                found += [(name, budget, tool) for budget in given.macs]
    return found


def run(given: argparse.Namespace) -> Results:
    """Measure everything that is asked for, and write it row by row."""
    if any(SUBJECTS[name].data == "fashion" for name in given.models):
        require_data(given.data)
    versions = peers.versions(given.peers) if "torch-pruning" in given.tools else {}
    results = Results.load(given.results)
    wanted = units(given)
    if given.resume:
        wanted = [unit for unit in wanted if unit not in results.units]
    results.machine = {**results.machine, **machine(given.threads, versions)}
    for name in given.models:
        with progress() as listener:
            network = Network(name, given, listener)
            for unit in (unit for unit in wanted if unit[0] == name):
                _, budget, tool = unit
                rows = []
                for row in network.measure(budget, tool):
                    print(f"{name} {budget:.0%} {tool} {row.stage}: {row.accuracy:.2%}", flush=True)
                    rows.append(row)
                results.replace(unit, rows)
    return results


def main() -> int:
    """Run the benchmark; its exit code."""
    given = options()
    try:
        results = run(given)
    except OnnxPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from here", file=sys.stderr)
        return 130
    show(results.rows)
    if given.readme:
        results.into(given.readme)
    print(f"written to {results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
