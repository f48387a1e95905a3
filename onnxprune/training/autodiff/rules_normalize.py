"""Gradients of normalizations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from onnxprune.training.autodiff.tape import Grad, Tape, vjp
from onnxprune.training.draft import attributes


@vjp("LayerNormalization")
def layer_normalization(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = n scale + bias, n = (x - mean) r: dx = r (h - mean(h) - n mean(h n)), h = dy scale

    The node tells mean and r = 1 / deviation as its second and third output.
    """
    x, scale = node.input[:2]
    dy = grads[0]
    mean, inverse = node.output[1:3]
    rank = t.rank(x)
    first = attributes(node).get("axis", -1) % rank
    axes, others = np.arange(first, rank), np.arange(first)
    normal = t.op("Mul", t.op("Sub", x, mean), inverse)
    h = t.op("Mul", dy, scale)
    inner = t.op("Sub", h, t.op("ReduceMean", h, axes))
    slope = t.op("ReduceMean", t.op("Mul", h, normal), axes)
    dx = t.op("Mul", t.op("Sub", inner, t.op("Mul", normal, slope)), inverse)
    if not (t.needs(node, 1) or t.needs(node, 2)):
        return [dx]

    def total(tensor: str | None) -> str:
        if not first:
            return t.op("Identity", tensor)
        return t.op("ReduceSum", tensor, others, keepdims=0)

    return [dx, total(t.op("Mul", dy, normal)), total(dy)]


@vjp("BatchNormalization")
def batch_normalization(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """In training mode, over [N, *S]: the equations of LayerNormalization with other axes."""
    options = attributes(node)
    if not options.get("training_mode", 0):
        raise ValueError(f"BatchNormalization ({node.name}) has a rule in training mode only")
    x, gamma = node.input[:2]
    rank = t.rank(x)
    axes = np.array([0, *range(2, rank)])
    spread = np.array([-1] + [1] * (rank - 2))
    centred = t.op("Sub", x, t.op("ReduceMean", x, axes))
    variance = t.op("ReduceMean", t.op("Mul", centred, centred), axes)
    guarded = t.op("Add", variance, float(options.get("epsilon", 1e-5)))
    deviation = t.op("Sqrt", guarded)
    normal = t.op("Div", centred, deviation)
    dy = grads[0]
    dbeta = t.op("ReduceMean", dy, axes)
    dgamma = t.op("ReduceMean", t.op("Mul", dy, normal), axes)
    inner = t.op("Sub", t.op("Sub", dy, dbeta), t.op("Mul", normal, dgamma))
    factor = t.op("Div", t.op("Reshape", gamma, spread), deviation)
    counts = t.op("Div", t.op("Size", x), t.op("Size", gamma))
    count = t.op("Cast", counts, to=onnx.TensorProto.FLOAT)

    def total(mean: str) -> str:
        return t.op("Mul", t.op("Reshape", mean, np.array([-1])), count)

    return [t.op("Mul", inner, factor), total(dgamma), total(dbeta)]
