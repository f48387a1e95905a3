"""What is frozen: the node, the reason in words, and what it costs, largest first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from models import zoo
from onnxprune import cli
from onnxprune.cost import count_params
from onnxprune.pipeline import inspect
from onnxprune.report.console import ALIKE_SHOWN, by_kind
from onnxprune.result import FrozenRow
from tests.graphs import build, mlp


def _rows(model: onnx.ModelProto) -> dict[tuple[str, int], FrozenRow]:
    return {(row.tensor, row.axis): row for row in inspect(model).frozen}


def test_inputs_and_outputs() -> None:
    rows = _rows(mlp(6, 8, 4))
    assert rows.keys() == {("w0", 1), ("w1", 0)}
    first, last = rows["w0", 1], rows["w1", 0]
    assert (first.node, first.reason) == ("model", "axis 1 of model input 'x'")
    assert (last.node, last.reason) == ("model", "axis 1 of model output 'y'")
    assert (first.params, first.macs, last.params, last.macs) == (48, 48, 32, 32)


def test_two_frozen_axes_share_the_cost() -> None:
    rows = _rows(mlp(6, 8))
    assert [(r.params, r.macs) for r in rows.values()] == [(24, 24), (24, 24)]


def test_an_axis_costs_its_frozen_share() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y, float[N,2] z)",
        "a = MatMul(x, w1)  z, b = Split<axis=1>(a, parts)  y = MatMul(b, w2)",
        "w1:6,8 parts=2,6 w2:6,4",
    )
    rows = _rows(model)
    assert rows["w1", 0].params == 24
    assert rows["w1", 1].params == 6  # a quarter of the indices, and half of the weight
    assert rows["w1", 1].reason == "axis 1 of model output 'z'"


def test_a_weight_used_twice_costs_both_uses() -> None:
    model = build(
        "(float[1,6] x, float[1,6] z) => (float[1,4] y)",
        "a = MatMul(x, w)  b = MatMul(z, w)  c = Mul(a, b)  y = MatMul(c, v)",
        "w:6,8 v:8,4",
    )
    row = _rows(model)["w", 0]
    assert (row.params, row.macs) == (48, 96)


def test_eight_bit_weights_are_listed() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        "f = DequantizeLinear(w, s, z)  y = MatMul(x, f)",
    )
    for name, value in (("w", np.ones((6, 4))), ("z", np.zeros(()))):
        tensor = onnx.numpy_helper.from_array(value.astype(np.int8), name)
        model.graph.initializer.append(tensor)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.1), "s"))
    assert {axis for name, axis in _rows(model) if name == "w"} == {0, 1}


ROOTS = {
    "far behind": "e = Relu(b)  y = MatMul(e, w2)",
    "through a sum": "e = Add(b, c)  y = MatMul(e, w2)",
    "after an operator that keeps it": "e = LayerNormalization(b, c)  y = MatMul(e, w2)",
}


@pytest.mark.parametrize("name", ROOTS)
def test_the_reason_is_the_first_one(name: str) -> None:
    """Whatever lies behind a node that gives channels up is frozen because of that node."""
    model = build(
        "(float[N,6] x, int64[8] i) => (float[N,4] y)",
        f"a = MatMul(x, w1)  b = Gather<axis=1>(a, i)  {ROOTS[name]}",
        "w1:6,8 w2:8,4" + (" c:8" if "c)" in ROOTS[name] else ""),
    )
    rows = _rows(model)
    for key in (("w1", 1), ("w2", 0)):
        assert rows[key].reason == "Gather b looks it up with an index computed at run time"
        assert rows[key].node == "Gather b"


def test_channels_that_meet_positions() -> None:
    model = build(
        "(float[N,3,16,16] x) => (float[N,4,8,8] y)",
        """a = Conv<strides=[2,2]>(x, w1)  b = Transpose<perm=[0,2,1,3]>(a)  c = Add(a, b)
        y = Conv(c, w2)""",
        "w1:8,3,2,2 w2:4,8,1,1",
    )
    row = _rows(model)["w1", 0]
    assert (row.node, row.reason) == (
        "Add c",
        "lines up in Add c with an axis that holds no channels",
    )


def _many(count: int) -> onnx.ModelProto:
    """Many biases over positions."""
    lines = [f"t{i + 1} = Add(t{i}, b{i})" for i in range(count)]
    body = "t0 = Conv<strides=[2,2]>(x, w)  " + "  ".join(lines) + f"  y = Relu(t{count})"
    weights = "w:4,3,2,2 " + " ".join(f"b{i}:1,8,{8 if i else 1}" for i in range(count))
    return build("(float[N,3,16,16] x) => (float[N,4,8,8] y)", body, weights)


def test_many_alike_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(_many(13), path)
    rows = inspect(path).frozen
    kind = "lines up in Add with an axis that holds no channels"
    alike = by_kind(rows)[kind]
    assert len(alike) > ALIKE_SHOWN + 1
    assert cli.main(["inspect", str(path), "--why"]) == 0
    table = capsys.readouterr().out.rpartition("| frozen ")[2]
    lines = [line.split("|") for line in table.splitlines()[2:] if line.startswith("|")]
    assert sum("lines up in Add t" in line[4] for line in lines) == ALIKE_SHOWN
    (summary,) = [line for line in lines if kind in line[4]]
    assert summary[1].strip() == f"... {len(alike) - ALIKE_SHOWN} more alike (--json lists all)"
    costs = [int(line[5].replace(",", "")) for line in lines]
    assert costs == sorted(costs, reverse=True)
    assert sum(costs) == sum(row.params for row in rows)
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["frozen"]) == len(rows)


ZOO = (
    "hf-albert-dyn",
    "hf-clipvision-dyn",
    "hf-segformer-ts",
    "hf-t5enc-ts",
    "hf-whisperenc-dyn",
    "misc-bilstm-ts",
    "misc-unet_deconv-dyn",
    "timm-convnext_atto-dyn",
    "timm-gcvit_xxtiny-dyn",
    "timm-levit_128s-dyn",
    "timm-mobilenetv3_small_050-ts",
    "timm-pvt_v2_b0-dyn",
    "timm-regnety_002-ts",
    "tv-shufflenet_v2_x1_0-dyn",
    "yolo-yolo11n-ts",
)


@pytest.mark.parametrize("name", ZOO)
def test_costs_of_real_models_add_up(name: str) -> None:
    model = zoo.load(name)
    rows = inspect(model).frozen
    assert list(rows) == sorted(rows, key=lambda r: (-r.params, -r.macs, r.tensor, r.axis))
    assert 0 < sum(row.params for row in rows) <= 1.01 * count_params(model)
    assert all(row.reason and row.node for row in rows)
    assert len(by_kind(rows)) <= 12
