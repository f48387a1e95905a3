"""The self-check, and the state that the worker keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.errors import TrainingError
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.checkpoint import (
    Checkpoint,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from onnxprune.training.client import Worker
from onnxprune.training.legalise import legalise
from onnxprune.training.loss import Objective, Term, append_loss
from onnxprune.training.teacher import Teacher
from tests.training.test_gradients import build

TERM = Term("t", "y", "square", "none", 0, 1.0, 1.0, True)
BATCH = {
    "x": np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5),
    **Objective((TERM,)).feeds(None, {"y": np.ones((2, 3), np.float32)}),
}


def trainer(worker: Any, **options: Any) -> WorkerTrainer:
    graph = legalise(build(17, "float[N,5] x, float[5,3] w", "h = MatMul(x, w) y = Tanh(h)"))
    append_loss(graph.draft, Objective((TERM,)))
    return WorkerTrainer(worker, graph, optimizer={"name": "adamw"}, **options)


class Stub:
    """A worker whose probes tell what the test wants."""

    def __init__(self, difference: Callable[[float, int | None], float], loss: float = 1.0) -> None:
        self.difference, self.loss = difference, loss

    def call(self, op: str, arrays: Any = None, **head: Any) -> tuple[dict[str, Any], Any]:
        if op != "probe":
            return {}, {"gradient": np.zeros(0, np.uint8), "y": np.zeros(1, np.float32)}
        found = self.difference(head["size"], head["seed"])
        return {"loss": self.loss, "slope": 2.0, "difference": found}, {}


def test_a_right_gradient_passes_at_any_step() -> None:
    assert trainer(Stub(lambda size, _: 2.0 if size < 1e-3 else 7.0)).check(BATCH, 1.0) is None


def test_a_wrong_gradient_is_told_from_a_rough_loss() -> None:
    with pytest.raises(TrainingError, match=r"gradient is wrong.* gives 2, .*3 \(step 0.001\)"):
        trainer(Stub(lambda *_: 3.0)).check(BATCH, 1.0)
    note = trainer(Stub(lambda size, _: 1 / size)).check(BATCH, 1.0)
    assert note is not None
    assert "too rough to check" in note


def test_a_rough_loss_is_tried_along_the_gradient() -> None:
    stub = Stub(lambda size, seed: 2.0 if seed is None else 1 / size)
    assert trainer(stub).check(BATCH, 1.0) is None


def test_another_loss_than_that_of_inference_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"its loss is 1, that of the model's outputs 1\.1"):
        trainer(Stub(lambda *_: 2.0)).check(BATCH, 1.1)
    assert trainer(Stub(lambda *_: 2.0)).check(BATCH, None) is None


def test_gradients_travel_and_change_nothing(worker: Worker) -> None:
    own = trainer(worker)
    before = own.values()["w"]
    loss, grads = own.grads(BATCH)
    assert loss > 0
    assert grads["w"].shape == (5, 3)
    np.testing.assert_array_equal(own.values()["w"], before)


def test_parts_accumulate_to_one_step(worker: Worker) -> None:
    whole = trainer(worker)
    whole.step(BATCH, 0.1)
    once = whole.values()["w"]
    halves = [{n: a[s] if a.ndim == 2 else a for n, a in BATCH.items()} for s in ([0], [1])]
    parts = trainer(worker)
    parts.accumulate(halves[0])
    parts.step(halves[1], 0.1)
    np.testing.assert_allclose(parts.values()["w"], once, atol=1e-6)


def test_a_state_continues_bit_for_bit(worker: Worker) -> None:
    first = trainer(worker)
    first.step(BATCH, 0.1)
    head, arrays = first.state()
    first.step(BATCH, 0.05)
    wanted = first.values()["w"]
    second = trainer(worker)
    second.restore(head, arrays)
    second.step(BATCH, 0.05)
    np.testing.assert_array_equal(second.values()["w"], wanted)


def test_masked_weights_stay_zero(worker: Worker) -> None:
    mask = np.ones((5, 3))
    mask[1:3] = 0
    own = trainer(worker, masks={"w": mask})
    for _ in range(3):
        own.step(BATCH, 0.1)
    assert np.array_equal(own.values()["w"] != 0, mask != 0)


def test_divergence_is_an_error(worker: Worker) -> None:
    own = trainer(worker)
    batch = {**BATCH, "x": np.full((2, 5), np.nan, np.float32)}
    with pytest.raises(TrainingError, match=r"diverged: the loss is nan .* lower learning rate"):
        own.step(batch, 0.1)
    assert np.isfinite(own.values()["w"]).all()


def test_a_batch_that_lacks_an_input(worker: Worker) -> None:
    with pytest.raises(TrainingError, match="the batch lacks x"):
        trainer(worker).grads({n: a for n, a in BATCH.items() if n != "x"})


def test_checkpoints_come_back(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    saved = Checkpoint({"epoch": 3}, {"a/b": np.arange(3), "params": np.ones(2, np.float32)})
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    assert loaded.facts["epoch"] == 3
    assert set(loaded.arrays) == {"a/b", "params"}
    np.testing.assert_array_equal(loaded.arrays["a/b"], np.arange(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.npz"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"cannot read the checkpoint .*run\.npz"):
        load_checkpoint(path)


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    np.savez(path, header=np.array('{"format": "other"}'))
    with pytest.raises(TrainingError, match="is not an onnxprune checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "none" / "run.npz", Checkpoint({}, {}))


def test_fingerprints_tell_runs_apart() -> None:
    w = {"w": np.ones(3)}
    assert fingerprint(w, {"lr": 1}) == fingerprint({"w": np.ones(3)}, {"lr": 1})
    assert fingerprint(w, {"lr": 1}) != fingerprint(w, {"lr": 2})
    assert fingerprint(w, {}) != fingerprint({"w": np.zeros(3)}, {})


def test_the_teacher_runs_once_for_each_sample() -> None:
    model = build(17, "float[N,5] x, float[5,3] w", "h = MatMul(x, w) y = Tanh(h)")
    x = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    teacher, plain = Teacher(model, ["y"]), Teacher(model, ["y"], remember=False)
    first = teacher({"x": x})["y"]
    teacher._session = None  # type: ignore[assignment]
    order = np.random.default_rng(1).permutation(8)
    np.testing.assert_array_equal(teacher({"x": x[order]})["y"], first[order])
    np.testing.assert_array_equal(plain({"x": x})["y"], first)


def test_the_teacher_stops_remembering_at_its_limit() -> None:
    model = build(17, "float[N,5] x, float[5,3] w", "y = MatMul(x, w)")
    teacher = Teacher(model, ["y"], limit_bytes=4 * 3 * 2)
    for value in (1, 2):
        teacher({"x": np.full((2, 5), value, np.float32)})
    assert len(teacher._known) == 1
