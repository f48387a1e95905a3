"""Graphs as other exporters and older operator sets write them: pruned, equal to their twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxprune import verify
from onnxprune.cost import count_params
from tests.graphs import TOLERANCE, build, prune_half, tensors


@dataclass(frozen=True)
class Row:
    """`left`: the largest share of parameters that may be left at half of all channels."""

    name: str
    signature: str
    body: str
    weights: str
    opset: int = 13
    ir: int = 7
    left: float = 0.5
    scope: str = "exact"


IMAGE = "(float[N,3,8,8] x) => (float[N,4,?,?] y)"
NHWC = "(float[N,8,8,3] x) => (float[N,?,?,4] y)"
CONVS = "w1:8,3,3,3 b1:8 w2:4,8,1,1"


def old(name: str, middle: str, spec: str = "", *, opset: int = 7, **more: object) -> Row:
    """Conv to 8 channels `a`, `middle` from a to h, Conv to y, in an old operator set."""
    body = f"a = Conv(x, w1, b1)  {middle}  y = Conv(h, w2)"
    weights = f"w1:8,3,3,3 b1:8 {spec}" + ("" if "w2:" in spec else " w2:4,8,1,1")
    return Row(name, IMAGE, body, weights, opset=opset, ir=3, **more)  # type: ignore[arg-type]


IN, OUT = "Transpose<perm=[0,3,1,2]>", "Transpose<perm=[0,2,3,1]>"

TENSORFLOW = [
    Row(
        "sandwiched-convs",
        NHWC,
        f"""t1 = {IN}(x)  a = Conv(t1, w1)  t2 = {OUT}(a)  c = Add(t2, b1)  r = Relu(c)
        t3 = {IN}(r)  d = Conv(t3, w2)  y = {OUT}(d)""",
        "w1:8,3,3,3 b1:8 w2:4,8,1,1",
    ),
    Row(
        "fused-batch-norm-and-residual",
        NHWC,
        f"""t1 = {IN}(x)  a = Conv(t1, w1)  n = BatchNormalization(a, s, t, m, var)  r = Relu(n)
        t2 = {OUT}(r)  t3 = {IN}(t2)  e = Conv<pads=[1,1,1,1]>(t3, w3)  t4 = {OUT}(e)
        f = Add(t2, t4)  t5 = {IN}(f)  d = Conv(t5, w2)  y = {OUT}(d)""",
        "w1:8,3,3,3 s:8 t:8 m:8 var:8 w3:8,8,3,3 w2:4,8,1,1",
    ),
    Row(
        "depthwise-with-reshaped-kernel",
        NHWC,
        f"""t1 = {IN}(x)  a = Conv(t1, w1)  k1 = Transpose<perm=[3,2,0,1]>(k)  k2 = Reshape(k1, to)
        g = Conv<group=8, pads=[1,1,1,1]>(a, k2)  r = Clip(g, zero, six)  d = Conv(r, w2)
        y = {OUT}(d)""",
        "w1:8,3,3,3 k:3,3,8,1 to=8,1,3,3 zero: six: w2:4,8,1,1",
        left=0.55,
    ),
    Row(
        "spatial-mean-then-dense",
        "(float[N,8,8,3] x) => (float[N,4] y)",
        f"""t1 = {IN}(x)  a = Conv(t1, w1)  t2 = {OUT}(a)
        m = ReduceMean<axes=[1,2], keepdims=0>(t2)  d = MatMul(m, w2)  y = Add(d, b)""",
        "w1:8,3,3,3 w2:8,4 b:4",
        left=0.52,
    ),
    Row(
        "flatten-by-reshape-in-nhwc",
        "(float[N,8,8,3] x) => (float[N,4] y)",
        f"""t1 = {IN}(x)  a = Conv(t1, w1)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
        t2 = {OUT}(p)  f = Reshape(t2, to)  y = MatMul(f, w2)""",
        "w1:8,3,3,3 to=-1,72 w2:72,4",
    ),
    Row(
        "squeeze-excite-in-nhwc",
        NHWC,
        f"""t1 = {IN}(x)  a = Conv(t1, w1)  t2 = {OUT}(a)
        m = ReduceMean<axes=[1,2], keepdims=1>(t2)  t3 = {IN}(m)  s1 = Conv(t3, ws1)
        s2 = Relu(s1)  s3 = Conv(s2, ws2)  s4 = Sigmoid(s3)  t4 = {OUT}(s4)  h = Mul(t2, t4)
        t5 = {IN}(h)  d = Conv(t5, w2)  y = {OUT}(d)""",
        "w1:8,3,3,3 ws1:4,8,1,1 ws2:8,4,1,1 w2:4,8,1,1",
        left=0.45,
    ),
    Row(
        "concat-on-the-last-axis",
        NHWC,
        f"""t1 = {IN}(x)  a = Conv(t1, w1)  t2 = {OUT}(a)  b = Conv(t1, w3)  t3 = {OUT}(b)
        c = Concat<axis=3>(t2, t3)  t4 = {IN}(c)  d = Conv(t4, w2)  y = {OUT}(d)""",
        "w1:8,3,3,3 w3:6,3,3,3 w2:4,14,1,1",
    ),
    Row(
        "einsum-dense",
        "(float[N,S,6] x) => (float[N,S,4] y)",
        """a = Einsum<equation="abc,cde->abde">(x, w1)  c = Add(a, b1)  r = Relu(c)
        y = Einsum<equation="abcd,cde->abe">(r, w2)""",
        "w1:6,4,4 b1:4,4 w2:4,4,4",
    ),
    Row(
        "bias-add-with-space-to-batch",
        "(float[N,8,8,3] x) => (float[N,4] y)",
        f"""t1 = {IN}(x)  q = Pad(t1, pads)  a = Conv<strides=[2,2]>(q, w1, b1)  r = Relu(a)
        g = GlobalAveragePool(r)  f = Squeeze(g, axes)  y = MatMul(f, w2)""",
        "w1:8,3,3,3 b1:8 pads=0,0,0,0,0,0,1,1 axes=2,3 w2:8,4",
        left=0.52,
    ),
]

OLD = [
    old("clip-attributes", "h = Clip<min=0.0, max=6.0>(a)"),
    old(
        "batch-norm-spatial",
        "h = BatchNormalization<spatial=1>(a, s, t, m, var)",
        "s:8 t:8 m:8 var:8",
    ),
    old("upsample-attributes", 'h = Upsample<mode="nearest", scales=[1.0,1.0,2.0,2.0]>(a)'),
    old("upsample-operand", 'h = Upsample<mode="nearest">(a, scales)', "scales:4", opset=9),
    old("pad-attributes", 'h = Pad<mode="constant", pads=[0,0,1,1,0,0,1,1]>(a)'),
    old("slice-attributes", "h = Slice<axes=[2,3], starts=[1,1], ends=[5,5]>(a)"),
    old("slice-channels", "h = Slice<axes=[1], starts=[2], ends=[8]>(a)", "w2:4,6,1,1"),
    old("dropout-with-mask", "h, mask = Dropout<ratio=0.5>(a)"),
    old("squeeze-attributes", "u = Unsqueeze<axes=[4]>(a)  r = Relu(u)  h = Squeeze<axes=[4]>(r)"),
    old("split-attributes", "p, q = Split<axis=1, split=[4,4]>(a)  h = Mul(p, q)", "w2:4,4,1,1"),
    old("split-equal", "p, q = Split<axis=1>(a)  h = Max(p, q)", "w2:4,4,1,1", opset=8),
    old("prelu", "h = PRelu(a, p)", "p:8,1,1"),
    old("sum-of-three", "b = Relu(a)  d = Tanh(a)  h = Sum(a, b, d)", opset=8),
    old("mean-of-two", "b = Relu(a)  h = Mean(a, b)", opset=8),
    old("reduce-attributes", "m = ReduceSum<axes=[2,3], keepdims=1>(a)  h = Mul(a, m)", opset=8),
    old("global-max-pool", "h = GlobalMaxPool(a)"),
    old("average-pool-without-padding", "h = AveragePool<kernel_shape=[2,2], strides=[2,2]>(a)"),
    old("instance-norm", "h = InstanceNormalization(a, s, t)", "s:8 t:8"),
    old("depth-to-space", "h = DepthToSpace<blocksize=2>(a)", "w2:4,2,1,1", left=0.55),
    old("expand", "h = Expand(a, to)", "to=1,8,1,1", opset=8),
    old("gather-channels", "h = Gather<axis=1>(a, index)", "index=7,1,5,0,3,2,6,4"),
    old("softmax-over-everything", "h = Softmax<axis=1>(a)", scope="all"),
    old("conv-transpose", "h = ConvTranspose<strides=[2,2]>(a, wt)", "wt:8,6,2,2 w2:4,6,1,1"),
    Row(
        "flatten-then-gemm",
        "(float[N,3,8,8] x) => (float[N,4] y)",
        """a = Conv(x, w1, b1)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
        f = Flatten(p)  g = Gemm<transB=1>(f, w2, b2)  r = Relu(g)
        y = Gemm<transB=1>(r, w3, b3)""",
        "w1:8,3,3,3 b1:8 w2:10,72 b2:10 w3:4,10 b3:4",
        opset=7,
        ir=3,
    ),
    Row(
        "gemm-with-a-broadcast-bias",
        "(float[N,6] x) => (float[N,4] y)",
        "a = Gemm(x, w1, b1)  r = Relu(a)  y = Gemm(r, w2, b2)",
        "w1:6,8 b1:1,8 w2:8,4 b2:1,4",
        opset=7,
        ir=3,
        left=0.53,
    ),
    Row(
        "reshape-by-a-constant",
        "(float[N,3,8,8] x) => (float[N,4] y)",
        "a = Conv(x, w1, b1)  f = Reshape(a, to)  y = MatMul(f, w2)",
        "w1:8,3,3,3 b1:8 to=-1,288 w2:288,4",
        opset=7,
        ir=3,
    ),
    Row(
        "lstm-of-opset-7",
        "(float[5,N,6] x) => (float[5,N,4] y)",
        """h4, last, cell = LSTM<hidden_size=8>(x, w, r, b)  h = Squeeze<axes=[1]>(h4)
        y = MatMul(h, w2)""",
        "w:1,32,6 r:1,32,8 b:1,64 w2:8,4",
        opset=7,
        ir=3,
    ),
]


def as_it_is(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights stay initializers alone."""
    model.ir_version = max(model.ir_version, 4)
    return model


