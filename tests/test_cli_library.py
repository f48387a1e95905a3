"""The command line with the real library on the trained models: transcripts and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune import cli, runtime

GOLDEN = Path(__file__).parent / "golden"
PRUNE = "prune in.onnx out.onnx --channels 0.5"


@pytest.fixture(autouse=True)
def _brief_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies that nobody reads need no precision."""
    brief = partial(runtime.latencies_ms, budget_s=0.02)
    monkeypatch.setattr(runtime, "latencies_ms", brief)


@pytest.fixture(autouse=True)
def files(workdir: Path, models_dir: Path) -> Path:
    """A working directory with a model, its data, and things that are neither."""
    shutil.copy(models_dir / "digits_mlp.onnx", "in.onnx")
    shutil.copy(models_dir / "digits_cnn.onnx", "cnn.onnx")
    shutil.copy(models_dir / "digits_test.npz", "test.npz")
    whole = Path("in.onnx").read_bytes()
    Path("truncated.onnx").write_bytes(whole[: len(whole) // 2])
    Path("empty.onnx").touch()
    Path("notes.onnx").write_text("dear diary\n")
    np.savez("names.npz", image=np.zeros((4, 1, 8, 8), np.float32), mask=np.zeros(4))
    np.savez("shape.npz", x=np.zeros((4, 3, 8, 8), np.float32))
    Path("plan.json").write_text('{"format": "recipe"}')
    Path("feeds.py").write_text("def feeds():\n    return 1 / 0\n")
    return workdir


def transcript(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a terminal would show, without what differs between runs and machines."""
    capsys.readouterr()
    code = cli.main(command.split())
    shown = capsys.readouterr()
    text = shown.out + "".join(f"[stderr] {line}\n" for line in shown.err.splitlines())
    return f"$ onnxprune {command}\n{_stable(text)}[exit {code}]\n"


def _stable(text: str) -> str:
    """Measured numbers masked; columns no longer padded, as widths depend on them."""
    lines = []
    for line in text.splitlines():
        line = re.sub(r" +", " ", re.sub(r"-{3,}:?", "---", line))
        if line.startswith("| latency"):
            line = "| latency | T | T | R |"
        line = re.sub(r"\d\.\de[+-]\d\d", "E", line)
        lines.append(re.sub(r"[+-]?\d+\.\d+ (%|points)", r"N \1", line))
    return "\n".join(lines) + "\n"


def compare(name: str, text: str) -> None:
    """Compare with the golden file `name`; UPDATE_GOLDEN=1 writes it instead."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_prune_inspect_apply_check(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        "inspect in.onnx --why --layers",
        f"{PRUNE} --plan p.json --report r.json --layers",
        "apply in.onnx p.json replayed.onnx",
        "check out.onnx replayed.onnx --tolerance 0",
        "check in.onnx cnn.onnx",
    ]
    compare("digits", "".join(transcript(command, capsys) for command in commands))
    assert Path("out.onnx").read_bytes() == Path("replayed.onnx").read_bytes()
    report = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert report["after"]["params"] < report["before"]["params"]


def test_data_brings_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PRUNE.split(), "--val", "test.npz", "--report", "r.json"]) == 0
    assert "| accuracy" in capsys.readouterr().out
    report = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert report["before"]["metrics"]["accuracy"] > 0.9


def test_broken_promise_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.onnx").write_text("old")
    command = "prune in.onnx out.onnx --channels 0.1 --val test.npz --max-drop 0 --plan p.json"
    assert cli.main(command.split()) == 1
    shown = capsys.readouterr()
    assert re.search(r"accuracy fell by \d+\.\d\d points, more than --max-drop 0", shown.out)
    assert shown.err == (
        "onnxprune: error: the pruned model failed its check; out.onnx, plan p.json not written\n"
    )
    assert Path("out.onnx").read_text() == "old"
    assert not Path("p.json").exists()


def test_pruning_in_place() -> None:
    before = Path("in.onnx").stat().st_size
    assert cli.main(["prune", "in.onnx", "in.onnx", "--channels", "0.5"]) == 0
    assert Path("in.onnx").stat().st_size < before
    onnx.checker.check_model("in.onnx", full_check=True)


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    kept = sorted(os.listdir())
    commands = [
        "prune missing.onnx out.onnx --channels 0.5",
        "prune truncated.onnx out.onnx --channels 0.5",
        "prune empty.onnx out.onnx --channels 0.5",
        "prune notes.onnx out.onnx --channels 0.5",
        "prune test.npz out.onnx --channels 0.5",
        "inspect .",
        f"{PRUNE} --criterion taste",
        f"{PRUNE} --keep nothing*",
        f"{PRUNE} --data missing.npz",
        f"{PRUNE} --data names.npz",
        f"{PRUNE} --data shape.npz",
        f"{PRUNE} --data in.onnx",
        f"{PRUNE} --data feeds.py",
        f"{PRUNE} --data feeds.py:feed",
        f"{PRUNE} --data feeds.py:feeds",
        "prune in.onnx out.onnx --macs 0.001",
        "prune in.onnx out.onnx --size-mb 0.0001",
        "apply in.onnx plan.json out.onnx",
        "apply in.onnx notes.onnx out.onnx",
        "check in.onnx notes.onnx",
    ]
    compare("bad_input", "".join(transcript(command, capsys) for command in commands))
    assert sorted(os.listdir()) == kept
