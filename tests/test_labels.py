"""The index algebra: runs of a reshape, ties, freezes and factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxprune.labels import (
    Factor,
    System,
    compress,
    reduce_to_varying,
    repeat,
    runs,
    varying_axes,
)
from tests.graphs import TOLERANCE, build, prune_half, shapes


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 8), (2, 8), [([0], [0]), ([1], [1])]),
        ((2, 8), (2, 2, 4), [([0], [0]), ([1], [1, 2])]),
        ((2, 2, 4), (2, 8), [([0], [0]), ([1, 2], [1])]),
        ((2, 8, 3, 3), (2, 72), [([0], [0]), ([1, 2, 3], [1])]),
        ((2, 1, 8), (2, 8, 1, 1), [([0], [0]), ([2], [1])]),
        ((6, 4), (4, 6), [([0, 1], [0, 1])]),
        ((2, 6, 4), (2, 4, 6), [([0], [0]), ([1, 2], [1, 2])]),
        ((1,), (), []),
    ],
)
def test_runs(
    before: tuple[int, ...], after: tuple[int, ...], expected: list[tuple[list[int], list[int]]]
) -> None:
    assert runs(before, after) == expected


def test_ties_join_units_in_order() -> None:
    system = System()
    a, b, c = system.fresh(3), system.fresh(3), system.fresh(2)
    system.tie(a, b[::-1], 0, "")
    solution = system.solve()
    assert solution.unit[a].tolist() == solution.unit[b[::-1]].tolist() == [1, 2, 3]
    assert solution.unit[c].tolist() == [4, 5]
    assert solution.units == 6


def test_a_freeze_spreads_over_ties_with_the_first_reason() -> None:
    system = System()
    a, b = system.fresh(3), system.fresh(3)
    system.freeze(b[:1], 7, "because")
    system.tie(a, b, 0, "")
    system.freeze(a[:1], 8, "too late")
    solution = system.solve()
    assert (solution.unit[a] == 0).tolist() == [True, False, False]
    assert system.reasons[solution.frozen_by[a[0]]].words == "because"
    assert solution.frozen_by[a[1]] == 0


def test_a_tie_to_a_frozen_axis_freezes_with_its_reason() -> None:
    system = System()
    a = system.fresh(2)
    system.tie(a, system.frozen_axis(2, 3, "an input"), 4, "aligned")
    frozen = system.solve().frozen_by[a]
    assert {system.reasons[i].words for i in frozen} == {"an input"}


def test_a_factor_keeps_the_preferred_axis() -> None:
    system = System()
    whole, heads, size = system.fresh(2, 3), system.fresh(2), system.fresh(3)
    system.factors.append(Factor(whole, (heads, size), 0))
    system.prefer(heads)
    unit = system.solve().unit
    assert (unit[size] == 0).all()
    assert unit[whole].tolist() == [[unit[heads[0]]] * 3, [unit[heads[1]]] * 3]


def test_varying_axes() -> None:
    grid = np.broadcast_to(np.arange(1, 4, dtype=np.int32).reshape(1, 3, 1), (2, 3, 4))
    assert varying_axes(grid) == (1,)
    assert varying_axes(np.ones((2, 2), np.int32)) == ()
    block = reduce_to_varying(grid, (5, 6, 7))
    assert block is not None
    assert block.axes == (6,)
    assert block.labels.tolist() == [1, 2, 3]
    assert reduce_to_varying(np.ones((2, 2), np.int32), (0, 1)) is None


def test_a_flattened_feature_map_needs_few_labels() -> None:
    """GroupNormalization as exporters write it, over 64x64 pixels: no label for each pixel."""
    model = build(
        "(float[1,3,64,64] x) => (float[1,4,64,64] y)",
        """a = Conv(x, w1)  g = Reshape(a, groups)  n = InstanceNormalization(g, scale, shift)
        s = Shape(a)  b = Reshape(n, s)  h = Mul(b, k)  y = Conv(h, w2)""",
        "w1:8,3,1,1 groups=1,2,-1 scale:2 shift:2 k:8,1,1 w2:4,8,1,1",
    )
    result = prune_half(model)
    assert result.analysis.coupling.system.size < 500
    assert shapes(result.model)["w1"][0] == 4
    assert result.error <= TOLERANCE


@pytest.mark.parametrize(
    ("labels", "small"),
    [
        ([3, 3, 3, 4, 4, 5], [3, 4, 5]),
        ([7], [7]),
        ([[1, 1, 2], [1, 1, 2], [3, 3, 4]], [[1, 2], [3, 4]]),
        ([[1, 2], [2, 1]], [[1, 2], [2, 1]]),
    ],
)
def test_compress_and_repeat(labels: list[Any], small: list[Any]) -> None:
    array = np.array(labels, np.int32)
    compressed, lengths = compress(array)
    assert compressed.tolist() == small
    np.testing.assert_array_equal(repeat(compressed, lengths), array)
