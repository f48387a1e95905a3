"""Importance from gradients: what the square of the change of the loss says about each channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxprune import prune
from onnxprune.analysis import analyse
from onnxprune.errors import InvalidRecipeError
from onnxprune.passes.taylor import taylor
from tests.graphs import build, outputs

Array = NDArray[Any]
MODELS = Path(__file__).resolve().parent.parent / "models"
BODY = "h = MatMul(x, w0)  r = Relu(h)  {}"
ENDS = {
    "scores": "y = MatMul(r, w1)",
    "softmax": "z = MatMul(r, w1)  y = Softmax(z)",
    "sigmoid": "z = MatMul(r, w1)  y = Sigmoid(z)",
}
ROWS = np.random.default_rng(1).normal(size=(2048, 5)).astype(np.float32)


def perceptron(end: str) -> onnx.ModelProto:
    return build("(float[N,5] x) => (float[N,4] y)", BODY.format(ENDS[end]), "w0:5,6 w1:6,4")


def importance(model: onnx.ModelProto, x: Array) -> Array:
    """Of the channels of h."""
    analysis = analyse(model)
    batches = [{"x": x[i : i + 256]} for i in range(0, len(x), 256)]
    scores = taylor(analysis.coupling, analysis.groups, batches, threads=1)
    assert np.isinf(scores[0])
    block = next(b for b in analysis.coupling.layouts["h"] if b.axes == (1,))
    return np.asarray(scores[analysis.coupling.solution.unit[block.labels]])


def fisher(model: onnx.ModelProto, x: Array, end: str) -> Array:
    """E[(d log p(y) / d gate)^2] of each channel, written out: x of one layer, then the outputs."""
    w0, w1 = (numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer)
    hidden = np.maximum(x @ w0, 0)  # [N, 6]
    through = hidden[:, :, None] * w1  # [N, 6, 4]: what each channel adds to each output
    y = outputs(model, {"x": x})[0].astype(np.float64)
    if end == "sigmoid":
        return np.asarray((through**2 * (y * (1 - y))[:, None]).sum(2).mean(0))
    p = y if end == "softmax" else np.exp(y) / np.exp(y).sum(1, keepdims=True)
    mean = (through * p[:, None]).sum(2)
    return np.asarray(((through**2 * p[:, None]).sum(2) - mean**2).mean(0))


@pytest.mark.parametrize("end", list(ENDS))
def test_it_is_the_fisher_information(end: str) -> None:
    """The mean over 16 samples of independent targets has a sixteenth of one sample's square."""
    model = perceptron(end)
    got, wanted = importance(model, ROWS), fisher(model, ROWS, end)
    np.testing.assert_allclose(got * 16, wanted, rtol=0.6)
    assert np.corrcoef(got, wanted)[0, 1] > 0.9


def test_what_the_outputs_do_not_follow_costs_nothing() -> None:
    model = perceptron("scores")
    reader = model.graph.initializer[1]
    weight = numpy_helper.to_array(reader).copy()
    weight[[1, 4]] = 0
    weight[2] *= 10
    reader.CopyFrom(numpy_helper.from_array(weight, "w1"))
    scores = importance(model, ROWS[:256])
    assert set(np.argsort(scores)[:2]) == {1, 4}
    assert scores[[1, 4]].max() == 0
    assert scores.argmax() == 2


def test_numbers_are_compared_with_noise_of_their_own_spread() -> None:
    """An output that is no class score, here a sequence, has a gradient too."""
    model = build(
        "(float[N,3,5] x) => (float[N,3,4] y)", BODY.format(ENDS["scores"]), "w0:5,6 w1:6,4"
    )
    scores = importance(model, ROWS[:510].reshape(-1, 3, 5))
    assert (scores > 0).all()


def test_channels_of_one_residual_stream_and_of_a_convolution() -> None:
    model = build(
        "(float[N,3,6,6] x) => (float[N,5] y)",
        """a = Conv(x, w0)  b = Relu(a)  c = Conv(b, w1)  h = Add(a, c)  g = GlobalAveragePool(h)
        f = Flatten(g)  y = MatMul(f, w2)""",
        "w0:8,3,1,1 w1:8,8,1,1 w2:8,5",
    )
    x = np.random.default_rng(0).normal(size=(256, 3, 6, 6)).astype(np.float32)
    assert (importance(model, x) > 0).all()


def test_pruning_by_it() -> None:
    options: dict[str, Any] = {"macs": 0.5, "repair": "none", "threads": 1}
    data = MODELS / "digits_test.npz"
    source = MODELS / "digits_mlp.onnx"
    best = prune(source, criterion="taylor", data=data, **options).report
    chance = prune(source, criterion="random", data=data, **options).report
    assert best.options["criterion"] == "taylor"
    assert not best.notes
    assert best.after.metrics["accuracy"] > chance.after.metrics["accuracy"] + 0.1


def test_without_data_it_says_so() -> None:
    with pytest.raises(InvalidRecipeError, match="--criterion taylor measures on inputs: add"):
        prune(MODELS / "digits_mlp.onnx", macs=0.5, criterion="taylor", repair="none", threads=1)


def test_a_model_without_gradients_is_ranked_by_its_weights() -> None:
    model = build(
        "(float[N,5] x) => (float[N,4] y)",
        "h = MatMul(x, w0)  d = Det(s)  k = Mul(h, d)  y = MatMul(k, w1)",
        "w0:5,6 w1:6,4 s:2,2",
    )
    first = prune(model, macs=0.5, criterion="taylor", data={"x": ROWS[:64]}, threads=1)
    assert first.plan.initializers
