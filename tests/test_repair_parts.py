"""Repairs piece by piece: which steps belong to a layer, and how its weights are read and moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from onnxprune.calibration import weights
from onnxprune.calibration.editable import Editable
from onnxprune.calibration.gram import Moments
from onnxprune.calibration.sites import Site, find_sites
from onnxprune.calibration.solve import ridge
from tests.graphs import build, outputs

Array = NDArray[Any]
SPACE = "(float[2,4,6,6] x) => (float[2,6,P,Q] y)"
ROWS = "(float[2,6,5] x) => (float[2,6,6] y)"


def site_of(model: onnx.ModelProto, number: int = 0) -> tuple[Editable, Site]:
    """A site of the model, and the model that it is of."""
    editable = Editable(model)
    return editable, list(find_sites(editable))[number]


def answer(model: onnx.ModelProto) -> Array:
    """The output on fixed inputs."""
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(3).normal(size=dims).astype(np.float32)
    return outputs(model, {"x": x})[0]


@pytest.mark.parametrize(
    ("signature", "layer", "dims", "belongs"),
    [
        (SPACE, "Conv", "6,1,1", True),
        (SPACE, "Conv", "1,6,1,1", True),
        (SPACE, "Conv", "6,1", False),  # rows of an image that is as high as there are channels
        (SPACE, "Conv", "1,1,6,1", False),
        (SPACE, "Conv", "6", False),
        (ROWS, "MatMul", "6", True),
        (ROWS, "MatMul", "1,6", True),
        (ROWS, "MatMul", "6,1", False),
    ],
)
def test_only_what_lies_along_the_channels_belongs_to_a_layer(
    signature: str, layer: str, dims: str, belongs: bool
) -> None:
    shape = "6,4,1,1" if layer == "Conv" else "5,6"
    _, site = site_of(build(signature, f"c = {layer}(x, w)  y = Mul(c, s)", f"w:{shape} s:{dims}"))
    assert [step.op_type for step in site.path] == (["Mul"] if belongs else [])


LAYERS = {
    "conv": (SPACE, "y = Conv<pads=[1,1,1,1]>(x, w)", "w:6,4,3,3"),
    "grouped conv": (SPACE, "y = Conv<group=2>(x, w)", "w:6,2,1,1"),
    "transposed": (SPACE, "y = ConvTranspose(x, w)", "w:4,6,2,2"),
    "grouped transposed": (SPACE, "y = ConvTranspose<group=2>(x, w)", "w:4,3,2,2"),
    "matmul": (ROWS, "y = MatMul(x, w)", "w:5,6"),
    "gemm": ("(float[2,5] x) => (float[2,6] y)", "y = Gemm<alpha=0.5>(x, w)", "w:5,6"),
    "gemm, turned": ("(float[2,5] x) => (float[2,6] y)", "y = Gemm<transB=1>(x, w)", "w:6,5"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_of_the_matrices_is_an_output_channel(name: str) -> None:
    model = build(*LAYERS[name])
    editable, site = site_of(model)
    value = weights.matrices(editable, site)
    group, row = divmod(4, value.shape[1])
    value[group, row] *= 2
    weights.write_matrices(editable, site, value)
    wanted = answer(model)
    np.moveaxis(wanted, site.axis, 0)[4] *= 2
    np.testing.assert_allclose(answer(editable.model()), wanted, rtol=1e-4, atol=1e-5)


SHIFTS = {
    "own bias": ("y = Gemm<beta=0.5>(r, w, b)", "w:5,6 b:6"),
    "no bias": ("y = Gemm(r, w)", "w:5,6"),
    "add": ("c = MatMul(r, w)  y = Add(b, c)", "w:5,6 b:6"),
    "subtraction": ("c = MatMul(r, w)  y = Sub(c, b)", "w:5,6 b:6"),
    "before a factor": ("c = MatMul(r, w)  d = Sub(c, b)  y = Mul(d, s)", "w:5,6 b:6 s:6"),
    "before a divisor": ("c = MatMul(r, w)  d = Add(c, b)  y = Div(d, s)", "w:5,6 b:6 s:6"),
    "own, behind a factor": ("c = Gemm(r, w, b)  y = Mul(c, s)", "w:5,6 b:6 s:6"),
    "normalized": (
        "c = Gemm(r, w, b) n = BatchNormalization(c, g, t, m, var) y = Mul(n, s)",
        "w:5,6 b:6 g:6 t:6 m:6 var:6 s:6",
    ),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_the_intercept_moves_by_what_is_asked(name: str) -> None:
    body, spec = SHIFTS[name]
    model = build("(float[2,5] x) => (float[2,6] y)", f"r = Relu(x)  {body}", spec)
    editable, site = site_of(model)
    old = weights.intercept(editable, site)
    change = np.arange(6.0) - 2
    assert old is not None and weights.can_shift(editable, site)
    weights.shift(editable, site, change)
    np.testing.assert_allclose(answer(editable.model()), answer(model) + change, atol=1e-5)
    moved = weights.intercept(editable, site_of(editable.model())[1])
    assert moved is not None
    np.testing.assert_allclose(moved, old + change, atol=1e-6)


def test_new_statistics_change_nothing_however_small_the_variance() -> None:
    body = "c = Conv(x, w)  y = BatchNormalization<epsilon=0.1>(c, g, t, m, var)"
    model = build(SPACE, body, "w:6,4,1,1 g:6 t:6 m:6 var:6")
    editable, site = site_of(model)
    weights.record_statistics(editable, site.path[0], np.arange(6.0), np.full(6, 1e-3))
    np.testing.assert_allclose(answer(editable.model()), answer(model), rtol=1e-4, atol=1e-5)


def test_weights_stay_where_nothing_that_is_fitted_predicts_better() -> None:
    """Two halves of pure noise around what the present weights give."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(2, 8))
    halves = []
    for _ in range(2):
        p = rng.normal(size=(12, 8))
        z = p @ start.T + rng.normal(size=(12, 2))
        sums = {"A": p.T @ p, "B": p.T @ z, "p": p.sum(0), "z": z.sum(0), "zz": (z * z).sum(0)}
        half = Moments()
        half.add(len(p), {name: value[None] for name, value in sums.items()})
        halves.append(half)
    solved, _ = ridge((halves[0], halves[1]), 0, start, True)
    assert solved is start
