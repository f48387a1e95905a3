"""Weights behind a Transpose, as exporters leave them without constant folding, are repaired."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune import prune
from onnxprune.calibration.editable import Editable
from tests.graphs import build, outputs

X = np.random.default_rng(0).normal(size=(256, 3, 8)).astype(np.float32)
FORM = """t0 = Transpose<perm=[1,0]>(w0)  h = MatMul(x, t0)  a = Add(h, b0)  r = Relu(a)
    t1 = Transpose(w1)  y = MatMul(r, t1)"""
TRANSPOSED = build("(float[N,3,8] x) => (float[N,3,4] y)", FORM, "w0:32,8 b0:32 w1:4,32")


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    return Editable(model).proto


def test_the_same_model_without_the_nodes() -> None:
    model = folded(TRANSPOSED)
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node] == ["MatMul", "Add", "Relu", "MatMul"]
    np.testing.assert_allclose(
        outputs(model, {"x": X})[0], outputs(TRANSPOSED, {"x": X})[0], rtol=1e-5, atol=1e-5
    )
    assert len(TRANSPOSED.graph.node) == 6


@pytest.mark.parametrize(
    ("inputs", "results", "body"),
    [
        ("float[N,8] x", "float[N,6] y", "t = Transpose(w)  h = MatMul(x, t)  y = MatMul(h, w2)"),
        ("float[N,8] x", "float[N,8] y", "t = Transpose(w)  h = MatMul(x, t)  y = MatMul(h, w)"),
        ("float[N,8] x", "float[N,6] y, float[8,6] t", "t = Transpose(w)  y = MatMul(x, t)"),
        ("float[N,8] x, float[6,8] w", "float[N,6] y", "t = Transpose(w)  y = MatMul(x, t)"),
    ],
    ids=["one reader", "two readers", "an output", "an input"],
)
def test_only_what_nothing_else_reads(inputs: str, results: str, body: str) -> None:
    model = build(f"({inputs}) => ({results})", body, "w:6,8 w2:6,6")
    count = sum(n.op_type == "Transpose" for n in folded(model).graph.node)
    assert count == (0 if "w2" in body else 1)


def test_repair_and_ranking_see_them() -> None:
    result = prune(TRANSPOSED, params=0.5, data={"x": X}, threads=1)
    pruned, repaired = result.report.rebuild
    assert (repaired["step"], repaired["solved"]) == ("reconstruct", 2)
    assert repaired["output_error"] < 0.7 * pruned["output_error"]
    same = prune(folded(TRANSPOSED), params=0.5, data={"x": X}, threads=1)
    np.testing.assert_allclose(
        outputs(result.model, {"x": X})[0], outputs(same.model, {"x": X})[0], rtol=1e-3, atol=1e-3
    )
