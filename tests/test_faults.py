"""Whatever ends a run early: files stay as they were, nothing is left behind, the code is right."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import pytest

from onnxprune import cli, files, io, runtime
from onnxprune.interruption import interruptible
from tests.graphs import build

COMMANDS = {
    "prune": "prune in.onnx out.onnx --channels 0.5 --plan p.json --report r.json -q",
    "lossless": "prune in.onnx out.onnx --lossless --plan p.json -q",
    "apply": "apply in.onnx plan.json out.onnx",
    "prune-weights": "prune-weights in.onnx out.onnx --data d.npz -q",
    "prune-layers": "prune-layers in.onnx out.onnx --data d.npz -q",
    "run": "run recipe.yaml in.onnx out.onnx --data d.npz --plan p.json -q",
    "in place": "prune-weights in.onnx in.onnx -q",
}
RECIPE = "steps: [lossless, {prune: {channels: 0.5, repair: none}}, prune-weights]\n"
INTERRUPTED = "onnxprune: error: interrupted; existing files are as they were\n"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a residual model, data, a plan, a recipe, and an older result."""
    folder = tmp_path_factory.mktemp("faults")
    model = build(
        "(float[N,6] x) => (float[N,3] y)",
        "a = Gemm(x, w0, b0) r = Relu(a) b = Gemm(r, w1, b1) s = Add(a, b) y = Gemm(s, w2, b2)",
        "w0:6,8 b0:8 w1:8,8 b1:8 w2:8,3 b2:3",
    )
    onnx.save(model, folder / "in.onnx")
    np.savez(folder / "d.npz", x=np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32))
    (folder / "recipe.yaml").write_text(RECIPE)
    made = [str(folder / name) for name in ("in.onnx", "out.onnx", "plan.json")]
    assert cli.main(["prune", *made[:2], "--channels", "0.5", "--plan", made[2], "-q"]) == 0
    (folder / "out.onnx").write_text("old")
    return folder


@pytest.fixture(autouse=True)
def contents(prepared: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The working folder, whose files are as given."""
    shutil.copytree(prepared, workdir, dirs_exist_ok=True)
    monkeypatch.setattr(runtime, "latencies_ms", partial(runtime.latencies_ms, budget_s=0.01))
    return snapshot()


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """As in a terminal: a shell that starts the tests in the background has SIGINT ignored."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def snapshot() -> dict[str, bytes]:
    """Every file in the working folder."""
    return {name: Path(name).read_bytes() for name in sorted(os.listdir())}


def kill(number: signal.Signals) -> Callable[[], None]:
    """Sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def full() -> None:
    """A disk without space."""
    raise OSError(28, "No space left on device")


def at_flush(monkeypatch: pytest.MonkeyPatch, nth: int, fault: Callable[[], None]) -> None:
    """The fault happens when the `nth` file was written and is flushed."""
    count = 0

    def flush(stream: BinaryIO) -> None:
        nonlocal count
        count += 1
        if count == nth:
            fault()
        stream.flush()

    for module in (files, io):
        monkeypatch.setattr(module, "flush", flush)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("name", "nth"), [(n, i) for n, c in COMMANDS.items() for i in range(1, 2 + c.count("p.json"))]
)
def test_a_signal_while_writing(
    name: str,
    number: signal.Signals,
    nth: int,
    contents: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_flush(monkeypatch, nth, kill(number))
    assert cli.main(COMMANDS[name].split()) == 130
    assert capsys.readouterr().err == INTERRUPTED
    assert snapshot() == contents


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(
    name: str,
    contents: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_flush(monkeypatch, 1, full)
    assert cli.main(COMMANDS[name].split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("onnxprune: error: no space left while writing ")
    assert error.count("\n") == 1
    assert snapshot() == contents


GARBAGE = {"empty": b"", "text": b"dear diary\n", "zeros": bytes(64), "random": bytes(range(256))}


@pytest.mark.parametrize("garbage", [*GARBAGE, "cut"])
@pytest.mark.parametrize(
    ("name", "victim"),
    [
        (name, victim)
        for name, command in COMMANDS.items()
        for victim in ("in.onnx", "d.npz", "plan.json", "recipe.yaml")
        if victim in command.split() and name != "in place"
    ],
)
def test_bad_files(
    name: str, victim: str, garbage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name].split()
    whole = Path(victim).read_bytes()
    Path(victim).write_bytes(GARBAGE.get(garbage, whole[: 2 * len(whole) // 3]))
    before = snapshot()
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("onnxprune: error: ") and error.count("\n") == 1
    assert victim in error
    assert snapshot() == before


def not_finite(model: onnx.ModelProto) -> None:
    """A weight that is no number."""
    tensor = model.graph.initializer[0]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[0] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def twice(model: onnx.ModelProto) -> None:
    """A name that is given twice."""
    model.graph.initializer.append(model.graph.initializer[0])


def misfit(model: onnx.ModelProto) -> None:
    """A weight of another shape."""
    tensor = model.graph.initializer[0]
    fresh = onnx.numpy_helper.from_array(np.ones((3, 3), np.float32), tensor.name)
    tensor.CopyFrom(fresh)


@pytest.mark.parametrize("spoil", [not_finite, twice, misfit])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("prune-weights", "prune_weights.PruneWeights"),
        ("in place", "prune_weights.PruneWeights"),
        ("prune-layers", "prune_layers.PruneLayers"),
        ("run", "prune_weights.PruneWeights"),
    ],
)
def test_a_result_that_is_not_sound_is_not_written(
    name: str,
    kind: str,
    spoil: Callable[[onnx.ModelProto], None],
    contents: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, _, own = f"onnxprune.passes.{kind}".rpartition(".")
    run = getattr(__import__(module, fromlist=[own]), own).__call__

    def call(*args: Any, **options: Any) -> Any:
        result = run(*args, **options)
        spoil(result.model)
        return result

    monkeypatch.setattr(f"onnxprune.passes.{kind}.__call__", call)
    assert cli.main(COMMANDS[name].split()) == 1
    assert "the result is not sound: " in capsys.readouterr().err
    assert snapshot() == contents


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_native_code_that_turns_an_interrupt_into_an_error(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        try:
            kill(number)()
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("onnxprune.pipeline.inspect", load)
    assert cli.main(["inspect", "in.onnx"]) == 130
    assert capsys.readouterr().err == INTERRUPTED


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_an_interrupt_through_text_that_is_executed(root: Path) -> None:
    """Python remembers it, and would end by a signal of its own."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from onnxprune import cli, pipeline\n"
        "def inspect(*a, **k): exec('os.kill(os.getpid(), signal.SIGINT)')\n"
        "pipeline.inspect = inspect\n"
        "sys.exit(cli.main(['inspect', 'in.onnx']))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert (ran.returncode, ran.stderr) == (130, INTERRUPTED)


def test_handlers_of_the_caller_stay() -> None:
    def own(*_: object) -> None: ...

    old = signal.signal(signal.SIGTERM, own)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGTERM) is own
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, old)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_module_of_the_command_line_runs(root: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "onnxprune.cli", "--version"],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert ran.stdout.startswith("onnxprune ")
