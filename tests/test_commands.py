"""The commands for single weights, whole layers and recipes, end to end on a small model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune import cli


@pytest.fixture
def digits(root: Path) -> dict[str, str]:
    """The paths of the digits model and its data."""
    folder = root / "models"
    names = {"model": "digits_cnn.onnx", "train": "digits_train.npz", "test": "digits_test.npz"}
    return {key: str(folder / name) for key, name in names.items()}


def test_prune_weights(
    digits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.onnx"
    command = ["prune-weights", digits["model"], str(target), "--sparsity", "0.6", "-q"]
    command += ["--data", digits["train"], "--val", digits["test"], "--samples", "128"]
    assert cli.main([*command, "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "| zeros in these weights" in text
    assert "ONNX Runtime computes with zeros as with any number" in text
    arrays = [numpy_helper.to_array(t) for t in onnx.load(target).graph.initializer]
    zeros = sum(int((a == 0).sum()) for a in arrays if a.ndim > 1)
    assert zeros / sum(a.size for a in arrays if a.ndim > 1) == pytest.approx(0.6, abs=0.01)
    assert all(np.isfinite(a).all() for a in arrays)


def test_a_promise_is_kept_or_nothing_written(
    digits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.onnx"
    command = ["prune-weights", digits["model"], str(target), "--sparsity", "0.95", "-q"]
    assert cli.main([*command, "--max-drop", "1"]) == 2
    assert "--max-drop needs data to measure with" in capsys.readouterr().err
    assert cli.main([*command, "--max-drop", "1", "--val", digits["test"]]) == 1
    assert f"{target} not written" in capsys.readouterr().err
    assert not target.exists()


def test_prune_layers(
    digits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.onnx"
    command = ["prune-layers", digits["model"], str(target), "--layers", "1", "-q"]
    command += ["--data", digits["train"], "--samples", "128", "--threads", "1"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "1 of 3 that could go were dropped" in text
    assert len(onnx.load(target).graph.node) < len(onnx.load(digits["model"]).graph.node)
