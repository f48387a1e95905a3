"""Rules broken on purpose: the check keeps the groups at fault, and no wrong model comes out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from onnxprune import runtime, verify
from onnxprune.analysis import analyse
from onnxprune.errors import VerificationError
from onnxprune.ops.registry import REWRITES, RULES
from onnxprune.result import Result
from onnxprune.twin import masked_twin
from tests import mutations as m
from tests import test_operators, test_operators_indexing, test_rules
from tests.graphs import TOLERANCE, outputs, prune

MODELS = {
    row.name: row for row in (*test_rules.ROWS, *test_operators.ROWS, *test_operators_indexing.ROWS)
}

#: (row of the rule tests, operator, what is done to its rule)
RULE_MUTATIONS = [
    ("conv-2d", "Conv", m.without_ties),
    ("conv-2d", "Conv", m.permutes_ties),
    ("conv-2d", "Conv", m.without_contraction),
    ("conv-2d", "Conv", m.forgets_input(2)),
    ("conv-grouped", "Conv", m.without_factors),
    ("conv-transpose-grouped", "ConvTranspose", m.without_factors),
    ("conv-transpose", "ConvTranspose", m.forgets_input(2)),
    ("deform-conv", "DeformConv", m.without_ties),
    ("gemm", "Gemm", m.without_ties),
    ("gemm", "Gemm", m.forgets_input(2)),
    ("gemm-trans-a", "Gemm", m.contracts_next_axis),
    ("matmul", "MatMul", m.permutes_ties),
    ("attention", "MatMul", m.without_ties),
    ("attention-einsum", "Einsum", m.without_ties),
    ("einsum-dense", "Einsum", m.without_contraction),
    ("batch-norm", "BatchNormalization", m.without_ties),
    ("batch-norm", "BatchNormalization", m.forgets_input(3)),
    ("group-norm", "GroupNormalization", m.without_factors),
    ("group-norm-layer", "GroupNormalization", m.exact_everything),
    ("layer-norm", "LayerNormalization", m.exact_everything),
    ("layer-norm", "LayerNormalization", m.forgets_input(1)),
    ("softmax", "Softmax", m.exact_everything),
    ("lp-normalization", "LpNormalization", m.without_contraction),
    ("lrn", "LRN", m.exact_everything),
    ("mean-over-channels", "ReduceMean", m.exact_everything),
    ("sum-over-channels", "ReduceSum", m.without_contraction),
    ("cumsum", "CumSum", m.without_contraction),
    ("arg-max-freezes", "ArgMax", m.without_freezing),
    ("residual", "Add", m.without_ties),
    ("gated", "Mul", m.permutes_ties),
    ("where", "Where", m.without_ties),
    ("conv-2d", "Relu", m.reversed_outputs),
    ("prelu", "PRelu", m.without_ties),
    ("concat", "Concat", m.reversed_outputs),
    ("split-uneven", "Split", m.shifted_outputs),
    ("roll", "Slice", m.shifted_outputs),
    ("gather-permuted", "Gather", m.reversed_outputs),
    ("gather-elements-index-computed", "GatherElements", m.without_ties),
    ("scatter-nd", "ScatterND", m.without_ties),
    ("reshape-flatten", "Reshape", m.shifted_outputs),
    ("flatten", "Flatten", m.reversed_outputs),
    ("flatten-after-transpose", "Transpose", m.reversed_outputs),
    ("depth-to-space", "DepthToSpace", m.without_ties),
    ("depth-to-space-crd", "DepthToSpace", m.permutes_ties),
    ("space-to-depth", "SpaceToDepth", m.doubled_outputs),
    ("max-pool", "MaxPool", m.shifted_outputs),
    ("lstm-forward", "LSTM", m.without_ties),
    ("gru-bidirectional", "GRU", m.forgets_input(3)),
    ("rnn-forward", "RNN", m.without_contraction),
]

#: (row of the rule tests, operator, what is done to its rewrite)
REWRITE_MUTATIONS = [
    ("reshape-flatten", "Reshape", m.forgotten),
    ("attention", "Reshape", m.forgotten),
    ("split-uneven", "Split", m.forgotten),
    ("split-uneven", "Split", m.off_by(1)),
    ("slice-part", "Slice", m.forgotten),
    ("slice-part", "Slice", m.off_by(-1)),
    ("gather-part", "Gather", m.forgotten),
    ("gather-permuted", "Gather", m.reversed_operand),
    ("pad-crop-channels", "Pad", m.forgotten),
    ("tile-of-one", "Tile", m.forgotten),
    ("expand-fixed", "Expand", m.forgotten),
    ("conv-depthwise", "Conv", m.forgotten),
    ("conv-depthwise", "Conv", m.off_by(1)),
    ("conv-transpose-depthwise", "ConvTranspose", m.forgotten),
    ("group-norm", "GroupNormalization", m.forgotten),
    ("lstm-forward", "LSTM", m.forgotten),
    ("resize-sizes", "Resize", m.forgotten),
]


def _names(mutations: list[tuple[str, str, object]]) -> list[str]:
    return [f"{i}-{row}-{op}" for i, (row, op, _) in enumerate(mutations)]


@pytest.mark.parametrize(("row", "op", "mutate"), RULE_MUTATIONS, ids=_names(RULE_MUTATIONS))
def test_a_broken_rule_never_gives_a_wrong_model(
    monkeypatch: pytest.MonkeyPatch, row: str, op: str, mutate: m.MutateRule
) -> None:
    model = MODELS[row].model()
    entries = [replace(e, rule=mutate(e.rule)) for e in RULES["", op]]
    with monkeypatch.context() as patch:
        patch.setitem(RULES, ("", op), entries)
        result = _pruned(model)
    _check(model, result)


@pytest.mark.parametrize(("row", "op", "mutate"), REWRITE_MUTATIONS, ids=_names(REWRITE_MUTATIONS))
def test_a_broken_rewrite_never_gives_a_wrong_model(
    monkeypatch: pytest.MonkeyPatch, row: str, op: str, mutate: m.MutateRewrite
) -> None:
    model = MODELS[row].model()
    with monkeypatch.context() as patch:
        patch.setitem(REWRITES, ("", op), mutate(REWRITES["", op]))
        result = _pruned(model)
    _check(model, result)


def _pruned(model: onnx.ModelProto) -> Result | None:
    try:
        return prune(model, channels=0.5)
    except VerificationError as error:
        assert str(error)
        return None


def _check(model: onnx.ModelProto, result: Result | None) -> None:
    """The fault was seen, and what was pruned all the same is what the sound rules would give."""
    assert result is not None
    assert any("its pruning failed the check" in note for note in result.report.notes)
    assert verify.structure_problems(result.model, model) == []
    feeds = runtime.random_feeds(model, seed=0)
    ours = outputs(result.model, feeds)
    references = (_sound_twin(model, result), _with_zeros(model, result))
    assert min(verify.difference(ours, outputs(r, feeds)) for r in references) <= TOLERANCE


def _with_zeros(model: onnx.ModelProto, result: Result) -> onnx.ModelProto:
    """The original with zeros for all that is missing in the result's weights: no rule needed."""
    silent = onnx.ModelProto()
    silent.CopyFrom(model)
    for tensor in silent.graph.initializer:
        for item in result.plan.initializers.values():
            if item.source == tensor.name:
                array = onnx.numpy_helper.to_array(tensor).copy()
                for axis, kept in item.keep.items():
                    gone = np.setdiff1d(np.arange(array.shape[int(axis)]), kept)
                    np.moveaxis(array, int(axis), 0)[gone] = 0
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return silent


def _sound_twin(model: onnx.ModelProto, result: Result) -> onnx.ModelProto:
    """The twin, by the rules as they are, of what is missing in the result's weights."""
    coupling = analyse(model).coupling
    keep = np.ones(coupling.solution.units, bool)
    for item in result.plan.initializers.values():
        for layout in coupling.constants[item.source].values():
            for block in layout:
                kept = item.keep.get(str(block.axes[0]), range(block.labels.size))
                gone = np.setdiff1d(np.arange(block.labels.size), list(kept))
                keep[coupling.solution.unit[np.maximum(block.labels[gone], 0)]] = False
    keep[0] = True
    return masked_twin(coupling, keep)


@pytest.mark.parametrize("row", sorted({row for row, *_ in RULE_MUTATIONS + REWRITE_MUTATIONS}))
def test_the_sound_rules_pass(row: str) -> None:
    result = prune(MODELS[row].model(), channels=0.5)
    assert not any("failed the check" in note for note in result.report.notes)
