"""How operators that compute carry facts; those that only move values are in fact_moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxprune import fact_moves
from onnxprune.facts import Array, Fact, Facts, exactly, fact_rule, union
from onnxprune.graph import Node
from onnxprune.ops.elementwise import UNARY, VARIADIC

assert fact_moves
#: Elementwise operators that never fall where their input rises.
RISING = frozenset(
    "Ceil Clip Elu Celu Erf Exp Floor HardSigmoid LeakyRelu Relu Round Selu Sigmoid Sign Softplus "
    "Softsign Tanh Atan ThresholdedRelu".split()
)


def evaluate(node: Node, facts: Facts, inputs: Sequence[Array | None]) -> Array | None:
    """The output of an elementwise node at these inputs; None where that cannot be had."""
    from onnx.reference import ReferenceEvaluator

    fed = {f"i{n}": np.asarray(v, np.float32) for n, v in enumerate(inputs) if v is not None}
    names = ["" if v is None else f"i{n}" for n, v in enumerate(inputs)]
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.append("o")
    kind = onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(n, kind, None) for n in fed]
    result = [helper.make_tensor_value_info("o", kind, None)]
    graph = helper.make_graph([proto], "g", values, result)
    version = helper.make_opsetid("", facts.graph.opset)
    try:
        model = helper.make_model(graph, opset_imports=[version])
        found: Any = ReferenceEvaluator(model).run(None, fed)
        return np.asarray(found[0], np.float64)
    except Exception:  # the reference may lack an operator, or raise anything inside
        return None


@fact_rule(*UNARY, *VARIADIC)
def pointwise(node: Node, facts: Facts) -> Fact | None:
    """Known inputs give a known output; a rising function keeps bounds."""
    inputs = [facts.input(node, s) if name else None for s, name in enumerate(node.inputs)]
    given = [f for f in inputs if f is not None]
    if node.op_type in RISING and _rises(node) and all(f.constant.all() for f in given[1:]):
        low = evaluate(node, facts, [None if f is None else f.low for f in inputs])
        high = evaluate(node, facts, [None if f is None else f.high for f in inputs])
        return None if low is None or high is None else Fact(low, high)
    mask = given[0].constant
    for fact in given[1:]:
        mask = mask & fact.constant
    if not mask.any():
        return None
    safe = [None if f is None else np.where(f.constant, f.low, 1.0) for f in inputs]
    value = evaluate(node, facts, safe)
    if value is None or value.shape != mask.shape:
        return None
    return Fact(np.where(mask, value, -np.inf), np.where(mask, value, np.inf))


def _rises(node: Node) -> bool:
    return bool(node.op_type != "LeakyRelu" or node.attr("alpha", 0.01) >= 0)


@fact_rule("Add", "Sum")
def add(node: Node, facts: Facts) -> Fact:
    """Bounds add up."""
    inputs = [facts.input(node, s) for s in range(len(node.inputs))]
    low, high = inputs[0].low, inputs[0].high
    for fact in inputs[1:]:
        low, high = low + fact.low, high + fact.high
    return Fact(low, high)


@fact_rule("Sub")
def subtract(node: Node, facts: Facts) -> Fact:
    """a - b"""
    a, b = facts.input(node, 0), facts.input(node, 1)
    return Fact(a.low - b.high, a.high - b.low)


@fact_rule("Mul")
def multiply(node: Node, facts: Facts) -> Fact:
    """a * b; zero times anything finite is zero"""
    return product(facts.input(node, 0), facts.input(node, 1))


def product(a: Fact, b: Fact) -> Fact:
    """Bounds of an elementwise product."""
    ends = [np.multiply(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    ends = [np.where(np.isnan(e), 0.0, e) for e in ends]
    return Fact(np.minimum.reduce(ends), np.maximum.reduce(ends))


@fact_rule("Div")
def divide(node: Node, facts: Facts) -> Fact | None:
    """a / b where b stays away from zero"""
    a, b = facts.input(node, 0), facts.input(node, 1)
    if not ((b.low > 0) | (b.high < 0)).all():
        return None
    return product(a, Fact(1 / b.high, 1 / b.low))


@fact_rule("Neg")
def negate(node: Node, facts: Facts) -> Fact:
    """-x"""
    x = facts.input(node, 0)
    return Fact(-x.high, -x.low)


@fact_rule("Abs")
def absolute(node: Node, facts: Facts) -> Fact:
    """|x|"""
    x = facts.input(node, 0)
    low = np.maximum(np.maximum(x.low, -x.high), 0)
    return Fact(low, np.maximum(-x.low, x.high))


@fact_rule("Max")
def maximum(node: Node, facts: Facts) -> Fact:
    """The largest operand."""
    inputs = [facts.input(node, s) for s in range(len(node.inputs))]
    low, high = inputs[0].low, inputs[0].high
    for fact in inputs[1:]:
        low, high = np.maximum(low, fact.low), np.maximum(high, fact.high)
    return Fact(low, high)


@fact_rule("Min")
def minimum(node: Node, facts: Facts) -> Fact:
    """The smallest operand."""
    inputs = [facts.input(node, s) for s in range(len(node.inputs))]
    low, high = inputs[0].low, inputs[0].high
    for fact in inputs[1:]:
        low, high = np.minimum(low, fact.low), np.minimum(high, fact.high)
    return Fact(low, high)


@fact_rule("Where")
def choose(node: Node, facts: Facts) -> Fact:
    """One of two, elementwise"""
    shape = tuple(1 for _ in facts.out_dims(node))
    parts = [facts.input(node, s) for s in (1, 2)]
    return union(
        [p.map(lambda v: v.reshape(shape[: len(shape) - v.ndim] + v.shape)) for p in parts]
    )


@fact_rule("PRelu")
def prelu(node: Node, facts: Facts) -> Fact | None:
    """x, or slope * x below zero"""
    x, slope = facts.input(node, 0), facts.input(node, 1)
    if not slope.constant.all() or (slope.low < 0).any():
        return None
    return Fact(
        np.where(x.low < 0, x.low * slope.low, x.low),
        np.where(x.high < 0, x.high * slope.low, x.high),
    )


# -- sums of products ------------------------------------------------------------------------------


def weighted(x: Fact, weight: Array) -> Fact:
    """Bounds of x[*B, M, K] @ weight[*B, K, N]."""
    return _sums(x, np.maximum(weight, 0), np.minimum(weight, 0))


def _sums(x: Fact, up: Array, down: Array) -> Fact:
    """Bounds of x @ (up + down), up not negative, down not positive."""
    exact: Any = np.float64 if up.size <= 1 << 22 else np.float32
    up, down = up.astype(exact), down.astype(exact)
    ends = []
    for first, second, sign in ((x.low, x.high, -1), (x.high, x.low, 1)):
        whole = [np.where(np.isfinite(v), v, 0).astype(exact) for v in (first, second)]
        value: Array = np.matmul(whole[0], up) + np.matmul(whole[1], down)
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            open_ = np.isinf(first).astype(np.float32) @ (up > 0).astype(np.float32)
            open_ += np.isinf(second).astype(np.float32) @ (down < 0).astype(np.float32)
            value = np.where(open_ > 0, sign * np.inf, value)
        ends.append(value)
    return Fact(ends[0], ends[1])


def _taps(x: Fact, weight: Array) -> Fact:
    """Bounds of the channels of a convolution: x[g, C/g], weight[g, C/g, M/g, taps] -> [g * M/g]"""
    up = np.asarray(np.maximum(weight, 0).sum(axis=3, dtype=np.float64))
    down = np.asarray(np.minimum(weight, 0).sum(axis=3, dtype=np.float64))
    return _sums(x.map(lambda v: v[:, None]), up, down).map(np.ravel)


@fact_rule("Conv")
def conv(node: Node, facts: Facts) -> Fact | None:
    """x[N, C, *S], W[M, C/g, *K], b[M] -> y[N, M, *S']; padding brings zeros in"""
    weight = facts.input(node, 1)
    if not weight.constant.all():
        return None
    w, groups = weight.low, node.attr("group", 1)
    x = _channels(facts, node)
    x = x.hull(0.0) if is_padded(node) else x
    grid = x.map(lambda v: v.reshape(groups, -1))
    w = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1).swapaxes(1, 2)
    return _with_bias(node, facts, _taps(grid, w))


