"""Users' losses on several outputs and on sequences, and masks, from end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxprune import Finetune, prune, runtime
from onnxprune.data import open_data
from onnxprune.recipe import Recipe, run_recipe
from tests.graphs import build, outputs

Array = NDArray[Any]
MODELS = Path(__file__).resolve().parent.parent.parent / "models"
BACKENDS = ("worker", "builtin")

DETECTOR = build(
    "(float[N,3,8,8] x) => (float[N,4,16] boxes, float[N,3,16] scores)",
    """a = Conv<pads=[1,1,1,1],strides=[2,2]>(x, w0, b0)  f = Relu(a)
    p = Conv(f, w1, b1)  boxes = Reshape(p, s4)  q = Conv(f, w2, b2)  scores = Reshape(q, s3)""",
    "w0:12,3,3,3 b0:12 w1:4,12,1,1 b1:4 w2:3,12,1,1 b2:3 s4=0,4,16 s3=0,3,16",
)
DETECTOR_LOSS = """<ir_version: 8, opset_import: ["": 13]>
loss (float[N,4,16] boxes, float[N,4,16] teacher_boxes, float[N,3,16] scores,
      float[N,3,16] teacher_scores) => (float loss) {
    gap = Sub(boxes, teacher_boxes)  size = Abs(gap)  near = ReduceMean<keepdims=0>(size)
    logs = LogSoftmax<axis=1>(scores)  wanted = Softmax<axis=1>(teacher_scores)
    each = Mul(wanted, logs)  sums = ReduceSum<keepdims=0>(each, one)
    mean = ReduceMean<keepdims=0>(sums)  loss = Sub(near, mean) }"""
TAGGER = build(
    "(float[N,6,5] x) => (float[N,6,3] tags)",
    """t = Transpose<perm=[1,0,2]>(x)  y, h = LSTM<hidden_size=8>(t, w, r, b)
    q = Squeeze(y, one)  u = Transpose<perm=[1,0,2]>(q)  m = MatMul(u, v)  tags = Add(m, c)""",
    "w:1,32,5 r:1,32,8 b:1,64 v:8,3 c:3 one=1",
)
TAGGER_LOSS = """<ir_version: 8, opset_import: ["": 13]>
loss (float[N,6,3] tags, int64[N,6] labels) => (float loss) {
    logs = LogSoftmax(tags)  last = Transpose<perm=[0,2,1]>(logs)
    loss = NegativeLogLikelihoodLoss(last, labels) }"""


def loss_of(text: str) -> onnx.ModelProto:
    model = parser.parse_model(text)
    if "one)" in text:
        model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    return model


def arrays(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def samples(name: str) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    if name == "detector":
        return {"x": rng.normal(size=(256, 3, 8, 8)).astype(np.float32)}
    x = rng.normal(size=(256, 6, 5)).astype(np.float32)
    return {"x": x, "y": np.cumsum(x, axis=1)[..., :3].argmax(axis=2)}


CASES = {"detector": (DETECTOR, DETECTOR_LOSS, 0.6), "sequence": (TAGGER, TAGGER_LOSS, 0.6)}


@pytest.mark.parametrize("name", list(CASES))
def test_a_users_loss_after_pruning_by_both_backends(name: str, tmp_path: Path) -> None:
    model, text, share = CASES[name]
    onnx.save(loss_of(text), tmp_path / "loss.onnx")
    data, found = samples(name), []
    for backend in BACKENDS:
        tune = Finetune(
            epochs=4, batch_size=32, lr=0.02, loss=tmp_path / "loss.onnx", backend=backend,
            threads=1,
        )  # fmt: skip
        result = prune(
            model, params=share, data=data, repair="none", finetune=tune, criterion="l2",
            threads=1,
        )  # fmt: skip
        assert result.report.checks[-1].passed
        found.append(result)
    worker, builtin = (arrays(r.model) for r in found)
    assert worker.keys() == builtin.keys()
    for tensor, value in worker.items():
        gap = np.linalg.norm(value - builtin[tensor])  # kinks of the loss part them a little
        assert gap <= 0.02 * np.linalg.norm(value)
    cut = prune(model, params=share, data=data, repair="none", criterion="l2", threads=1).model
    before, after = (told(name, model, m, data) for m in (cut, found[0].model))
    assert after < 0.8 * before


def told(name: str, original: onnx.ModelProto, model: onnx.ModelProto, data: Any) -> float:
    """How wrong the model is: distance from the original's boxes, or share of wrong tags."""
    got = outputs(model, {"x": data["x"]})
    if name == "detector":
        wanted = outputs(original, {"x": data["x"]})
        return float(np.abs(got[0] - wanted[0]).mean())
    return float((got[0].argmax(axis=2) != data["y"]).mean())


def test_outputs_of_a_detector_may_be_compared_each_in_its_way() -> None:
    tune = Finetune(
        epochs=2, batch_size=32, lr=0.01, distillation={"boxes": "l1", "scores": "kl"}, threads=1
    )
    data = samples("detector")
    student = prune(DETECTOR, params=0.6, repair="none", criterion="l2", threads=1).model
    losses = []
    for backend in BACKENDS:
        run = dataclasses.replace(tune, backend=backend)
        result = run(student, teacher=DETECTOR, data=open_data(data, student))
        losses.append([e.loss for e in result.history[1:]])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert losses[0][1] < losses[0][0]


@pytest.mark.parametrize(("pattern", "share"), [("unstructured", 0.8), ("2:4", 0.5)])
def test_pruned_weights_stay_zero_when_a_recipe_trains(pattern: str, share: float) -> None:
    text = f"""
    data: {MODELS / "digits_train.npz"}
    val: {MODELS / "digits_test.npz"}
    steps:
      - prune-weights: {{sparsity: {share}, pattern: "{pattern}", method: magnitude}}
      - finetune: {{epochs: 2, batch_size: 256}}
    """
    source = MODELS / "digits_mlp.onnx"
    recipe = Recipe.parse(text)
    sparse = arrays(run_recipe(source, Recipe(recipe.steps[:1], recipe.data)).model)
    result = run_recipe(source, recipe)
    tuned = arrays(result.model)
    moved = 0
    for name, value in tuned.items():
        if value.ndim == 2 and (sparse[name] == 0).mean() > 0.2:
            np.testing.assert_array_equal(value[sparse[name] == 0], 0)
            moved += int((value != sparse[name]).sum())
    assert moved
    assert "zeros stay zero in" in result.plan["steps"][1]["record"]["notes"][0]
    assert runtime.session(result.model, threads=1)
