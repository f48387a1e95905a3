"""Pruning in steps: one plan of the original, whatever was repaired in between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune import Finetune, apply, cli, gradual, prune, runtime
from onnxprune.data import open_data
from onnxprune.errors import InvalidRecipeError
from onnxprune.gradual import differing
from onnxprune.passes.finetune import Epoch, FinetuneResult
from onnxprune.plan import Plan, Slice
from onnxprune.recipe import Recipe, run_recipe
from tests.graphs import build

MODELS = Path(__file__).resolve().parent.parent / "models"
TEST = MODELS / "digits_test.npz"


@pytest.fixture(autouse=True)
def _no_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "latencies_ms", lambda runs, **_: [1.0] * len(runs))


def arrays(model: onnx.ModelProto) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


RESIDUAL = build(
    "(float[N,8] x) => (float[N,4] y)",
    """h = MatMul(x, w0)  r = Relu(h)  a = MatMul(r, w1)  b = Relu(a)  c = MatMul(b, w2)
    s = Add(r, c)  t = Add(s, b3)  y = MatMul(t, w3)""",
    "w0:8,12 w1:12,20 w2:20,12 b3:12 w3:12,4",
)
CONVOLUTIONS = build(
    "(float[N,3,8,8] x) => (float[N,5] y)",
    """a = Conv<pads=[1,1,1,1]>(x, w0, b0)  b = Relu(a)  c = Conv<group=12,pads=[1,1,1,1]>(b, w1)
    d = Conv(c, w2)  e = Concat<axis=1>(d, b)  f = GlobalAveragePool(e)  g = Flatten(f)
    y = Gemm(g, w3, b3)""",
    "w0:12,3,3,3 b0:12 w1:12,1,3,3 w2:10,12,1,1 w3:22,5 b3:5",
)
HEADS = build(
    "(float[N,6,16] x) => (float[N,6,16] y)",
    """q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    q1 = Reshape(q, s)  k1 = Reshape(k, s)  v1 = Reshape(v, s)
    q2 = Transpose<perm=[0,2,1,3]>(q1)  k2 = Transpose<perm=[0,2,3,1]>(k1)
    v2 = Transpose<perm=[0,2,1,3]>(v1)  a = MatMul(q2, k2)  p = Softmax(a)  o = MatMul(p, v2)
    o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, t)  y = MatMul(o2, wo)""",
    "wq:16,32 wk:16,32 wv:16,32 wo:32,16 s=0,6,8,4 t=0,6,32",
)


@pytest.mark.parametrize("model", [RESIDUAL, CONVOLUTIONS, HEADS], ids=["sum", "conv", "heads"])
@pytest.mark.parametrize("budget", [{"params": 0.3}, {"channels": 0.4}, {"macs": 0.5}])
def test_without_repair_the_plan_gives_the_model(
    model: onnx.ModelProto, budget: Mapping[str, Any]
) -> None:
    """The weights are the original's then, so what was cut in steps is what the plan cuts."""
    options: dict[str, Any] = {**budget, "repair": "none", "criterion": "l2", "threads": 1}
    result = prune(model, steps=3, min_keep=0.2, **options)
    assert not [note for note in result.report.notes if "in one step" in note]
    assert result.report.checks[0].passed
    replayed = arrays(apply(model, result.plan))
    for name, value in arrays(result.model).items():
        np.testing.assert_array_equal(value, replayed[name])
    share = result.report.budget["reached"]
    assert share <= next(iter(budget.values())) + 0.05
    group = result.plan.groups[0]
    assert group.units - len(group.removed) >= 0.2 * group.units


@pytest.mark.parametrize("model", [RESIDUAL, CONVOLUTIONS, HEADS], ids=["sum", "conv", "heads"])
def test_a_repaired_model_has_the_shapes_of_its_plan(model: onnx.ModelProto) -> None:
    shape = [
        2 if d.dim_param else d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim
    ]
    x = np.random.default_rng(0).normal(size=(256, *shape[1:])).astype(np.float32)
    result = prune(model, params=0.3, data={"x": x}, steps=3, threads=1)
    assert not [note for note in result.report.notes if "in one step" in note]
    replayed, got = arrays(apply(model, result.plan)), arrays(result.model)
    assert {n: v.shape for n, v in replayed.items()}.items() <= {
        n: v.shape for n, v in got.items()
    }.items()
    repaired = any(step["step"] == "reconstruct" for step in result.report.rebuild)
    assert repaired == any((got[n] != v).any() for n, v in replayed.items())


def test_the_report_tells_the_steps() -> None:
    source = MODELS / "digits_mlp.onnx"
    once, slowly = (
        prune(source, macs=0.3, data=TEST, criterion="wanda", steps=steps, threads=1)
        for steps in (1, 3)
    )
    parts = [step["part"] for step in slowly.report.rebuild]
    assert parts == sorted(parts)
    assert (parts[0], parts[-1]) == ("1 of 3", "3 of 3")
    left = [step["macs_left"] for step in slowly.report.rebuild if step["step"] == "pruned"]
    assert left[0] == pytest.approx(0.3 ** (1 / 3), abs=0.05)
    assert left[1] == pytest.approx(0.3 ** (2 / 3), abs=0.05)
    assert left[2] <= 0.3
    assert ["accuracy" in step for step in slowly.report.rebuild[::2]] == [False, False, True]
    accuracy = [r.report.after.metrics["accuracy"] for r in (once, slowly)]
    assert accuracy[1] > accuracy[0] - 0.05
    assert slowly.report.options["steps"] == 3
    assert once.plan.groups != slowly.plan.groups  # ranked on what was repaired