@fact_rule("ConvTranspose")
def conv_transpose(node: Node, facts: Facts) -> Fact | None:
    """x[N, C, *S], W[C, M/g, *K], b[M] -> y[N, M, *S']; not every tap reaches every output"""
    weight = facts.input(node, 1)
    if not weight.constant.all():
        return None
    w, groups = weight.low, node.attr("group", 1)
    grid = _channels(facts, node).hull(0.0).map(lambda v: v.reshape(groups, -1))
    w = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    return _with_bias(node, facts, _taps(grid, w))


def is_padded(node: Node) -> bool:
    """Whether a Conv or pool may read zeros around its input."""
    auto = node.attr("auto_pad", b"NOTSET")
    return any(node.attr("pads", ())) or auto not in (b"NOTSET", b"VALID", "NOTSET", "VALID")


def _channels(facts: Facts, node: Node) -> Fact:
    """Bounds of each channel of x[N, C, *S], [C]."""
    x, dims = facts.input(node, 0), facts.dims(node, 0)
    rest = [a for a in range(x.rank) if a != 1]
    return x.over(rest).full(1, dims[1]).map(np.ravel)


def _with_bias(node: Node, facts: Facts, y: Fact) -> Fact:
    if node.input(2):
        bias = facts.input(node, 2)
        y = Fact(y.low + bias.low, y.high + bias.high)
    rank = len(facts.dims(node, 0))
    return y.map(lambda v: v.reshape(1, -1, *(1,) * (rank - 2)))


