"""The checks catch a wrong rule: each is broken on purpose, and no wrong model comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest

from onnxprune import verify
from onnxprune.analysis import analyse
from onnxprune.groups import Group
from onnxprune.ops import elementwise
from onnxprune.ops.registry import RULES
from onnxprune.pipeline import apply
from onnxprune.pipeline import check as compare
from onnxprune.twin import masked_twin
from tests.graphs import build, mlp, prune, tensors
from tests.mutations import reversed_outputs

CONV = "(float[N,3,8,8] x) => (float[N,4,6,6] y)"
CONVS = "w1:8,3,3,3 b1:8 w2:4,8,1,1"


def test_a_faulty_group_is_kept_and_the_others_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """a = MatMul(x, w1)  r = Relu(a)  b = MatMul(r, w2)  s = Tanh(b)  y = MatMul(s, w3)""",
        "w1:6,8 w2:8,8 w3:8,4",
    )
    broken = [replace(e, rule=reversed_outputs(elementwise.unary)) for e in RULES["", "Tanh"]]
    monkeypatch.setitem(RULES, ("", "Tanh"), broken)
    result = prune(model, channels=0.5)
    assert [s.source for s in result.plan.initializers.values()] == ["w1", "w2"]
    assert len(result.report.notes) == 1
    assert result.report.notes[0].startswith("group MatMul b was kept")
    assert result.report.checks[0].faulty == ("MatMul b",)
    assert apply(model, result.plan).SerializeToString() == result.model.SerializeToString()


def test_without_the_check_a_broken_rule_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [replace(e, rule=reversed_outputs(elementwise.unary)) for e in RULES["", "Relu"]]
    monkeypatch.setitem(RULES, ("", "Relu"), broken)
    result = prune(mlp(6, 8, 4), channels=0.5, check=False)
    assert result.report.checks == ()
    assert "w0" in result.plan.initializers


# -- find_faulty ----


def _groups(count: int) -> list[Group]:
    return [
        Group(f"g{i}", np.arange(2 * i + 1, 2 * i + 3, dtype=np.int32), 1, True, (i,))
        for i in range(count)
    ]


def _half(count: int) -> np.ndarray:
    keep = np.ones(2 * count + 1, bool)
    keep[1::2] = False
    return keep


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_every_single_fault_is_found(count: int) -> None:
    groups, keep = _groups(count), _half(count)
    for bad in groups:
        found = verify.find_faulty(groups, keep, lambda k, bad=bad: bool(k[bad.units].all()))
        assert [g.name for g in found] == [bad.name]


def test_two_faults_are_both_found() -> None:
    groups = _groups(8)
    bad = [*groups[2].units, *groups[6].units]
    found = verify.find_faulty(groups, _half(8), lambda k: bool(k[bad].all()))
    assert [g.name for g in found] == ["g2", "g6"]


def test_groups_that_fail_only_together_are_all_blamed() -> None:
    groups = _groups(4)
    first, second = groups[0].units, groups[3].units
    found = verify.find_faulty(groups, _half(4), lambda k: bool(k[first].all() or k[second].all()))
    assert {"g0", "g3"} <= {g.name for g in found}


def test_nothing_is_blamed_where_all_is_sound() -> None:
    assert verify.find_faulty(_groups(4), _half(4), lambda _: True) == ()


def test_groups_that_were_not_touched_are_not_tried() -> None:
    asked: list[int] = []

    def sound(keep: np.ndarray) -> bool:
        asked.append(int((~keep).sum()))
        return False

    assert verify.find_faulty(_groups(4), np.ones(9, bool), sound) == ()
    assert asked == []


# -- difference ----

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        pytest.param([1.0, 2.0], [1.0, 2.0], 0.0, id="equal"),
        pytest.param([1.0, 2.5], [1.0, 2.0], 0.25, id="relative-to-the-largest"),
        pytest.param([0.25], [0.0], 0.25, id="absolute-against-zeros"),
        pytest.param([1.0], [1.0, 2.0], INF, id="shapes"),
        pytest.param([[1.0, 2.0]], [1.0, 2.0], INF, id="ranks"),
        pytest.param([NAN, 1.0], [NAN, 1.0], 0.0, id="both-nan"),
        pytest.param([INF, 1.0], [INF, 1.0], 0.0, id="both-inf"),
        pytest.param([NAN, 1.0], [0.5, 1.0], INF, id="nan-against-number"),
        pytest.param([0.5, 1.0], [NAN, 1.0], INF, id="number-against-nan"),
        pytest.param([INF], [-INF], INF, id="signs-of-inf"),
        pytest.param([NAN], [INF], INF, id="nan-against-inf"),
        pytest.param([INF], [NAN], INF, id="inf-against-nan"),
        pytest.param([], [], 0.0, id="empty"),
        pytest.param(["a"], ["a"], 0.0, id="same-strings"),
        pytest.param(["a"], ["b"], INF, id="other-strings"),
        pytest.param([True, False], [True, True], 1.0, id="booleans"),
        pytest.param([3], [4], 0.25, id="integers"),
    ],
)
def test_difference(ours: list[object], theirs: list[object], expected: float) -> None:
    assert verify.difference([np.array(ours)], [np.array(theirs)]) == expected


def test_difference_takes_the_worst_output() -> None:
    one, two = np.ones(2), np.full(2, 1.5)
    assert verify.difference([one, two], [one, one]) == 0.5
    assert verify.difference([], []) == 0.0
    with pytest.raises(ValueError, match="longer"):
        verify.difference([one], [one, one])


def test_difference_looks_into_sequences() -> None:
    one, two = np.ones(2), np.full(2, 1.5)
    assert verify.difference([[one, two]], [[one, one]]) == 0.5
    assert verify.difference([[one]], [[one, one]]) == INF
    assert verify.difference([one], [[one]]) == INF


# -- structure ----


def _changed(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = mlp(6, 8, 4)
    change(model)
    return model


def _rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "z"
    model.graph.node[-1].output[0] = "z"


def _widen_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "M"


def _break_edge(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "nobody"


def _break_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(tensors("w0:8,5")[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(_rename_output, "the outputs are", id="output-name"),
        pytest.param(_widen_input, "the inputs are", id="input-dimension"),
        pytest.param(_break_edge, "onnx.checker refuses the graph", id="missing-tensor"),
        pytest.param(_break_weight, "onnx.checker refuses the graph", id="wrong-shape"),
    ],
)
def test_structure_problems(change: Callable[[onnx.ModelProto], None], words: str) -> None:
    problems = verify.structure_problems(_changed(change), mlp(6, 8, 4))
    assert len(problems) == 1
    assert problems[0].startswith(words)
    assert "\n" not in problems[0]


def test_a_sound_model_has_no_structure_problems() -> None:
    assert verify.structure_problems(mlp(6, 8, 4), mlp(6, 8, 4)) == []
    assert verify.structure_problems(mlp(6, 5, 4), mlp(6, 8, 4)) == []


def test_what_the_original_broke_already_is_not_blamed_on_pruning() -> None:
    assert verify.structure_problems(_changed(_break_weight), _changed(_break_weight)) == []


# -- twin and level 3 ----


def test_the_twin_of_everything_is_the_model() -> None:
    analysis = analyse(mlp(6, 8, 4))
    twin = masked_twin(analysis.coupling, analysis.everything)
    assert twin.graph.node == analysis.model.graph.node
    assert twin.graph.initializer == analysis.model.graph.initializer


def test_check_reports_the_distance_and_fails_only_with_a_tolerance() -> None:
    model, other = mlp(6, 8, 4), prune(mlp(6, 8, 4), channels=0.5).model
    report = compare(model, other, threads=1)
    assert report.passed
    assert report.max_error is not None
    assert report.max_error > 0.01
    strict = compare(model, other, tolerance=1e-3, threads=1)
    assert not strict.passed
    assert "more than 0.001" in strict.problems[0]
    assert compare(model, model, tolerance=0.0, threads=1).max_error == 0.0


def test_half_precision_has_a_wider_tolerance() -> None:
    model = mlp(6, 8, 4)
    assert verify.default_tolerance(model) == 1e-4
    model.graph.initializer[0].data_type = onnx.TensorProto.FLOAT16
    assert verify.default_tolerance(model) == 1e-2
