"""A check must compare numbers: where the outputs have none, inner tensors are compared."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune import runtime, verify
from onnxprune.analysis import analyse
from onnxprune.errors import VerificationError
from onnxprune.passes.apply import apply_keep
from onnxprune.probes import are_telling, follow_inputs, probes
from tests.graphs import build, prune_half

INTEGERS = """a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  d = Sub(c, far)
    y = ArgMax<axis=1, keepdims=0>(d)"""
EMPTY = """a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  s = Sigmoid(c)
    n = ReduceMax<axes=[1], keepdims=0>(s)  k = Greater(n, two)  y = Compress<axis=0>(c, k)"""


@pytest.mark.parametrize(
    ("value", "telling"),
    [
        ([np.zeros((0, 4), np.float32), np.arange(3)], False),
        ([np.full(3, np.nan, np.float32)], False),
        ([np.array([np.nan, 1], np.float32)], True),
        ([[np.zeros((0,), np.float32)], [np.ones(1, np.float16)]], True),
    ],
    ids=["empty-and-integers", "not-a-number", "one-number", "sequences"],
)
def test_what_says_something(value: list[object], telling: bool) -> None:
    assert are_telling(value) is telling


@pytest.mark.parametrize(
    ("signature", "body", "opset"),
    [
        ("(float[N,6] x) => (int64[N] y)", INTEGERS, 18),
        ("(float[N,6] x) => (float[M,4] y)", EMPTY, 17),
    ],
    ids=["integers", "empty"],
)
def test_wrong_weights_show_in_inner_tensors(signature: str, body: str, opset: int) -> None:
    model = build(signature, body, "w1:6,8 w2:8,4 far:1,4 two:", opset=opset)
    two = next(t for t in model.graph.initializer if t.name == "two")
    two.raw_data = np.float32(2).tobytes()
    result = prune_half(model)
    assert result.error <= 1e-6
    coupling, feeds = result.analysis.coupling, runtime.working_feeds(model)
    next(t for t in result.model.graph.initializer if t.name == "w2").raw_data = bytes(4 * 4 * 4)
    assert verify.twin_error(coupling, result.keep, result.model, feeds) > 0.1


def test_a_model_without_a_finite_number_cannot_be_compared() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        "n = Log(minus)  z = Add(x, n)  a = MatMul(z, w1)  y = MatMul(a, w2)",
        "w1:6,8 w2:8,4 minus:",
    )
    minus = next(t for t in model.graph.initializer if t.name == "minus")
    minus.raw_data = np.float32(-1).tobytes()
    analysis = analyse(model)
    keep = analysis.everything
    keep[analysis.groups[0].units[:4]] = False
    pruned = apply_keep(analysis.coupling, keep).model
    feeds = runtime.working_feeds(model)
    with pytest.raises(VerificationError, match="no finite numbers on random inputs"):
        verify.twin_error(analysis.coupling, keep, pruned, feeds)


@pytest.mark.parametrize(
    ("outputs", "follow"),
    [
        ([np.float32([[1, 2], [1, 2]])], False),
        ([np.float32([[1, 2], [1, 2.5]])], True),
        ([np.float32([[480, 2], [480, 2.00001]])], False),
        ([np.float32([[1, 2], [1, 2]]), np.float32([[0], [1]])], True),
        ([np.float32([[1, 2], [1, 2]]), np.float32([3.0, 4.0, 5.0])], True),
        ([np.arange(2)], True),
    ],
    ids=["equal", "different", "rounding", "another-output", "without-a-batch", "integers"],
)
def test_what_depends_on_the_input(outputs: list[object], follow: bool) -> None:
    assert follow_inputs(outputs, 2) is follow
    assert follow_inputs(outputs, 1)


def test_wrong_weights_show_where_the_signal_fades_before_the_outputs() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """a = MatMul(x, w1)  r = Relu(a)  b = MatMul(r, w2)  h = Sigmoid(b)  c = Mul(h, tiny)
        d = MatMul(c, w3)  y = Add(d, far)""",
        "w1:6,8 w2:8,8 tiny: w3:8,4 far:4",
    )
    tiny = next(t for t in model.graph.initializer if t.name == "tiny")
    tiny.raw_data = np.float32(1e-9).tobytes()
    result = prune_half(model)
    assert result.error <= 1e-6
    coupling, feeds = result.analysis.coupling, runtime.working_feeds(model)
    next(t for t in result.model.graph.initializer if t.name == "w2").raw_data = bytes(4 * 4 * 4)
    assert verify.twin_error(coupling, result.keep, result.model, feeds) > 0.1


def test_batch_and_channels_in_one_axis_are_no_probe() -> None:
    """The number of removed places follows the batch there: another batch has another mask."""
    model = build(
        "(float[N,3,2,2] x) => (int64[N,2,2] y)",
        """a = Conv(x, w1)  b = Relu(a)  p = Reshape(b, apart)  q = Neg(p)  r = Reshape(q, back)
        c = Conv(r, w2)  y = ArgMax<axis=1, keepdims=0>(c)""",
        "w1:8,3,1,1 w2:4,8,1,1 apart=-1,2,2 back=-1,8,2,2",
    )
    result = prune_half(model)
    names = {p.name for p in probes(result.analysis.coupling, result.keep, result.model)}
    assert "b" in names
    assert names.isdisjoint({"p", "q"})
    assert result.error <= 1e-6


def test_numbers_too_small_to_be_exact_do_not_differ() -> None:
    tiny, other = np.array([1e-43], np.float32), np.array([2e-43], np.float32)
    assert verify.difference([tiny], [other]) == 0
    assert verify.difference([tiny * 0 + 1e-30], [other]) > 1