@fact_rule("MatMul")
def matmul(node: Node, facts: Facts) -> Fact | None:
    """A[*B, M, K], B[*B, K, N] -> y[*B, M, N]"""
    a, b = facts.input(node, 0), facts.input(node, 1)
    if min(a.rank, b.rank) < 2:
        return None
    return contracted(a, b, facts.dims(node, 0)[-1])


def contracted(a: Fact, b: Fact, length: int) -> Fact:
    """A @ B: bounds where one of them is known, else where it must be zero."""
    a, b = a.full(a.rank - 1, length), b.full(b.rank - 2, length)
    if b.constant.all():
        return weighted(a, b.low)
    if a.constant.all():
        turned = weighted(b.map(lambda v: np.swapaxes(v, -1, -2)), np.swapaxes(a.low, -1, -2))
        return turned.map(lambda v: np.swapaxes(v, -1, -2))
    reached = a.nonzero.astype(np.float32) @ b.nonzero.astype(np.float32) > 0
    return Fact(np.where(reached, -np.inf, 0.0), np.where(reached, np.inf, 0.0))


@fact_rule("Gemm")
def gemm(node: Node, facts: Facts) -> Fact:
    """alpha * A @ B + beta * C"""
    a, b = facts.input(node, 0), facts.input(node, 1)
    a = a.map(np.transpose) if node.attr("transA", 0) else a
    b = b.map(np.transpose) if node.attr("transB", 0) else b
    length = facts.dims(node, 0)[0 if node.attr("transA", 0) else 1]
    y = product(contracted(a, b, length), exactly(np.full((1, 1), node.attr("alpha", 1.0))))
    if node.input(2):
        c = product(facts.input(node, 2), exactly(np.asarray(node.attr("beta", 1.0))))
        y = Fact(y.low + c.low, y.high + c.high)
    return y


# -- normalizations --------------------------------------------------------------------------------


def _per_channel(value: Array, rank: int) -> Array:
    return value.reshape(1, -1, *(1,) * (rank - 2))


@fact_rule("BatchNormalization")
def batch_norm(node: Node, facts: Facts) -> Sequence[Fact | None]:
    """x * s + (b - mean * s), s = scale / sqrt(var + eps)"""
    parts = [facts.input(node, s) for s in range(1, 5)]
    trains = node.attr("training_mode", 0)
    if trains or len(node.outputs) > 1 or not all(p.constant.all() for p in parts):
        return [None]
    scale, bias, mean, var = (p.low.astype(np.float64) for p in parts)
    s = scale / np.sqrt(var + node.attr("epsilon", 1e-5))
    x = facts.input(node, 0)
    y = product(x, exactly(_per_channel(s, x.rank)))
    shift = _per_channel(bias - mean * s, x.rank)
    return [Fact(y.low + shift, y.high + shift)]


def _normalized(
    node: Node, facts: Facts, count: int | None, scale: Fact, bias: Fact | None
) -> Fact:
    """n * scale + bias, where n has zero mean and unit variance over `count` elements."""
    rank = len(facts.dims(node, 0))
    most = math.sqrt(count) if count else np.inf
    n = Fact(np.full((1,) * rank, -most), np.full((1,) * rank, most))
    y = product(n, scale)
    return y if bias is None else Fact(y.low + bias.low, y.high + bias.high)


@fact_rule("LayerNormalization", "RMSNormalization")
def layer_norm(node: Node, facts: Facts) -> Sequence[Fact]:
    """No element is further from the mean than the root of their number"""
    dims = facts.dims(node, 0)
    axes = range(node.attr("axis", -1) % len(dims), len(dims))
    fixed = all(facts.is_fixed(node, 0, a) for a in axes)
    count = math.prod(dims[a] for a in axes) if fixed else None
    bias = facts.input(node, 2) if node.input(2) else None
    return [_normalized(node, facts, count, facts.input(node, 1), bias)]


