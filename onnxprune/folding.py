"""Operators that shape chains are made of, on values: what numpy makes of small constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxprune.graph import Node

Array = NDArray[Any]
#: Values of more elements are not folded.
FOLD_LIMIT = 8192


def _axes(node: Node, value: Array | None) -> tuple[int, ...] | None:
    axes = node.attr("axes") if value is None else value.ravel()
    return None if axes is None else tuple(int(a) for a in axes)


def _slice(node: Node, x: Array, *rest: Array | None) -> Array:
    parts: list[Any] = list(rest) + [None] * (4 - len(rest))
    if not rest:
        parts = [node.attr("starts"), node.attr("ends"), node.attr("axes"), None]
    starts, ends = parts[0], parts[1]
    axes = range(len(starts)) if parts[2] is None else parts[2]
    steps = [1] * len(starts) if parts[3] is None else parts[3]
    index = [slice(None)] * x.ndim
    for a, s, e, t in zip(axes, starts, ends, steps, strict=True):
        stop: int | None = int(e)
        if t < 0 and e < -x.shape[int(a)]:
            stop = None
        index[int(a)] = slice(int(s), stop, int(t))
    return x[tuple(index)]


def _unsqueeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    where = _axes(node, axes) or ()
    rank = x.ndim + len(where)
    return np.expand_dims(x, tuple(a % rank for a in where))


def _reshape(node: Node, x: Array, shape: Array | None = None) -> Array:
    target = [int(v) for v in (node.attr("shape") if shape is None else shape)]
    if not node.attr("allowzero", 0):
        target = [x.shape[i] if v == 0 else v for i, v in enumerate(target)]
    return x.reshape(target)


def _divide(_: Node, a: Array, b: Array) -> Array:
    if np.issubdtype(a.dtype, np.integer):
        return np.asarray(np.trunc(a / b)).astype(a.dtype)
    return a / b


def _cast(node: Node, x: Array) -> Array:
    return x.astype(helper.tensor_dtype_to_np_dtype(node.attr("to")))


def _constant_of_shape(node: Node, shape: Array) -> Array:
    if np.prod(shape) > FOLD_LIMIT:
        raise ValueError("too large to fold")
    value = node.attr("value")
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    return np.full(tuple(int(v) for v in shape), fill.ravel()[0])


def _expand(_: Node, x: Array, shape: Array) -> Array:
    dims = np.broadcast_shapes(x.shape, tuple(int(v) for v in shape))
    if np.prod(dims) > FOLD_LIMIT:
        raise ValueError("too large to fold")
    return np.broadcast_to(x, dims)


def _gather(node: Node, x: Array, index: Array) -> Array:
    return np.take(x, index, axis=node.attr("axis", 0))


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def fold(node: Node, x: Array, axes: Array | None = None) -> Array:
        where = _axes(node, axes)
        if where is None and node.attr("noop_with_empty_axes", 0):
            return x
        return np.asarray(function(x, axis=where, keepdims=bool(node.attr("keepdims", 1))))

    return fold


def _range(_: Node, start: Array, limit: Array, step: Array) -> Array:
    if abs((limit - start) / step) > FOLD_LIMIT:
        raise ValueError("too large to fold")
    first, last, by = start.item(), limit.item(), step.item()
    return np.arange(first, last, by, dtype=start.dtype)


def _clip(node: Node, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    bounds = [node.attr("min"), node.attr("max")] if low is None and high is None else [low, high]
    for bound, limit in zip(bounds, (np.maximum, np.minimum), strict=True):
        x = x if bound is None else limit(x, bound)
    return np.asarray(x)


def _shape(node: Node, dims: Array) -> Array:
    return dims[node.attr("start", 0) : node.attr("end", None)]


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda node, *inputs: function(*inputs)


#: Folds of the operators that shape chains are made of: (node, *input values) -> output value.
FOLDS: dict[str, Callable[..., Any]] = {
    "Shape": _shape,
    "Size": lambda node, dims: np.prod(dims, dtype=np.int64),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": lambda node, *xs: np.concatenate(xs, axis=node.attr("axis")),
    "Unsqueeze": _unsqueeze,
    "Squeeze": lambda node, x, axes=None: np.squeeze(x, _axes(node, axes)),
    "Reshape": _reshape,
    "Flatten": lambda node, x: x.reshape(int(np.prod(x.shape[: node.attr("axis", 1)])), -1),
    "Cast": _cast,
    "Identity": lambda node, x: x,
    "Transpose": lambda node, x: np.transpose(x, node.attr("perm")),
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Range": _range,
    "Clip": _clip,
    "NonZero": lambda node, x: np.stack(np.nonzero(x)).astype(np.int64),
    "Div": _divide,
    "Mod": lambda node, a, b: np.fmod(a, b) if node.attr("fmod", 0) else np.mod(a, b),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Where": _plain(np.where),
    "Add": _plain(np.add),
    "Sub": _plain(np.subtract),
    "Mul": _plain(np.multiply),
    "Pow": _plain(np.power),
    "Neg": _plain(np.negative),
    "Reciprocal": _plain(np.reciprocal),
    "Abs": _plain(np.abs),
    "Min": lambda node, *xs: np.minimum.reduce(np.broadcast_arrays(*xs)),
    "Max": lambda node, *xs: np.maximum.reduce(np.broadcast_arrays(*xs)),
    "Floor": _plain(np.floor),
    "Ceil": _plain(np.ceil),
    "Sqrt": _plain(np.sqrt),
    "Equal": _plain(np.equal),
    "Greater": _plain(np.greater),
    "GreaterOrEqual": _plain(np.greater_equal),
    "Less": _plain(np.less),
    "LessOrEqual": _plain(np.less_equal),
    "And": _plain(np.logical_and),
    "Or": _plain(np.logical_or),
    "Not": _plain(np.logical_not),
}
