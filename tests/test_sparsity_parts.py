"""The parts of pruning single weights: blocks, the last solve, what a pattern lies along."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune import sparsity
from onnxprune.passes.lossless import Lossless
from onnxprune.passes.prune_weights import PruneWeights
from onnxprune.sparsity import Pattern, obs, resolve
from tests.graphs import build


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_size_of_blocks_does_not_matter(
    pattern: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    x = rng.normal(size=(64, 16)) @ rng.normal(size=(16, 16))
    weight, hessian = rng.normal(size=(5, 16)), x.T @ x / 64
    whole = obs(weight, hessian, 0.5, Pattern.parse(pattern), 0.01)
    monkeypatch.setattr(sparsity, "BLOCK", 4)
    np.testing.assert_allclose(
        obs(weight, hessian, 0.5, Pattern.parse(pattern), 0.01), whole, atol=1e-9
    )


def test_the_last_solve_is_least_squares_on_other_inputs(rng: np.random.Generator) -> None:
    t = rng.normal(size=(200, 6))
    x = t @ rng.normal(size=(6, 6))
    weight, keep = rng.normal(size=(3, 6)), rng.random((3, 6)) < 0.6
    found = resolve(weight, keep, x.T @ x / 200, t.T @ x / 200, 1e-9)
    for row, kept in enumerate(keep):
        best = np.linalg.lstsq(x[:, kept], t @ weight[row], rcond=None)[0]
        np.testing.assert_allclose(found[row, kept], best, rtol=1e-3, atol=1e-5)
        assert not found[row, ~kept].any()


def test_a_pattern_lies_along_the_channels_of_one_tap() -> None:
    model = build("(float[N,2,4,4] x) => (float[N,4,P,Q] y)", "y = Conv(x, w)", "w:4,2,1,2")
    [layer] = PruneWeights(pattern="2:4", method="magnitude", threads=1)(model).layers
    assert (layer.sparsity, layer.note) == (0.0, "its shape does not divide into 2:4")


@pytest.mark.parametrize(("operator", "value"), [("Sub", 0.0), ("Div", 1.0)])
def test_what_turns_its_second_operand_around_is_no_idle_layer(operator: str, value: float) -> None:
    body = f"c = Constant<value = float[1] {{{value}}}>()  h = Relu(x)  u = {operator}(c, h)"
    model = build("(float[N,4] x) => (float[N,4] y)", f"{body}  y = Relu(u)")
    assert not Lossless(threads=1, check=False)(model).modified
