"""A real worker: what its engine computes, and what the caller hears when it dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxprune.errors import TrainingError
from onnxprune.training import Runtime
from onnxprune.training import worker as module
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.client import TAIL_LINES, Worker
from onnxprune.training.legalise import legalise
from onnxprune.training.loss import Objective, Term, append_loss
from tests.training.test_client import HELLO, fake, is_gone
from tests.training.test_gradients import build

OBJECTIVE = Objective((Term("t", "y", "square", "none", 0, 1.0, 1.0, True, scale=1.0),))
ROWS = 6


def trainer(worker: Worker, **options: Any) -> WorkerTrainer:
    """y = x w + b, trained to the targets by plain gradient descent."""
    graph = legalise(build(13, "float[N,5] x, float[5,3] w, float[3] b", "y = Gemm(x, w, b)"))
    append_loss(graph.draft, OBJECTIVE)
    return WorkerTrainer(worker, graph, optimizer={"name": "sgd", "momentum": 0.0}, **options)


def feeds(first: int = 0, last: int = ROWS, *, share: float = 1.0) -> dict[str, NDArray[Any]]:
    """Rows of the only batch."""
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal((ROWS, n)).astype(np.float32)[first:last] for n in (5, 3))
    return {"x": x, **OBJECTIVE.feeds(None, {"y": y}, share=share)}


def test_a_killed_worker_says_why_and_leaves_no_zombie(training_runtime: Runtime) -> None:
    with Worker(training_runtime) as running:
        training = trainer(running)
        assert np.isfinite(training.step(feeds(), 0.1)[0])
        os.kill(running._process.pid, signal.SIGTERM)
        with pytest.raises(TrainingError, match=rf"ended \(exit status {-signal.SIGTERM}\)"):
            training.step(feeds(), 0.1)
        assert is_gone(running._process.pid)


def test_a_stopped_worker_is_ended_when_its_time_is_over(training_runtime: Runtime) -> None:
    with Worker(training_runtime, timeout_s=0.3) as running:
        os.kill(running._process.pid, signal.SIGSTOP)
        start = time.perf_counter()
        with pytest.raises(TrainingError, match="did not answer in time and was stopped"):
            running.call("hello")
        assert time.perf_counter() - start < 5
    assert is_gone(running._process.pid)


def test_a_worker_that_never_says_hello(tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(TrainingError, match="did not answer in time"):
        Worker(fake(tmp_path, "time.sleep(60)"), start_s=0.3)
    assert time.perf_counter() - start < 5


def test_a_call_may_have_a_time_of_its_own(tmp_path: Path) -> None:
    body = HELLO + "wire.receive(source)\ntime.sleep(60)"
    with (
        Worker(fake(tmp_path, body)) as running,
        pytest.raises(TrainingError, match="did not answer in time"),
    ):
        running.call("step", timeout_s=0.2)


def test_only_the_tail_of_a_long_trace_is_told(tmp_path: Path) -> None:
    body = HELLO + "sys.stderr.write('\\n'.join(f'line {n}' for n in range(99)))\nsys.exit(4)"
    with Worker(fake(tmp_path, body)) as running, pytest.raises(TrainingError) as caught:
        running.call("step")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(f"ended (exit status 4): line {99 - TAIL_LINES}")
    assert lines[-1] == "line 98"
    assert len(lines) == TAIL_LINES


def test_a_message_before_the_graph_is_an_error_of_the_worker(training_runtime: Runtime) -> None:
    with Worker(training_runtime) as running:
        with pytest.raises(TrainingError, match="the training worker failed: AttributeError"):
            running.call("values")
        assert running.alive


def test_the_trace_of_a_failure_stays_out_of_the_messages(training_runtime: Runtime) -> None:
    with Worker(training_runtime) as running:
        with pytest.raises(TrainingError, match="unknown message"):
            running.call("dance")
        assert "Traceback" in running._tail()
        assert running.call("hello")[0]["training"]


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_parts_of_a_batch_add_up_to_the_batch(clip: float, worker: Worker) -> None:
    whole = trainer(worker, clip=clip)
    whole.step(feeds(), 0.1)
    expected = whole.values()
    parts = trainer(worker, clip=clip)
    before = parts.values()
    parts.accumulate(feeds(0, 3, share=0.5))
    parts.step(feeds(3, 6, share=0.5), 0.1)
    for name, value in parts.values().items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6)
        assert (value != before[name]).any()


def test_masked_weights_stay_at_zero(worker: Worker) -> None:
    mask = np.ones((5, 3), bool)
    mask[1] = mask[:, 2] = False
    training = trainer(worker, masks={"w": mask})
    training.step(feeds(), 0.1)
    assert ((training.values()["w"] != 0) == mask).all()


def test_state_continues_where_it_was(worker: Worker) -> None:
    training = trainer(worker)
    training.step(feeds(), 0.1)
    head, arrays = training.state()
    training.step(feeds(), 0.1)
    expected = training.values()
    other = trainer(worker)
    other.restore(head, arrays)
    other.step(feeds(), 0.1)
    for name, value in other.values().items():
        assert (value == expected[name]).all()


def test_every_tensor_begins_on_a_cache_line() -> None:
    layout, size = module._layout({"a": [3], "b": [], "c": [17], "d": [0]})
    assert layout == {"a": (0, [3]), "b": (16, []), "c": (32, [17]), "d": (64, [0])}
    assert size == 64
    assert module._vector(size).ctypes.data % 64 == 0


def test_the_worker_needs_nothing_of_the_package_but_its_own_modules(
    training_runtime: Runtime,
) -> None:
    """It may run in a Python that lacks what onnxprune imports."""
    body = Path(module.__file__).read_text() + Path(module.wire.__file__).read_text()
    imported = {
        line.split()[1] for line in body.splitlines() if line.startswith(("import", "from"))
    }
    allowed = {"__future__", "collections.abc", "numpy", "onnxprune.training", "typing"}
    assert imported <= allowed | set(sys.stdlib_module_names)
