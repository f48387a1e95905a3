"""Layers and channels under one budget: measured, recorded, replayed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onnxprune import runtime
from onnxprune.analysis import analyse
from onnxprune.data import open_data
from onnxprune.errors import InvalidRecipeError
from onnxprune.joint import PruneJointly
from onnxprune.recipe import Recipe, digest, replay, run_recipe
from tests.graphs import mlp


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runtime, "latencies_ms", lambda runs, **_: [1.0] * len(runs))
    yield


def macs(model: Any) -> float:
    analysis = analyse(model)
    return analysis.cost.macs(analysis.everything)


def test_the_best_number_of_layers_is_measured() -> None:
    model = mlp(8, 32, 32, 32, 4)
    data = open_data([runtime.random_feeds(model, batch=512)], model)
    result = PruneJointly(macs=0.5, threads=1, samples=512)(model, data)
    assert macs(result.model) <= 0.5 * macs(model) * 1.001
    errors = {t.layers: t.error for t in result.trials if t.error is not None}
    assert len(errors) >= 2
    assert errors[len(result.dropped)] == min(errors.values())


def test_a_plan_has_both_and_replays(root: Path, tmp_path: Path) -> None:
    models = root / "models"
    text = f"data: {models / 'digits_train.npz'}\n"
    text += "steps: [{prune-jointly: {macs: 0.5, most_layers: 1, samples: 256}}]"
    result = run_recipe(models / "digits_mlp.onnx", Recipe.parse(text))
    record = result.plan["steps"][0]["record"]
    assert [t["layers"] for t in record["trials"]] == [0, 1]
    assert macs(result.model) <= 0.5 * macs(result.original) * 1.001
    again = replay(models / "digits_mlp.onnx", result.plan)
    assert digest(again) == digest(result.model)


def test_options() -> None:
    with pytest.raises(InvalidRecipeError, match="give one of macs, params"):
        PruneJointly()
    with pytest.raises(InvalidRecipeError, match="most_layers 0: must be at least 1"):
        PruneJointly(macs=0.5, most_layers=0)
