"""Plans: written, read back, replayed, and refused where they do not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import onnx
import pytest

from onnxprune.errors import InvalidRecipeError
from onnxprune.pipeline import apply
from onnxprune.plan import Plan, fingerprint
from tests.graphs import build, mlp, prune, tensors

Json = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return build(
        "(float[N,3,8,8] x) => (float[N,4,6,6] y)",
        """a = Conv(x, w1, b1)  g = Reshape(a, five)  t = Transpose<perm=[0,2,1,3,4]>(g)
        s = Reshape(t, four)  p, q = Split<axis=1>(s, parts)  c = Concat<axis=1>(q, p)
        m = ReduceMean(c, channels)  h = Mul(c, m)  y = Conv(h, w2)""",
        "w1:8,3,3,3 b1:8 five=0,2,4,6,6 four=0,8,6,6 parts=3,5 channels=1 w2:4,8,1,1",
    )


@pytest.fixture(scope="module")
def plan(model: onnx.ModelProto) -> Plan:
    return prune(model, channels=0.5).plan


def test_json_round_trip(plan: Plan) -> None:
    text = json.dumps(plan.to_json())
    assert Plan.from_json(text) == plan
    assert Plan.from_json(json.loads(text)) == plan
    assert json.dumps(Plan.from_json(text).to_json()) == text


def test_applying_gives_the_same_bytes(model: onnx.ModelProto) -> None:
    result = prune(model, channels=0.5)
    again = apply(model, Plan.from_json(json.dumps(result.plan.to_json())))
    assert again.SerializeToString() == result.model.SerializeToString()
    assert result.plan.initializers["w1"].shape_after == (4, 3, 3, 3)


def test_pruning_twice_gives_the_same_bytes(model: onnx.ModelProto) -> None:
    results = [prune(model, channels=0.5) for _ in range(2)]
    assert results[0].plan == results[1].plan
    first, second = (r.model.SerializeToString() for r in results)
    assert first == second


def test_an_empty_plan_gives_the_model_back(model: onnx.ModelProto) -> None:
    result = prune(model, channels=1.0)
    assert result.plan.initializers == {}
    assert apply(model, result.plan) is model


def test_other_weights_of_the_same_structure_are_accepted() -> None:
    model = mlp(6, 8, 4)
    plan = prune(model, channels=0.5).plan
    other = onnx.ModelProto()
    other.CopyFrom(model)
    del other.graph.initializer[:]
    other.graph.initializer.extend(tensors("w0:8,6 b0:8 w1:4,8 b1:4", seed=1))
    assert fingerprint(other) == fingerprint(model)
    assert dict(plan.initializers)["w0"].shape_after == (4, 6)
    pruned = apply(other, plan)
    assert next(t for t in pruned.graph.initializer if t.name == "w0").dims == [4, 6]


def test_a_plan_for_another_model_is_refused(plan: Plan) -> None:
    with pytest.raises(InvalidRecipeError, match="made for another model"):
        apply(mlp(6, 8, 4), plan)


def _set(*path: str | int, to: object) -> Callable[[Json], None]:
    def change(value: Json) -> None:
        place: Any = value
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


def _drop(*path: str | int) -> Callable[[Json], None]:
    def change(value: Json) -> None:
        place: Any = value
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


MALFORMED = [
    ("format", _set("format", to="recipe"), '"format" is not "onnxprune-plan"'),
    ("no-format", _drop("format"), '"format" is not'),
    ("version", _set("version", to=99), "version 99; this onnxprune reads version 1"),
    ("no-version", _drop("version"), "version None"),
    *((f"no-{f}", _drop(f), f) for f in ("model", "initializers", "groups", "frozen")),
    *(
        (f"no-slice-{f}", _drop("initializers", "w1", f), f)
        for f in ("source", "shape_before", "shape_after", "keep")
    ),
    *(
        (f"no-group-{f}", _drop("groups", 0, f), f)
        for f in ("name", "units", "width", "exact", "removed")
    ),
    *((f"no-frozen-{f}", _drop("frozen", 0, f), f) for f in ("tensor", "axis", "node", "reason")),
    ("keep-axis", _set("initializers", "w1", "keep", to={"x": [0]}), "malformed"),
    ("keep-index", _set("initializers", "w1", "keep", to={"0": ["a"]}), "malformed"),
    ("keep-list", _set("initializers", "w1", "keep", to=[0]), "malformed"),
    ("shape", _set("initializers", "w1", "shape_before", to=3), "malformed"),
    ("removed", _set("groups", 0, "removed", to=["one"]), "malformed"),
    ("units", _set("groups", 0, "units", to="many"), "malformed"),
    ("groups", _set("groups", to=3), "malformed"),
    ("initializers", _set("initializers", to=[]), "malformed"),
    ("model", _set("model", to=5), "malformed"),
]


@pytest.mark.parametrize(
    ("change", "words"), [pytest.param(c, w, id=name) for name, c, w in MALFORMED]
)
def test_a_malformed_plan_names_the_field(
    plan: Plan, change: Callable[[Json], None], words: str
) -> None:
    value = copy.deepcopy(plan.to_json())
    change(value)
    with pytest.raises(InvalidRecipeError) as caught:
        Plan.from_json(value)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"plan"'])
def test_what_is_no_plan_at_all(text: str) -> None:
    with pytest.raises(InvalidRecipeError, match=r"not JSON|no plan"):
        Plan.from_json(text)


CONTRADICTIONS = [
    ("out-of-range", _set("groups", 0, "removed", to=[99]), "units that group"),
    ("negative", _set("groups", 0, "removed", to=[-1]), "units that group"),
    ("all", _set("groups", 0, "removed", to=list(range(8))), "units that group"),
    ("repeated", _set("groups", 0, "removed", to=[1, 1, 1]), "contradicts itself"),
    ("fewer", _set("groups", 0, "removed", to=[0]), "contradicts itself"),
    ("name", _set("groups", 0, "name", to="Conv other"), "not this model's"),
    ("size", _set("groups", 0, "units", to=9), "not this model's"),
    ("slice", _drop("initializers", "w1"), "contradicts itself"),
    ("structure", _set("model", "structure_sha256", to="0"), "another model"),
]


@pytest.mark.parametrize(
    ("change", "words"), [pytest.param(c, w, id=name) for name, c, w in CONTRADICTIONS]
)
def test_a_plan_that_contradicts_itself_is_refused(
    model: onnx.ModelProto, plan: Plan, change: Callable[[Json], None], words: str
) -> None:
    value = copy.deepcopy(plan.to_json())
    change(value)
    with pytest.raises(InvalidRecipeError, match=words):
        apply(model, Plan.from_json(value))
