"""Optimizers against their definitions, and the schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxprune.training.optimizer import PIECE, AdamW, Sgd, average_into, clip_by_norm
from onnxprune.training.schedule import rate_at

SIZE = PIECE + 100  # more than one piece


def series() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    decay = np.where(np.arange(SIZE) % 2, 0.1, 0.0).astype(np.float32)
    return rng.standard_normal(SIZE), rng.standard_normal((5, SIZE)), decay


def test_adamw_is_its_definition() -> None:
    w, grads, decay = series()
    own = w.astype(np.float32)
    optimizer = AdamW(SIZE)
    m, v = np.zeros(SIZE), np.zeros(SIZE)
    for t, g in enumerate(grads, 1):
        optimizer.step(own, g.astype(np.float32), decay, 0.01)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w - 0.01 * decay * w - 0.01 * step
    np.testing.assert_allclose(own, w, atol=1e-6)


def test_sgd_is_its_definition() -> None:
    w, grads, decay = series()
    own = w.astype(np.float32)
    optimizer = Sgd(SIZE, momentum=0.8)
    u = np.zeros(SIZE)
    for g in grads:
        optimizer.step(own, g.astype(np.float32), decay, 0.01)
        u = 0.8 * u + g
        w = w - 0.01 * (u + decay * w)
    np.testing.assert_allclose(own, w, atol=1e-6)


@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_clipping_limits_the_norm(limit: float, after: float) -> None:
    grads = np.array([3, 4], np.float32)
    assert clip_by_norm(grads, limit) == pytest.approx(5)
    assert float(np.linalg.norm(grads)) == pytest.approx(after)


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(i, 100, 1.0, warmup=0.1) for i in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert rate_at(0, 1, 0.5) == 0.5


def test_other_ways_down() -> None:
    line = [rate_at(i, 100, 2.0, warmup=0, schedule="linear") for i in range(100)]
    assert line == pytest.approx([2 * (1 - i / 100) for i in range(100)])
    assert {rate_at(i, 100, 2.0, warmup=0, schedule="constant") for i in range(100)} == {2.0}


@pytest.mark.parametrize("make", [AdamW, Sgd])
def test_a_factor_scales_the_rate_of_each_weight(make: Any) -> None:
    w, grads, decay = series()
    gradient = grads[0].astype(np.float32)
    ends = {}
    for key, rate, factor in (
        ("plain", 0.01, None),
        ("whole", 0.005, np.full(SIZE, 2, np.float32)),
        ("none", 0.01, np.zeros(SIZE, np.float32)),
    ):
        ends[key] = w.astype(np.float32)
        make(SIZE).step(ends[key], gradient, decay, rate, factor)
    np.testing.assert_allclose(ends["whole"], ends["plain"], atol=1e-6)
    np.testing.assert_array_equal(ends["none"], w.astype(np.float32))
    assert not np.array_equal(ends["plain"], ends["none"])


def test_the_average_follows_the_weights() -> None:
    average, weights = np.zeros(SIZE, np.float32), np.ones(SIZE, np.float32)
    average_into(average, weights, 0.5, step=1)
    np.testing.assert_allclose(average, 1 - 2 / 11)  # the first steps forget faster
    average_into(average, weights, 0.5, step=100)
    np.testing.assert_allclose(average, 1 - 2 / 11 * 0.5)
