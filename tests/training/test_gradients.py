"""Every operator in a small graph: the legalised gradient against finite differences."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxprune import runtime
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.client import Worker
from onnxprune.training.legalise import TrainingGraph, legalise
from onnxprune.training.loss import Objective, Term, append_loss, loss_value

WEIGHT = re.compile(r"[wb]\d*$")

# (name, opset, inputs, body); tensors named w*, b* are weights, `y` is the output
IMAGE = "float[N,4,6,6] x"
CASES: list[tuple[str, int, str, str]] = [
    ("gemm", 13, "float[N,5] x, float[5,3] w, float[3] b", "y = Gemm(x, w, b)"),
    ("gemm-trans", 13, "float[N,5] x, float[3,5] w", "y = Gemm<transB=1, alpha=0.5>(x, w)"),
    ("gemm-9", 9, "float[N,5] x, float[5,3] w, float[3] b", "h = Gemm(x, w, b) y = Relu(h)"),
    ("matmul-3d", 17, "float[N,3,5] x, float[5,4] w, float[4] b", "h = MatMul(x, w) y = Add(h, b)"),
    ("conv", 17, f"{IMAGE}, float[3,4,3,3] w, float[3] b", "y = Conv<pads=[1,1,1,1]>(x, w, b)"),
    (
        "conv-no-bias",
        17,
        f"{IMAGE}, float[3,4,3,2] w",
        "y = Conv<strides=[2,1], pads=[0,1,1,0]>(x, w)",
    ),
    ("conv-group", 17, f"{IMAGE}, float[6,2,3,3] w, float[6] b", "y = Conv<group=2>(x, w, b)"),
    (
        "conv-depthwise",
        17,
        f"{IMAGE}, float[4,1,3,3] w",
        "y = Conv<group=4, dilations=[2,2]>(x, w)",
    ),
    ("conv-1d", 17, "float[N,4,9] x, float[3,4,3] w", "y = Conv<strides=[2]>(x, w)"),
    ("conv-3d", 17, "float[N,2,4,4,4] x, float[3,2,2,2,2] w", "y = Conv(x, w)"),
    (
        "conv-same",
        17,
        f"{IMAGE}, float[3,4,4,4] w",
        'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)',
    ),
    ("conv-same-lower", 11, f"{IMAGE}, float[3,4,4,2] w", 'y = Conv<auto_pad="SAME_LOWER">(x, w)'),
    ("conv-valid", 17, f"{IMAGE}, float[3,4,2,2] w", 'y = Conv<auto_pad="VALID">(x, w)'),
    ("deconv", 17, f"{IMAGE}, float[4,3,3,3] w, float[3] b", "y = ConvTranspose(x, w, b)"),
    (
        "deconv-stride",
        17,
        f"{IMAGE}, float[4,3,3,2] w",
        "y = ConvTranspose<strides=[2,3], pads=[1,0,1,0], output_padding=[1,2]>(x, w)",
    ),
    (
        "deconv-group",
        17,
        f"{IMAGE}, float[4,2,2,2] w",
        "y = ConvTranspose<group=2, strides=[2,2], dilations=[2,1]>(x, w)",
    ),
    (
        "deconv-cut",
        17,
        f"{IMAGE}, float[4,3,2,2] w",
        "y = ConvTranspose<strides=[2,2], pads=[2,1,1,2]>(x, w)",
    ),
    (
        "deconv-shape",
        17,
        f"{IMAGE}, float[4,3,3,3] w",
        "y = ConvTranspose<strides=[2,2], output_shape=[12,12]>(x, w)",
    ),
    (
        "deconv-same",
        17,
        f"{IMAGE}, float[4,3,3,3] w",
        'y = ConvTranspose<strides=[2,2], auto_pad="SAME_UPPER">(x, w)',
    ),
    (
        "conv-bn",
        17,
        f"{IMAGE}, float[3,4,3,3] w, float[3] w1, float[3] b1, float[3] mean, float[3] var",
        "h = Conv(x, w) y = BatchNormalization(h, w1, b1, mean, var)",
    ),
    (
        "conv-bias-bn",
        15,
        f"{IMAGE}, float[3,4,3,3] w, float[3] b, float[3] w1, float[3] b1, float[3] mean, float[3] var",
        "h = Conv(x, w, b) z = BatchNormalization(h, w1, b1, mean, var) y = Relu(z)",
    ),
    (
        "bn-alone",
        17,
        f"{IMAGE}, float[4] w1, float[4] b1, float[4] mean, float[4] var",
        "h = Relu(x) y = BatchNormalization(h, w1, b1, mean, var)",
    ),
    (
        "bn-shared-conv",
        9,
        f"{IMAGE}, float[4,4,1,1] w, float[4] w1, float[4] b1, float[4] mean, float[4] var",
        "h = Conv(x, w) z = BatchNormalization(h, w1, b1, mean, var) y = Add(z, h)",
    ),
    (
        "gemm-bn",
        13,
        "float[N,5] x, float[3,5] w, float[3] b, float[3] w1, float[3] b1, float[3] mean, float[3] var",
        "h = Gemm<transB=1>(x, w, b) y = BatchNormalization(h, w1, b1, mean, var)",
    ),
    (
        "deconv-bn",
        17,
        f"{IMAGE}, float[4,3,2,2] w, float[3] w1, float[3] b1, float[3] mean, float[3] var",
        "h = ConvTranspose<strides=[2,2]>(x, w) y = BatchNormalization(h, w1, b1, mean, var)",
    ),
    (
        "bn-1d",
        13,
        "float[N,5] x, float[5,4] w, float[4] w1, float[4] b1, float[4] mean, float[4] var",
        "h = MatMul(x, w) y = BatchNormalization(h, w1, b1, mean, var)",
    ),
    (
        "layernorm",
        17,
        "float[N,3,5] x, float[5,4] w, float[4] w1, float[4] b1",
        "h = MatMul(x, w) y = LayerNormalization<axis=-1>(h, w1, b1)",
    ),
    (
        "layernorm-no-bias",
        17,
        "float[N,3,5] x, float[5,4] w, float[4] w1",
        "h = MatMul(x, w) y = LayerNormalization<axis=-1, epsilon=0.001>(h, w1)",
    ),
    (
        "layernorm-2-axes",
        17,
        "float[N,3,5] x, float[5,4] w, float[3,4] w1, float[3,4] b1",
        "h = MatMul(x, w) y = LayerNormalization<axis=1>(h, w1, b1)",
    ),
    (
        "instancenorm",
        17,
        f"{IMAGE}, float[3,4,1,1] w, float[3] w1, float[3] b1",
        "h = Conv(x, w) y = InstanceNormalization(h, w1, b1)",
    ),
    (
        "groupnorm-21",
        21,
        f"{IMAGE}, float[4,4,1,1] w, float[4] w1, float[4] b1",
        "h = Conv(x, w) y = GroupNormalization<num_groups=2>(h, w1, b1)",
    ),
    (
        "rmsnorm-23",
        23,
        "float[N,3,5] x, float[5,4] w, float[4] w1",
        "h = MatMul(x, w) y = RMSNormalization(h, w1)",
    ),
    (
        "lrn",
        17,
        f"{IMAGE}, float[5,4,1,1] w",
        "h = Conv(x, w) y = LRN<size=3, alpha=0.5, beta=0.6, bias=1.5>(h)",
    ),
    ("lpnorm", 17, "float[N,5] x, float[5,4] w", "h = MatMul(x, w) y = LpNormalization<axis=1>(h)"),
    (
        "maxpool",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(h)",
    ),
    (
        "maxpool-ceil",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(h)",
    ),
    (
        "maxpool-same",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        'h = Conv(x, w) y = MaxPool<kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER">(h)',
    ),
    (
        "maxpool-dilated",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(h)",
    ),
    (
        "avgpool",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = AveragePool<kernel_shape=[2,3], strides=[2,2]>(h)",
    ),
    (
        "avgpool-pads",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(h)",
    ),
    (
        "avgpool-include",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(h)",
    ),
    (
        "avgpool-ceil",
        19,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(h)",
    ),
    (
        "avgpool-tiles",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = AveragePool<kernel_shape=[2,3], strides=[2,3]>(h)",
    ),
    (
        "avgpool-same",
        11,
        f"{IMAGE}, float[3,4,1,1] w",
        'h = Conv(x, w) y = AveragePool<kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER">(h)',
    ),
    (
        "avgpool-dilated",
        19,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = AveragePool<kernel_shape=[2,2], dilations=[2,1]>(h)",
    ),
    ("global-avg", 17, f"{IMAGE}, float[3,4,1,1] w", "h = Conv(x, w) y = GlobalAveragePool(h)"),
    ("global-max", 17, f"{IMAGE}, float[3,4,1,1] w", "h = Conv(x, w) y = GlobalMaxPool(h)"),
    (
        "resize-nearest",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        'h = Conv(x, w) s = Constant<value = float[4] {1.0,1.0,2.0,2.0}>() y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(h, , s)',
    ),
    (
        "resize-linear",
        17,
        f"{IMAGE}, float[3,4,1,1] w",
        'h = Conv(x, w) s = Constant<value = float[4] {1.0,1.0,1.5,2.0}>() y = Resize<mode="linear">(h, , s)',
    ),
    (
        "resize-cubic",
        13,
        f"{IMAGE}, float[3,4,1,1] w",
        'h = Conv(x, w) s = Constant<value = int64[4] {2,3,9,4}>() y = Resize<mode="cubic", coordinate_transformation_mode="align_corners">(h, , , s)',
    ),
    (
        "upsample-9",
        9,
        f"{IMAGE}, float[3,4,1,1] w",
        'h = Conv(x, w) s = Constant<value = float[4] {1.0,1.0,2.0,2.0}>() y = Upsample<mode="nearest">(h, s)',
    ),
    (
        "depth-to-space",
        13,
        f"{IMAGE}, float[8,4,1,1] w",
        "h = Conv(x, w) y = DepthToSpace<blocksize=2>(h)",
    ),
    (
        "depth-to-space-crd",
        13,
        f"{IMAGE}, float[8,4,1,1] w",
        'h = Conv(x, w) y = DepthToSpace<blocksize=2, mode="CRD">(h)',
    ),
    (
        "space-to-depth",
        13,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = SpaceToDepth<blocksize=2>(h)",
    ),
    (
        "split-all",
        13,
        "float[N,5] x, float[5,6] w",
        "h = MatMul(x, w) p, q = Split<axis=1>(h) y = Mul(p, q)",
    ),
    (
        "split-unused",
        13,
        "float[N,5] x, float[5,6] w",
        "h = MatMul(x, w) n = Constant<value = int64[3] {1,3,2}>() p, q, r = Split<axis=1>(h, n) y = Tanh(q)",
    ),
    (
        "split-unused-18",
        18,
        "float[N,5] x, float[5,6] w",
        "h = MatMul(x, w) p, q = Split<axis=-1, num_outputs=2>(h) y = Tanh(q)",
    ),
    (
        "slice",
        13,
        "float[N,5] x, float[5,6] w",
        "h = MatMul(x, w) a = Constant<value = int64[1] {1}>() e = Constant<value = int64[1] {5}>() t = Constant<value = int64[1] {2}>() y = Slice(h, a, e, a, t)",
    ),
    (
        "concat",
        13,
        "float[N,5] x, float[5,6] w, float[5,2] w1",
        "h = MatMul(x, w) g = MatMul(x, w1) y = Concat<axis=1>(h, g)",
    ),
    (
        "pad-constant",
        13,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) p = Constant<value = int64[8] {0,0,1,0,0,0,0,2}>() y = Pad(h, p)",
    ),
    (
        "pad-axes",
        18,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) p = Constant<value = int64[4] {1,0,0,2}>() a = Constant<value = int64[2] {2,3}>() y = Pad(h, p, , a)",
    ),
    (
        "pad-reflect",
        13,
        f"{IMAGE}, float[3,4,1,1] w",
        'h = Conv(x, w) p = Constant<value = int64[8] {0,0,1,2,0,0,1,0}>() y = Pad<mode="reflect">(h, p)',
    ),
    (
        "pad-edge",
        13,
        f"{IMAGE}, float[3,4,1,1] w",
        'h = Conv(x, w) p = Constant<value = int64[8] {0,0,1,2,0,0,1,0}>() y = Pad<mode="edge">(h, p)',
    ),
    (
        "transpose",
        13,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) y = Transpose<perm=[2,0,1]>(h)",
    ),
    (
        "flatten",
        13,
        f"{IMAGE}, float[3,4,3,3] w, float[48,2] w1",
        "h = Conv(x, w) f = Flatten(h) y = MatMul(f, w1)",
    ),
    (
        "reshape",
        13,
        "float[N,3,4] x, float[4,4] w",
        "h = MatMul(x, w) s = Constant<value = int64[3] {0,2,-1}>() y = Reshape(h, s)",
    ),
    (
        "squeeze",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = int64[1] {1}>() u = Unsqueeze(h, a) y = Squeeze(u, a)",
    ),
    (
        "squeeze-11",
        11,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) u = Unsqueeze<axes=[1]>(h) y = Squeeze<axes=[1]>(u)",
    ),
    (
        "expand",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = int64[1] {1}>() u = Unsqueeze(h, a) s = Constant<value = int64[3] {1,3,1}>() y = Expand(u, s)",
    ),
    (
        "tile",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) s = Constant<value = int64[2] {1,3}>() y = Tile(h, s)",
    ),
    (
        "gather",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) i = Constant<value = int64[3] {2,0,2}>() y = Gather<axis=1>(h, i)",
    ),
    (
        "gather-scalar",
        13,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) i = Constant<value = int64 {-1}>() y = Gather<axis=1>(h, i)",
    ),
    ("embedding", 13, "int64[N,5] i, float[7,4] w", "h = Gather(w, i) y = Tanh(h)"),
    (
        "where",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) z = Constant<value = float {0.1}>() c = Greater(h, z) t = Exp(h) y = Where(c, h, t)",
    ),
    (
        "topk",
        13,
        "float[N,5] x, float[5,6] w",
        "h = MatMul(x, w) k = Constant<value = int64[1] {3}>() y, i = TopK<axis=1>(h, k)",
    ),
    (
        "reduce-mean",
        13,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) y = ReduceMean<axes=[1], keepdims=0>(h)",
    ),
    (
        "reduce-mean-18",
        18,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = int64[2] {-1,1}>() y = ReduceMean(h, a)",
    ),
    (
        "reduce-sum",
        13,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = int64[1] {1}>() y = ReduceSum<keepdims=0>(h, a)",
    ),
    (
        "reduce-max",
        13,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) y = ReduceMax<axes=[1], keepdims=0>(h)",
    ),
    (
        "reduce-max-2",
        13,
        f"{IMAGE}, float[3,4,1,1] w",
        "h = Conv(x, w) y = ReduceMax<axes=[-2,-1]>(h)",
    ),
    (
        "reduce-min",
        18,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = int64[1] {1}>() y = ReduceMin(h, a)",
    ),
    ("reduce-l1", 13, "float[N,3,5] x, float[5,4] w", "h = MatMul(x, w) y = ReduceL1<axes=[1]>(h)"),
    ("reduce-l2", 13, "float[N,3,5] x, float[5,4] w", "h = MatMul(x, w) y = ReduceL2<axes=[2]>(h)"),
    (
        "reduce-sumsquare",
        18,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = int64[1] {2}>() y = ReduceSumSquare(h, a)",
    ),
    (
        "reduce-logsumexp",
        13,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) y = ReduceLogSumExp<axes=[2]>(h)",
    ),
    (
        "reduce-logsum",
        13,
        "float[N,3,5] x, float[5,4] w",
        "h = MatMul(x, w) e = Exp(h) y = ReduceLogSum<axes=[2]>(e)",
    ),
    ("softmax", 13, "float[N,3,5] x, float[5,4] w", "h = MatMul(x, w) y = Softmax<axis=1>(h)"),
    ("softmax-11", 11, "float[N,3,5] x, float[5,4] w", "h = MatMul(x, w) y = Softmax<axis=1>(h)"),
    ("log-softmax", 13, "float[N,5] x, float[5,4] w", "h = MatMul(x, w) y = LogSoftmax(h)"),
    ("dropout", 13, "float[N,5] x, float[5,4] w", "h = MatMul(x, w) y = Dropout(h)"),
    ("prelu", 13, f"{IMAGE}, float[3,4,1,1] w, float[3,1,1] b", "h = Conv(x, w) y = PRelu(h, b)"),
    ("leaky", 13, "float[N,5] x, float[5,4] w", "h = MatMul(x, w) y = LeakyRelu<alpha=0.2>(h)"),
    ("clip-6", 7, "float[N,5] x, float[5,4] w", "h = MatMul(x, w) y = Clip<min=-0.5, max=0.5>(h)"),
    (
        "clip-13",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = float {0.2}>() y = Clip(h, a)",
    ),
    (
        "clip-upper",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = float {0.2}>() y = Clip(h, , a)",
    ),
    (
        "pow-2",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = float {2.0}>() y = Pow(h, a)",
    ),
    (
        "pow-3",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) a = Constant<value = float {3.0}>() y = Pow(h, a)",
    ),
    (
        "sum",
        13,
        "float[N,5] x, float[5,4] w, float[4] b",
        "h = MatMul(x, w) t = Tanh(h) y = Sum(h, t, b)",
    ),
    (
        "mean",
        13,
        "float[N,5] x, float[5,4] w, float[4] b",
        "h = MatMul(x, w) t = Tanh(h) y = Mean(h, t, b)",
    ),
    (
        "max",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) t = Neg(h) u = Tanh(h) y = Max(h, t, u)",
    ),
    ("min", 13, "float[N,5] x, float[5,4] w", "h = MatMul(x, w) t = Neg(h) y = Min(h, t)"),
    (
        "sub-div",
        13,
        "float[N,5] x, float[5,4] w, float[4] b",
        "h = MatMul(x, w) e = Exp(b) s = Sub(h, b) y = Div(s, e)",
    ),
    (
        "broadcast",
        13,
        "float[N,3,5] x, float[5,4] w, float[3,1] b",
        "h = MatMul(x, w) s = Mul(h, b) y = Add(s, h)",
    ),
    (
        "sqrt-log",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) e = Exp(h) s = Sqrt(e) l = Log(e) r = Reciprocal(e) q = Sum(s, l, r) y = Abs(q)",
    ),
    (
        "sin-cos",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) s = Sin(h) c = Cos(h) y = Mul(s, c)",
    ),
    (
        "cast",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) d = Cast<to=1>(h) y = Identity(d)",
    ),
    ("einsum-bij", 13, "float[N,3,5] x, float[5,4] w", 'y = Einsum<equation="bik,kj->bij">(x, w)'),
    (
        "einsum-heads",
        13,
        "float[N,3,8] x, float[8,8] w",
        'h = MatMul(x, w) s = Constant<value = int64[4] {0,0,2,4}>() q = Reshape(h, s) t = Tanh(q) y = Einsum<equation="bqhd,bkhd->bhqk">(q, t)',
    ),
    (
        "einsum-two-inner",
        13,
        "float[N,3,4] x, float[3,4,5] w",
        'y = Einsum<equation="bij,ijk->bk">(x, w)',
    ),
    (
        "einsum-outer",
        13,
        "float[N,5] x, float[5,4] w",
        'h = MatMul(x, w) t = Tanh(h) y = Einsum<equation="bi,bj->bij">(h, t)',
    ),
    (
        "einsum-dot",
        13,
        "float[N,5] x, float[5,4] w",
        'h = MatMul(x, w) t = Tanh(h) y = Einsum<equation="bi,bi->b">(h, t)',
    ),
    (
        "einsum-one",
        13,
        "float[N,3,5] x, float[5,4] w",
        'h = MatMul(x, w) y = Einsum<equation="bij->jb">(h)',
    ),
    (
        "lstm",
        14,
        "float[5,N,3] x, float[1,8,3] w, float[1,8,2] w1, float[1,16] b",
        "y = LSTM<hidden_size=2>(x, w, w1, b)",
    ),
    (
        "lstm-no-bias",
        14,
        "float[5,N,3] x, float[1,8,3] w, float[1,8,2] w1",
        "o, y, c = LSTM<hidden_size=2>(x, w, w1)",
    ),
    (
        "lstm-both",
        14,
        "float[5,N,3] x, float[2,8,3] w, float[2,8,2] w1, float[2,16] b",
        'o, y, c = LSTM<hidden_size=2, direction="bidirectional">(x, w, w1, b)',
    ),
    (
        "lstm-reverse",
        14,
        "float[5,N,3] x, float[1,8,3] w, float[1,8,2] w1, float[1,16] b",
        'y = LSTM<hidden_size=2, direction="reverse">(x, w, w1, b)',
    ),
    (
        "gru",
        14,
        "float[5,N,3] x, float[1,6,3] w, float[1,6,2] w1, float[1,12] b",
        "y = GRU<hidden_size=2>(x, w, w1, b)",
    ),
    (
        "gru-linear",
        14,
        "float[5,N,3] x, float[1,6,3] w, float[1,6,2] w1, float[1,12] b",
        "y = GRU<hidden_size=2, linear_before_reset=1>(x, w, w1, b)",
    ),
    (
        "gru-both",
        14,
        "float[5,N,3] x, float[2,6,3] w, float[2,6,2] w1, float[2,12] b",
        'y, h = GRU<hidden_size=2, direction="bidirectional">(x, w, w1, b)',
    ),
    (
        "concat-untrained",
        13,
        "float[N,5] x, float[5,5] w",
        "h = MatMul(x, w) t = Tanh(x) y = Concat<axis=1>(t, t, h)",
    ),
    (
        "gather-elements",
        13,
        "float[N,5] x, int64[N,3] i, float[5,6] w",
        "h = MatMul(x, w) y = GatherElements<axis=1>(h, i)",
    ),
    (
        "gather-nd",
        13,
        "float[N,5] x, float[5,6] w",
        "h = MatMul(x, w) i = Constant<value = int64[3,2] {0,1,1,4,0,1}>() y = GatherND(h, i)",
    ),
    (
        "scatter-nd",
        16,
        "float[N,5] x, float[5,6] w, float[5,3] w1",
        "h = MatMul(x, w) g = MatMul(x, w1) i = Constant<value = int64[2,3,2] {0,1,0,2,0,3,1,0,1,2,1,5}>() y = ScatterND(h, i, g)",
    ),
    (
        "scatter-elements",
        16,
        "float[N,5] x, int64[2,3] i, float[5,6] w, float[5,3] w1",
        "h = MatMul(x, w) g = MatMul(x, w1) z = Constant<value = int64[2,3] {0,1,2,5,4,3}>() y = ScatterElements<axis=1>(h, z, g)",
    ),
    ("trilu", 14, "float[N,5,5] x, float[5,5] w", "h = MatMul(x, w) y = Trilu<upper=0>(h)"),
    (
        "weight-slices",
        17,
        "float[N,4] x, float[6,4] w",
        "a = Constant<value = int64[1] {0}>() c = Constant<value = int64[1] {3}>() d = Constant<value = int64[1] {6}>() p = Slice(w, a, c, a) q = Slice(w, c, d, a) r = Concat<axis=0>(q, p) t = Transpose(r) y = MatMul(x, t)",
    ),
    ("gelu-20", 20, "float[N,5] x, float[5,4] w", "h = MatMul(x, w) y = Gelu(h)"),
    (
        "gelu-tanh",
        20,
        "float[N,5] x, float[5,4] w",
        'h = MatMul(x, w) y = Gelu<approximate="tanh">(h)',
    ),
    ("swish-24", 24, "float[N,5] x, float[5,4] w", "h = MatMul(x, w) y = Swish(h)"),
    (
        "opset-22",
        22,
        f"{IMAGE}, float[3,4,3,3] w",
        "h = Conv(x, w) e = Elu(h) y = GlobalAveragePool(e)",
    ),
    (
        "hard-sigmoid",
        13,
        "float[N,5] x, float[5,4] w",
        "h = MatMul(x, w) y = HardSigmoid<alpha=0.3>(h)",
    ),
    *(
        (name.lower(), opset, "float[N,5] x, float[5,4] w", f"h = MatMul(x, w) y = {name}(h)")
        for name, opset in [
            ("Relu", 13),
            ("Sigmoid", 13),
            ("Tanh", 13),
            ("Erf", 13),
            ("Softplus", 13),
            ("Softsign", 13),
            ("Elu", 13),
            ("Selu", 13),
            ("Celu", 13),
            ("HardSwish", 14),
            ("Mish", 18),
            ("ThresholdedRelu", 13),
            ("Shrink", 13),
            ("MeanVarianceNormalization", 13),
        ]
        if name != "MeanVarianceNormalization"
    ),
]


def build(opset: int, inputs: str, body: str) -> onnx.ModelProto:
    """A model whose inputs named w*, b*, mean, var are initializers of random values."""
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => (float y) {{ {body} }}'
    model = parser.parse_model(text)
    rng = np.random.default_rng(7)
    data = []
    for info in model.graph.input:
        if WEIGHT.match(info.name) or info.name in ("mean", "var"):
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            value = rng.standard_normal(shape).astype(np.float32) * 0.5
            if info.name == "var":
                value = np.abs(value) + 0.5
            model.graph.initializer.append(numpy_helper.from_array(value, info.name))
        else:
            data.append(info)
    del model.graph.input[:]
    model.graph.input.extend(data)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def feeds_for(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Two random samples."""
    rng = np.random.default_rng(3)
    feeds: dict[str, NDArray[Any]] = {}
    for info in model.graph.input:
        shape = [d.dim_value or 2 for d in info.type.tensor_type.shape.dim]
        if info.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            feeds[info.name] = rng.integers(0, 5, shape)
        else:
            feeds[info.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def check_gradient(model: onnx.ModelProto, worker: Worker) -> TrainingGraph:
    """Compare the loss with inference, and the gradient with finite differences."""
    feeds = feeds_for(model)
    outputs = runtime.run(runtime.session(model, threads=1), feeds)
    graph = legalise(model)
    term = Term("t", "y", "square", "none", 0, 1.0, 1.0, True, scale=1.0)
    objective = Objective((term,))
    rng = np.random.default_rng(5)
    target = outputs["y"] + rng.standard_normal(outputs["y"].shape).astype(np.float32)
    batch = {**feeds, **objective.feeds(None, {"y": target})}
    append_loss(graph.draft, objective)
    trainer = WorkerTrainer(worker, graph, optimizer={"name": "sgd"})
    trainer.check(batch, loss_value(objective, outputs, batch), seed=1)
    return graph


@pytest.mark.parametrize(("name", "opset", "inputs", "body"), CASES, ids=[c[0] for c in CASES])
def test_gradient_agrees_with_differences(
    name: str, opset: int, inputs: str, body: str, worker: Worker
) -> None:
    model = build(opset, inputs, body)
    graph = check_gradient(model, worker)
    weights = {t.name for t in model.graph.initializer if WEIGHT.match(t.name)}
    assert set(graph.parameters) == weights
    assert not graph.frozen


@pytest.mark.parametrize("shared", ["norms", "concat"])
def test_untrained_tensors_may_be_shared(shared: str, worker: Worker) -> None:
    """The builder would give two gradients one name."""
    inputs = "float[N,4] x, float[4,4] w, float[4] w1, float[4] b1"
    norm = "LayerNormalization(h, w1, b1) j = MatMul(i, w) y = LayerNormalization(j, w1, b1)"
    body = f"h = MatMul(x, w) i = {norm}"
    if shared == "concat":
        body = "t = Tanh(x) h = MatMul(x, w) y = Concat<axis=1>(t, t, h, t)"
    model = build(17, inputs, body)
    for tensor, value in zip(model.graph.initializer[1:], (1, 0), strict=True):
        array = np.full(4, value, np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    assert set(check_gradient(model, worker).parameters) == {"w"}
