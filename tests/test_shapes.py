"""Shapes at two sizes: which dimensions follow the input, and which shape chains fold."""

from __future__ import annotations

from onnxprune.graph import Graph
from onnxprune.shapes import Shapes, infer
from tests.graphs import build


def _infer(signature: str, body: str, weights: str = "") -> Shapes:
    return infer(Graph.of(build(signature, body, weights)))


def test_free_dimensions_are_told_from_fixed_ones() -> None:
    found = _infer("(float[N,S,8] x) => (float[N,S,4] y)", "y = MatMul(x, w)", "w:8,4")
    assert [found.is_fixed("y", axis) for axis in range(3)] == [False, False, True]
    dims = found.dims("y")
    assert dims is not None
    assert dims[2] == 4


def test_a_shape_chain_folds_to_the_reshape_target() -> None:
    found = _infer(
        "(float[N,S,8] x) => (float[N,S,2,4] y)",
        """d = Shape(x)  ns = Slice(d, zero, two)  to = Concat<axis=0>(ns, hd)
        y = Reshape(x, to)""",
        "zero=0 two=2 hd=2,4",
    )
    assert not found.is_fixed_value("to")
    value = found.value("to")
    assert value is not None
    assert value.tolist()[2:] == [2, 4]
    assert [found.is_fixed("y", axis) for axis in range(4)] == [False, False, True, True]


def test_a_chain_over_fixed_dimensions_is_a_fixed_value() -> None:
    found = _infer(
        "(float[N,6,8] x) => (float[?,?] y)",
        """d = Shape<start=1>(x)  p = ReduceProd<keepdims=1>(d)  to = Concat<axis=0>(open, p)
        y = Reshape(x, to)""",
        "open=-1",
    )
    assert found.is_fixed_value("to")
    value = found.value("to")
    assert value is not None
    assert value.tolist() == [-1, 48]


def test_a_fully_fixed_model_is_inferred_once() -> None:
    found = _infer("(float[2,8] x) => (float[2,4] y)", "y = MatMul(x, w)", "w:8,4")
    assert found.first is found.second
    assert found.dims("y") == (2, 4)
