"""The command line with the real library on the trained models: transcripts and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune import cli, runtime
from tests.graphs import build

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
    Path("bytes.json").write_bytes(b"\xff\xfe")
    np.savez("text.npz", image=np.array(["a", "b"]))
    np.savez("uneven.npz", image=np.zeros((3, 64), np.float32), y=np.zeros(2, np.int64))
    odd_models()
    return workdir


def odd_models() -> None:
    """Models that are sound, but not for pruning."""
    head = '<ir_version: 10, opset_import: ["" : 21]> f '
    texts = {
        "bare": "(float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }",
        "string": "(string[N, 4] x) => (string[N, 4] y) { y = Identity(x) }",
        "int": "(int32[N, 1] x) => (int32[N, 2] y) <int32[1, 2] w = {1, 2}> { y = MatMul(x, w) }",
    }
    for name, text in texts.items():
        onnx.save(onnx.parser.parse_model(head + text), f"{name}.onnx")
    model = onnx.load("in.onnx")
    onnx.save(model, "split.onnx", save_as_external_data=True, location="split.data")
    Path("split.data").unlink()
    model = onnx.load("in.onnx")
    model.opset_import[0].version = 99
    onnx.save(model, "opset.onnx")


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
        f"{PRUNE} --repair none --plan p.json --report r.json --layers",
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
    assert cli.main([*command.split(), "--repair", "none"]) == 1
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
        "prune split.onnx out.onnx --channels 0.5",
        "prune bare.onnx out.onnx --channels 0.5",
        "prune string.onnx out.onnx --channels 0.5",
        "prune int.onnx out.onnx --channels 0.5",
        "inspect opset.onnx",
        "inspect .",
        "prune in.onnx out.onnx --channels 0",
        "prune in.onnx out.onnx --macs 1.5",
        "prune in.onnx out.onnx --params -0.5",
        f"{PRUNE} --criterion taste",
        f"{PRUNE} --keep nothing*",
        f"{PRUNE} --data missing.npz",
        f"{PRUNE} --data names.npz",
        f"{PRUNE} --data shape.npz",
        f"{PRUNE} --data text.npz",
        f"{PRUNE} --data uneven.npz",
        f"{PRUNE} --data in.onnx",
        f"{PRUNE} --data feeds.py",
        f"{PRUNE} --data feeds.py:feed",
        f"{PRUNE} --data feeds.py:feeds",
        "prune in.onnx out.onnx --macs 0.001",
        "prune in.onnx out.onnx --size-mb 0.0001",
        "apply in.onnx plan.json out.onnx",
        "apply in.onnx notes.onnx out.onnx",
        "apply in.onnx bytes.json out.onnx",
        "check in.onnx notes.onnx",
    ]
    compare("bad_input", "".join(transcript(command, capsys) for command in commands))
    assert sorted(os.listdir()) == kept


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from onnxprune import cli
sys.exit(cli.main(sys.argv[1:]))
"""
# A shell that starts the tests in the background has SIGINT ignored.
SLOW = """
import signal, sys, time
from onnxprune import cli, files
signal.signal(signal.SIGINT, signal.default_int_handler)
def flush(stream):
    print('writing', flush=True)
    time.sleep(60)
files.flush = flush
sys.exit(cli.main(sys.argv[1:]))
"""


def test_data_on_which_the_model_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    """No group of channels is to blame."""
    body = "s = Add(x, m) h = MatMul(s, w0) y = MatMul(h, w1)"
    head = "(float[N, L, 4] x, float[M, K, 4] m) => (float[P, Q, 4] y)"
    onnx.save(build(head, body, "w0:4,8 w1:8,4"), "two.onnx")
    np.savez("two.npz", x=np.ones((9, 5, 4), np.float32), m=np.ones((9, 3, 4), np.float32))
    assert cli.main("prune two.onnx out.onnx --channels 0.5 --data two.npz".split()) == 2
    assert "error: the model does not run on the data: " in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("target", ["in.onnx", "out.onnx"])
def test_no_space_left(target: str) -> None:
    """Files may not grow beyond 4 KB, which is to a writer what a full disk is."""
    names, whole = sorted(os.listdir()), Path("in.onnx").read_bytes()
    command = ["prune", "in.onnx", target, "--channels", "0.9", "--plan", "p.json", "-q"]
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 2
    assert re.fullmatch(
        r"onnxprune: error: no space left while writing \S+: "
        r"free some or write to another folder\n",
        ran.stderr,
    )
    assert (sorted(os.listdir()), Path("in.onnx").read_bytes()) == (names, whole)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_interrupted_while_writing() -> None:
    names, whole = sorted(os.listdir()), Path("in.onnx").read_bytes()
    command = ["prune", "in.onnx", "in.onnx", "--channels", "0.5", "--report", "r.json", "-q"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line == b"writing\n" for line in process.stdout)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read().decode()
        assert process.wait(timeout=20) == 130
    assert errors == "onnxprune: error: interrupted; existing files are as they were\n"
    assert (sorted(os.listdir()), Path("in.onnx").read_bytes()) == (names, whole)
