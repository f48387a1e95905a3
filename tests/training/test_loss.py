"""The loss: what it is made of, and that graph and numpy agree on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.errors import TrainingError
from onnxprune.training.draft import to_model
from onnxprune.training.legalise import legalise
from onnxprune.training.loss import (
    Objective,
    Term,
    append_loss,
    class_axis,
    loss_value,
    plan_objective,
    softmax,
)
from tests.training.test_gradients import build

Array = NDArray[Any]
LINEAR = "float[N,5] x, float[5,3] w, float[3] b"
IMAGE = "float[N,2,4,4] x, float[3,2,1,1] w, float[3] b"
rng = np.random.default_rng(0)


def cross_entropy(scores: Array, labels: Array) -> float:
    p = softmax(scores.astype(np.float64), 1)
    return float(-np.log(p[np.arange(len(labels)), labels]).mean())


def divergence(teacher: Array, student: Array, t: float) -> float:
    p, q = softmax(teacher.astype(np.float64) / t, 1), softmax(student.astype(np.float64) / t, 1)
    return float(t * t * (p * (np.log(p) - np.log(q))).sum(axis=1).mean())


def run(
    body: str,
    x: Array,
    labels: Array | None,
    teacher: Array | None,
    inputs: str = LINEAR,
    distillation: Any = "auto",
) -> tuple[float, Array, Objective]:
    """The loss by the training graph, the model's output, and the objective."""
    model = build(17, inputs, body)
    outputs = runtime.run(runtime.session(model, threads=1), {"x": x})
    graph = legalise(model)
    objective = plan_objective(
        graph.draft,
        outputs,
        labels,
        has_teacher=teacher is not None,
        alpha=0.3,
        temperature=2.0,
        distillation=distillation,
    )
    feeds = objective.feeds(labels, {} if teacher is None else {"y": teacher})
    append_loss(graph.draft, objective)
    proto = to_model(graph.draft)
    values = {n: p.value for n, p in graph.parameters.items()}
    loss = runtime.run(runtime.session(proto, threads=1), {"x": x, **values, **feeds})["loss"]
    assert float(loss) == pytest.approx(loss_value(objective, outputs, feeds), rel=1e-4, abs=1e-6)
    return float(loss), outputs["y"], objective


X = rng.standard_normal((6, 5)).astype(np.float32)
LABELS = np.array([0, 1, 2, 2, 1, 0])
SCORES = rng.standard_normal((6, 3)).astype(np.float32)


def test_labels_on_logits() -> None:
    loss, y, _ = run("y = Gemm(x, w, b)", X, LABELS, None)
    assert loss == pytest.approx(cross_entropy(y, LABELS), rel=1e-5)


@pytest.mark.parametrize("last", ["Softmax", "LogSoftmax"])
def test_labels_on_probabilities(last: str) -> None:
    loss, y, _ = run(f"h = Gemm(x, w, b) y = {last}(h)", X, LABELS, None)
    scores = np.log(y) if last == "Softmax" else y
    assert loss == pytest.approx(cross_entropy(scores, LABELS), rel=1e-4)


def test_teacher_alone() -> None:
    loss, y, _ = run("y = Gemm(x, w, b)", X, None, SCORES)
    assert loss == pytest.approx(divergence(SCORES, y, 2.0), rel=1e-4)
    assert run("y = Gemm(x, w, b)", X, None, y)[0] == pytest.approx(0, abs=1e-5)


def test_teacher_of_probabilities() -> None:
    loss, y, _ = run("h = Gemm(x, w, b) y = Softmax(h)", X, None, softmax(SCORES, 1))
    assert loss == pytest.approx(divergence(SCORES, np.log(y), 2.0), rel=1e-4)


def test_teacher_and_labels() -> None:
    loss, y, _ = run("y = Gemm(x, w, b)", X, LABELS, SCORES)
    wanted = 0.7 * cross_entropy(y, LABELS) + 0.3 * divergence(SCORES, y, 2.0)
    assert loss == pytest.approx(wanted, rel=1e-4)


def test_regression() -> None:
    target = rng.standard_normal((6, 3)).astype(np.float32)
    loss, y, _ = run("y = Gemm(x, w, b)", X, target, None)
    assert loss == pytest.approx(float(np.square(y - target).mean()), rel=1e-4)


