"""Set weights to zero with `prune-weights` and with onnxsim, on the same files and data.

    python -m benchmarks.weights MODEL.onnx ... --peers PYTHON [--data DIR]

MODEL takes Fashion-MNIST images in 0..1; DIR holds the data set as four .gz files; PYTHON belongs
to an environment with onnxsim (benchmarks/peers/requirements.txt). Calibration sees 1,024 training
images without labels; accuracies are those of the 10,000 test images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from onnxprune import io
from onnxprune.data import open_data
from onnxprune.data.idx import read_idx
from onnxprune.graph import Graph
from onnxprune.matrices import find_matrices
from onnxprune.metrics import evaluate
from onnxprune.passes.prune_weights import PruneWeights

RESULTS = Path(__file__).parents[1] / "results" / "weights.json"
SAMPLES = 1024
SETTINGS = {"50 %": (0.5, 0, 0), "70 %": (0.7, 0, 0), "2:4": (0.5, 2, 4)}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--peers", required=True, help="python of the environment with onnxsim")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    options = parser.parse_args()
    rows = []
    for path in options.models:
        for setting in SETTINGS:
            rows.append(_row(path, setting, options.peers, options.data))
            print(rows[-1], file=sys.stderr, flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)
    return 0


def _row(path: Path, setting: str, peers: str, root: Path) -> dict[str, Any]:
    model = io.load(path)
    images, labels = (read_idx(root / f"t10k-{part}.gz") for part in _PARTS)
    name = model.graph.input[0].name
    shape = [-1, *(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:])]
    test = open_data([{name: _scaled(images, shape), "label": labels.astype(np.int64)}], model)
    train = read_idx(root / "train-images-idx3-ubyte.gz")
    picked = np.random.default_rng(0).permutation(len(train))[:SAMPLES]
    calibration = {name: _scaled(train[picked], shape)}
    row: dict[str, Any] = {"model": path.stem, "setting": setting}
    row["dense"] = evaluate(model, test, threads=1)["accuracy"]
    for tool, run in (("onnxprune", _ours), ("onnxsim", _theirs)):
        try:
            pruned, seconds = run(path, setting, calibration, peers)
        except subprocess.CalledProcessError as failure:
            row[tool] = {"problem": failure.stderr.strip().splitlines()[-1][:200]}
            continue
        row[tool] = {
            "accuracy": evaluate(pruned, test, threads=1)["accuracy"],
            "zeros": round(zeros(pruned), 4),
            "seconds": round(seconds, 1),
        }
    return row


_PARTS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _scaled(images: NDArray[Any], shape: list[int]) -> NDArray[Any]:
    return (images / 255).astype(np.float32).reshape(shape)


def _ours(
    path: Path, setting: str, calibration: dict[str, Any], _: str
) -> tuple[onnx.ModelProto, float]:
    share, n, m = SETTINGS[setting]
    model = io.load(path)
    run = PruneWeights(share, pattern=f"{n}:{m}" if n else "unstructured", threads=1)
    start = time.process_time()
    return run(model, open_data([calibration], model)).model, time.process_time() - start


def _theirs(
    path: Path, setting: str, calibration: dict[str, Any], peers: str
) -> tuple[onnx.ModelProto, float]:
    import resource

    program = Path(__file__).with_name("peer.py")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with tempfile.TemporaryDirectory() as folder:
        data, target = Path(folder) / "data.npz", Path(folder) / "out.onnx"
        np.savez(data, **calibration)
        parts = [program, path.resolve(), data, *SETTINGS[setting], target]
        command = [peers, *map(str, parts)]
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
        after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        return onnx.load(target), after - before


def zeros(model: onnx.ModelProto) -> float:
    """The share of zeros among the weights of all layers."""
    arrays = [
        m.read(Graph.of(model).constants[m.name].array()) for m in find_matrices(Graph.of(model))
    ]
    return sum(int((a == 0).sum()) for a in arrays) / max(sum(a.size for a in arrays), 1)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table: points of accuracy lost."""
    table = Table("model", "zeros", "dense", "onnxprune loses", "onnxsim loses")
    for row in rows:
        lost = [
            f"{100 * (row['dense'] - row[tool]['accuracy']):.2f}"
            if "accuracy" in row[tool]
            else row[tool]["problem"]
            for tool in ("onnxprune", "onnxsim")
        ]
        table.add_row(row["model"], row["setting"], f"{100 * row['dense']:.2f}", *lost)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
