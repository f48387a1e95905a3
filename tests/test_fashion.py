"""The Fashion-MNIST benchmark runs from IDX files to its table, and says how to get the data."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fashion import __main__ as command


def write_idx(path: Path, array: np.ndarray) -> None:
    """A uint8 array as an IDX file."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


@pytest.fixture
def pictures(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Fashion-MNIST's four files in small: a bright row tells the class."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, count in (("train", 512), ("t10k", 64)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        images[np.arange(count), 2 * labels + 4] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the benchmark's command line."""
    monkeypatch.setattr(sys, "argv", ["fashion", *arguments])
    return command.main()


def test_end_to_end(
    pictures: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--model=mlp", f"--data={pictures}", "--results=results", "--threads=1"]
    assert run(monkeypatch, *options, "--epochs=8") == 0
    shown = capsys.readouterr().out
    assert "fine-tuned" in shown and "s an epoch on 1 threads" in shown
    result = json.loads((workdir / "results" / "fashion-mlp.json").read_text())
    assert [stage["name"] for stage in result["stages"]] == ["original", "pruned", "fine-tuned"]
    assert result["stages"][0]["accuracy"] > 0.9
    assert result["macs"][1] <= 0.5 * result["macs"][0]
    assert set(result["seconds_per_epoch"]) == {"training", "fine-tuning"}
    assert len(list((workdir / "out").glob("fashion_mlp_8_0*.onnx"))) == 2
    assert run(monkeypatch, *options, "--epochs=8", "--finetune=0", "--round-to=8") == 0
    rounded = json.loads((workdir / "results" / "fashion-mlp-round8.json").read_text())
    assert rounded["stages"][0]["accuracy"] == result["stages"][0]["accuracy"]
    assert rounded["params"][1] != result["params"][1]


def test_missing_data_says_how_to_get_it(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"--data={workdir}") == 2
    message = capsys.readouterr().err
    assert "lacks train-images, train-labels, t10k-images, t10k-labels" in message
    assert "apt install dataset-fashion-mnist" in message
