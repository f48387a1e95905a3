"""Shapes at two sizes: which dimensions follow the input, and which shape chains fold."""

from __future__ import annotations

import numpy as np

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


def test_padding_that_keeps_the_size_is_folded() -> None:
    """TensorFlow's "same" padding as an exporter writes it: the surplus is clipped at zero."""
    model = build(
        "(float[N,3,9,9] x) => (float[N,4,9,9] y)",
        """s = Shape(x)  w = Gather(s, last)  d = Sub(w, eight)  c = Clip(d, none)
        p = Concat<axis=0>(zeros, c, zeros, c)  q = Pad(x, p)  y = Conv(q, w1)""",
        "w1:4,3,2,2 last=3 eight=8 none=0 zeros=0,0,0",
    )
    fix = next(t for t in model.graph.initializer if t.name == "none")
    fix.ClearField("dims")
    zero = next(t for t in model.graph.initializer if t.name == "zeros")
    assert list(zero.dims) == [3]
    found = infer(Graph.of(model))
    np.testing.assert_array_equal(found.value("c"), [1])
    assert not found.doubted