def in_constant_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """As Paddle writes them: every weight is the output of a Constant node, at the front."""
    model = as_it_is(model)
    for i in reversed(range(len(model.graph.initializer))):
        tensor = model.graph.initializer[i]
        if tensor.data_type == onnx.TensorProto.FLOAT:  # Constant had no integers before opset 9
            node = helper.make_node("Constant", [], [tensor.name], value=tensor)
            model.graph.node.insert(0, node)
            del model.graph.initializer[i]
    return model


def as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """As before IR version 4: every initializer is an input too."""
    for tensor in model.graph.initializer:
        declared = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(declared)
    model.ir_version = 3
    return model


STORAGE: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "initializers": as_it_is,
    "constant-nodes": in_constant_nodes,
    "inputs": as_inputs,
}


def made(row: Row) -> onnx.ModelProto:
    """The row's model with weights; Clip's bounds and Upsample's scales get sensible values."""
    model = build(row.signature, row.body, opset=row.opset, ir=row.ir)
    given = {"zero": [0.0], "six": [6.0], "scales": [1.0, 1.0, 2.0, 2.0]}
    for tensor in tensors(row.weights):
        if tensor.name in given:
            shape = tuple(tensor.dims)
            array = np.array(given[tensor.name], np.float32).reshape(shape)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        model.graph.initializer.append(tensor)
    return model


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("row", [*TENSORFLOW, *OLD], ids=lambda row: row.name)
def test_half_of_every_group_equals_the_twin(row: Row, storage: str) -> None:
    model = STORAGE[storage](made(row))
    if storage == "inputs" and row.opset > 8:
        pytest.skip("initializers were inputs up to operator set 8")
    onnx.checker.check_model(model, full_check=True)
    pruned = prune_half(model, row.scope)
    assert verify.structure_problems(pruned.model, model) == []
    assert pruned.error <= TOLERANCE
    assert pruned.effect > 1e-3
    assert count_params(pruned.model) <= row.left * count_params(model) + 6
