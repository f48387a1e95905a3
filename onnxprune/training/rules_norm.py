"""Normalizations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxprune.training.draft import Builder, Draft, Undifferentiable, attributes, replaced, rule


def merge_batchnorm(draft: Draft) -> None:
    """Let a BatchNormalization act on the weights of the Conv or Gemm before it, inside the graph.

    With s = gamma / sqrt(var + eps):  y = conv(x, W * s) + (b - mean) * s + beta. W, b, gamma and
    beta stay trainable, and no activation is touched twice.
    """
    merged: dict[str, onnx.NodeProto] = {}
    for node in draft.nodes:
        if node.op_type == "BatchNormalization" and not node.domain:
            source = draft.producers.get(node.input[0])
            if source is not None and _takes_batchnorm(source, node, draft):
                merged[source.output[0]] = node
    gone = {id(node) for node in merged.values()}
    nodes: list[onnx.NodeProto] = []
    for node in draft.nodes:
        norm = merged.get(node.output[0])
        if norm is not None:
            nodes.extend(_merged(node, norm, draft))
        elif id(node) not in gone:
            nodes.append(node)
    draft.nodes = nodes


def use_batch_statistics(draft: Draft, momentum: float) -> None:
    """Put BatchNormalization into training mode; running statistics become buffers.

    Nodes that share statistics stay in inference form: each batch would move them twice.
    """
    for index, node in enumerate(draft.nodes):
        if node.op_type != "BatchNormalization" or node.domain or len(node.output) > 1:
            continue
        statistics = list(node.input[3:5])
        if any(n not in draft.constants or draft.uses.get(n) != 1 for n in statistics):
            continue
        fresh = replaced(node, training_mode=1, momentum=float(momentum))
        for name in statistics:
            draft.buffers[name] = draft.constants.pop(name).astype(np.float32)
            draft.updates[name] = draft.name("running")
            fresh.output.append(draft.updates[name])
        draft.nodes[index] = fresh


def _takes_batchnorm(source: onnx.NodeProto, norm: onnx.NodeProto, draft: Draft) -> bool:
    if (
        source.domain
        or draft.uses.get(source.output[0]) != 1
        or attributes(norm).get("training_mode")
    ):
        return False
    known = draft.constants.keys() | draft.parameters.keys()
    if any(name not in known for name in [*source.input[1:], *norm.input[1:]] if name):
        return False
    if any(name not in draft.constants for name in norm.input[3:5]):
        return False
    options = attributes(source)
    if source.op_type == "Gemm":
        return bool(options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0)
    return source.op_type == "Conv" or (
        source.op_type == "ConvTranspose" and options.get("group", 1) == 1
    )


def _merged(source: onnx.NodeProto, norm: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    b = Builder(draft, norm)
    scale, shift = _scale_and_shift(
        b, norm, draft, source.input[2] if len(source.input) > 2 else None
    )
    weight = source.input[1]
    rank = draft.rank(source, weight)
    axis = {"Conv": 0, "ConvTranspose": 1}.get(source.op_type)
    if axis is None:
        axis = 0 if attributes(source).get("transB") else 1
    spread = [1] * rank
    spread[axis] = -1
    scaled = b.op("Mul", weight, b.op("Reshape", scale, np.array(spread)))
    fresh = replaced(source, [source.input[0], scaled, shift])
    fresh.output[0] = norm.output[0]
    return [*b.nodes, fresh]


def _scale_and_shift(
    b: Builder, norm: onnx.NodeProto, draft: Draft, bias: str | None
) -> tuple[str, str]:
    """s [C] and (bias - mean) * s + beta [C]."""
    mean, var = draft.value(norm, 3), draft.value(norm, 4)
    assert mean is not None and var is not None
    eps = attributes(norm).get("epsilon", 1e-5)
    inverse = (1 / np.sqrt(var.astype(np.float64) + eps)).astype(np.float32)
    scale = b.op("Mul", norm.input[1], inverse)
    centre = b.op("Sub", bias, mean) if bias else -mean
    return scale, b.op("Add", b.op("Mul", centre, scale), norm.input[2])


@rule("BatchNormalization")
def batch_normalization(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x[N, C, *S] -> y[N, C, *S] = x * s + (beta - mean * s).

    The builder would use the statistics of the batch.
    """
    if node.input[3] in draft.buffers:
        return None
    if attributes(node).get("training_mode"):
        raise Undifferentiable("BatchNormalization: it is in training mode")
    rank = draft.rank(node, node.input[0])
    b = Builder(draft, node)
    scale, shift = _scale_and_shift(b, node, draft, None)
    if rank > 2:
        spread = np.array([-1] + [1] * (rank - 2))
        scale, shift = b.op("Reshape", scale, spread), b.op("Reshape", shift, spread)
    b.op("Add", b.op("Mul", node.input[0], scale), shift, output=node.output[0])
    return b.nodes


