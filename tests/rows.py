"""Rows of rule tests: a small model, and the weights that get smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import pytest

from onnxprune import runtime, verify
from onnxprune.analysis import analyse
from onnxprune.granularity import Granularity
from onnxprune.passes.apply import apply_keep
from tests.graphs import TOLERANCE, build, prune_half, shapes

MICROSOFT = ', "com.microsoft": 1'


@dataclass(frozen=True)
class Row:
    """`shrinks`: the weights that get smaller under scope "all"; `exact`: those under "exact"."""

    name: str
    signature: str
    body: str
    weights: str
    shrinks: str
    exact: str | None = None
    opset: int = 18

    def model(self) -> onnx.ModelProto:
        """The model before pruning."""
        ir = 13 if self.opset > 24 else 10 if self.opset > 20 else 8
        return build(
            self.signature, self.body, self.weights, opset=self.opset, imports=MICROSOFT, ir=ir
        )

    def check(self) -> None:
        """Half of every group goes, as in the masked twin, and only from the named weights."""
        model = self.model()
        for scope in ("all", "exact"):
            wanted = self.shrinks if scope == "all" or self.exact is None else self.exact
            pruned = prune_half(model, scope)
            assert verify.structure_problems(pruned.model, model) == []
            assert pruned.error <= TOLERANCE
            assert shrunk(model, pruned.model) == set(wanted.split()), scope
            assert (pruned.effect > 1e-3) == bool(wanted), scope


def shrunk(before: onnx.ModelProto, after: onnx.ModelProto) -> set[str]:
    """The float initializers that are smaller afterwards, shape operands aside."""
    left = shapes(after)
    whole = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
    floats = {t.name for t in before.graph.initializer if t.data_type not in whole}
    return {
        name
        for name, dims in shapes(before).items()
        if name in floats and 0 < math.prod(left.get(name, (0,))) < math.prod(dims)
    }


IMAGE = "(float[N,3,8,8] x) => (float[N,4,?,?] y)"
FLAT = "(float[N,6] x) => (float[N,4] y)"
SEQUENCE = "(float[N,S,8] x) => (float[N,S,8] y)"
CONVS = "w1:8,3,3,3 b1:8 w2:4,8,1,1"
DENSE = "w1:6,8 w2:8,4"


def image(
    name: str, middle: str, weights: str = "", *, shrinks: str = "w1 b1 w2", **more: object
) -> Row:
    """Conv to 8 channels `a`, `middle` from a to h, Conv to y."""
    body = f"a = Conv(x, w1, b1)\n{middle}\ny = Conv(h, w2)"
    spec = f"w1:8,3,3,3 b1:8 {weights}"
    spec += "" if "w2:" in weights else " w2:4,8,1,1"
    return Row(name, IMAGE, body, spec, shrinks, **more)  # type: ignore[arg-type]


def flat(
    name: str, middle: str, weights: str = "", *, shrinks: str = "w1 w2", **more: object
) -> Row:
    """MatMul to 8 channels `a`, `middle` from a to h, MatMul to y."""
    spec = f"w1:6,8 {weights}" + ("" if "w2:" in weights else " w2:8,4")
    return Row(name, FLAT, f"a = MatMul(x, w1)\n{middle}\ny = MatMul(h, w2)", spec, shrinks, **more)
    # type: ignore[arg-type]


def sequence(name: str, body: str, weights: str, shrinks: str, **more: object) -> Row:
    """x[N, S, 8] to y[N, S, 8]."""
    return Row(name, SEQUENCE, body, weights, shrinks, **more)  # type: ignore[arg-type]


def case(row: Row) -> object:
    """The row as a pytest parameter."""
    return pytest.param(row, id=row.name)


def check_row(row: Row) -> None:
    """The row's graph is valid, and half of every group of it is removed, as in the masked twin."""
    onnx.checker.check_model(row.model(), full_check=True)
    row.check()


def check_uneven(model: onnx.ModelProto, granularity: Granularity, seed: int = 1) -> None:
    """Another share of every group goes, so that widths that must agree agree for a reason."""
    rng = np.random.default_rng(seed)
    analysis = analyse(model, granularity=granularity)
    keep = analysis.everything
    for group in analysis.groups:
        keep[rng.permutation(group.units)[rng.integers(1, group.size + 1) :]] = False
    pruned = apply_keep(analysis.coupling, keep).model
    assert verify.structure_problems(pruned, model) == []
    feeds = [runtime.random_feeds(model)]
    assert verify.twin_error(analysis.coupling, keep, pruned, feeds, threads=1) <= TOLERANCE
