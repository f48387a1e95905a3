"""Torch-Pruning, run in an environment of its own by `peer.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.accuracy.stages import CALIBRATION, Row
from benchmarks.accuracy.subjects import Samples
from onnxprune.errors import InvalidRecipeError

SCRIPT = Path(__file__).with_name("peer.py")
#: Right answers of a thousand that may come out otherwise in torch, by rounding.
TOLERANCE = 1e-3


def versions(python: Path) -> dict[str, str]:
    """Versions of the packages of `python`.

    Raises:
        InvalidRecipeError: there is no such Python, or it lacks a package.
    """
    if not python.exists():
        raise InvalidRecipeError(
            f"no Python with Torch-Pruning at {python}: `make benchmark-accuracy` makes one; name "
            "another with --peers, or leave it out with --tools onnxprune"
        )
    done = subprocess.run([str(python), str(SCRIPT)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InvalidRecipeError(f"{python} cannot run Torch-Pruning: {_end(done.stderr)}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def rows(
    python: Path,
    name: str,
    original: onnx.ModelProto,
    train: Samples,
    test: Samples,
    budget: float,
    start: Row,
    threads: int,
) -> Iterator[Row]:
    """The stages by Torch-Pruning; none beyond one that fails.

    Raises:
        InvalidRecipeError: the network in torch is not as accurate as the original.
    """
    key = next(n for n in train if n != "y")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        onnx.save(original, place / "model.onnx")
        np.savez(place / "data.npz", x=train[key], y=train["y"], xt=test[key], yt=test["y"])
        job: dict[str, Any] = {
            "model": str(place / "model.onnx"),
            "data": str(place / "data.npz"),
            "budget": budget,
            "threads": threads,
            "calibration": CALIBRATION,
        }
        (place / "job.json").write_text(json.dumps(job))
        command = [str(python), str(SCRIPT), str(place / "job.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"Torch-Pruning, {name} at {budget:.0%}: {_end(done.stderr)}", file=sys.stderr)
    for line in done.stdout.splitlines():
        row = Row("torch-pruning", name, budget, **json.loads(line))
        if row.stage != "original":
            yield row
        elif abs(row.accuracy - start.accuracy) > TOLERANCE:
            raise InvalidRecipeError(
                f"{name} is right on {row.accuracy:.2%} in torch and on {start.accuracy:.2%} in "
                "ONNX Runtime: it is not the same network"
            )


def _end(text: str) -> str:
    return text.strip()[-300:]