@rule("LayerNormalization")
def layer_normalization(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x[*B, *D], scale[*D], bias[*D] -> y: the builder needs the bias and all three outputs."""
    complete = len(node.input) > 2 and node.input[2]
    if complete and len([o for o in node.output if o]) == 3:
        return None
    inputs = list(node.input[:2])
    if complete:
        inputs.append(node.input[2])
    else:
        shape = draft.static(node, node.input[1])
        inputs.append(draft.constant(np.zeros(shape, np.float32), "bias"))
    outputs = list(node.output) + [""] * (3 - len(node.output))
    fresh = replaced(node, inputs)
    del fresh.output[:]
    fresh.output.extend(o or draft.name("statistic") for o in outputs)
    return [fresh]


@rule("InstanceNormalization")
def instance_normalization(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x[N, C, *S], scale[C], bias[C] -> y[N, C, *S]"""
    rank = draft.rank(node, node.input[0])
    b = Builder(draft, node)
    normal = _normalized(
        b, node.input[0], list(range(2, rank)), attributes(node).get("epsilon", 1e-5)
    )
    return _affine(b, normal, node, rank)


@rule("GroupNormalization")
def group_normalization(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x[N, C, *S], scale[C], bias[C] -> y[N, C, *S], statistics over each group of channels."""
    rank = draft.rank(node, node.input[0])
    options = attributes(node)
    b = Builder(draft, node)
    grouped = b.op("Reshape", node.input[0], np.array([0, options["num_groups"], -1]))
    normal = _normalized(b, grouped, [2], options.get("epsilon", 1e-5))
    normal = b.op("Reshape", normal, b.op("Shape", node.input[0]))
    return _affine(b, normal, node, rank)


def _normalized(b: Builder, x: str, axes: list[int], eps: float) -> str:
    centred = b.op("Sub", x, b.op("ReduceMean", x, np.array(axes)))
    variance = b.op("ReduceMean", b.op("Mul", centred, centred), np.array(axes))
    return b.op("Div", centred, b.op("Sqrt", b.op("Add", variance, eps)))


def _affine(b: Builder, normal: str, node: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
    spread = np.array([-1] + [1] * (rank - 2))
    scaled = b.op("Mul", normal, b.op("Reshape", node.input[1], spread))
    b.op("Add", scaled, b.op("Reshape", node.input[2], spread), output=node.output[0])
    return b.nodes


@rule("LpNormalization")
def lp_normalization(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> x / ||x||_p along one axis"""
    options = attributes(node)
    axis = np.array([options.get("axis", -1)])
    b = Builder(draft, node)
    x = node.input[0]
    if options.get("p", 2) == 1:
        norm = b.op("ReduceSum", b.op("Abs", x), axis)
    else:
        norm = b.op("Sqrt", b.op("ReduceSum", b.op("Mul", x, x), axis))
    b.op("Div", x, norm, output=node.output[0])
    return b.nodes


@rule("LRN")
def local_response(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x[N, C, H, W] -> x / (k + alpha / n * sum of squares over n channels) ^ beta.

    The sum is a 1x1 convolution.
    """
    options: dict[str, Any] = attributes(node)
    rank = draft.rank(node, node.input[0])
    channels = draft.static(node, node.input[0], [1])[0]
    size = options["size"]
    index = np.arange(channels)
    distance = index[None, :] - index[:, None]
    band = (distance >= -((size - 1) // 2)) & (distance <= size // 2)
    kernel = band.astype(np.float32).reshape(channels, channels, *[1] * (rank - 2))
    b = Builder(draft, node)
    sums = b.op("Conv", b.op("Mul", node.input[0], node.input[0]), kernel)
    scaled = b.op("Mul", sums, options.get("alpha", 1e-4) / size)
    base = b.op("Add", scaled, options.get("bias", 1.0))
    b.op("Mul", node.input[0], b.op("Pow", base, -options.get("beta", 0.75)), output=node.output[0])
    return b.nodes
