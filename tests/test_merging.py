"""Linear layers with nothing between become one, and only where that is right."""

import numpy as np
import onnx
import pytest

from onnxprune import runtime, verify
from onnxprune.merging import merge_layers
from tests.graphs import build

IMAGE = "(float[N,3,9,9] x) => (float[N,C,H,W] y)"
FLAT = "(float[N,6] x) => (float[N,4] y)"
TOKENS = "(float[N,5,6] x) => (float[N,5,4] y)"
POINT = "a = Conv(x, w, b) y = Conv(a, v, c)"
WIDE = "w:32,3,3,3 b:32 v:4,32,1,1 c:4"
LEAD = "w:64,3,1,1 b:64 v:4,64,3,3 c:4"

#: What it shows: (signature, nodes, weights, operators that are left).
MERGED = {
    "point-after": (IMAGE, POINT, WIDE, "Conv"),
    "point-after-padded": (
        IMAGE,
        "a = Conv<pads=[1, 2, 0, 1], dilations=[2, 1]>(x, w, b) y = Conv(a, v, c)",
        WIDE,
        "Conv",
    ),
    "point-after-strides": (
        IMAGE,
        "a = Conv<strides=[2, 1], pads=[1, 1, 1, 1]>(x, w, b) y = Conv<strides=[2, 3]>(a, v, c)",
        WIDE,
        "Conv",
    ),
    "point-after-same": (
        IMAGE,
        'a = Conv<auto_pad="SAME_UPPER", strides=[2, 2]>(x, w) y = Conv(a, v, c)',
        WIDE,
        "Conv",
    ),
    "point-leads-unpadded": (
        IMAGE,
        "a = Conv(x, w, b) y = Conv<strides=[2, 1]>(a, v)",
        LEAD,
        "Conv",
    ),
    "point-leads-valid": (
        IMAGE,
        'a = Conv(x, w, b) y = Conv<auto_pad="VALID">(a, v)',
        LEAD,
        "Conv",
    ),
    "point-leads-padded-no-bias": (
        IMAGE,
        "a = Conv(x, w) y = Conv<pads=[1, 1, 1, 1]>(a, v, c)",
        LEAD,
        "Conv",
    ),
    "kernel-shape": (
        IMAGE,
        "a = Conv<kernel_shape=[1, 1]>(x, w, b) y = Conv<kernel_shape=[3, 3]>(a, v, c)",
        LEAD,
        "Conv",
    ),
    "one-axis": (
        "(float[N,3,9] x) => (float[N,4,L] y)",
        "a = Conv(x, w, b) y = Conv(a, v, c)",
        "w:32,3,3 b:32 v:4,32,1 c:4",
        "Conv",
    ),
    "chain": (
        IMAGE,
        "a = Conv(x, w, b) d = Conv(a, u) y = Conv(d, v, c)",
        "w:32,3,3,3 b:32 u:32,32,1,1 v:4,32,1,1 c:4",
        "Conv",
    ),
    "gemm": (FLAT, "a = Gemm(x, w, b) y = Gemm(a, v, c)", "w:6,9 b:9 v:9,4 c:1,4", "Gemm"),
    "gemm-flags": (
        FLAT,
        "a = Gemm<transB=1, alpha=0.5, beta=3.0>(x, w, b) "
        "y = Gemm<alpha=2.0, beta=0.25, transB=1>(a, v, c)",
        "w:9,6 b:9 v:4,9 c:1",
        "Gemm",
    ),
    "gemm-no-bias": (FLAT, "a = Gemm(x, w) y = Gemm(a, v)", "w:6,9 v:9,4", "Gemm"),
    "gemm-then-matmul": (
        FLAT,
        "a = Gemm<transB=1>(x, w, b) d = MatMul(a, v) y = Add(c, d)",
        "w:9,6 b:9 v:9,4 c:4",
        "Gemm",
    ),
    "matmul": (TOKENS, "a = MatMul(x, w) y = MatMul(a, v)", "w:6,9 v:9,4", "MatMul"),
    "matmul-first-bias": (
        TOKENS,
        "a = MatMul(x, w) d = Add(a, b) y = MatMul(d, v)",
        "w:6,9 b:9 v:9,4",
        "MatMul Add",
    ),
    "matmul-biases": (
        TOKENS,
        "a = MatMul(x, w) d = Add(b, a) e = MatMul(d, v) y = Add(e, c)",
        "w:6,9 b: v:9,4 c:4",
        "MatMul Add",
    ),
    "matmul-vector": (
        "(float[6] x) => (float[4] y)",
        "a = MatMul(x, w) y = MatMul(a, v)",
        "w:6,9 v:9,4",
        "MatMul",
    ),
    "wide-bias-stays": (
        "(float[N,6] x) => (float[M,4] y)",
        "a = MatMul(x, w) d = MatMul(a, v) y = Add(d, c)",
        "w:6,9 v:9,4 c:1,1,4",
        "MatMul Add",
    ),
}

