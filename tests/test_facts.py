"""What is claimed of values before a run holds in the run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from onnxprune import runtime
from onnxprune.errors import InvalidDataError, InvalidModelError
from onnxprune.facts import Facts, find_facts
from onnxprune.graph import Graph
from onnxprune.shapes import infer
from tests.graphs import build
from tests.properties.models import random_model

SLACK = 1e-4


def facts_of(model: onnx.ModelProto) -> Facts:
    graph = Graph.of(model)
    return find_facts(graph, infer(graph))


def violations(model: onnx.ModelProto, seed: int = 0) -> list[str]:
    """Names of tensors whose values are outside of what is known of them."""
    facts = facts_of(model)
    made = {n for node in facts.graph.top for n in node.outputs}
    names = [n for n in facts.known if n in made]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    have = {value.name for value in model.graph.output}
    tapped.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in have
    )
    session = runtime.session(tapped, threads=1, optimize=False)
    values = runtime.run(session, runtime.random_feeds(model, seed=seed))
    wrong = []
    for name in names:
        fact, value = facts.known[name], np.asarray(values[name], np.float64)
        slack = [
            SLACK * (1 + np.abs(np.where(np.isfinite(v), v, 0))) for v in (fact.low, fact.high)
        ]
        if ((value < fact.low - slack[0]) | (value > fact.high + slack[1])).any():
            wrong.append(name)
    return wrong


@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 12))
def test_facts_hold_in_random_models(seed: int, count: int) -> None:
    model = random_model(seed, count)
    try:
        found = violations(model, seed)
    except (InvalidModelError, InvalidDataError):
        assume(False)
        return
    assert found == []


@pytest.mark.parametrize(
    ("body", "weights", "low", "high"),
    [
        ("y = Sigmoid(x)", "", 0, 1),
        ("a = Relu(x) y = Neg(a)", "", -np.inf, 0),
        ("a = Sigmoid(x) y = MatMul(a, w)", "w:4,4", None, None),
        ("y = Softmax(x)", "", 0, 1),
        ("a = Sigmoid(x) b = Relu(x) y = Mul(a, b)", "", 0, np.inf),
        ("a = Relu(x) c = Sigmoid(x) y = Sub(c, a)", "", -np.inf, 1),
        ("a = Tanh(x) y = Abs(a)", "", 0, 1),
        ("a = Tanh(x) b = ReduceMean<keepdims=1>(a) y = Max(b, a)", "", -1, 1),
    ],
)
def test_bounds(body: str, weights: str, low: float | None, high: float | None) -> None:
    model = build("(float[N,4] x) => (float[N,4] y)", body, weights)
    fact = facts_of(model).of("y")
    assert np.isfinite(fact.low).any() or np.isfinite(fact.high).any()
    if low is not None:
        assert float(fact.low.min()) == pytest.approx(low, abs=1e-6)
        assert float(fact.high.max()) == pytest.approx(high, abs=1e-6)
    assert violations(model) == []


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("y = Conv<pads=[1,1,1,1]>(u, var)", "var:4,4,3,3"),
        ('y = Conv<auto_pad="SAME_LOWER">(u, var)', "var:4,4,3,3"),
        ("y = ConvTranspose<strides=[2,2]>(u, var)", "var:4,4,3,3"),
        ("y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(u)", ""),
        ("y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(u)", ""),
        ("y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(u)", ""),
        ("y = Pad(u, sizes)", "sizes=0,0,1,1,0,0,1,1"),
        ("h = Tanh(x)  y = LeakyRelu<alpha=-0.5>(h)", ""),
    ],
)
def test_borders_and_what_falls(body: str, weights: str) -> None:
    """Zeros come in around values of at least a half."""
    head = "(float[N,4,6,6] x) => (float[N,4,P,Q] y)"
    model = build(head, f"s = Sigmoid(x)  u = Add(s, var_low)  {body}", f"var_low:1 {weights}")
    assert violations(model) == []
