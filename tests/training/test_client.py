"""A worker that fails in every way: no hang, no zombie, and the reason in the message."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from onnxprune.errors import TrainingError
from onnxprune.training import Runtime
from onnxprune.training.client import Worker, _package_root

HELLO = """
about = {"onnxruntime": "1", "training": True, "numpy": "2", "python": "3"}
wire.receive(source)
wire.send(sink, about)
"""


def fake(folder: Path, body: str) -> Runtime:
    """A runtime whose Python is a script that does `body` instead of serving."""
    script = folder / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys, types, time, os\n"
        f"root = {_package_root()!r}\n"
        'for name, folder in (("onnxprune", root), ("onnxprune.training", root + "/training")):\n'
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [folder]\n"
        "from onnxprune.training import wire\n"
        "source, sink = sys.stdin.buffer, sys.stdout.buffer\n" + body
    )
    script.chmod(0o755)
    return Runtime(script, None, "test")


def is_gone(pid: int) -> bool:
    """Whether the process has ended and been waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_worker_that_dies_at_once(tmp_path: Path) -> None:
    runtime = fake(tmp_path, 'sys.exit("no numpy in sight")')
    with pytest.raises(TrainingError, match=r"ended \(exit status 1\): no numpy in sight"):
        Worker(runtime)


def test_a_worker_that_dies_in_a_step(tmp_path: Path) -> None:
    body = HELLO + 'wire.receive(source)\nprint("boom", file=sys.stderr)\nos._exit(3)'
    with Worker(fake(tmp_path, body)) as worker:
        with pytest.raises(TrainingError, match=r"exit status 3\): boom"):
            worker.call("step", {"x": np.ones(4)}, lr=1.0)
        assert not worker.alive
        with pytest.raises(TrainingError, match="exit status 3"):
            worker.call("step", {"x": np.ones(4_000_000)}, lr=1.0)
    assert is_gone(worker._process.pid)


@pytest.mark.parametrize("arrays", [1, 4_000_000], ids=["silent", "deaf"])
def test_a_worker_that_hangs_is_stopped(tmp_path: Path, arrays: int) -> None:
    with Worker(fake(tmp_path, HELLO + "time.sleep(60)"), timeout_s=0.2) as worker:
        start = time.perf_counter()
        with pytest.raises(TrainingError, match="did not answer in time and was stopped"):
            worker.call("step", {"x": np.ones(arrays)})
        assert time.perf_counter() - start < 10
    assert is_gone(worker._process.pid)


def test_a_worker_out_of_memory(tmp_path: Path) -> None:
    body = HELLO + "wire.receive(source)\nos.kill(os.getpid(), 9)"
    with (
        Worker(fake(tmp_path, body)) as worker,
        pytest.raises(TrainingError, match="try a smaller batch size"),
    ):
        worker.call("step")


def test_a_worker_that_talks_nonsense(tmp_path: Path) -> None:
    body = 'sink.write(b"\\x05\\0\\0\\0hello")\nsink.flush()\ntime.sleep(60)'
    with pytest.raises(TrainingError, match="answered with something that is no message"):
        Worker(fake(tmp_path, body))


def test_an_onnxruntime_without_training(tmp_path: Path) -> None:
    body = HELLO.replace("True", "False")
    with pytest.raises(TrainingError, match="without training; install onnxruntime-training-cpu"):
        Worker(fake(tmp_path, body))


def test_a_python_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot start the training worker"):
        Worker(Runtime(tmp_path / "nothing", None, "test"))


def test_an_interruption_ends_the_worker(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Worker(fake(tmp_path, HELLO + "time.sleep(60)")) as worker,
    ):
        raise KeyboardInterrupt
    assert is_gone(worker._process.pid)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are different there")
def test_the_terminals_interrupt_does_not_reach_the_worker(training_runtime: Runtime) -> None:
    with Worker(training_runtime) as worker:
        assert os.getpgid(worker._process.pid) != os.getpgid(0)
        worker._process.send_signal(signal.SIGCONT)
        assert worker.call("hello")[0]["onnxruntime"].startswith("1.")


def test_an_error_in_the_worker_leaves_it_alive(worker: Worker) -> None:
    with pytest.raises(TrainingError, match="ValueError: unknown message 'dance'"):
        worker.call("dance")
    assert worker.call("hello")[0]["training"]


def test_a_closed_worker_has_ended(training_runtime: Runtime) -> None:
    worker = Worker(training_runtime)
    worker.close()
    assert is_gone(worker._process.pid)
    assert worker._process.returncode == 0
