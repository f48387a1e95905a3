"""Convolutions along channels: attention over neighbouring channels (ECA), or one by one."""

from __future__ import annotations

import pytest

from onnxprune.pipeline import inspect
from tests.graphs import TOLERANCE, build, prune_half, shapes

ECA = """a = Conv(x, w1, b1)  p = GlobalAveragePool(a)  q = Reshape(p, line)
    k = Conv<pads=[{pad}]{more}>(q, wk)  g = Sigmoid(k)  s = Reshape(g, back)
    h = Mul(a, s)  y = Conv(h, w2)"""


def _model(width: int, pad: int, more: str = "", line: str = "0,1,8") -> object:
    return build(
        "(float[N,3,6,6] x) => (float[N,4,?,?] y)",
        ECA.format(pad=f"{pad},{pad}", more=more),
        f"w1:8,3,3,3 b1:8 wk:1,1,{width} w2:4,8,1,1 line={line} back=0,8,1,1",
    )


@pytest.mark.parametrize(
    ("width", "pad", "scope", "left"),
    [(3, 1, "all", 4), (3, 1, "exact", 8), (5, 2, "all", 4), (1, 0, "exact", 4)],
    ids=["neighbours", "neighbours-are-not-exact", "wider", "one-by-one-is-exact"],
)
def test_channels_along_a_spatial_axis(width: int, pad: int, scope: str, left: int) -> None:
    result = prune_half(_model(width, pad), scope)  # type: ignore[arg-type]
    assert shapes(result.model)["w1"][0] == left
    assert result.error <= TOLERANCE


def test_channels_that_change_their_number_stay() -> None:
    model = build(
        "(float[N,3,6,6] x) => (float[N,4] y)",
        """a = Conv(x, w1)  p = GlobalAveragePool(a)  q = Reshape(p, line)
        k = Conv<strides=[2]>(q, wk)  f = Flatten(k)  y = MatMul(f, w2)""",
        "w1:8,3,3,3 wk:1,1,1 w2:4,4 line=0,1,8",
    )
    assert shapes(prune_half(model).model)["w1"][0] == 8
    assert "spatial axis of Conv k" in {row.reason for row in inspect(model).frozen}
