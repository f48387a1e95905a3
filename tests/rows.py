"""Rows of rule tests: a small model, and the weights that get smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from onnxprune import verify
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
        ir = 10 if self.opset > 20 else 8
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
            assert shrunk(model, pruned.model) == set(wanted.split())
            assert (pruned.effect > 1e-3) == bool(wanted)


def shrunk(before: onnx.ModelProto, after: onnx.ModelProto) -> set[str]:
    """The float initializers that are smaller afterwards, shape operands aside."""
    left = shapes(after)
    floats = {t.name for t in before.graph.initializer if t.data_type != onnx.TensorProto.INT64}
    return {
        name
        for name, dims in shapes(before).items()
        if name in floats and 0 < math.prod(left.get(name, (0,))) < math.prod(dims)
    }
