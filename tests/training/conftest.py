"""Fixtures of the training tests: one installed runtime, one worker for many tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onnxprune.training import Runtime, ensure_training
from onnxprune.training.client import Worker


@pytest.fixture(scope="session")
def training_runtime() -> Runtime:
    """The training runtime, installed into the default cache if it is not there yet."""
    return ensure_training()


@pytest.fixture(scope="session")
def _workers(training_runtime: Runtime) -> Iterator[list[Worker]]:
    workers = [Worker(training_runtime)]
    yield workers
    for running in workers:
        running.close()


@pytest.fixture
def worker(_workers: list[Worker], training_runtime: Runtime) -> Worker:
    """A worker for tests that only build graphs in it; a new one where a test killed the last."""
    if not _workers[-1].alive:
        _workers.append(Worker(training_runtime))
    return _workers[-1]
