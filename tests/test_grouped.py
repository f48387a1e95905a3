"""Groups of grouped convolutions stay balanced: each keeps as many channels, or goes as a whole."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.passes.select import RANKINGS, Ranking
from onnxprune.result import Result
from tests.graphs import TOLERANCE, build, prune, shapes

IMAGE = "(float[N,3,8,8] x) => (float[N,5,?,?] y)"
SHUFFLE = "g = Reshape({0}, five)  t = Transpose<perm=[0,2,1,3,4]>(g)  {1} = Reshape(t, four)"


def _grouped(channels: int, groups: int, multiplier: int = 1) -> onnx.ModelProto:
    out, inner = channels * multiplier, channels // groups
    return build(
        IMAGE,
        f"a = Conv(x, w1, b1)  r = Relu(a)  h = Conv<group={groups}>(r, wg, bg)  y = Conv(h, w2)",
        f"w1:{channels},3,1,1 b1:{channels} wg:{out},{inner},3,3 bg:{out} w2:5,{out},1,1",
    )


def _per_group(result: Result, name: str, groups: int) -> list[int]:
    """How many channels each group of an output axis keeps."""
    cut = result.plan.initializers[name]
    each = cut.shape_before[0] // groups
    return np.bincount(np.array(cut.keep["0"]) // each, minlength=groups).tolist()


def _group_count(model: onnx.ModelProto) -> int:
    conv = next(n for n in model.graph.node if n.op_type == "Conv" and n.output[0] == "h")
    return next((a.i for a in conv.attribute if a.name == "group"), 1)


def _sound(result: Result) -> None:
    check = result.report.checks[0]
    assert check.max_error is not None
    assert check.max_error <= TOLERANCE
    assert not result.report.notes


CASES = [(16, 4, 1), (128, 32, 1), (24, 2, 1), (12, 4, 2), (16, 4, 4), (24, 8, 1)]


@pytest.mark.parametrize(("channels", "groups", "multiplier"), CASES)
@pytest.mark.parametrize("share", [0.34, 0.5, 0.8])
def test_each_group_keeps_as_many(
    channels: int, groups: int, multiplier: int, share: float
) -> None:
    result = prune(_grouped(channels, groups, multiplier), channels=share)
    _sound(result)
    left = _group_count(result.model)
    for name in ("w1", "wg"):
        kept = [n for n in _per_group(result, name, groups) if n]
        assert len(kept) == left
        assert len(set(kept)) == 1
    after = shapes(result.model)
    assert after["wg"][1] * left == after["w1"][0]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("budget", [{"params": 0.4}, {"macs": 0.4}, {"channels": 0.4}])
def test_any_budget_and_ranking_keep_the_balance(
    ranking: Ranking, budget: dict[str, float]
) -> None:
    result = prune(_grouped(24, 4), ranking=ranking, **budget)
    _sound(result)
    assert len(set(_per_group(result, "w1", 4))) == 1
    assert len(set(_per_group(result, "wg", 4))) == 1


@pytest.mark.parametrize("multiplier", [2, 3])
def test_a_depthwise_multiplier_keeps_all_of_a_channels_outputs(multiplier: int) -> None:
    result = prune(_grouped(12, 12, multiplier), channels=0.5)
    _sound(result)
    assert _group_count(result.model) == 6
    assert set(_per_group(result, "wg", 12)) == {0, multiplier}


def test_a_shuffle_between_grouped_convolutions() -> None:
    model = build(
        IMAGE,
        f"""a = Conv(x, w1)  c = Conv<group=4>(a, wg)  {SHUFFLE.format("c", "s")}
        h = Conv<group=4>(s, wh)  y = Conv(h, w2)""",
        "w1:16,3,1,1 wg:16,4,1,1 wh:16,4,1,1 w2:5,16,1,1 five=0,4,4,8,8 four=0,16,8,8",
    )
    result = prune(model, channels=0.5)
    _sound(result)
    for name in ("wg", "wh"):
        assert len({n for n in _per_group(result, name, 4) if n}) == 1
    assert shapes(result.model)["w2"] == (5, 8, 1, 1)


@pytest.mark.parametrize("groups", [(2, 4), (4, 8), (4, 6), (3, 4)])
def test_two_ways_to_group_the_same_channels(groups: tuple[int, int]) -> None:
    first, second = groups
    model = build(
        IMAGE,
        f"""a = Conv(x, w1)  c = Conv<group={first}>(a, wg)  d = Conv<group={second}>(a, wh)
        h = Add(c, d)  y = Conv(h, w2)""",
        f"w1:24,3,1,1 wg:24,{24 // first},1,1 wh:24,{24 // second},1,1 w2:5,24,1,1",
    )
    result = prune(model, channels=0.5)
    _sound(result)
    assert shapes(result.model)["w1"][0] < 24
