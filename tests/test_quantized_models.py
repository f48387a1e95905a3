"""Quantized attention, and quantized models through the whole pipeline."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxprune import apply, verify
from onnxprune.analysis import analyse
from onnxprune.passes.apply import apply_keep
from onnxprune.pipeline import inspect
from tests.graphs import build, outputs, prune, prune_half, shapes
from tests.quantized import weights
from tests.test_quantized import ROWS, model_of

STREAM = "(float[N,S,8] x) => (float[N,S,8] y)"


def attention(first: str, second: str, spec: str) -> onnx.ModelProto:
    """x quantized, packed attention of four heads of four channels, a projection; and another."""
    model = build(
        STREAM,
        f"""q = QuantizeLinear(x, sa, za)
        o = com.microsoft.QAttention<num_heads=4>(q, w, b, sa, sw, , za{first})
        a = MatMul(x, w1)  p = QuantizeLinear(a, sa, za)
        u = com.microsoft.QAttention<num_heads=2, unidirectional=1>(p, v, c, sa, sv, , za{second})
        d = MatMul(o, w2)  e = MatMul(u, w3)  y = Add(d, e)""",
        opset=21,
        imports=', "com.microsoft": 1',
        ir=10,
    )
    base = "w:i8:8,48 b:f:48 v:i8:8,48 c:f:48 w1:f:8,8 w2:f:16,8 w3:f:16,8 sa:f: za:u8:"
    model.graph.initializer.extend(weights(f"{base} {spec}"))
    return model


@pytest.mark.parametrize("scope", ["all", "exact"])
@pytest.mark.parametrize(
    ("first", "second", "spec"),
    [
        ("", "", "sw:f: sv:f:"),
        (", zw", "", "sw:f: zw:i8: sv:f:48"),
        (", ow", ", zv", "sw:f:48 ow:i8:48 sv:f: zv:i8:"),
    ],
    ids=["symmetric", "zero-point", "per-channel"],
)
def test_quantized_attention(first: str, second: str, spec: str, scope: str) -> None:
    model = attention(first, second, spec)
    pruned = prune_half(model, scope)
    assert verify.structure_problems(pruned.model, model) == []
    assert pruned.error <= 1e-6
    assert pruned.effect > 1e-2
    after = shapes(pruned.model)
    assert (after["w"], after["b"], after["v"], after["w1"]) == ((8, 24), (24,), (4, 24), (8, 4))


def test_attention_with_a_zero_point_per_channel_stays_and_says_why() -> None:
    model = attention(", zw", "", "sw:f:48 zw:i8:48 sv:f:")
    pruned = prune_half(model)
    assert pruned.error <= 1e-6
    assert shapes(pruned.model)["w"] == (8, 48)
    reasons = {(row.tensor, row.axis): row.reason for row in inspect(model).frozen}
    assert reasons["w", 1] == "QAttention o has a zero point for each of its channels"


def test_quantized_embedding() -> None:
    model = build(
        "(int32[N,S] x, int32[N,S] segment) => (float[N,S,4] y)",
        """h, m = com.microsoft.QEmbedLayerNormalization(x, segment, t1, t2, t3, g, b, ,
            s1, s2, s3, s4, s5, z1, z2, z3, z4, z5)  y = MatMul(h, w)""",
        opset=21,
        imports=', "com.microsoft": 1',
        ir=10,
    )
    scales = " ".join(f"s{i}:f: z{i}:u8:" for i in range(1, 6))
    tables = "t1:u8:20,8 t2:u8:32,8 t3:u8:2,8 g:u8:8 b:u8:8 w:f:8,4"
    model.graph.initializer.extend(weights(f"{tables} {scales}"))
    pruned = prune_half(model)
    assert pruned.error <= 1e-6
    assert pruned.effect > 1e-2
    after = shapes(pruned.model)
    assert [after[n] for n in ("t1", "t2", "t3", "g", "b", "w")] == [
        (20, 4),
        (32, 4),
        (2, 4),
        (4,),
        (4,),
        (4, 4),
    ]


@pytest.mark.parametrize(
    "name", ["qdq-residual", "qlinear-conv-depthwise", "matmul-integer", "packed-4-bit", "qdq-lstm"]
)
def test_the_pipeline_prunes_checks_and_replays(name: str) -> None:
    model = model_of(next(row for row in ROWS if row.name == name))
    result = prune(model, channels=0.5)
    report = result.report
    assert all(checked.passed for checked in report.checks)
    assert report.after.params < 0.75 * report.before.params
    assert report.after.size_bytes < report.before.size_bytes
    replayed = apply(model, result.plan)
    feeds = {"x": np.resize(np.float32([0.3, -1.2, 0.7]), (2, 3, 8, 8)).astype(np.float32)}
    if name == "qdq-residual":
        assert all(map(np.array_equal, outputs(replayed, feeds), outputs(result.model, feeds)))


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("qlinear-conv", 1e-4),
        ("packed-8-bit-with-bias", 1e-4),
        ("qdq-conv-per-channel", 2e-2),
        ("dynamic-quantize-matmul", 2e-2),
    ],
)
def test_the_tolerance_is_wider_where_activations_are_rounded(name: str, tolerance: float) -> None:
    model = model_of(next(row for row in ROWS if row.name == name))
    assert verify.default_tolerance(model) == tolerance


@pytest.mark.parametrize("opset", [10, 13, 17, 19, 21, 23, 24])
def test_every_operator_set_that_quantizes(opset: int) -> None:
    axis = "<axis=0>" if opset >= 13 else ""
    model = build(
        "(float[N,3,8,8] x) => (float[N,4,6,6] y)",
        f"""q = QuantizeLinear(x, sa, za)  d = DequantizeLinear(q, sa, za)
        w1 = DequantizeLinear{axis}(w1_q, sw, zw)  c = Conv(d, w1)  r = Relu(c)
        p = QuantizeLinear(r, sa, za)  e = DequantizeLinear(p, sa, za)
        w2 = DequantizeLinear(w2_q, sa)  y = Conv(e, w2)""",
        opset=opset,
        ir=10,
    )
    per_channel = "sw:f:8 zw:i8:8" if opset >= 13 else "sw:f: zw:i8:"
    model.graph.initializer.extend(
        weights(f"w1_q:i8:8,3,3,3 {per_channel} w2_q:u8:4,8,1,1 sa:f: za:u8:")
    )
    pruned = prune_half(model, "exact")
    assert pruned.error <= 1e-6
    assert pruned.effect > 1e-2
    assert shapes(pruned.model)["w1_q"] == (4, 3, 3, 3)
    assert shapes(pruned.model)["w2_q"] == (4, 4, 1, 1)


@pytest.mark.parametrize("kind", ["INT2", "UINT2", "FLOAT4E2M1", "FLOAT8E5M2FNUZ", "INT16"])
def test_types_that_the_runtime_lacks_are_sliced_alike(kind: str) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, kind))
    stored = np.random.default_rng(0).integers(0, 2, (8, 6)).astype(dtype)
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """w1 = DequantizeLinear<axis=0>(w1_q, s)  a = Gemm<transB=1>(x, w1)
        y = MatMul(a, w2)""",
        "w2:8,4",
        opset=24,
        ir=12,
    )
    model.graph.initializer.append(numpy_helper.from_array(stored, "w1_q"))
    model.graph.initializer.extend(weights("s:f:8"))
    analysis = analyse(model)
    keep = analysis.everything.copy()
    (group,) = analysis.groups
    keep[group.units[::2]] = False
    tensors = {t.name: t for t in apply_keep(analysis.coupling, keep).model.graph.initializer}
    assert tensors["w1_q"].data_type == getattr(onnx.TensorProto, kind)
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["w1_q"]), stored[1::2])
    assert list(tensors["s"].dims) == [4]
