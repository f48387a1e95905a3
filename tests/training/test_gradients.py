"""Every operator in a small graph: the legalised gradient against finite differences."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxprune import runtime
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.client import Worker
from onnxprune.training.legalise import TrainingGraph, legalise
from onnxprune.training.loss import Objective, Term, append_loss, loss_value
from tests.training.gradient_layers import LAYERS
from tests.training.gradient_operators import OPERATORS

WEIGHT = re.compile(r"[wb]\d*$")
CASES = [*LAYERS, *OPERATORS]


def build(opset: int, inputs: str, body: str) -> onnx.ModelProto:
    """A model whose inputs named w*, b*, mean, var are initializers of random values."""
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => (float y) {{ {body} }}'
    model = parser.parse_model(text)
    rng = np.random.default_rng(7)
    data = []
    for info in model.graph.input:
        if WEIGHT.match(info.name) or info.name in ("mean", "var"):
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            value = rng.standard_normal(shape).astype(np.float32) * 0.5
            if info.name == "var":
                value = np.abs(value) + 0.5
            model.graph.initializer.append(numpy_helper.from_array(value, info.name))
        else:
            data.append(info)
    del model.graph.input[:]
    model.graph.input.extend(data)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def feeds_for(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Two random samples."""
    rng = np.random.default_rng(3)
    feeds: dict[str, NDArray[Any]] = {}
    for info in model.graph.input:
        shape = [d.dim_value or 2 for d in info.type.tensor_type.shape.dim]
        if info.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            feeds[info.name] = rng.integers(0, 5, shape)
        else:
            feeds[info.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def check_gradient(model: onnx.ModelProto, worker: Worker) -> TrainingGraph:
    """Compare the loss with inference, and the gradient with finite differences."""
    feeds = feeds_for(model)
    outputs = runtime.run(runtime.session(model, threads=1), feeds)
    graph = legalise(model)
    term = Term("t", "y", "square", "none", 0, 1.0, 1.0, True, scale=1.0)
    objective = Objective((term,))
    rng = np.random.default_rng(5)
    target = outputs["y"] + rng.standard_normal(outputs["y"].shape).astype(np.float32)
    batch = {**feeds, **objective.feeds(None, {"y": target})}
    append_loss(graph.draft, objective)
    trainer = WorkerTrainer(worker, graph, optimizer={"name": "sgd"})
    trainer.check(batch, loss_value(objective, outputs, batch), seed=1)
    return graph


@pytest.mark.parametrize(("name", "opset", "inputs", "body"), CASES, ids=[c[0] for c in CASES])
def test_gradient_agrees_with_differences(
    name: str, opset: int, inputs: str, body: str, worker: Worker
) -> None:
    model = build(opset, inputs, body)
    graph = check_gradient(model, worker)
    weights = {t.name for t in model.graph.initializer if WEIGHT.match(t.name)}
    assert set(graph.parameters) == weights
    assert not graph.frozen


@pytest.mark.parametrize("shared", ["norms", "concat"])
def test_untrained_tensors_may_be_shared(shared: str, worker: Worker) -> None:
    """The builder would give two gradients one name."""
    inputs = "float[N,4] x, float[4,4] w, float[4] w1, float[4] b1"
    norm = "LayerNormalization(h, w1, b1) j = MatMul(i, w) y = LayerNormalization(j, w1, b1)"
    body = f"h = MatMul(x, w) i = {norm}"
    if shared == "concat":
        body = "t = Tanh(x) h = MatMul(x, w) y = Concat<axis=1>(t, t, h, t)"
    model = build(17, inputs, body)
    for tensor, value in zip(model.graph.initializer[1:], (1, 0), strict=True):
        array = np.full(4, value, np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    assert set(check_gradient(model, worker).parameters) == {"w"}
