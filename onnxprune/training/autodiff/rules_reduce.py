"""Gradients of reductions, softmax, pooling and choice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from onnxprune.training.autodiff.tape import Grad, Tape, vjp
from onnxprune.training.draft import attributes


@vjp("ReduceSum", "ReduceMean", "ReduceL2", "ReduceLogSumExp")
def reduction(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """dy goes back to every element, by its share."""
    x, y, dy = node.input[0], node.output[0], grads[0]
    assert dy is not None
    axes = _axes(node, t)
    if axes is not None and not axes:
        return [dy]
    if not attributes(node).get("keepdims", 1):
        kept = _kept_shape(t, x, axes)
        dy, y = t.op("Reshape", dy, kept), t.op("Reshape", y, kept)
    if node.op_type == "ReduceL2":
        norm = t.op("Max", y, np.array(1e-30, np.float32))
        return [t.op("Mul", t.op("Div", x, norm), dy)]
    if node.op_type == "ReduceLogSumExp":
        return [t.op("Mul", t.op("Exp", t.op("Sub", x, y)), dy)]
    if node.op_type == "ReduceMean":
        counts = t.op("Div", t.op("Size", x), t.op("Size", y))
        dy = t.op("Div", dy, t.op("Cast", counts, to=onnx.TensorProto.FLOAT))
    return [t.op("Expand", dy, t.shape_of(x))]


def _axes(node: onnx.NodeProto, t: Tape) -> list[int] | None:
    """The reduced axes; None: all of them; [] where nothing is reduced."""
    value = t.value(node, 1)
    if value is None and len(node.input) > 1 and node.input[1]:
        raise ValueError(f"{node.op_type} ({node.name}): the axes are not constant")
    if value is None or not value.size:
        return [] if attributes(node).get("noop_with_empty_axes", 0) else None
    rank = t.rank(node.input[0])
    return sorted(int(axis) % rank for axis in value)


def _kept_shape(t: Tape, x: str, axes: list[int] | None) -> str:
    """The shape of x with ones at the reduced axes, as a tensor."""
    rank = t.rank(x)
    gone = range(rank) if axes is None else axes
    if axes is None:
        return t.constant(np.ones(rank, np.int64))
    sizes = [np.array([1]) if axis in gone else t.size_of(x, axis) for axis in range(rank)]
    return t.op("Concat", *sizes, axis=0)


@vjp("Softmax", "LogSoftmax")
def softmax(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """dx = y (dy - sum(y dy)); of the logarithm: dx = dy - exp(y) sum(dy)"""
    y, dy = node.output[0], grads[0]
    assert dy is not None
    axis = np.array([attributes(node).get("axis", -1)])
    if node.op_type == "LogSoftmax":
        total = t.op("ReduceSum", dy, axis, keepdims=1)
        return [t.op("Sub", dy, t.op("Mul", t.op("Exp", y), total))]
    weighted = t.op("Mul", y, dy)
    total = t.op("ReduceSum", weighted, axis, keepdims=1)
    return [t.op("Sub", weighted, t.op("Mul", y, total))]


@vjp("GlobalAveragePool")
def global_average_pool(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """x[N, C, *S] -> y[N, C, 1...]: dx = dy / |S|"""
    x, y = node.input[0], node.output[0]
    counts = t.op("Div", t.op("Size", x), t.op("Size", y))
    share = t.op("Div", grads[0], t.op("Cast", counts, to=onnx.TensorProto.FLOAT))
    return [t.op("Expand", share, t.shape_of(x))]


@vjp("MaxPool")
def max_pool(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """dy goes to the place of each maximum; the places are a further output of the node."""
    x = node.input[0]
    while len(node.output) < 2:
        node.output.append("")
    if not node.output[1]:
        node.output[1] = t.name("places")
    flat = np.array([-1])
    places = t.op("Reshape", node.output[1], flat)
    zeros = t.op("Reshape", t.zeros_like(x), flat)
    spread = t.op(
        "ScatterElements", zeros, places, t.op("Reshape", grads[0], flat), axis=0, reduction="add"
    )
    return [t.op("Reshape", spread, t.shape_of(x))]


@vjp("TopK")
def top_k(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """The gradients of the values go to where the values came from."""
    if grads[0] is None:
        return [None]
    axis = attributes(node).get("axis", -1)
    if len(node.output) < 2 or not node.output[1]:
        raise ValueError(f"TopK ({node.name}): the indices are no output")
    x = node.input[0]
    return [t.op("ScatterElements", t.zeros_like(x), node.output[1], grads[0], axis=axis)]
