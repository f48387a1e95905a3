"""Which channels compete: all, those of layers of like shape, or none; budgets always hold."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune.analysis import analyse
from onnxprune.cost import count_params
from onnxprune.errors import InvalidRecipeError
from onnxprune.groups import isomorphic
from onnxprune.passes.select import RANKINGS, Ranking
from onnxprune.pipeline import apply
from onnxprune.plan import Plan
from onnxprune.result import Result
from tests.graphs import build, mlp, prune, shapes

BLOCKS = """a = Conv<pads=[1,1,1,1]>(x, w0)  r0 = Relu(a)
b1 = Conv<pads=[1,1,1,1]>(r0, u1)  r1 = Relu(b1)  c1 = Conv<pads=[1,1,1,1]>(r1, v1)
s1 = Add(a, c1)
b2 = Conv<pads=[1,1,1,1]>(s1, u2)  r2 = Relu(b2)  c2 = Conv<pads=[1,1,1,1]>(r2, v2)
s2 = Add(s1, c2)
p = GlobalAveragePool(s2)  f = Flatten(p)  y = Gemm(f, w9)"""


@pytest.fixture(scope="module")
def blocks() -> onnx.ModelProto:
    """Two residual blocks of like shape; the weights inside the second are small."""
    model = build(
        "(float[N,3,8,8] x) => (float[N,10] y)",
        BLOCKS,
        "w0:16,3,3,3 u1:20,16,3,3 v1:16,20,3,3 u2:20,16,3,3 v2:16,20,3,3 w9:16,10",
    )
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.name == "u2":  # important channels and a tail of useless ones
            scale = np.where(np.arange(20) < 6, 1.0, 1e-3).reshape(-1, 1, 1, 1)
            value = (scale * rng.normal(size=(20, 16, 3, 3))).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def _left(result: Result) -> dict[str, float]:
    return {g.name: 1 - len(g.removed) / g.units for g in result.plan.groups}


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("budget", [{"params": 0.5}, {"macs": 0.5}, {"channels": 0.5}])
def test_the_budget_holds(
    blocks: onnx.ModelProto, ranking: Ranking, budget: dict[str, float]
) -> None:
    result = prune(blocks, ranking=ranking, **budget)
    assert 0.42 < result.report.budget["reached"] <= 0.5 + 1e-9
    if "params" in budget:
        assert count_params(result.model) <= 0.5 * count_params(blocks)
    if "channels" in budget:
        kept = sum(g.units - len(g.removed) for g in result.plan.groups)
        assert kept <= 0.5 * sum(g.units for g in result.plan.groups)
    assert result.report.options["ranking"] == result.plan.options["ranking"] == ranking


@pytest.mark.parametrize("ranking", RANKINGS)
def test_the_file_is_small_enough(blocks: onnx.ModelProto, ranking: Ranking) -> None:
    target = 0.5 * blocks.ByteSize() / 1e6
    result = prune(blocks, ranking=ranking, size_mb=target)
    assert result.model.ByteSize() / 1e6 <= target * 1.001


@pytest.mark.parametrize("budget", [{"params": 0.4}, {"macs": 0.4}])
def test_uniform_takes_the_same_share_of_each(
    blocks: onnx.ModelProto, budget: dict[str, float]
) -> None:
    shares = list(_left(prune(blocks, ranking="uniform", **budget)).values())
    assert max(shares) - min(shares) <= 1 / 16


def test_like_groups_compete_among_themselves(blocks: onnx.ModelProto) -> None:
    analysis = analyse(blocks)
    names = [g.name for g in analysis.groups]
    classes = dict(zip(names, isomorphic(analysis.groups, analysis.coupling), strict=True))
    assert classes["Conv b1"] == classes["Conv b2"] != classes["Conv a"]
    left = _left(prune(blocks, ranking="isomorphic", params=0.5))
    inner = (left["Conv b1"] + left["Conv b2"]) / 2
    assert left["Conv b2"] < left["Conv b1"]
    assert inner == pytest.approx(left["Conv a"], abs=0.08)


def test_global_lets_all_compete(blocks: onnx.ModelProto) -> None:
    left = _left(prune(blocks, ranking="global", channels=0.7))
    assert left["Conv b2"] < 0.6 < left["Conv b1"]


@pytest.mark.parametrize(
    ("options", "ranking"), [({"channels": 0.5}, "uniform"), ({"params": 0.5}, "global")]
)
def test_the_default_depends_on_the_budget(
    blocks: onnx.ModelProto, options: dict[str, float], ranking: Ranking
) -> None:
    default, asked = prune(blocks, **options), prune(blocks, ranking=ranking, **options)
    assert default.plan == asked.plan
    assert default.model.SerializeToString() == asked.model.SerializeToString()


def test_widths_and_floors_hold(blocks: onnx.ModelProto) -> None:
    for ranking in RANKINGS:
        after = shapes(prune(blocks, ranking=ranking, params=0.6, round_to=4, min_keep=0.4).model)
        widths = (after["w0"][0], after["u1"][0], after["u2"][0])
        assert all(
            width % 4 == 0 and width >= 0.4 * whole
            for width, whole in zip(widths, (16, 20, 20), strict=True)
        )


def test_a_plan_of_any_ranking_replays(blocks: onnx.ModelProto) -> None:
    result = prune(blocks, ranking="isomorphic", macs=0.5)
    plan = Plan.from_json(json.dumps(result.plan.to_json()))
    assert plan == result.plan
    assert apply(blocks, plan).SerializeToString() == result.model.SerializeToString()


def test_an_unknown_ranking_is_a_mistake() -> None:
    with pytest.raises(InvalidRecipeError, match="--ranking 'best' is unknown: choose global, iso"):
        prune(mlp(6, 8, 4), channels=0.5, ranking="best")
