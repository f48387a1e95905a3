"""Gradients as plain ONNX operators, against those of the training worker and differences."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.errors import TrainingError
from onnxprune.passes.finetune import Finetune
from onnxprune.training.autodiff import RULES, gradient_model
from onnxprune.training.autodiff.local import LocalWorker
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.client import Worker
from onnxprune.training.draft import to_model
from onnxprune.training.legalise import DIFFERENTIABLE, TrainingGraph, legalise
from onnxprune.training.loss import Objective, Term, append_loss, loss_value
from tests.passes.test_finetune import HELD_OUT, QUICK, STUDENT, TRAIN
from tests.training.test_gradients import CASES, build, feeds_for

OBJECTIVE = Objective((Term("t", "y", "square", "none", 0, 1.0, 1.0, True, scale=1.0),))
Batch = dict[str, NDArray[Any]]
# broadcasts whose axes are known at run time only, and forms that the other backend lacks
MORE = [
    ("broadcast-batch", 18, "float[N,3] x, float[3,4] w", "h = MatMul(x, w) m = ReduceMean"
     "<keepdims=1>(h) y = Sub(h, m)"),
    ("batched-weights", 18, "float[N,2,3,4] x, float[1,2,4,5] w", "y = MatMul(x, w)"),
    ("one-matrix-for-all", 18, "float[N,3] x, float[2,3,4] w, float[3,3] w1",
     "h = MatMul(x, w1) y = MatMul(h, w)"),
    ("batches-of-two-names", 18, "float[N,2,3] x, float[M,2,3] z, float[3,4] w",
     "h = MatMul(x, w) k = MatMul(z, w) t = Transpose<perm=[0,2,1]>(k) y = MatMul(h, t)"),
    ("used-twice", 18, "float[N,4] x, float[4,4] w", "h = MatMul(x, w) i = MatMul(h, w)"
     " y = Mul(i, h)"),
]  # fmt: skip


def prepared(model: onnx.ModelProto, feeds: Batch) -> tuple[TrainingGraph, Batch, float]:
    """The training graph with its loss, a batch for it, and the loss that inference gives."""
    outputs = runtime.run(runtime.session(model, threads=1), feeds)
    graph = legalise(model)
    noise = np.random.default_rng(5).standard_normal(outputs["y"].shape).astype(np.float32)
    batch = {**feeds, **OBJECTIVE.feeds(None, {"y": outputs["y"] + noise})}
    append_loss(graph.draft, OBJECTIVE)
    return graph, batch, loss_value(OBJECTIVE, outputs, batch)


def local(graph: TrainingGraph) -> WorkerTrainer:
    return WorkerTrainer(LocalWorker(), graph, optimizer={"name": "sgd"})


@pytest.mark.parametrize(
    ("name", "opset", "inputs", "body"), [*CASES, *MORE], ids=[c[0] for c in [*CASES, *MORE]]
)
def test_both_backends_agree(name: str, opset: int, inputs: str, body: str, worker: Worker) -> None:
    model = build(opset, inputs, body)
    feeds = feeds_for(model)
    graph, batch, loss = prepared(model, feeds)
    own, gradients = local(graph).grads(batch)
    other, expected = WorkerTrainer(worker, graph, optimizer={"name": "sgd"}).grads(batch)
    assert own == pytest.approx(loss, rel=1e-4)
    assert own == pytest.approx(other, rel=1e-4)
    assert gradients.keys() == expected.keys() == graph.parameters.keys()
    for key, value in expected.items():
        scale = max(float(np.abs(value).max()), 1e-3)
        np.testing.assert_allclose(gradients[key], value, atol=1e-4 * scale, rtol=1e-4)


def test_broadcasts_may_show_at_run_time_only() -> None:
    """The other backend takes the two unknown sizes for one."""
    inputs = "float[N,4] x, float[M,4] z, float[4,4] w, float[4,4] w1"
    model = build(18, inputs, "h = MatMul(x, w) i = MatMul(z, w1) y = Mul(h, i)")
    feeds = feeds_for(model)
    feeds["z"] = feeds["z"][:1]
    graph, batch, loss = prepared(model, feeds)
    assert local(graph).check(batch, loss, seed=1) is None


def test_every_differentiable_operator_has_a_rule() -> None:
    assert DIFFERENTIABLE - RULES.keys() == {"GRU", "LSTM"}  # which are written out


def test_the_gradient_is_made_of_standard_operators() -> None:
    model = build(17, "float[N,5] x, float[5,3] w", "h = MatMul(x, w) y = Relu(h)")
    graph, _, _ = prepared(model, feeds_for(model))
    gradient = gradient_model(to_model(graph.draft), ["w"])
    onnx.checker.check_model(gradient, full_check=True)
    assert {node.domain for node in gradient.graph.node} == {""}
    assert [o.name for o in gradient.graph.output] == ["loss", "w_grad"]


def test_what_has_no_rule_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(17, "float[N,5] x, float[5,3] w", "h = MatMul(x, w) y = Tanh(h)")
    graph, _, _ = prepared(model, feeds_for(model))
    monkeypatch.delitem(RULES, "Tanh")
    with pytest.raises(TrainingError, match=r"Tanh \(.*\) has no gradient rule"):
        local(graph)


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(17, "float[N,5] x, float[5,3] w", "h = MatMul(x, w) y = Tanh(h)")
    graph, batch, loss = prepared(model, feeds_for(model))
    monkeypatch.setitem(RULES, "Tanh", lambda node, grads, t: grads)
    with pytest.raises(TrainingError, match="the gradient is wrong"):
        local(graph).check(batch, loss)


def test_fine_tuning_without_a_worker() -> None:
    ends = {}
    for backend in ("worker", "builtin"):
        tune = dataclasses.replace(QUICK, backend=backend)
        ends[backend] = tune(STUDENT, data=TRAIN, val=HELD_OUT)
        assert not ends[backend].notes
    losses = [[e.loss for e in r.history[1:]] for r in ends.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    accuracy = ends["builtin"].history[-1].metrics["accuracy"]
    assert accuracy == pytest.approx(ends["worker"].history[-1].metrics["accuracy"], abs=0.02)


def test_the_builtin_backend_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(progress: Any = None) -> Any:
        raise TrainingError("no wheel for this Python")

    monkeypatch.setattr("onnxprune.passes.finetune.ensure_training", missing)
    quick = dataclasses.replace(QUICK, epochs=1)
    (note,) = quick(STUDENT, data=TRAIN).notes
    assert note == "gradients are computed by plain ONNX operators: no wheel for this Python"
    with pytest.raises(TrainingError, match="no wheel"):
        Finetune(backend="worker")(STUDENT, data=TRAIN)


def test_batch_statistics_have_a_gradient(worker: Worker) -> None:
    inputs = (
        "float[N,3,4,4] x, float[5,3,3,3] w, float[5] w1, float[5] b1, float[5] mean, float[5] var"
    )
    body = "h = Conv<pads=[1,1,1,1]>(x, w) y = BatchNormalization(h, w1, b1, mean, var)"
    model = build(15, inputs, body)
    graph = legalise(model, momentum=0.9)
    append_loss(graph.draft, OBJECTIVE)
    feeds = feeds_for(model)
    target = np.random.default_rng(1).standard_normal((2, 5, 4, 4)).astype(np.float32)
    batch = {**feeds, **OBJECTIVE.feeds(None, {"y": target})}
    _, own = local(graph).grads(batch)
    _, other = WorkerTrainer(worker, graph, optimizer={"name": "sgd"}).grads(batch)
    for key, value in other.items():
        np.testing.assert_allclose(own[key], value, atol=1e-4, rtol=1e-3)


def test_what_was_asked_for_stays_when_training_goes_on() -> None:
    model = build(17, "float[N,5] x, float[5,3] w", "y = MatMul(x, w)")
    graph, batch, _ = prepared(model, feeds_for(model))
    trainer = local(graph)
    before, gradient = trainer.values()["w"], trainer.grads(batch)[1]["w"]
    kept = before.copy(), gradient.copy()
    trainer.step({n: 2 * a for n, a in batch.items()}, 0.1)
    np.testing.assert_array_equal(before, kept[0])
    np.testing.assert_array_equal(gradient, kept[1])
    assert not np.array_equal(trainer.values()["w"], before)
