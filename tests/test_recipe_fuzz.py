"""Whatever a recipe says, it is read or refused in one line that says where; and other packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.errors import InvalidRecipeError
from onnxprune.recipe import Recipe
from onnxprune.recipe_steps import BUILT_IN

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from(["", "x", "2:4", "linear", "auto", "0.5"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=4,
)
FIELDS = sorted({f for kind in BUILT_IN.values() for f in getattr(kind, "__dataclass_fields__")})  # noqa: B009
OPTIONS = st.dictionaries(st.sampled_from(FIELDS) | SCALARS, VALUES, max_size=3)
STEPS = st.one_of(
    VALUES,
    st.sampled_from(sorted(BUILT_IN)),
    st.dictionaries(st.sampled_from(sorted(BUILT_IN)) | SCALARS, OPTIONS | VALUES, max_size=2),
)
RECIPES = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {"steps": VALUES | st.lists(STEPS, max_size=3)},
        optional=dict.fromkeys(("data", "val", "seed", "threads", "other"), VALUES),
    ),
)


def read(text: str) -> None:
    try:
        recipe = Recipe.parse(text)
    except InvalidRecipeError as error:
        words = str(error)
        assert words.startswith("line ")
        assert "\n" not in words
    else:
        assert recipe.steps


@settings(max_examples=150)
@given(RECIPES)
def test_wrong_values(value: object) -> None:
    read(yaml.safe_dump(value))


@settings(max_examples=150)
@given(st.text(st.sampled_from("steps: [prune]{}-\n\t'\"&*!|>%@x0\x00\ufeff#,?"), max_size=40))
def test_wrong_text(text: str) -> None:
    read(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps:\n - prune:\n    keep: [1]", "line 3: prune: keep.0: input should be a valid str"),
        ("steps:\n - prune-layers:\n    macs: 2", "line 2: prune-layers: macs 2: a share must be"),
        ("steps: [prune-jointly]", "line 1: prune-jointly: give one of macs, params"),
        ("steps:\n - prune-layers: {layers: 1, params: 0.5}", "line 2: prune-layers: give one of"),
        ("steps: [? [a]: b]", "line 1: this is not YAML|line 1: a step is a name|no step"),
        ("[a, b]: 1\nsteps: [lossless]", "line 1: "),
        ("# a\nsteps: &a [*a]", "line 1: this is not YAML: it contains itself"),
        ("seed: 2001-99-99\nsteps: [lossless]", "line 1: this is not YAML: month must be in"),
        ("seed: 1\nsteps: [\x00]", "line 2: this is not YAML: special characters"),
        ("# a\nsed: 1", "line 2: a recipe has a list `steps`"),
    ],
)
def test_lines_and_fields(text: str, words: str) -> None:
    with pytest.raises(InvalidRecipeError, match=words):
        Recipe.parse(text)


MODULE = """
from dataclasses import dataclass

from onnxprune.ops.registry import rule


@rule("Twice", domain="example")
def twice(node, c):
    c.set(node, 0, c.layout(node, 0))


@dataclass(frozen=True)
class Rename:
    name: str = "x"

    def __call__(self, model, context):
        model.graph.name = self.name
        return model, {"renamed": True}
"""
PROGRAM = """
from onnxprune.ops.registry import RULES
from onnxprune.recipe import Recipe
import onnxprune.ops
print(Recipe.parse("steps: [{rename: {name: a}}]").steps[0][1].name, ("example", "Twice") in RULES)
try:
    Recipe.parse("steps: [{rename: {nam: a}}]")
except Exception as error:
    print(error)
"""
POINTS = """[onnxprune.passes]
rename = example_passes:Rename
[onnxprune.rules]
example = example_passes
"""


def test_an_installed_package_adds_steps_and_rules(tmp_path: Path) -> None:
    (tmp_path / "example_passes.py").write_text(MODULE)
    info = tmp_path / "example_passes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "a True"
    assert lines[1] == "line 1: rename: nam: no such option; choose name"
