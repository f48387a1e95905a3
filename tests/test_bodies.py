"""If, Loop and Scan: channels are pruned through bodies, inside them, and what they capture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune import runtime, verify
from onnxprune.bodies import separate_bodies
from onnxprune.graph import Graph
from onnxprune.pipeline import inspect
from tests.graphs import TOLERANCE, build, prune, prune_half, tensors


@dataclass(frozen=True)
class Row:
    """`shrinks`: the weights, those in bodies included, that get smaller."""

    name: str
    body: str
    weights: str
    shrinks: str
    signature: str = "(float[N,6] x) => (float[N,4] y)"
    inner: str = ""
    opset: int = 18


ROWS = [
    Row(
        "if-captures",
        """a = MatMul(x, w1)  h = Relu(a)  s = ReduceSum<keepdims=0>(x)  k = Greater(s, zero)
        b = If (k) <
          then_branch = t () => (float[N,8] p) { p = MatMul(h, w2) },
          else_branch = e () => (float[N,8] q) { r = MatMul(h, w3)  q = Neg(r) }
        >
        y = MatMul(b, w4)""",
        "w1:6,8 w2:8,8 w3:8,8 w4:8,4 zero:",
        "w1 w2 w3 w4",
    ),
    Row(
        "if-same-names-own-weights",
        """a = MatMul(x, w1)  s = ReduceSum<keepdims=0>(x)  k = Greater(s, zero)
        b = If (k) <
          then_branch = t () => (float[N,8] p) { m = MatMul(a, v)  p = Relu(m) },
          else_branch = e () => (float[N,8] p) { m = MatMul(a, v)  p = Tanh(m) }
        >
        y = MatMul(b, w4)""",
        "w1:6,8 w4:8,4 zero:",
        "w1 w4 v v_1",
        inner="v:8,8",
    ),
    Row(
        "loop-passes-state-on",
        """h0 = MatMul(x, w1)  c0 = MatMul(x, w2)
        h, c = Loop (trips, , h0, c0) < body = l (int64 i, bool go, float[N,8] s, float[N,8] keep)
          => (bool go, float[N,8] u, float[N,8] keep) { m = MatMul(keep, w5)  u = Add(m, s) } >
        d = MatMul(c, w3)  e = MatMul(h, w4)  y = Add(d, e)""",
        "w1:6,8 w2:6,8 w3:8,4 w4:8,4 w5:8,8 trips=2",
        "w1 w2 w3 w4 w5",
    ),
    Row(
        "loop-state",
        """h0 = MatMul(x, w1)
        h = Loop (trips, , h0) < body = l (int64 i, bool go, float[N,8] s)
          => (bool on, float[N,8] u) { on = Identity(go)  m = MatMul(s, w2)  u = Tanh(m) } >
        y = MatMul(h, w3)""",
        "w1:6,8 w2:8,8 w3:8,4 trips=3",
        "w1 w2 w3",
    ),
    Row(
        "loop-without-turns",
        """h0 = MatMul(x, w1)
        h = Loop (trips, , h0) < body = l (int64 i, bool go, float[N,8] s)
          => (bool on, float[N,8] u) { on = Identity(go)  m = MatMul(s, w2)  u = Tanh(m) } >
        y = MatMul(h, w3)""",
        "w1:6,8 w2:8,8 w3:8,4 trips=0",
        "w1 w2 w3",
    ),
    Row(
        "loop-stacks",
        """h0 = MatMul(x, w1)
        h, all = Loop (trips, , h0) < body = l (int64 i, bool go, float[N,8] s)
          => (bool on, float[N,8] u, float[N,8] o)
          { on = Identity(go)  m = MatMul(s, w2)  u = Tanh(m)  o = MatMul(u, w5) } >
        z = ReduceSum<keepdims=0>(all, zero)
        b = MatMul(h, w3)  c = MatMul(z, w6)  y = Add(b, c)""",
        "w1:6,8 w2:8,8 w3:8,4 w5:8,10 w6:10,4 trips=3 zero=0",
        "w1 w2 w3 w5 w6",
    ),
    Row(
        "loop-own-hidden-layer",
        """h = Loop (trips, , x) < body = l (int64 i, bool go, float[N,6] s)
          => (bool on, float[N,6] u)
          { on = Identity(go)  m = MatMul(s, w1)  r = Relu(m)  n = MatMul(r, w2)  u = Add(s, n) } >
        y = MatMul(h, w3)""",
        "w1:6,8 w2:8,6 w3:6,4 trips=2",
        "w1 w2",
    ),
    Row(
        "loop-reshape-inside",
        """h0 = MatMul(x, w1)
        h = Loop (trips, , h0) < body = l (int64 i, bool go, float[N,8] s)
          => (bool on, float[N,8] u)
          { on = Identity(go)  p = Reshape(s, cut)  q = Transpose<perm=[0,2,1]>(p)
            v = Transpose<perm=[0,2,1]>(q)  m = Reshape(v, flat)  u = Tanh(m) } >
        y = MatMul(h, w3)""",
        "w1:6,8 w3:8,4 trips=2 cut=0,2,4 flat=0,8",
        "w1 w3",
    ),
    Row(
        "if-in-loop",
        """h0 = MatMul(x, w1)
        h = Loop (trips, , h0) < body = l (int64 i, bool go, float[N,8] s)
          => (bool on, float[N,8] u) { on = Identity(go)
            k = Greater(i, one)
            u = If (k) <
              then_branch = t () => (float[N,8] p) { m = MatMul(s, w2)  p = Relu(m) },
              else_branch = e () => (float[N,8] p) { m = MatMul(s, w4)  p = Tanh(m) }
            > } >
        y = MatMul(h, w3)""",
        "w1:6,8 w2:8,8 w4:8,8 w3:8,4 trips=3 one=1",
        "w1 w2 w4 w3",
    ),
    Row(
        "scan-recurrent",
        """e = MatMul(x, w1)  h0 = MatMul(first, w4)
        last, all = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1],
          body = l (float[N,8] s, float[N,8] step) => (float[N,8] u, float[N,8] o)
          { m = MatMul(s, w2)  n = Add(m, step)  u = Tanh(n)  o = Identity(u) } > (h0, e)
        y = MatMul(all, w3)""",
        "w1:6,8 w2:8,8 w3:8,4 w4:6,8",
        "w1 w2 w3 w4",
        signature="(float[N,5,6] x, float[N,6] first) => (float[N,5,4] y)",
    ),
]


def _model(row: Row) -> onnx.ModelProto:
    model = build(
        row.signature,
        row.body,
        row.weights,
        opset=row.opset,
    )
    for node in model.graph.node:
        for seed, attribute in enumerate(a for a in node.attribute if a.HasField("g")):
            attribute.g.initializer.extend(tensors(row.inner, seed))
    return model


def _all_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {name: c.dims for name, c in separate_bodies(Graph.of(model)).constants.items()}


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_channels_are_pruned_through_bodies(row: Row) -> None:
    model = _model(row)
    result = prune_half(model)
    before, after = _all_shapes(model), _all_shapes(result.model)
    assert {n for n in before if after.get(n, before[n]) != before[n]} == set(row.shrinks.split())
    assert result.error <= TOLERANCE
    assert result.effect > 1e-3, "the twin must differ from the original for the test to bite"
    assert not verify.structure_problems(result.model, model)
    for batch in (1, 3):
        runtime.run(runtime.session(result.model), runtime.random_feeds(model, batch=batch))


def test_a_state_that_grows_stays_whole() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """h0 = MatMul(x, w1)
        h = Loop (trips, , h0) < body = l (int64 i, bool go, float[N,k] s)
          => (bool go, float[N,m] u) { u = Concat<axis=1>(s, h0) } >
        z = ReduceSum<keepdims=1>(h, one)  y = MatMul(z, w3)""",
        "w1:6,8 w3:1,4 trips=3 one=1",
    )
    (row,) = (r for r in inspect(model).frozen if r.tensor == "w1" and r.axis == 1)
    assert "shape" in row.reason
    runtime.run(runtime.session(prune_half(model).model), runtime.random_feeds(model))


def test_an_operator_with_a_body_but_no_rule_holds_what_the_body_reads() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """h = MatMul(x, w1)  c = MatMul(x, w2)  q = SequenceConstruct(x)
        r = SequenceMap (q, h) < body = b (float[N,6] one, float[N,8] two)
          => (float[N,8] o) { o = Add(two, c) } >
        z = SequenceAt(r, zero)  y = MatMul(z, w3)""",
        "w1:6,8 w2:6,8 w3:8,4",
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(0), "zero"))
    result = prune_half(model)
    assert _all_shapes(result.model) == _all_shapes(model)
    frozen = {r.tensor: r.reason for r in inspect(model).frozen}
    assert frozen["w2"] == "used inside the body of SequenceMap r"


def test_multiply_adds_of_a_scan_count_every_step() -> None:
    model = _model(next(r for r in ROWS if r.name == "scan-recurrent"))
    (row,) = (r for r in inspect(model).layers if r.name == "m")
    assert row.macs_before == 5 * 8 * 8


def test_names_are_unique_over_bodies_and_the_model_stays_as_it_is() -> None:
    model = _model(next(r for r in ROWS if r.name == "if-same-names-own-weights"))
    before = model.SerializeToString(deterministic=True)
    nodes = separate_bodies(Graph.of(model)).nodes
    assert model.SerializeToString(deterministic=True) == before
    made = [name for node in nodes for name in node.outputs]
    assert len(made) == len(set(made))


def test_the_pipeline_verifies_a_loop() -> None:
    model = _model(next(r for r in ROWS if r.name == "if-in-loop"))
    result = prune(model, channels=0.5)
    assert result.report.checks[0].passed
    assert result.report.after.params < 0.6 * result.report.before.params


SQUEEZE = """a = MatMul(x, w1)  s = Shape(a)  d = Gather(s, axis)  k = Equal(d, one)
    b = If (k) <
      then_branch = t () => (float[M,K] p) { p = ReduceSum<keepdims=0>(a, axis) },
      else_branch = e () => (float[N,8] q) { q = Relu(a) }
    >
    y = MatMul(b, w2)"""


def test_a_branch_that_fixed_shapes_choose_replaces_its_if() -> None:
    model = build("(float[N,5,6] x) => (float[N,5,4] y)", SQUEEZE, "w1:6,8 w2:8,4 axis=1 one=1")
    result = prune_half(model)
    assert result.error <= TOLERANCE
    assert "If" not in {node.op_type for node in result.model.graph.node}
    assert _all_shapes(result.model)["w1"] == (6, 4)
    assert not verify.structure_problems(result.model, model)


def test_what_may_choose_another_branch_stays() -> None:
    axis = 0  # N is 1 for some inputs
    model = build(
        "(float[N,5,6] x) => (float[?,?,4] y)", SQUEEZE, f"w1:6,8 w2:8,4 axis={axis} one=1"
    )
    words = "the branches of If b differ in rank"
    assert words in {row.reason for row in inspect(model).frozen}
    assert _all_shapes(prune_half(model).model)["w1"] == (6, 8)


def test_a_length_that_chooses_a_branch_chooses_as_before() -> None:
    model = build("(float[N,5,6] x) => (float[N,5,4] y)", SQUEEZE, "w1:6,2 w2:2,4 axis=2 one=1")
    model.graph.node[4].attribute[1].g.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    result = prune_half(model)  # one channel is left: a fresh comparison would choose the other
    assert result.error <= TOLERANCE
    assert _all_shapes(result.model)["w1"] == (6, 1)


def test_the_rank_of_a_pruned_tensor_is_no_length() -> None:
    model = build(
        "(float[N,5,6] x) => (float[N,5,4] y)",
        """a = MatMul(x, w1)  s = Shape(a)  rank = Size(s)  k = Equal(rank, three)
        b = If (k) <
          then_branch = t () => (float[N,5,8] p) { p = Relu(a) },
          else_branch = e () => (float[N,5,8] q) { q = Unsqueeze(a, zero) }
        >
        y = MatMul(b, w2)""",
        "w1:6,8 w2:8,4 three=3 zero=0",
    )
    assert _all_shapes(prune_half(model).model)["w1"] == (6, 4)


def test_the_number_of_elements_of_a_pruned_tensor_is_a_length() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        "a = MatMul(x, w1)  n = Size(a)  f = Cast<to=1>(n)  b = Div(a, f)  y = MatMul(b, w2)",
        "w1:6,8 w2:8,4",
    )
    reasons = {(row.tensor, row.axis): row.reason for row in inspect(model).frozen}
    assert reasons["w1", 1] == "its length is used in arithmetic by Cast f"


def test_weights_in_bodies_are_counted() -> None:
    model = _model(next(r for r in ROWS if r.name == "if-same-names-own-weights"))
    assert inspect(model).cost.params == 6 * 8 + 2 * 8 * 8 + 8 * 4 + 1
