"""Every model of onnx's own backend suites survives load, save and the graph editor.

About 2,000 models: one operator each, control flow, sequences, all types, old and new opsets.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.test_case import TestCase as Case
from onnx.backend.test.loader import load_model_tests

from onnxprune import io, runtime
from onnxprune.errors import InvalidModelError, OnnxPruneError
from onnxprune.surgeon import export_graph, import_graph

SUITES = ("node", "simple", "pytorch-converted", "pytorch-operator")


def read(case: Case) -> tuple[onnx.ModelProto, list[Any]]:
    """The model of a case and its first set of inputs."""
    if case.model_dir is None:
        inputs = case.data_sets[0][0] if case.data_sets else []
        arrays = [numpy_helper.to_array(v) if hasattr(v, "dims") else v for v in inputs]
        return case.model, arrays
    model = onnx.load(Path(case.model_dir) / "model.onnx")
    files = sorted(Path(case.model_dir).glob("test_data_set_0/input_*.pb"), key=os.fspath)
    return model, [value_of(model, file) for file in files]


def value_of(model: onnx.ModelProto, file: Path) -> Any:
    """The value in input_N.pb, for input N of the model."""
    value = model.graph.input[int(file.stem.removeprefix("input_"))]
    if value.type.WhichOneof("value") == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(file.read_bytes()))
    return numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))


@pytest.fixture(scope="module", params=SUITES)
def cases(request: pytest.FixtureRequest) -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suites overflow on purpose
        return list(load_model_tests(kind=request.param))


def run(model: onnx.ModelProto, inputs: list[Any]) -> dict[str, Any] | None:
    """What ONNX Runtime makes of the model; None where it cannot run it."""
    named = zip([value.name for value in model.graph.input], inputs, strict=False)
    feeds = {name: value for name, value in named if value is not None}
    try:
        return runtime.run(runtime.session(model, threads=1), feeds)
    except OnnxPruneError:
        return None


def bits(value: Any) -> Any:
    """Comparable bit by bit: not-a-number equals itself, 0 differs from -0."""
    if isinstance(value, list):
        return [bits(item) for item in value]
    if value is None:
        return None
    array = np.asarray(value)
    content = array.tolist() if array.dtype == object else array.tobytes()
    return array.dtype, array.shape, content


def test_load_and_save_keep_the_proto(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    refused = []
    for case in cases:
        model, _ = read(case)
        data = model.SerializeToString()
        io.save(model, tmp_path / "m.onnx")
        assert (tmp_path / "m.onnx").read_bytes() == data
        try:
            assert io.load(tmp_path / "m.onnx") == model, case.name
        except InvalidModelError as error:
            refused.append(str(error))
    assert all("opset" in message for message in refused), refused


def test_the_editor_keeps_the_model_and_its_results(cases: list[Case]) -> None:
    count: Counter[str] = Counter()
    for case in cases:
        model, inputs = read(case)
        data = model.SerializeToString()
        exported = export_graph(import_graph(model))
        assert model.SerializeToString() == data, case.name
        assert exported == model, case.name
        before = run(model, inputs)
        if before is not None:
            onnx.checker.check_model(exported)
            after = run(exported, inputs) or {}
            assert bits(list(before.values())) == bits(list(after.values())), case.name
        count["run" if before is not None else "not run"] += 1
    assert count["run"] > 0.6 * sum(count.values()), count
