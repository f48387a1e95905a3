"""Options of fine-tuning from words, recipes and Python: what is taken and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxprune
from onnxprune import cli, recipe_steps
from onnxprune.errors import InvalidRecipeError
from onnxprune.passes.finetune import Epoch, Finetune, FinetuneResult, ParameterGroup
from onnxprune.recipe import Recipe, replay, run_recipe
from onnxprune.training.options import parse_settings
from onnxprune.training.schedule import peak_rate
from tests.passes.test_finetune import QUICK, STUDENT, TRAIN, weights

MODELS = Path(__file__).resolve().parent.parent.parent / "models"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr=3e-3", 0.003),
        ("batch-size=32", 32),
        ("batch_size=32", 32),
        ("optimizer=sgd", "sgd"),
        ("features=last", "last"),
        ("augment=flip,shift", "flip,shift"),
        ("augment=[flip, shift]", ("flip", "shift")),
        ("loss=own.onnx", Path("own.onnx")),
        ("masked=true", True),
        ("distillation={a: kl, b: none}", {"a": "kl", "b": "none"}),
        ("groups=[{pattern: '*.bias', rate: 0.1}]", (ParameterGroup("*.bias", 0.1),)),
    ],
)
def test_words_become_options(setting: str, value: Any) -> None:
    name = setting.partition("=")[0].replace("-", "_")
    options = parse_settings([setting, "ema=0.99"], 2)
    assert getattr(options, name) == value
    assert (options.epochs, options.ema) == (2, 0.99)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("lr", "--tune 'lr': give NAME=VALUE, as in lr=0.001"),
        ("=3", "--tune '=3': give NAME=VALUE"),
        ("lr={", "--tune 'lr={': the value is not YAML"),
        ("rate=1", "--tune rate: no such option; choose epochs, optimizer, lr"),
        ("epochs=3", "--tune 'epochs=3': --finetune says how many epochs"),
        ("lr=fast", "--tune lr: input should be a valid number, .* not 'fast'"),
        ("lr=-1", r"--tune lr=-1.0 is out of range"),
        ("optimizer=lion", "--tune optimizer: input should be 'adamw' or 'sgd', not 'lion'"),
        ("augment=flop", "--tune augmentation 'flop' is unknown: choose from flip, shift, mixup"),
        ("groups=[{rate: 1}]", "--tune groups.0: field required"),
        ("distillation={a: k}", "--tune distillation: input should be 'auto', .* not"),
    ],
)
def test_bad_words_are_refused(setting: str, words: str) -> None:
    with pytest.raises(InvalidRecipeError, match=words):
        parse_settings([setting], 1)


def test_settings_need_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prune", str(MODELS / "digits_mlp.onnx"), "out.onnx", "--macs", "0.5"]
    assert cli.main([*command, "--tune", "lr=1"]) == 2
    assert "--tune says how --finetune trains: add --finetune EPOCHS" in capsys.readouterr().err


class Seen:
    """Stands in for training: what it was asked for."""

    def __init__(self) -> None:
        self.options: list[Finetune] = []

    def train(self, options: Finetune, student: onnx.ModelProto) -> FinetuneResult:
        self.options.append(options)
        history = (Epoch(0, None, 0.0, 0.0), Epoch(1, 0.5, 0.0, 1.0))
        return FinetuneResult(student, history, 1, ("w",), {"b": "why"}, 1, 1.0, ("a note",), 0.01)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    monkeypatch.setattr(Finetune, "__call__", lambda self, student, **_: seen.train(self, student))
    return seen


def test_prune_takes_them_from_the_command_line(
    seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out.onnx", MODELS / "digits_test.npz"
    command = f"prune {MODELS / 'digits_mlp.onnx'} {out} --macs 0.5 --data {data} --seed 3 -q"
    command += " --threads 1 --finetune 2 --tune lr=0.02 --tune augment=mixup"
    assert cli.main(command.split()) == 0
    wanted = Finetune(epochs=2, lr=0.02, augment="mixup", seed=3, threads=1)
    assert seen.options == [wanted]
    assert "a note" in capsys.readouterr().out


def test_prune_takes_them_in_python(seen: Seen) -> None:
    data = MODELS / "digits_test.npz"
    options: dict[str, Any] = {"macs": 0.5, "data": data, "threads": 1}
    model = MODELS / "digits_mlp.onnx"
    result = onnxprune.prune(model, finetune=onnxprune.Finetune(epochs=4, lr=0.5), **options)
    assert seen.options == [Finetune(epochs=4, lr=0.5, threads=1)]
    assert result.report.options["finetune"] == 4
    assert result.report.rebuild[-1]["lr"] == 0.01


def test_recipes_have_all_options(seen: Seen, tmp_path: Path) -> None:
    text = f"""
    data: {MODELS / "digits_test.npz"}
    seed: 2
    steps:
      - prune: {{macs: 0.5, repair: none, finetune: {{epochs: 3, batch_size: 16}}}}
      - finetune: {{features: last, augment: [mixup], loss: own.onnx, masked: true}}
    """
    result = run_recipe(MODELS / "digits_mlp.onnx", Recipe.parse(text))
    assert seen.options == [
        Finetune(epochs=3, batch_size=16, seed=2, threads=1),
        Finetune(
            features="last", augment=("mixup",), loss=Path("own.onnx"), masked=True, seed=2,
            threads=1,
        ),
    ]  # fmt: skip
    assert result.plan["steps"][1]["options"]["loss"] == "own.onnx"
    replay(MODELS / "digits_mlp.onnx", result.plan)
    assert seen.options[2:] == seen.options[:2]


def test_a_recipe_says_where_an_option_is_wrong() -> None:
    text = "steps:\n  - finetune:\n      lr: 0.1\n      optimizer: lion"
    with pytest.raises(InvalidRecipeError, match="line 4: finetune: optimizer: input should be"):
        Recipe.parse(text)
    text = "steps:\n  - prune: {macs: 0.5,\n      finetune: {epochs: 0}}"
    with pytest.raises(InvalidRecipeError, match="line 2: prune: epochs=0 is out of range"):
        Recipe.parse(text)


def test_what_no_plan_can_hold_is_told(seen: Seen) -> None:
    step = recipe_steps.FinetuneStep(loss=onnx.ModelProto())
    recipe = Recipe((("finetune", step),), data=str(MODELS / "digits_test.npz"))
    with pytest.raises(InvalidRecipeError, match="a plan cannot hold ModelProto: give the name"):
        run_recipe(MODELS / "digits_mlp.onnx", recipe)


def test_the_command(seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, source = tmp_path / "out.onnx", MODELS / "digits_mlp.onnx"
    command = f"finetune {source} {out} --data {MODELS / 'digits_test.npz'} --epochs 2 -q"
    assert cli.main([*command.split(), "--tune", "alpha=1", "--teacher", str(source)]) == 0
    assert seen.options == [Finetune(epochs=2, alpha=1.0)]
    shown = capsys.readouterr().out
    for words in ("1 (kept)", "accuracy", "peak learning rate 0.01", "b was not trained: why"):
        assert words in shown
    assert onnx.load(out) == onnx.load(source)


def test_the_rate_follows_the_size_of_the_weights() -> None:
    weight = np.array([[3.0, -3.0], [3.0, 0.0]])
    assert peak_rate([weight]) == pytest.approx(0.045)
    assert peak_rate([weight, weight / 9]) == pytest.approx(0.015)
    assert peak_rate([]) == peak_rate([0 * weight]) == 1e-3


def test_the_rate_is_that_of_the_options_or_of_the_weights() -> None:
    tuned = Finetune(batch_size=600, threads=1)(STUDENT, data=TRAIN)
    found = weights(STUDENT)
    assert tuned.lr == pytest.approx(peak_rate([found["w1"], found["w2"]]))
    assert QUICK(STUDENT, data=TRAIN).lr == QUICK.lr
    assert Finetune(optimizer="sgd", batch_size=600, threads=1)(STUDENT, data=TRAIN).lr == 0.05


def pruned(share: float) -> onnx.ModelProto:
    """The student with this share of its first weight at zero."""
    copy = onnx.ModelProto()
    copy.CopyFrom(STUDENT)
    tensor = next(t for t in copy.graph.initializer if t.name == "w1")
    value = numpy_helper.to_array(tensor).copy()
    value[np.abs(value) < np.quantile(np.abs(value), share)] = 0
    tensor.CopyFrom(numpy_helper.from_array(value, "w1"))
    return copy


@pytest.mark.parametrize(
    ("share", "masked", "kept"),
    [(0.5, None, True), (0.1, None, False), (0.5, False, False), (0.1, True, True)],
)
def test_zeros_stay_where_a_weight_was_pruned(
    share: float, masked: bool | None, kept: bool
) -> None:
    """Biases, which are all zero here, train unless `masked` says that no zero may move."""
    student = pruned(share)
    tuned = Finetune(batch_size=200, masked=masked, threads=1)(student, data=TRAIN)
    zeros = weights(student)["w1"] == 0
    assert (weights(tuned.model)["w1"][zeros] == 0).all() == kept
    assert weights(tuned.model)["b1"].any() == (masked is not True)
    told = [note for note in tuned.notes if "zeros stay zero in 1 weights" in note]
    assert len(told) == (kept and masked is None)
