"""Criteria from activations, inputs that are made up, and the walk that both stand on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from onnxprune.analysis import analyse
from onnxprune.calibration.editable import Editable
from onnxprune.calibration.inputs import from_data, limited, peak_bytes
from onnxprune.calibration.walk import Walk
from onnxprune.data import open_data
from onnxprune.passes.criteria import MEASURED, _limit, measured
from tests.graphs import build, mlp, outputs, replaced

Array = NDArray[Any]
NET = build(
    "(float[N,3,10,10] x) => (float[N,4,10,10] y)",
    """h = Conv(x, w0, b0)  r = Relu(h)  t = Conv<pads=[1,1,1,1]>(r, w1)  s = Relu(t)
    u = Add(s, r)  y = Conv(u, w2, b2)""",
    "w0:8,3,1,1 b0:8 w1:8,8,3,3 w2:4,8,1,1 b2:4",
)


def batches(count: int = 4, size: int = 16, seed: int = 0) -> list[Mapping[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(size, 3, 10, 10)).astype(np.float32)} for _ in range(count)]


def first_out(model: onnx.ModelProto, criterion: str, tensor: str = "h") -> list[int]:
    """The channels of a tensor in the order in which they would go."""
    analysis = analyse(model)
    scores = measured(analysis.coupling, analysis.groups, criterion, batches(), threads=1)
    block = next(b for b in analysis.coupling.layouts[tensor] if b.axes == (1,))
    return np.argsort(scores[analysis.coupling.solution.unit[block.labels]]).tolist()


CHAIN = build(
    "(float[N,3,10,10] x) => (float[N,4,8,8] y)",
    "h = Conv(x, w0, b0)  y = Conv(h, w, b)",
    "w0:6,3,1,1 b0:6 w:4,6,3,3 b:4",
)


def test_reconstruction_lets_go_what_follows_from_the_rest() -> None:
    """Three inputs make six channels: three of them, however large, cost nothing."""
    analysis = analyse(CHAIN)
    scores = measured(analysis.coupling, analysis.groups, "reconstruction", batches(), threads=1)
    own = np.sort(scores[analysis.groups[0].units])
    assert own[2] < 0.02 * own[3]
    assert np.isinf(scores[0])


def test_reconstruction_knows_a_repeated_channel() -> None:
    rng = np.random.default_rng(3)
    weight = rng.normal(0, 0.5, (6, 3, 1, 1))
    weight[4] = 3 * weight[1]
    model = replaced(CHAIN, "w0", np.concatenate([weight[:2], weight[4:5], 0 * weight[:3]]))
    gone = first_out(model, "reconstruction")
    assert set(gone[:4]) - {1, 2} == {3, 4, 5}


def test_flap_ignores_what_is_constant_and_wanda_does_not() -> None:
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(0, 0.5, (6, 3, 1, 1)), np.zeros(6)
    weight[2], bias[2] = 0, 5
    model = replaced(replaced(CHAIN, "w0", weight), "b0", bias)
    assert first_out(model, "flap")[0] == 2
    assert first_out(model, "wanda")[-1] == 2


@pytest.mark.parametrize("name", MEASURED)
def test_every_unit_gets_a_finite_number(name: str) -> None:
    analysis = analyse(NET)
    scores = measured(analysis.coupling, analysis.groups, name, batches(), threads=1)
    assert np.isfinite(scores[1:]).all()
    assert (scores >= 0).all()


def test_a_large_layer_is_measured_by_one_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.passes.criteria.MAX_INPUTS", 20)
    gone = first_out(CHAIN, "reconstruction")
    assert sorted(gone) == list(range(6))


def test_a_group_that_nothing_measured_reads_is_ranked_by_its_weights() -> None:
    model = build(
        "(float[N,5] x) => (float[N,4] y)",
        'h = MatMul(x, w0)  i = MatMul(h, w1)  y = Einsum<equation="nh,ho->no">(i, w2)',
        "w0:5,6 w1:6,8 w2:8,4",
    )
    analysis = analyse(model)
    rows = [{"x": np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)}]
    scores = measured(analysis.coupling, analysis.groups, "reconstruction", rows, threads=1)
    assert scores[analysis.groups[1].units].sum() == pytest.approx(1)


@pytest.mark.parametrize("stops", [(1, 2, 3, 4, 5, 6), (3, 6), (6,)])
def test_a_walk_gives_what_a_run_gives(stops: tuple[int, ...]) -> None:
    data = batches()
    walk = Walk(Editable(NET), data, {"y", "s"}, threads=1)
    for stop in stops:
        walk.advance(stop)
    for held, feeds in zip(walk.held, data, strict=True):
        assert set(held) == {"y", "s"}
        np.testing.assert_allclose(held["y"], outputs(NET, feeds)[0], rtol=1e-4, atol=1e-5)
    walk.release({"s"})
    assert [set(held) for held in walk.held] == [{"y"}] * len(data)


def test_a_walk_passes_bodies_and_constants() -> None:
    model = build(
        "(float[N,4] x, bool c) => (float[N,4] y)",
        """k = Constant<value = float[4] {1, 2, 3, 4}>()  a = Mul(x, k)
        y = If(c)<then_branch = t () => (float[N,4] p) { p = Add(a, k) },
                  else_branch = e () => (float[N,4] q) { q = Neg(a) }>""",
    )
    feeds = {"x": np.ones((2, 4), np.float32), "c": np.array(True)}
    walk = Walk(Editable(model), [feeds], {"y"}, threads=1)
    walk.advance(1)
    walk.advance(2)
    np.testing.assert_allclose(walk.held[0]["y"], [[2, 4, 6, 8]] * 2)


def test_calibration_is_shuffled_and_bounded() -> None:
    data = open_data(
        {"x": np.arange(300, dtype=np.float32).repeat(5).reshape(300, 5)}, mlp(5, 8, 3)
    )
    calibration = from_data(data, samples=128)
    assert calibration.samples == 128
    assert max(b["x"].max() for b in calibration.batches) > 200
    coupling = analyse(mlp(5, 8, 3)).coupling
    each = peak_bytes(coupling, calibration.batches[0])
    assert 2 * 64 * 8 * 4 <= each <= 8 * 64 * 8 * 4
    halves = limited(calibration, coupling, each).batches  # each checks what the other gives
    assert [len(b["x"]) for b in halves] == [32, 32]
    small = limited(calibration, coupling, each // 8).batches
    assert [len(b["x"]) for b in small] == [4, 4]


def test_the_widest_layers_are_compared_by_one_tap_where_all_would_cost_too_much() -> None:
    assert _limit([]) == 0
    assert _limit([576, 1152, 2304, 4608]) == 2304
    assert _limit([576, *[1152] * 8, *[2304] * 11, 4608]) == 1152