@fact_rule("InstanceNormalization")
def instance_norm(node: Node, facts: Facts) -> Fact:
    """Statistics over the spatial axes of each channel; a constant channel gives its bias"""
    dims = facts.dims(node, 0)
    axes = range(2, len(dims))
    count = math.prod(dims[2:]) if all(facts.is_fixed(node, 0, a) for a in axes) else None
    scale, bias = (facts.input(node, s).map(lambda v: _per_channel(v, len(dims))) for s in (1, 2))
    y = _normalized(node, facts, count, scale, bias)
    x = facts.input(node, 0)
    flat = x.over(axes).constant & bias.constant
    return Fact(np.where(flat, bias.low, y.low), np.where(flat, bias.low, y.high))


@fact_rule("Softmax")
def softmax(node: Node, facts: Facts) -> Fact:
    """A share"""
    shape = (1,) * len(facts.dims(node, 0))
    return Fact(np.zeros(shape), np.ones(shape))


# -- reductions, pools, recurrent cells ------------------------------------------------------------


def reduced_axes(node: Node, facts: Facts) -> list[int] | None:
    """The axes that a reduction takes together; None where they are not known."""
    rank = len(facts.dims(node, 0))
    axes = node.attr("axes")
    if node.input(1):
        value = facts.value(node, 1)
        if value is None:
            return None
        axes = value.ravel().tolist()
    if not axes:
        return [] if node.attr("noop_with_empty_axes", 0) else list(range(rank))
    return [a % rank for a in axes]


def _dropped(node: Node, fact: Fact, axes: Sequence[int]) -> Fact:
    return fact if node.attr("keepdims", 1) else fact.map(lambda v: np.squeeze(v, tuple(axes)))


@fact_rule("ReduceMean", "ReduceMax", "ReduceMin")
def reduce_inside(node: Node, facts: Facts) -> Fact | None:
    """The result lies between the smallest and the largest"""
    axes = reduced_axes(node, facts)
    return None if axes is None else _dropped(node, facts.input(node, 0).over(axes), axes)


@fact_rule("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")
def reduce_sum(node: Node, facts: Facts) -> Fact | None:
    """Sums of zeros are zero; sums of what has a sign have it"""
    axes = reduced_axes(node, facts)
    if axes is None:
        return None
    x = facts.input(node, 0).over(axes)
    low, high = np.where(x.low < 0, -np.inf, 0.0), np.where(x.high > 0, np.inf, 0.0)
    if node.op_type != "ReduceSum":
        low, high = np.zeros_like(low), np.where(x.nonzero, np.inf, 0.0)
    return _dropped(node, Fact(low, high), axes)


@fact_rule("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
def pool(node: Node, facts: Facts) -> Fact:
    """x[N, C, *S] -> y[N, C, *S']; an average may count padding as zeros"""
    x = facts.input(node, 0)
    y = x.over(range(2, x.rank))
    counted = node.op_type == "AveragePool" and node.attr("count_include_pad", 0)
    return y.hull(0.0) if counted and is_padded(node) else y


@fact_rule("GlobalLpPool", "LpPool")
def lp_pool(node: Node, facts: Facts) -> Fact:
    """Norms of zeros are zero"""
    x = facts.input(node, 0)
    y = x.over(range(2, x.rank))
    return Fact(np.zeros_like(y.low), np.where(y.nonzero, np.inf, 0.0))


#: The gate that proposes a new state, and the number of gates.
_CANDIDATE = {"LSTM": (3, 4), "GRU": (2, 3), "RNN": (0, 1)}


@fact_rule("LSTM", "GRU", "RNN")
def cell(node: Node, facts: Facts) -> Sequence[Fact | None]:
    """A unit that starts at zero and whose proposals are tanh(0) stays at zero"""
    gate, gates = _CANDIDATE[node.op_type]
    hidden = facts.dims(node, 2)[-1]
    rows = slice(gate * hidden, (gate + 1) * hidden)
    if node.attr("activations") is not None or node.attr("layout", 0):
        return [None]
    quiet = np.ones((facts.dims(node, 1)[0], hidden), bool)
    for slot in (1, 2):
        weight = facts.input(node, slot).full(1, gates * hidden)
        quiet &= ~weight.nonzero[:, rows].any(axis=2)
    if node.input(3):
        bias = facts.input(node, 3).full(1, 2 * gates * hidden).nonzero
        quiet &= ~(bias[:, rows] | bias[:, gates * hidden :][:, rows])
    for slot in (5, 6):
        if node.input(slot):
            quiet &= ~facts.input(node, slot).over((1,)).full(2, hidden).nonzero[:, 0]
    high = np.where(quiet, 0.0, 1.0).reshape(1, -1, 1, hidden)
    started = bool(node.input(5))
    y = Fact(np.where(quiet, 0.0, -np.inf if started else -1.0).reshape(high.shape), high)
    y = Fact(y.low, np.where(high > 0, np.inf, 0.0)) if started else y
    return [y, y.map(lambda v: v[0])]
