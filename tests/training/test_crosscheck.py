"""Gradients that are wrong in a single tensor are found before training begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models import zoo
from onnxprune import runtime
from onnxprune.errors import TrainingError
from onnxprune.training import crosscheck
from onnxprune.training.autodiff import RULES
from onnxprune.training.autodiff.local import LocalWorker
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.client import Worker
from onnxprune.training.crosscheck import alike, described, differing, doubted
from onnxprune.training.legalise import legalise
from onnxprune.training.loss import append_loss, plan_objective
from onnxprune.training.parameters import find_parameters
from tests.passes.test_finetune import HELD_OUT, QUICK, STUDENT, TRAIN
from tests.training.test_autodiff import prepared
from tests.training.test_gradients import build

Array = NDArray[Any]
SGD = {"name": "sgd"}
WRONG = min(find_parameters(STUDENT.graph).trainable)


class Lying(Worker):
    """A worker whose gradient of one tensor is not quite right."""

    factor = 1.05
    started: list[Lying]

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime)
        self.started.append(self)

    def call(
        self, op: str, arrays: Mapping[str, Array] | None = None, **head: Any
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        facts, answer = super().call(op, arrays, **head)
        if op == "grads":
            answer = {**answer, WRONG: answer[WRONG] * np.float32(self.factor)}
        return facts, answer


@pytest.fixture
def liars(monkeypatch: pytest.MonkeyPatch) -> list[Lying]:
    started: list[Lying] = []
    monkeypatch.setattr(Lying, "started", started, raising=False)
    monkeypatch.setattr("onnxprune.passes.finetune.Worker", Lying)
    return started


@pytest.mark.parametrize("batchnorm", ["frozen", "batch"])
def test_a_wrong_tensor_leaves_training_to_plain_operators(
    liars: list[Lying], batchnorm: Any
) -> None:
    tune = dataclasses.replace(QUICK, batchnorm=batchnorm)
    result = tune(STUDENT, data=TRAIN, val=HELD_OUT)
    assert result.notes == (
        f"gradients are computed by plain ONNX operators: {described([WRONG])}",
    )
    assert not liars[0].alive
    builtin = dataclasses.replace(tune, backend="builtin")(STUDENT, data=TRAIN, val=HELD_OUT)
    assert result.model.SerializeToString() == builtin.model.SerializeToString()


def test_a_worker_that_was_asked_for_is_refused(liars: list[Lying]) -> None:
    with pytest.raises(TrainingError, match=rf"another gradient of {WRONG} .*'builtin' or 'auto'"):
        dataclasses.replace(QUICK, backend="worker")(STUDENT, data=TRAIN)
    assert not liars[0].alive


def test_a_right_worker_stays(liars: list[Lying], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lying, "factor", 1.0 + 1e-5)

    class Watched(LocalWorker):
        def __init__(self) -> None:
            raise AssertionError("the worker was left")

    monkeypatch.setattr("onnxprune.training.run.LocalWorker", Watched)
    assert not QUICK(STUDENT, data=TRAIN).notes
    assert len(liars) == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda g: g, ()),
        (lambda g: g * 1.001, ()),
        (lambda g: g * 1.1, ("small",)),
        (lambda g: -g, ("small",)),
        (lambda g: g * np.nan, ("small",)),
        (np.zeros_like, ("small",)),
    ],
)
def test_tensors_are_compared_by_their_own_norm(change: Any, found: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    wanted = {n: s * rng.standard_normal((4, 3)) for n, s in (("large", 1.0), ("small", 1e-4))}
    assert differing({**wanted, "small": change(wanted["small"])}, wanted) == found


def test_what_is_zero_but_for_rounding_is_not_compared() -> None:
    wanted = {"large": np.ones(4), "zero": np.full(4, 1e-9)}
    assert differing({"large": np.ones(4), "zero": np.full(4, -3e-8)}, wanted) == ()


def test_what_a_rounding_changes_is_no_mistake() -> None:
    wanted = {"rough": np.ones(4), "smooth": np.ones(4)}
    shaken = {"rough": np.full(4, 1.02), "smooth": np.ones(4)}
    grads = {"rough": np.full(4, 0.95), "smooth": np.full(4, 0.95)}
    assert differing(grads, wanted) == ("rough", "smooth")
    assert differing(grads, wanted, shaken) == ("smooth",)


def test_parameters_that_move_the_loss_alike_are_checked_together() -> None:
    grads = {f"p{i}": np.full(4, 2.0**i) for i in range(20)}
    parts = alike(grads, {name: np.ones(4) for name in grads})
    assert len(parts) <= crosscheck.PARTS
    assert [name for part in parts for name in part] == [f"p{i}" for i in range(20)]


@pytest.mark.parametrize("wrong", [False, True])
def test_differences_tell_where_plain_operators_cannot(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(
        17,
        "float[N,5] x, float[5,3] w, float[5,3] w1, float[3] b",
        "h = MatMul(x, w) p = MatMul(x, w1) s = Sigmoid(p) t = Mul(s, b) y = Add(h, t)",
    )
    b = next(t for t in model.graph.initializer if t.name == "b")
    b.raw_data = np.full(3, 0.03, np.float32).tobytes()
    x = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    graph, batch, loss = prepared(model, {"x": x})
    if wrong:
        right = RULES["Sigmoid"]
        monkeypatch.setitem(
            RULES, "Sigmoid", lambda n, g, t: right(n, [t.op("Add", g[0], g[0])], t)
        )
    trainer = WorkerTrainer(LocalWorker(), graph, optimizer=SGD)
    monkeypatch.setattr(crosscheck, "MAX_NODES", 0)
    assert trainer.check(batch, loss) is None  # one direction over all does not see it
    if not wrong:
        assert doubted(trainer, graph, batch) == ()
        return
    with pytest.raises(TrainingError, match=r"gradient is wrong.*\(it is about w1\)"):
        doubted(trainer, graph, batch)


@pytest.mark.parametrize(("name", "wrong"), [("hf-mamba-ts", True), ("hf-gpt2-dyn", False)])
def test_exports(name: str, wrong: bool, worker: Worker) -> None:
    """ONNX Runtime 1.19 is wrong about a state space model; differences of the loss say so too."""
    model = zoo.load(name)
    feeds = runtime.working_feeds(model, threads=1)[0]
    outputs = runtime.run(runtime.session(model, threads=1), feeds)
    graph = legalise(model, sizes={n: a.shape for n, a in feeds.items()})
    objective = plan_objective(
        graph.draft, outputs, None, has_teacher=True, alpha=1.0, temperature=1.0
    )
    append_loss(graph.draft, objective)
    rng = np.random.default_rng(0)
    teacher = {n: o + rng.standard_normal(o.shape).astype("f4") for n, o in outputs.items()}
    trainer = WorkerTrainer(worker, graph, optimizer=SGD)
    found = doubted(trainer, graph, {**feeds, **objective.feeds(None, teacher)})
    assert bool(found) == wrong, found
