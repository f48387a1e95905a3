"""Random graphs from a grammar of all operators: whatever is removed, the twin agrees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, note
from hypothesis import strategies as st

from onnxprune import pipeline, runtime, verify
from onnxprune.analysis import analyse
from onnxprune.errors import InvalidModelError
from onnxprune.ops.registry import RULES
from onnxprune.passes.apply import apply_keep
from tests.graphs import build, prune, prune_half
from tests.properties.models import random_keep, random_model

SEEDS = st.integers(0, 1 << 32)
COUNTS = st.integers(1, 12)

#: Rules that the grammar does not reach, and why.
NO_RUNTIME = "no runtime has it"
OLD = "only in operator sets before 11: tests/test_operators.py"
UNREACHED = {
    "CausalConvWithState": NO_RUNTIME,
    "LinearAttention": NO_RUNTIME,
    "NonMaxSuppression": "freezes all that it reads",
    "Scatter": OLD,
    "SimplifiedLayerNormalization": "not in the standard: tests/test_fused.py",
    "SwiGLU": NO_RUNTIME,
    "Upsample": OLD,
}


def _text(model: onnx.ModelProto) -> str:
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    for tensor in slim.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.ClearField("raw_data")
    return str(onnx.printer.to_text(slim))


def _loads(model: onnx.ModelProto) -> bool:
    try:
        runtime.session(model, threads=1)
    except InvalidModelError:
        return False
    return True


def _feeds(model: onnx.ModelProto, seed: int) -> list[verify.Feeds]:
    """Inputs of two sizes: another batch, and other lengths."""
    inputs = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim}
    found: list[verify.Feeds] = []
    for batch, length in ((2, 5), (3, 7)):
        sizes = {"S": length} if "S" in inputs else {}
        found.append(runtime.random_feeds(model, seed=seed, batch=batch, sizes=sizes))
    return found


@given(seed=SEEDS, count=COUNTS)
def test_any_choice_of_single_units_equals_its_twin(seed: int, count: int) -> None:
    """Not only whole budgets: each group loses an arbitrary part."""
    model = random_model(seed, count)
    note(_text(model))
    onnx.checker.check_model(model, full_check=True)
    analysis = analyse(model)
    keep = random_keep(analysis, seed)
    pruned = apply_keep(analysis.coupling, keep).model
    assert verify.structure_problems(pruned, model) == []
    feeds = _feeds(model, seed)
    try:
        error = verify.twin_error(analysis.coupling, keep, pruned, feeds, threads=1)
    except InvalidModelError:
        assume(_loads(model))  # else a fusion of ONNX Runtime breaks the model as it is
        raise
    assert error <= verify.default_tolerance(model)
    params, macs = analysis.cost.params(keep), analysis.cost.macs(keep)
    after = analyse(pruned)
    assert after.cost.params(after.everything) == pytest.approx(params)
    assert after.cost.macs(after.everything) == pytest.approx(macs)


@given(
    seed=SEEDS,
    count=COUNTS,
    ratio=st.sampled_from((0.25, 0.5, 0.75)),
    scope=st.sampled_from(("all", "exact")),
)
def test_a_budget_equals_its_twin(seed: int, count: int, ratio: float, scope: str) -> None:
    model = random_model(seed, count)
    note(_text(model))
    pruned = prune_half(model, scope, ratio=ratio, seed=seed, criterion="random")
    assert verify.structure_problems(pruned.model, model) == []
    assert pruned.error <= verify.default_tolerance(model)


@given(seed=SEEDS, count=COUNTS)
def test_pruning_nothing_gives_the_same_bytes(seed: int, count: int) -> None:
    model = random_model(seed, count)
    before = model.SerializeToString(deterministic=True)
    result = prune(model, channels=1.0, lossless=False)
    assert result.model.SerializeToString(deterministic=True) == before
    assert model.SerializeToString(deterministic=True) == before


@given(seed=SEEDS, count=COUNTS)
def test_pruning_twice_works(seed: int, count: int) -> None:
    model = random_model(seed, count)
    note(_text(model))
    once = prune_half(model, ratio=0.75, seed=seed, criterion="random").model
    twice = prune_half(once, ratio=0.75, seed=seed, criterion="random")
    assert verify.structure_problems(twice.model, model) == []
    assert twice.error <= verify.default_tolerance(model)


def test_a_full_share_returns_the_model() -> None:
    model = build(
        "(float[N,3,4,4] x) => (float[N,2,4,4] y)",
        "a = Conv(x, w1)  y = Conv(a, w2)",
        "w1:8,3,1,1 w2:2,8,1,1",
    )
    result = prune(model, channels=1.0, lossless=False)
    assert result.model.SerializeToString() == model.SerializeToString()
    assert pipeline.apply(model, result.plan) is model


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _operators(attribute.g)


def test_the_grammar_reaches_every_rule() -> None:
    """In 1,500 models every operator of the standard that has a rule comes up."""
    reached: set[str] = set()
    for seed in range(1500):
        reached.update(_operators(random_model(seed, 12).graph))
    standard = {name for domain, name in RULES if domain == ""}
    assert not standard - reached - UNREACHED.keys()
    assert not UNREACHED.keys() & reached


def test_the_same_seed_gives_the_same_model() -> None:
    one, two = random_model(5, 8), random_model(5, 8)
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)
    longer = random_model(5, 9)
    shared = len(random_model(5, 4).graph.node) // 2
    assert [n.op_type for n in longer.graph.node[:shared]] == [
        n.op_type for n in one.graph.node[:shared]
    ]
    assert np.all([n.op_type for n in one.graph.node])
