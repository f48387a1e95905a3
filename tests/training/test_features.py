"""Inner tensors as targets: chosen by name, compared by value or by likeness."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune import runtime
from onnxprune.errors import TrainingError
from onnxprune.training.features import chosen, last_features, likeness, with_outputs
from tests.passes.test_finetune import QUICK, STUDENT, TRAIN, UNLABELLED, X

TUNE = dataclasses.replace(QUICK, epochs=2, features="last", lr=2e-3)


@pytest.fixture(scope="module")
def teacher() -> onnx.ModelProto:
    return dataclasses.replace(QUICK, epochs=6)(STUDENT, data=TRAIN).model


def hidden(model: onnx.ModelProto) -> np.ndarray:
    session = runtime.session(with_outputs(model, ["r"]), threads=1)
    return runtime.run(session, {"x": X[:200]})["r"]


def test_likeness_is_of_unit_rows_and_ignores_scale(rng: np.random.Generator) -> None:
    features = rng.standard_normal((6, 2, 5))
    rows = likeness(features)
    np.testing.assert_allclose(np.square(rows).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(likeness(3 * features), rows, rtol=1e-5)


def test_the_last_layers_input_is_found(teacher: onnx.ModelProto) -> None:
    assert last_features(STUDENT) == "r"
    assert chosen("last", STUDENT, teacher) == ["r"]
    assert chosen("none", STUDENT, teacher) == []
    with pytest.raises(TrainingError, match="the student has no inner tensor named 'q'"):
        chosen(("q",), STUDENT, teacher)


def test_equal_shapes_are_drawn_together(teacher: onnx.ModelProto) -> None:
    ends = {}
    for weight in (0.0, 20.0):
        tune = dataclasses.replace(TUNE, feature_weight=weight)
        ends[weight] = hidden(tune(STUDENT, teacher=teacher, data=UNLABELLED).model)
    target = hidden(teacher)
    far, near = (float(np.square(ends[w] - target).mean()) for w in (0.0, 20.0))
    assert near < 0.7 * far


def test_a_narrower_student_learns_the_likeness(teacher: onnx.ModelProto) -> None:
    small = onnxprune.prune(teacher, channels=0.4, threads=1).model
    assert hidden(small).shape[1] < hidden(teacher).shape[1]
    ends = {}
    for weight in (0.0, 50.0):
        tune = dataclasses.replace(TUNE, feature_weight=weight)
        result = tune(small, teacher=teacher, data=UNLABELLED)
        assert not result.notes
        assert [o.name for o in result.model.graph.output] == ["y"]
        ends[weight] = likeness(hidden(result.model))
    target = likeness(hidden(teacher))
    far, near = (float(np.square(ends[w] - target).sum()) for w in (0.0, 50.0))
    assert near < 0.9 * far


def test_images_may_be_augmented_by_name(teacher: onnx.ModelProto) -> None:
    tune = dataclasses.replace(TUNE, augment=("mixup",), epochs=1)
    history = tune(STUDENT, teacher=teacher, data=TRAIN).history
    assert np.isfinite(history[-1].loss or np.nan)
