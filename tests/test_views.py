"""A Gather that reads a whole flat tensor in order is a reshape: so are strided views exported."""

from __future__ import annotations

import onnx
import pytest

from onnxprune import verify
from onnxprune.pipeline import inspect
from tests.graphs import TOLERANCE, build, prune_half, shapes

SIGNATURE = "(float[N,3,8,8] x) => (float[N,4,?,?] y)"
BODY = """z0 = Squeeze(zero)  o1 = Squeeze(one)  e8 = Squeeze(eight)  base = Reshape(places, to)
a = Conv(x, w1, b1)  p = GlobalAveragePool(a)  f = Reshape(p, flat)
d = Shape<end=1>(x)  n = Squeeze(d)  r = Range(z0, n, o1)  m = Mul(r, e8)
u = Unsqueeze(m, rest)  i = Add(u, base)  h = Gather(f, i)  y = Conv(h, w2)"""
WEIGHTS = "w1:8,3,3,3 b1:8 w2:4,8,1,1 flat=-1 zero=0 one=1 eight=8 rest=1,2,3 to=1,8,1,1"


def _model(places: str) -> onnx.ModelProto:
    return build(SIGNATURE, BODY, f"{WEIGHTS} places={places}")


def test_reading_in_order_keeps_channels_prunable() -> None:
    model = _model("0,1,2,3,4,5,6,7")
    pruned = prune_half(model)
    assert pruned.error <= TOLERANCE
    assert pruned.effect > 1e-3
    assert shapes(pruned.model)["w2"] == (4, 4, 1, 1)
    assert "Range" not in {n.op_type for n in pruned.model.graph.node}
    assert verify.structure_problems(pruned.model, model) == []


@pytest.mark.parametrize("places", ["1,0,2,3,4,5,6,7", "0,0,2,3,4,5,6,7"])
def test_another_order_freezes(places: str) -> None:
    report = inspect(_model(places))
    assert report.groups == ()
    assert any("index computed at run time" in row.reason for row in report.frozen)