def test_sigmoids() -> None:
    target = (SCORES > 0).astype(np.int64)
    loss, y, _ = run("h = Gemm(x, w, b) y = Sigmoid(h)", X, target, None)
    wanted = -(target * np.log(y) + (1 - target) * np.log(1 - y)).sum() / 6
    assert loss == pytest.approx(float(wanted), rel=1e-4)


def test_a_teacher_of_sigmoids_is_matched_at_zero() -> None:
    body = "h = Gemm(x, w, b) y = Sigmoid(h)"
    assert run(body, X, None, run(body, X, None, SCORES)[1])[0] == pytest.approx(0, abs=1e-5)


def test_dense_labels_and_ignored_positions() -> None:
    x = rng.standard_normal((2, 2, 4, 4)).astype(np.float32)
    labels = rng.integers(0, 3, (2, 4, 4))
    labels[0, 0] = 255
    loss, y, _ = run("y = Conv(x, w, b)", x, labels, None, IMAGE)
    flat, wanted = np.moveaxis(y, 1, -1).reshape(-1, 3), labels.reshape(-1)
    valid = wanted < 3
    assert loss == pytest.approx(cross_entropy(flat[valid], wanted[valid]), rel=1e-4)


def test_maps_are_compared_relative_to_their_variance() -> None:
    x = rng.standard_normal((2, 2, 4, 4)).astype(np.float32)
    teacher = rng.standard_normal((2, 3, 4, 4)).astype(np.float32)
    loss, y, _ = run("y = Conv(x, w, b)", x, None, teacher, IMAGE)
    assert loss == pytest.approx(float(np.square(y - teacher).mean() / y.var()), rel=1e-3)


def test_parts_of_a_batch_add_up_to_it() -> None:
    objective = Objective((Term("t", "y", "square", "none", 0, 1.0, 1.0, True),))
    y, target = SCORES, SCORES + 1
    whole = loss_value(objective, {"y": y}, objective.feeds(None, {"y": target}))
    parts = [
        loss_value(objective, {"y": y[s]}, objective.feeds(None, {"y": target[s]}, share=0.5))
        for s in (slice(0, 3), slice(3, 6))
    ]
    assert sum(parts) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("output", "labels", "hint", "axis"),
    [
        ((8, 10), (8,), None, 1),
        ((8, 10), (8, 1), None, 1),
        ((8, 10, 1, 1), (8,), None, 1),
        ((8, 10, 5, 5), (8, 5, 5), None, 1),
        ((8, 5, 10), (8, 5), None, 2),
        ((8, 5, 5), (8, 5), 2, 2),
        ((8, 10), (7,), None, None),
        ((8, 1), (8,), None, None),
    ],
)
def test_the_axis_of_classes(
    output: tuple[int, ...], labels: tuple[int, ...], hint: int | None, axis: int | None
) -> None:
    assert class_axis(output, labels, hint) == axis


def test_labels_that_fit_nothing() -> None:
    with pytest.raises(TrainingError, match=r"labels of shape \[6, 7\] fit none .*: y\[6, 3\]"):
        run("y = Gemm(x, w, b)", X, np.zeros((6, 7)), None)


def test_nothing_to_learn_from() -> None:
    with pytest.raises(TrainingError, match="no labels and there is no teacher"):
        run("y = Gemm(x, w, b)", X, None, None)


def test_a_comparison_may_be_picked_for_each_output() -> None:
    x, teacher = rng.standard_normal((4, 5)), rng.standard_normal((4, 3))
    x, teacher = x.astype(np.float32), teacher.astype(np.float32)
    loss, out, objective = run("y = Gemm(x, w, b)", x, None, teacher, distillation={"y": "l1"})
    assert loss == pytest.approx(np.abs(out - teacher).mean() / out.std(), rel=1e-4)
    assert objective.terms[0].kind == "absolute"
    loss, out, _ = run("y = Gemm(x, w, b)", x, None, teacher, distillation="mse")
    assert loss == pytest.approx(np.square(out - teacher).mean() / out.var(), rel=1e-4)
    with pytest.raises(TrainingError, match="nothing to learn from"):
        run("y = Gemm(x, w, b)", x, None, teacher, distillation="none")


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"z": "l1"}, "no float output named 'z'; it has y"), ("bce", "bce needs a Sigmoid")],
)
def test_a_comparison_that_does_not_fit_is_told(choice: Any, message: str) -> None:
    x = np.ones((4, 5), np.float32)
    with pytest.raises(TrainingError, match=message):
        run("y = Gemm(x, w, b)", x, None, np.ones((4, 3), np.float32), distillation=choice)
