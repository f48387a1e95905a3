"""Fine-tuning with a loss that the user gives as an ONNX model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxprune import runtime
from onnxprune.errors import TrainingError
from onnxprune.passes.finetune import Finetune
from tests.passes.test_finetune import HELD_OUT, QUICK, STUDENT, TRAIN, UNLABELLED, X, weights

CROSS_ENTROPY = """
    small = Constant<value_float = 1e-9>() guarded = Add(y, small) logs = Log(guarded)
    loss = NegativeLogLikelihoodLoss(logs, labels)"""
DISTANCE = """
    gap = Sub(y, teacher_y) size = Abs(gap) weighed = Mul(size, factor)
    loss = ReduceMean<keepdims=0>(weighed)"""
TUNE = dataclasses.replace(QUICK, lr=1e-2)


def loss(inputs: str, body: str, opset: int = 13) -> onnx.ModelProto:
    head = f'<ir_version: 8, opset_import: ["": {opset}]>'
    model = parser.parse_model(f"{head} loss ({inputs}) => (float loss) {{ {body} }}")
    factor = np.linspace(1, 2, 10, dtype=np.float32)
    if "factor" in body:
        model.graph.initializer.append(onnx.numpy_helper.from_array(factor, "factor"))
    return model


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("backend", ["worker", "builtin"])
def test_cross_entropy_of_labels(opset: int, backend: Any) -> None:
    own = loss("float[N,10] y, int64[N] labels", CROSS_ENTROPY, opset)
    tune = dataclasses.replace(TUNE, loss=own, backend=backend)
    result = tune(STUDENT, data=TRAIN, val=HELD_OUT)
    assert result.history[-1].metrics["accuracy"] > 0.85
    assert not result.notes


def test_it_is_the_loss_of_the_given_name(tmp_path: Path) -> None:
    """Cross-entropy written by hand trains as the built-in one does; a file does as a model."""
    own = loss("float[N,10] y, int64[N] labels", CROSS_ENTROPY)
    onnx.save(own, tmp_path / "loss.onnx")
    given = dataclasses.replace(TUNE, loss=tmp_path / "loss.onnx")(STUDENT, data=TRAIN)
    built_in = TUNE(STUDENT, data=TRAIN)
    losses = [[e.loss for e in r.history[1:]] for r in (given, built_in)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_distance_from_the_teacher_trains_no_constant_of_the_loss() -> None:
    teacher = TUNE(STUDENT, data=TRAIN).model
    own = loss("float[N,10] y, float[N,10] teacher_y", DISTANCE)
    result = dataclasses.replace(TUNE, loss=own)(STUDENT, teacher=teacher, data=UNLABELLED)
    assert result.trained == ("b1", "b2", "w1", "w2")
    assert weights(result.model).keys() == weights(STUDENT).keys()
    answers = [
        runtime.run(runtime.session(m, threads=1), {"x": X[:200]})["y"].argmax(axis=1)
        for m in (teacher, result.model)
    ]
    assert (answers[0] == answers[1]).mean() > 0.8


@pytest.mark.parametrize(
    ("inputs", "body", "message"),
    [
        ("float[N,10] z", "loss = ReduceMean<keepdims=0>(z)", "the loss reads 'z', which is no"),
        ("float[N,10] y, float[N,10] teacher_y", DISTANCE, r"reads 'teacher_y'"),
        ("float[N,10] y, int64[N] labels", CROSS_ENTROPY, "reads labels, and the data has none"),
    ],
)
def test_what_the_loss_cannot_have_is_told(inputs: str, body: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Finetune(loss=loss(inputs, body), threads=1)(STUDENT, data=UNLABELLED)
