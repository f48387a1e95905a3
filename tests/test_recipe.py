"""Recipes: what is accepted, what is refused and where, and that a plan replays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxprune import cli, recipe_steps
from onnxprune.errors import InvalidRecipeError, VerificationError
from onnxprune.recipe import Recipe, replay, run_recipe
from onnxprune.recipe_steps import Context
from tests.graphs import build

FULL = """
seed: 1
steps:
  - lossless
  - prune: {params: 0.7, repair: none}
  - prune-layers:
      layers: 1
      samples: 128
  - prune-weights: {sparsity: 0.5, samples: 128}
  - reestimate-batchnorm: {samples: 128}
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from onnxprune import runtime

    monkeypatch.setattr(runtime, "latencies_ms", lambda runs, **_: [1.0] * len(runs))
    yield


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [", "line 1: this is not YAML: "),
        ("data: x", "line 1: a recipe has a list `steps`"),
        ("", "a recipe has a list `steps`"),
        ("steps: []", "line 1: steps: there are none"),
        ("sed: 1\nsteps: [lossless]", "line 1: sed: no such field; choose data, val, seed"),
        ("steps:\n  - lossless\n  - prun", "line 3: no step 'prun'; choose finetune, lossless"),
        ("steps:\n  - a: 1\n    b: 2", "line 2: a step is a name, or a name with options"),
        ("steps:\n  - prune: 3", "line 2: prune: options are `name: value` pairs"),
        (
            "steps:\n  - prune:\n      macs: 0.5\n      mac: 1",
            "line 4: prune: mac: no such option; choose channels, macs",
        ),
        (
            "steps:\n  - prune:\n      macs: half",
            "line 3: prune: macs: input should be a valid number, .* not 'half'",
        ),
        (
            "steps:\n  - prune-weights:\n      method: best",
            "line 3: prune-weights: method: input should be 'magnitude', .* not 'best'",
        ),
        ("seed: x\nsteps: [lossless]", "line 1: seed: input should be a valid integer"),
    ],
)
def test_errors_name_line_and_field(text: str, words: str) -> None:
    with pytest.raises(InvalidRecipeError, match=words):
        Recipe.parse(text)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipeError, match="no such file"):
        Recipe.load(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("steps: [x]")
    with pytest.raises(InvalidRecipeError, match=r"recipe '.*bad.yaml', line 1: no step 'x'"):
        Recipe.load(path)


def test_defaults() -> None:
    recipe = Recipe.parse("steps: [lossless, {prune-weights: {sparsity: 0.25}}]")
    assert [name for name, _ in recipe.steps] == ["lossless", "prune-weights"]
    assert recipe.steps[1][1].sparsity == 0.25
    assert (recipe.seed, recipe.threads, recipe.data) == (0, 1, None)


def test_all_three_kinds_replay_to_the_same_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = root / "models"
    (tmp_path / "r.yaml").write_text(FULL)
    out, plan, again = (str(tmp_path / name) for name in ("out.onnx", "plan.json", "again.onnx"))
    source = str(models / "digits_cnn.onnx")
    command = ["run", str(tmp_path / "r.yaml"), source, out, "--plan", plan, "-q"]
    command += ["--data", str(models / "digits_train.npz")]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "steps: lossless, prune, prune-layers, prune-weights, reestimate-batchnorm" in text
    written = json.loads(Path(plan).read_text())
    kinds = [step["step"] for step in written["steps"]]
    assert kinds[1:4] == ["prune", "prune-layers", "prune-weights"]
    assert written["steps"][1]["record"]["plan"]["format"] == "onnxprune-plan"
    assert len(written["steps"][2]["record"]["dropped"]) == 1
    assert written["steps"][3]["record"]["layers"][0]["sparsity"] >= 0
    assert cli.main(["apply", source, plan, again]) == 0
    assert Path(again).read_bytes() == Path(out).read_bytes()


def test_a_replay_that_differs_is_refused(root: Path) -> None:
    source = root / "models" / "digits_mlp.onnx"
    recipe = Recipe.parse("steps: [{prune-weights: {method: magnitude}}]")
    plan: dict[str, Any] = dict(run_recipe(source, recipe).plan)
    assert replay(source, plan).graph.node
    with pytest.raises(VerificationError, match="the replay gave another model"):
        replay(source, {**plan, "result_sha256": "0"})
    with pytest.raises(InvalidRecipeError, match="the plan was made for another model"):
        replay(root / "models" / "digits_cnn.onnx", plan)
    with pytest.raises(InvalidRecipeError, match="the plan has version 9"):
        replay(source, {**plan, "version": 9})
    for damaged in ({**plan, "model": 3}, {k: v for k, v in plan.items() if k != "steps"}):
        with pytest.raises(InvalidRecipeError, match="the plan is damaged"):
            replay(source, damaged)


def test_a_step_that_fails_is_named(root: Path) -> None:
    recipe = Recipe.of({"steps": ["lossless", {"prune": {"macs": 2}}]})
    with pytest.raises(InvalidRecipeError, match=r"step 2, prune: --macs 2 is out of range"):
        run_recipe(root / "models" / "digits_mlp.onnx", recipe)
    with pytest.raises(InvalidRecipeError, match="seed: must not be negative, not -1"):
        Recipe.of({"steps": ["lossless"], "seed": -1})


def test_a_step_without_data_says_so(root: Path) -> None:
    recipe = Recipe.parse("steps: [prune-layers]")
    with pytest.raises(InvalidRecipeError, match="step prune-layers needs data"):
        run_recipe(root / "models" / "digits_cnn.onnx", recipe)


@dataclass(frozen=True)
class Rename:
    """A step of another package."""

    name: str = "x"

    def __call__(
        self, model: onnx.ModelProto, context: Context
    ) -> tuple[onnx.ModelProto, dict[str, Any]]:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        copy.graph.name = self.name
        return copy, {"renamed": True}


def test_other_packages_add_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    point = metadata.EntryPoint("rename", "tests.test_recipe:Rename", recipe_steps.ENTRY_POINTS)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    model = build("(float[N,6] x) => (float[N,4] y)", "y = MatMul(x, w)", "w:6,4")
    result = run_recipe(model, Recipe.parse("steps: [{rename: {name: mine}}]"))
    assert result.model.graph.name == "mine"
    assert result.plan["steps"][0]["record"] == {"renamed": True}


def test_simplify_checks_the_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    model = build("(float[N,6] x) => (float[N,4] y)", "i = Identity(x) y = MatMul(i, w)", "w:6,4")
    small = build("(float[N,6] x) => (float[N,4] y)", "y = MatMul(x, w)", "w:6,4")
    recipe = Recipe.parse("steps: [simplify]")
    monkeypatch.setitem(sys.modules, "onnxslim", SimpleNamespace(slim=lambda _: small))
    assert len(run_recipe(model, recipe).model.graph.node) == 1
    small.graph.initializer[0].raw_data = bytes(len(small.graph.initializer[0].raw_data))
    with pytest.raises(VerificationError, match="onnxslim's result is not the same model"):
        run_recipe(model, recipe)
    monkeypatch.setitem(sys.modules, "onnxslim", None)
    with pytest.raises(InvalidRecipeError, match="step simplify needs onnxslim: pip install"):
        run_recipe(model, recipe)
