"""Which channels repeat others: value numbering (Alpern, Wegman and Zadeck, 1988) of channels.

Along one axis of a tensor each index has a number and a factor: two indices of one number hold the
same values but for their factors. Filters that are multiples of each other get one number, and what
keeps multiples (rectifiers, pools, sums with multiples of the same) passes it on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.fact_rules import reduced_axes
from onnxprune.facts import Facts, exactly
from onnxprune.graph import Node
from onnxprune.labels import runs
from onnxprune.ops.elementwise import UNARY
from onnxprune.ops.indexing import slice_bounds

Array = NDArray[Any]
#: Filters are multiples of each other if no element differs by more than this, at unit length.
TOLERANCE = 1e-6
#: Channels spread over more positions than this are not followed.
LIMIT = 1 << 18
#: The number of what is constant: the factor is its value.
CONSTANT = 0


@dataclass(frozen=True, eq=False)
class Numbers:
    """Index i along `axis` holds `factor[i]` times the values that `number[i]` stands for."""

    axis: int
    number: Array
    factor: Array


Rule = Callable[[Node, "Numbering"], "Numbers | None"]
_RULES: dict[str, Rule] = {}


def _rule(*op_types: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for op_type in op_types:
            _RULES[op_type] = function
        return function

    return register


@dataclass
class Numbering:
    """The numbers of every tensor that has channels."""

    facts: Facts
    known: dict[str, Numbers] = field(default_factory=dict)
    _keys: dict[Hashable, int] = field(default_factory=dict)

    def fresh(self, keys: Sequence[Hashable]) -> Array:
        """One number for each different key."""
        return np.array([self._keys.setdefault(k, len(self._keys) + 1) for k in keys], np.int64)

    def input(self, node: Node, slot: int) -> Numbers | None:
        """The numbers of input `slot`."""
        return self.known.get(node.input(slot))


def number_channels(facts: Facts) -> Numbering:
    """Interpret the graph once, forwards."""
    numbering = Numbering(facts)
    for node in facts.graph.top:
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        shapes = facts.shapes
        if rule is None or any(n and shapes.dims(n) is None for n in (*node.inputs, *node.outputs)):
            continue
        found = rule(node, numbering)
        dims = facts.out_dims(node)
        if found is not None and found.number.size == dims[found.axis]:
            numbering.known[node.outputs[0]] = _with_constants(facts, node, found)
    return numbering


def _with_constants(facts: Facts, node: Node, found: Numbers) -> Numbers:
    """Channels of a known value share a number."""
    fact = facts.of(node.outputs[0])
    rest = [a for a in range(fact.rank) if a != found.axis]
    whole = fact.over(rest).full(found.axis, found.number.size)
    fixed = whole.constant.ravel() & (whole.low.ravel() != 0)
    return Numbers(
        found.axis,
        np.where(fixed, CONSTANT, found.number),
        np.where(fixed, whole.low.ravel(), found.factor),
    )


def classes(rows: Array) -> tuple[Array, Array]:
    """For each row of rows[n, d] its class and factor: row = factor * the row of its class."""
    rows = rows.astype(np.float64)
    size = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    peak = np.abs(rows).argmax(axis=1)
    factor = size * np.sign(rows[np.arange(len(rows)), peak])
    unit = rows / np.where(factor == 0, 1.0, factor)[:, None]
    place = unit @ np.random.default_rng(0).normal(size=rows.shape[1])
    found = np.arange(len(rows))
    order = np.argsort(place, kind="stable")
    first = order[0] if len(order) else 0
    for i in order:
        near = abs(place[i] - place[first]) < 1e-4
        if not near or np.abs(unit[i] - unit[first]).max(initial=0.0) > TOLERANCE:
            first = i
        found[i] = first
    return found, np.where(factor == 0, 1.0, factor)


def _digits(value: Array) -> list[str]:
    """Seven significant digits, as text."""
    return [f"{v:.6e}" for v in value]


@_rule("Conv", "ConvTranspose", "Gemm", "MatMul")
def layer(node: Node, n: Numbering) -> Numbers | None:
    """Filters that are multiples of each other, on the same inputs"""
    facts = n.facts
    weight = facts.graph.constants.get(node.input(1))
    if weight is None or not weight.is_float or len(weight.dims) < 2:
        return None
    array, groups = weight.array(), node.attr("group", 1)
    axis = {"Conv": 0, "Gemm": 0 if node.attr("transB", 0) else 1, "MatMul": 1}.get(node.op_type, 1)
    if (groups > 1 and node.op_type != "Conv") or (node.op_type == "MatMul" and array.ndim != 2):
        return None
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
    before: list[Hashable] = [0] * len(rows)
    x = n.input(node, 0)
    if groups > 1:
        before = list(np.arange(len(rows)) // (len(rows) // groups) + 1)
        if array.shape[1] == 1 and x is not None and x.axis == 1:
            picked = np.repeat(np.arange(groups), len(rows) // groups)
            before = [-int(v) - 1 for v in x.number[picked]]
            rows = rows * x.factor[picked][:, None]
    rows = rows * node.attr("alpha", 1.0)
    bias = facts.graph.constants.get(node.input(2)) if node.input(2) else None
    if node.input(2):
        if bias is None or bias.size != len(rows):
            return None
        shift = bias.array().astype(np.float64).reshape(-1, 1) * node.attr("beta", 1.0)
        rows = np.concatenate([rows, shift], axis=1)
    found, factor = classes(rows)
    keys = [(node.index, b, int(f)) for b, f in zip(before, found, strict=True)]
    rank = len(facts.out_dims(node))
    return Numbers(1 if node.op_type.startswith("Conv") else rank - 1, n.fresh(keys), factor)


@_rule("BatchNormalization")
def batch_norm(node: Node, n: Numbering) -> Numbers | None:
    """x * s + t for each channel"""
    x = n.input(node, 0)
    parts = [n.facts.graph.constants.get(node.input(s)) for s in range(1, 5)]
    if x is None or x.axis != 1 or any(p is None for p in parts) or any(node.outputs[1:]):
        return None
    scale, bias, mean, var = (p.array().astype(np.float64) for p in parts if p is not None)
    s = scale / np.sqrt(var + node.attr("epsilon", 1e-5))
    factor, shift = x.factor * s, bias - mean * s
    ratio = shift / np.where(factor == 0, 1.0, factor)
    return _scaled(n, node, 1, [x.number, _digits(ratio)], factor)


def _scaled(n: Numbering, node: Node, axis: int, parts: Sequence[Any], factor: Array) -> Numbers:
    """Numbers from `parts`, one sequence each, but of its own where the factor is zero."""
    own = [i if f == 0 else -1 for i, f in enumerate(factor)]
    keys = list(zip([node.index] * factor.size, *parts, own, strict=True))
    return Numbers(axis, n.fresh(keys), np.where(factor == 0, 1.0, factor))


@_rule("Relu", "LeakyRelu", "MaxPool", "GlobalMaxPool")
def homogeneous(node: Node, n: Numbering) -> Numbers | None:
    """f(c * x) = c * f(x) for positive c"""
    x = n.input(node, 0)
    if x is None or any(node.outputs[1:]) or ("Pool" in node.op_type and x.axis != 1):
        return None
    keys = [(node.index, v, s) for v, s in zip(x.number, np.sign(x.factor), strict=True)]
    return Numbers(x.axis, n.fresh(keys), np.abs(x.factor))


@_rule("Identity", "Dropout", "AveragePool", "GlobalAveragePool")
def linear(node: Node, n: Numbering) -> Numbers | None:
    """f(c * x) = c * f(x)"""
    x = n.input(node, 0)
    if x is None or ("Pool" in node.op_type and x.axis != 1) or node.input(2):
        return None
    keys = [(node.index, v) for v in x.number]
    return Numbers(x.axis, n.fresh(keys), x.factor)


@_rule("Pow", *(set(UNARY) - {"Relu", "LeakyRelu"}))
def pointwise(node: Node, n: Numbering) -> Numbers | None:
    """Equal inputs give equal outputs"""
    x = n.input(node, 0)
    others = [n.facts.graph.constants.get(name) for name in node.inputs[1:] if name]
    alike = all(c is not None and c.size == 1 for c in others)
    if x is None or not alike or n.facts.dims(node, 0) != n.facts.out_dims(node):
        return None
    return _equals(node, n, x)


def _equals(node: Node, n: Numbering, x: Numbers) -> Numbers:
    """Equal channels stay equal; multiples do not stay multiples."""
    keys = list(zip([node.index] * x.number.size, x.number, _digits(x.factor), strict=True))
    return Numbers(x.axis, n.fresh(keys), np.ones(x.number.size))


@_rule("Pad")
def pad(node: Node, n: Numbering) -> Numbers | None:
    """Around the other axes; zeros keep multiples, another value only what is equal"""
    x, facts = n.input(node, 0), n.facts
    pads = node.attr("pads") if not node.input(1) else facts.value(node, 1)
    if x is None or pads is None or node.input(3) or pads[x.axis]:
        return None
    if pads[x.axis + len(facts.dims(node, 0))]:
        return None
    value = facts.input(node, 2) if node.input(2) else exactly(np.array(node.attr("value", 0.0)))
    zeros = value.constant.all() and not value.nonzero.any()
    if zeros or node.attr("mode", b"constant") != b"constant":
        return Numbers(x.axis, n.fresh([(node.index, v) for v in x.number]), x.factor)
    return _equals(node, n, x)


@_rule("Slice")
def slice_(node: Node, n: Numbering) -> Numbers | None:
    """Some of the channels, or some of the places"""
    x, rank = n.input(node, 0), len(n.facts.dims(node, 0))
    bounds = slice_bounds(node, [n.facts.value(node, s) for s in range(1, 5)], rank)
    if x is None or bounds is None:
        return None
    cut = bounds.get(x.axis, slice(None))
    keys = [(node.index, v) for v in x.number[cut]]
    return Numbers(x.axis, n.fresh(keys), x.factor[cut])


@_rule("Resize", "Upsample")
def resize(node: Node, n: Numbering) -> Numbers | None:
    """Interpolation along the other axes is linear"""
    x, facts = n.input(node, 0), n.facts
    slot = 2 if node.op_type == "Resize" and facts.graph.opset > 10 else 1
    crops = node.attr("coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    if x is None or crops or node.attr("axes") or node.attr("scales"):
        return None
    scales = facts.graph.constants.get(node.input(slot)) if node.input(slot) else None
    if scales is not None and scales.size:
        if scales.array().ravel()[x.axis] != 1:
            return None
    elif not node.input(3) or facts.dims(node, 0)[x.axis] != facts.out_dims(node)[x.axis]:
        return None
    return Numbers(x.axis, n.fresh([(node.index, v) for v in x.number]), x.factor)


@_rule("ReduceMean", "ReduceSum")
def reduce(node: Node, n: Numbering) -> Numbers | None:
    """Sums over the other axes"""
    x, axes = n.input(node, 0), reduced_axes(node, n.facts)
    if x is None or axes is None or x.axis in axes:
        return None
    before = 0 if node.attr("keepdims", 1) else sum(a < x.axis for a in axes)
    return Numbers(x.axis - before, n.fresh([(node.index, v) for v in x.number]), x.factor)


@_rule("Add", "Sub", "Mul", "Div")
def binary(node: Node, n: Numbering) -> Numbers | None:
    """Equal or proportional operands, index by index"""
    rank = len(n.facts.out_dims(node))
    known = [x for x in (n.input(node, s) for s in (0, 1)) if x is not None]
    if not known:
        return None
    source = next(s for s in (0, 1) if n.input(node, s) is known[0])
    axis = known[0].axis + rank - len(n.facts.dims(node, source))
    length = known[0].number.size
    left, right = (_side(node, n, slot, axis - rank, length) for slot in (0, 1))
    if left is None or right is None:
        return None
    (a, p), (b, q) = left, right
    if node.op_type == "Mul":
        return _scaled(n, node, axis, [a, b], p * q)
    share = q if node.op_type == "Div" else q / np.where(p == 0, 1.0, p)
    return _scaled(n, node, axis, [a, b, _digits(share)], p)


def _side(
    node: Node, n: Numbering, slot: int, axis: int, length: int
) -> tuple[Array, Array] | None:
    """Number and factor of an operand at each index of the axis (counted from the end)."""
    dims = n.facts.dims(node, slot)
    constant = n.facts.graph.constants.get(node.input(slot))
    if constant is not None:
        if constant.size not in (1, length) or not constant.is_float:
            return None
        if constant.size > 1 and dims[axis] != length:
            return None
        value = np.broadcast_to(constant.array().ravel().astype(np.float64), (length,))
        return np.zeros(length, np.int64), value
    x = n.input(node, slot)
    if x is not None and x.axis - len(dims) == axis and x.number.size == length:
        return x.number, x.factor
    if len(dims) < -axis or dims[axis] == 1:
        return n.fresh([("whole", node.input(slot))] * length), np.ones(length)
    return None


@_rule("Concat")
def concat(node: Node, n: Numbering) -> Numbers | None:
    """Joined along the channels"""
    parts = [n.input(node, s) for s in range(len(node.inputs))]
    axis = node.attr("axis") % len(n.facts.out_dims(node))
    known = [p for p in parts if p is not None and p.axis == axis]
    if len(known) != len(parts):
        return None
    return Numbers(
        axis,
        np.concatenate([p.number for p in known]),
        np.concatenate([p.factor for p in known]),
    )


@_rule("Transpose")
def transpose(node: Node, n: Numbering) -> Numbers | None:
    """Axes change places"""
    x = n.input(node, 0)
    if x is None:
        return None
    rank = len(n.facts.out_dims(node))
    perm = node.attr("perm") or list(range(rank))[::-1]
    return Numbers(list(perm).index(x.axis), n.fresh([(node.index, v) for v in x.number]), x.factor)


@_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Node, n: Numbering) -> Numbers | None:
    """Flattened channels: one number for each channel and position"""
    x, facts = n.input(node, 0), n.facts
    if x is None:
        return None
    before, after = facts.dims(node, 0), facts.out_dims(node)
    for inner, outer in runs(before, after):
        if x.axis not in inner or len(outer) > 1:
            continue
        if not all(facts.is_fixed(node, 0, a) for a in inner) and len(inner) > 1:
            return None
        lengths = [before[a] for a in inner]
        if np.prod(lengths) > LIMIT:
            return None
        place = inner.index(x.axis)
        shape = [-1 if i == place else 1 for i in range(len(inner))]
        number = np.broadcast_to(x.number.reshape(shape), lengths).ravel()
        factor = np.broadcast_to(x.factor.reshape(shape), lengths).ravel()
        spot = np.indices(lengths).reshape(len(inner), -1)
        spot[place] = 0
        keys = list(zip([node.index] * number.size, number, map(tuple, spot.T), strict=True))
        return Numbers(outer[0], n.fresh(keys), factor)
    return None
