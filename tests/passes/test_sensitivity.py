"""The change of the outputs, layer by layer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune.analysis import analyse
from onnxprune.errors import InvalidRecipeError
from onnxprune.passes.sensitivity import Sensitivity
from tests.graphs import mlp


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(64, 6)).astype(np.float32)} for _ in range(2)]


def silent(model: onnx.ModelProto, name: str, *part: slice) -> None:
    """This part of a weight is nearly zero."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array[part] *= 1e-6
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def test_a_layer_with_channels_to_spare_comes_last() -> None:
    model = mlp(6, 8, 8, 3)
    silent(model, "w1", slice(0, 4))
    silent(model, "b1", slice(0, 4))
    silent(model, "w2", slice(None), slice(0, 4))
    analysis = analyse(model)
    before = model.SerializeToString()
    rows = Sensitivity(threads=1)(analysis.coupling, analysis.groups, feeds())
    assert [(r.units, r.removed) for r in rows] == [(8, 4), (8, 4)]
    first, last = rows
    assert first.group == analysis.groups[0].name
    assert first.change is not None and first.change > 0.05
    assert last.change is not None and last.change < 1e-6
    assert model.SerializeToString() == before


def test_scores_say_what_goes() -> None:
    analysis = analyse(mlp(6, 8, 8, 3))
    least = Sensitivity(threads=1)(analysis.coupling, analysis.groups, feeds())
    scores = np.random.default_rng(1).random(analysis.coupling.solution.units)
    other = Sensitivity(threads=1)(analysis.coupling, analysis.groups, feeds(), scores)
    assert {r.group: r.change for r in least} != {r.group: r.change for r in other}


def test_what_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr("onnxprune.passes.sensitivity.apply_keep", refuse)
    analysis = analyse(mlp(6, 8, 3))
    (row,) = Sensitivity(threads=1)(analysis.coupling, analysis.groups, feeds())
    assert row.change is None


def test_a_share_must_leave_something() -> None:
    with pytest.raises(InvalidRecipeError, match=r"share 1 must be in \(0, 1\)"):
        Sensitivity(share=1)