class Trained:
    """Stands in for training: how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(Finetune, "__call__", lambda own, model, **_: self.train(model))

    def train(self, model: onnx.ModelProto) -> FinetuneResult:
        self.count += 1
        return FinetuneResult(model, (Epoch(0, None, 0.0, 0.0),), 0, (), {}, 1, 1.0)


@pytest.mark.parametrize(("every_step", "count"), [(False, 1), (True, 3)])
def test_training_follows_the_last_step_or_each(
    every_step: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(monkeypatch)
    tune = Finetune(every_step=every_step)
    options: dict[str, Any] = {"macs": 0.5, "data": TEST, "repair": "bias", "threads": 1}
    prune(MODELS / "digits_mlp.onnx", steps=3, finetune=tune, **options)
    assert trained.count == count


def test_steps_that_cannot_go_on_end_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"macs": 0.5, "data": TEST, "threads": 1}
    once = prune(MODELS / "digits_mlp.onnx", **options)
    monkeypatch.setattr(gradual, "differing", lambda *_: "w")
    slowly = prune(MODELS / "digits_mlp.onnx", steps=2, **options)
    note = "pruned in one step, not in 2: the repaired model's w was cut in another way"
    assert note in slowly.report.notes
    assert slowly.model == once.model
    assert slowly.plan == once.plan


def test_a_group_that_cannot_be_found_again_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradual, "_pairs", lambda *_: [])
    options: dict[str, Any] = {"params": 0.3, "repair": "none", "criterion": "l2", "threads": 1}
    result = prune(RESIDUAL, steps=2, **options)
    assert any(note.startswith("pruned in one step, not in 2: ") for note in result.report.notes)
    assert result.report.budget["reached"] <= 0.3


def cut(source: str, length: int, *kept: int) -> Slice:
    return Slice(source, (length, 2), (len(kept), 2), {"0": kept})


@pytest.mark.parametrize(
    ("before", "step", "whole", "wrong"),
    [
        ({"w": cut("w", 5, 0, 2, 4)}, {"w": cut("w", 3, 0, 2)}, {"w": cut("w", 5, 0, 4)}, None),
        ({"w": cut("w", 5, 0, 2, 4)}, {"w": cut("w", 3, 0, 1)}, {"w": cut("w", 5, 0, 4)}, "w"),
        ({"w": cut("w", 5, 0, 4)}, {}, {"w": cut("w", 5, 0, 4)}, None),
        ({}, {"w": cut("w", 5, 0, 4)}, {"w": cut("w", 5, 0, 4)}, None),
        ({}, {}, {"w": cut("w", 5, 0, 4)}, "w"),
        ({"w": cut("w", 5, 0, 4)}, {}, {}, "w"),
        ({}, {"v": cut("w", 5, 0, 4)}, {"v": cut("u", 5, 0, 4)}, "v"),
        ({"v": cut("w", 5, 0, 4)}, {}, {"v": cut("u", 5, 0, 4)}, "v"),
    ],
)
def test_two_cuts_in_turn_against_one(
    before: dict[str, Slice], step: dict[str, Slice], whole: dict[str, Slice], wrong: str | None
) -> None:
    assert differing(before, step, whole) == wrong


def test_the_promise_holds_with_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    result = prune(
        MODELS / "digits_mlp.onnx", max_drop=2, criterion="l2", data=TEST, steps=2, threads=1
    )
    metrics = [cost.metrics["accuracy"] for cost in (result.report.before, result.report.after)]
    assert metrics[1] >= metrics[0] - 0.02 - 1e-9
    assert result.report.rebuild[-1]["part"] == "2 of 2"
    assert len(result.report.attempts) > 1


def test_recipes_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"data: {TEST}\nsteps: [prune: {{macs: 0.5, steps: 2}}]"
    result = run_recipe(MODELS / "digits_mlp.onnx", Recipe.parse(text))
    plan = Plan.from_json(result.plan["steps"][0]["record"]["plan"])
    out = tmp_path / "out.onnx"
    command = f"prune {MODELS / 'digits_mlp.onnx'} {out} --macs 0.5 --steps 2 --data {TEST}"
    assert cli.main([*command.split(), "--threads", "1", "-q"]) == 0
    assert "part 1 of 2" in capsys.readouterr().out
    assert {n: v.shape for n, v in arrays(onnx.load(out)).items()} == {
        n: v.shape for n, v in arrays(result.model).items()
    }
    assert plan.initializers
    assert open_data(TEST, onnx.load(out))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "--steps 0 is out of range: it must be at least 1"),
        (
            {"steps": 2, "granularity": "vocab", "vocab_keep": [0, 1]},
            "--steps does not go with --granularity vocab: drop one of them",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRecipeError, match=words):
        prune(MODELS / "digits_mlp.onnx", macs=0.5, **options)