#: What must stay as it is.
APART = {
    "border-bias": (IMAGE, "a = Conv(x, w, b) y = Conv<pads=[1, 1, 1, 1]>(a, v, c)", LEAD),
    "border-bias-same": (IMAGE, 'a = Conv(x, w, b) y = Conv<auto_pad="SAME_LOWER">(a, v, c)', LEAD),
    "padded-point-leads": (IMAGE, "a = Conv<pads=[1, 1, 1, 1]>(x, w, b) y = Conv(a, v, c)", LEAD),
    "strided-point-leads": (IMAGE, "a = Conv<strides=[2, 2]>(x, w, b) y = Conv(a, v, c)", LEAD),
    "padded-point-follows": (IMAGE, "a = Conv(x, w, b) y = Conv<pads=[1, 1, 1, 1]>(a, v, c)", WIDE),
    "same-then-strides": (
        IMAGE,
        'a = Conv<auto_pad="SAME_UPPER">(x, w, b) y = Conv<strides=[2, 2]>(a, v, c)',
        WIDE,
    ),
    "both-wide": (IMAGE, POINT, "w:32,3,3,3 b:32 v:4,32,3,3 c:4"),
    "more-parameters": (IMAGE, POINT, "w:2,3,3,3 b:2 v:32,2,1,1 c:32"),
    "depthwise": (
        IMAGE,
        "a = Conv<group=3>(x, w, b) y = Conv(a, v, c)",
        "w:3,1,3,3 b:3 v:1,3,1,1 c:1",
    ),
    "groups-follow": (
        IMAGE,
        "a = Conv(x, w, b) y = Conv<group=2>(a, v, c)",
        "w:32,3,3,3 b:32 v:4,16,1,1 c:4",
    ),
    "between": (IMAGE, "a = Conv(x, w, b) r = Relu(a) y = Conv(r, v, c)", WIDE),
    "conv-two-readers": (IMAGE, "a = Conv(x, w, b) y = Conv(a, v, c) z = Relu(a)", WIDE),
    "shared-weight": (
        IMAGE,
        "a = Conv(x, w, b) y = Conv(a, v, c) z = Conv(x, w)",
        "w:12,3,3,3 b:12 v:6,12,1,1 c:6",
    ),
    "low-rank": (FLAT, "a = Gemm(x, w) y = Gemm(a, v)", "w:6,2 v:2,4"),
    "two-readers": (FLAT, "a = Gemm(x, w) y = Gemm(a, v) z = Relu(a)", "w:6,9 v:9,4"),
    "read-twice": (
        "(float[9,9] x) => (float[9,9] y)",
        "a = MatMul(x, w) y = MatMul(a, a)",
        "w:9,9",
    ),
    "second-operand": (
        "(float[6,6] x) => (float[6,6] y)",
        "a = MatMul(x, w) y = MatMul(v, a)",
        "w:6,6 v:6,6",
    ),
    "turned-input": (
        "(float[9,9] x) => (float[9,9] y)",
        "a = Gemm(x, w) y = Gemm<transA=1>(a, v)",
        "w:9,9 v:9,9",
    ),
    "batched-weight": (TOKENS, "a = MatMul(x, w) y = MatMul(a, v)", "w:6,9 v:2,9,4"),
    "bias-by-row": (
        "(float[3,6] x) => (float[3,4] y)",
        "a = Gemm(x, w, b) y = Gemm(a, v)",
        "w:6,9 b:3,9 v:9,4",
    ),
    "bias-adds-an-axis": (
        FLAT,
        "a = MatMul(x, w) d = Add(a, b) y = MatMul(d, v)",
        "w:6,9 b:1,1,9 v:9,4",
    ),
    "bias-widens": (
        FLAT,
        "a = MatMul(x, w) d = Add(a, b) y = MatMul(d, v)",
        "w:6,1 b:9 v:9,4",
    ),
    "computed-weight": (FLAT, "u = Relu(v) a = Gemm(x, w) y = Gemm(a, u)", "w:6,9 v:9,4"),
    "computed-bias": (FLAT, "u = Relu(b) a = Gemm(x, w, u) y = Gemm(a, v)", "w:6,9 b:9 v:9,4"),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_layers_answer_the_same(name: str) -> None:
    signature, body, weights, left = MERGED[name]
    model = build(signature, body, weights)
    original = model.SerializeToString()
    merged, count = merge_layers(model)
    assert model.SerializeToString() == original
    assert [node.op_type for node in merged.graph.node] == left.split()
    assert count == (2 if name == "chain" else 1)
    assert not verify.structure_problems(merged, model)
    assert merged.ByteSize() < model.ByteSize()
    for feeds in runtime.working_feeds(model, threads=1):
        results = (runtime.run(runtime.session(m, threads=1), feeds) for m in (merged, model))
        ours, theirs = (list(r.values()) for r in results)
        assert verify.difference(ours, theirs) < 2e-6


@pytest.mark.parametrize("name", APART)
def test_others_stay(name: str) -> None:
    model = build(*APART[name])
    merged, count = merge_layers(model)
    assert count == 0
    assert merged is model


def test_what_the_model_gives_stays() -> None:
    model = build(
        "(float[N,6] x) => (float[N,9] a, float[N,4] y)",
        "a = Gemm(x, w) y = Gemm(a, v)",
        "w:6,9 v:9,4",
    )
    assert merge_layers(model) == (model, 0)


def test_what_a_branch_reads_stays() -> None:
    body = (
        "a = Gemm(x, w) y = Gemm(a, v) "
        "z = If(p) <then_branch = t () => (float[N,9] r) { r = Relu(a) }, "
        "else_branch = e () => (float[N,9] q) { q = Identity(a) }>"
    )
    model = build("(float[N,6] x, bool p) => (float[N,4] y, float[N,9] z)", body, "w:6,9 v:9,4")
    assert merge_layers(model) == (model, 0)


def test_old_files_list_their_weights_as_inputs() -> None:
    model = build(FLAT, "a = Gemm(x, w, b) y = Gemm(a, v, c)", "w:6,9 b:9 v:9,4 c:4", opset=9)
    for tensor in model.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    merged, count = merge_layers(model)
    assert count == 1
    assert [i.name for i in merged.graph.input] == ["x"]
    assert {tuple(t.dims) for t in merged.graph.initializer} == {(6, 4), (4,)}


def test_half_precision_stays() -> None:
    model = build(FLAT, "a = Gemm(x, w) y = Gemm(a, v)", "w:6,9 v:9,4")
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    assert merge_layers(model) == (model, 0)
