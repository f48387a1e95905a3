"""Sequences of tensors: channels are pruned through them, element by element."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import pytest

from onnxprune import verify
from onnxprune.analysis import analyse
from onnxprune.pipeline import inspect
from tests.graphs import TOLERANCE, build, prune_half, shapes

FLAT = "(float[N,6] x) => (float[N,4] y)"


@dataclass(frozen=True)
class Row:
    """`shrinks`: the weights that get smaller."""

    name: str
    body: str
    weights: str
    shrinks: str
    signature: str = FLAT


TWO = "w1:6,8 w2:6,8 w3:8,4 zero=0 one=1 last=-1"
ROWS = [
    Row(
        "construct-at",
        """a = MatMul(x, w1)  b = MatMul(x, w2)  s = SequenceConstruct(a, b)
        n = Squeeze(one, zero)  h = SequenceAt(s, n)  y = MatMul(h, w3)""",
        TWO,
        "w1 w2 w3",
    ),
    Row(
        "split-chunks",
        """a = MatMul(x, w1)  c = Squeeze(four, zero)  s = SplitToSequence<axis=1>(a, c)
        i = Squeeze(zero, zero)  j = Squeeze(last, zero)
        p = SequenceAt(s, i)  q = SequenceAt(s, j)
        d = MatMul(p, w2)  e = MatMul(q, w3)  y = Add(d, e)""",
        "w1:6,10 w2:4,4 w3:2,4 zero=0 last=-1 four=4",
        "w1 w2 w3",
    ),
    Row(
        "split-sizes-concat",
        """a = MatMul(x, w1)  s = SplitToSequence<axis=1>(a, sizes)
        h = ConcatFromSequence<axis=1>(s)  y = MatMul(h, w3)""",
        "w1:6,8 w3:8,4 sizes=6,2",
        "w1 w3",
    ),
    Row(
        "unbind-and-stack",
        """a = MatMul(x, w1)  s = SplitToSequence<axis=1, keepdims=0>(a)
        t = ConcatFromSequence<axis=1, new_axis=1>(s)
        h = ReduceSum<keepdims=0>(t, one)  y = MatMul(h, w3)""",
        "w1:6,8 w3:8,4 one=1",
        "w1 w3",
        signature="(float[N,3,6] x) => (float[N,4] y)",
    ),
    Row(
        "pieces-of-one",
        """a = MatMul(x, w1)  s = SplitToSequence<axis=1>(a)
        h = ConcatFromSequence<axis=1>(s)  y = MatMul(h, w3)""",
        "w1:6,8 w3:8,4",
        "",
    ),
    Row(
        "insert-erase",
        """a = MatMul(x, w1)  b = MatMul(x, w2)  s = SequenceConstruct(a)
        i = Squeeze(zero, zero)  t = SequenceInsert(s, b, i)  u = SequenceErase(t)
        h = SequenceAt(u, i)  y = MatMul(h, w3)""",
        TWO,
        "w1 w2 w3",
    ),
    Row(
        "any-element",
        """a = MatMul(x, w1)  b = MatMul(x, w2)  s = SequenceConstruct(a, b)
        r = ReduceSum<keepdims=0>(x)  f = Greater(r, half)  n = Cast<to=7>(f)
        h = SequenceAt(s, n)  y = MatMul(h, w3)""",
        TWO + " half:",
        "w1 w2 w3",
    ),
    Row(
        "identity",
        """a = MatMul(x, w1)  b = MatMul(x, w2)  s0 = SequenceConstruct(a, b)  s = Identity(s0)
        h = ConcatFromSequence<axis=-1>(s)  y = MatMul(h, w3)""",
        "w1:6,8 w2:6,8 w3:16,4",
        "w1 w2 w3",
    ),
    Row(
        "empty-and-insert",
        """a = MatMul(x, w1)  s = SequenceEmpty()  t = SequenceInsert(s, a)
        h = ConcatFromSequence<axis=1>(t)  y = MatMul(h, w3)""",
        "w1:6,8 w3:8,4",
        "w1 w3",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_channels_are_pruned_through_sequences(row: Row) -> None:
    model = build(row.signature, row.body, row.weights)
    result = prune_half(model)
    before, after = shapes(model), shapes(result.model)
    floats = {n for n in before if n.startswith("w")}
    assert {n for n in floats if after[n] != before[n]} == set(row.shrinks.split())
    assert result.error <= TOLERANCE
    assert not verify.structure_problems(result.model, model)


def test_sequences_that_leave_the_model_stay_whole() -> None:
    model = build(
        "(float[N,6] x) => (seq(float[N,8]) s)",
        "a = MatMul(x, w1)  b = MatMul(x, w2)  s = SequenceConstruct(a, b)",
        "w1:6,8 w2:6,8",
    )
    assert shapes(prune_half(model).model) == shapes(model)
    assert {r.reason for r in inspect(model).frozen if r.axis == 1} >= {
        "axis 1 of model output 's'"
    }


def _collecting(trips: str, weights: str, go_on: str = "go", extra: str = "") -> onnx.ModelProto:
    return build(
        f"(float[N,6] x{extra}) => (float[N,4] y)",
        f"""h = MatMul(x, w1)  s = SequenceEmpty()
        t = Loop ({trips}, , s) < body = l (int64 i, bool go, seq(float[N,8]) c)
          => (bool on, seq(float[N,8]) d) {{
            on = Identity({go_on})  p = Cast<to=1>(i)  q = Add(h, p)  d = SequenceInsert(c, q) }} >
        k = ConcatFromSequence<axis=1>(t)  y = MatMul(k, w2)""",
        weights,
    )


def test_a_loop_that_collects_a_fixed_number_is_unrolled() -> None:
    model = _collecting("trips", "w1:6,8 w2:24,4 trips=3")
    result = prune_half(model)
    after = shapes(result.model)
    assert (after["w1"], after["w2"]) == ((6, 4), (12, 4))
    assert result.error <= TOLERANCE
    assert [node.op_type for node in result.model.graph.node].count("SequenceInsert") == 3
    assert not verify.structure_problems(result.model, model)


@pytest.mark.parametrize(
    ("trips", "weights", "go_on", "extra"),
    [
        ("n", "w1:6,8 w2:24,4", "go", ", int64 n"),
        ("trips", "w1:6,8 w2:24,4 trips=3", "stop", ", bool stop"),
        ("trips", "w1:6,8 w2:1600,4 trips=200", "go", ""),
    ],
    ids=["asked-for", "stopped", "too-often"],
)
def test_a_sequence_that_other_loops_collect_stays_whole(
    trips: str, weights: str, go_on: str, extra: str
) -> None:
    model = _collecting(trips, weights, go_on, extra)
    analysis = analyse(model)
    assert [node.op_type for node in analysis.coupling.graph.top].count("Loop") == 1
    assert any("no fixed number of tensors" in row.reason for row in inspect(model).frozen)
