"""Moving averages, parameter groups, and what fine-tuning tells the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune.errors import InvalidRecipeError
from onnxprune.passes.finetune import Epoch, Finetune, FinetuneResult, ParameterGroup
from tests.passes.test_finetune import HELD_OUT, QUICK, STUDENT, TRAIN, Recorder, weights

MODELS = Path(__file__).resolve().parent.parent.parent / "models"


def test_the_average_is_what_is_kept_and_resumed(tmp_path: Path) -> None:
    tune = dataclasses.replace(QUICK, ema=0.9, checkpoint=tmp_path / "run.npz", resume=True)
    whole = dataclasses.replace(tune, checkpoint=None, resume=False)(STUDENT, data=TRAIN)
    last = dataclasses.replace(QUICK)(STUDENT, data=TRAIN)
    with pytest.raises(KeyboardInterrupt):
        tune(STUDENT, data=TRAIN, progress=Recorder(stop_at=40))
    resumed = tune(STUDENT, data=TRAIN)
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()
    apart = np.abs(weights(whole.model)["w1"] - weights(last.model)["w1"]).max()
    assert 0 < apart < 0.1


def test_a_group_may_stand_still() -> None:
    tune = dataclasses.replace(QUICK, epochs=1, groups=(ParameterGroup("w1", rate=0),))
    tuned = weights(tune(STUDENT, data=TRAIN).model)
    start = weights(STUDENT)
    np.testing.assert_array_equal(tuned["w1"], start["w1"])
    assert not np.array_equal(tuned["w2"], start["w2"])


def test_a_group_that_matches_nothing_is_told() -> None:
    tune = dataclasses.replace(QUICK, groups=(ParameterGroup("conv*"),))
    with pytest.raises(InvalidRecipeError, match=r"group 'conv\*' matches none of"):
        tune(STUDENT, data=TRAIN)


def test_notes_and_time_reach_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: Finetune, student: onnx.ModelProto, **_: Any) -> FinetuneResult:
        history = (Epoch(0, None, 0.0, 50.0), Epoch(1, 0.5, 0.1, 2.0), Epoch(2, 0.4, 0.0, 4.0))
        return FinetuneResult(student, history, 2, (), {}, 10, 60.0, ("the loss is too rough",))

    monkeypatch.setattr(Finetune, "__call__", call)
    model, data = MODELS / "digits_mlp.onnx", MODELS / "digits_test.npz"
    report = onnxprune.prune(model, macs=0.5, data=data, finetune=2, threads=1).report
    assert "fine-tuning: the loss is too rough" in report.notes
    assert report.rebuild[-1]["seconds_per_epoch"] == 3.0


@pytest.mark.parametrize(("lr", "kept"), [(1e-9, 1), (50.0, 0)])
def test_the_weights_before_are_kept_only_if_they_are_clearly_better(lr: float, kept: int) -> None:
    """Training that changes nothing counts as trained; training that ruins the model does not."""
    start = dataclasses.replace(QUICK, epochs=8)(STUDENT, data=TRAIN).model
    result = dataclasses.replace(QUICK, epochs=1, lr=lr)(start, data=TRAIN, val=HELD_OUT)
    assert result.best_epoch == kept
