"""Operators that sum products over an axis: convolutions and matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxprune.coupling import NO_CHANNELS, Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.choices import experts, prefer_heads
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter


@rule("Conv")
def conv(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], W[M, C/g, *K], b[M] -> y[N, M, *S']"""
    convolve(node, c, weight=1, bias=2)


def convolve(node: Node, c: Interpreter, *, weight: int, bias: int, zero: int = -1) -> None:
    """A convolution with its operands in these input slots, -1 for none; `zero`: x's zero point."""
    groups = node.attr("group", 1)
    out, inner = c.axis(node, weight, 0), c.axis(node, weight, 1)
    x = c.contract(node, 0, 1, zero)
    if groups == 1:
        c.tie(node, x, inner)
    else:
        _grouped(node, c, x, out, inner, groups)
    macs = math.prod(c.out_dims(node)) * math.prod(c.dims(node, weight)[1:])
    _finish(node, c, out, macs, (out, inner), weight, bias)


@rule("ConvTranspose")
def conv_transpose(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], W[C, M/g, *K], b[M] -> y[N, M, *S']"""
    groups = node.attr("group", 1)
    rows, out = c.axis(node, 1, 0), c.axis(node, 1, 1)
    x = c.contract(node, 0, 1)
    c.tie(node, x, rows)
    own = out
    if groups > 1:
        channels = c.out_dims(node)[1]
        own = c.system.fresh(channels)
        group = c.system.fresh(groups)
        _split(node, c, rows, group, None)
        _split(node, c, own, group, out)
    kernel = math.prod(c.dims(node, 1)[1:])
    macs = math.prod(c.dims(node, 0)[:2]) * math.prod(c.dims(node, 0)[2:]) * kernel
    _finish(node, c, own, macs, (rows, out), 1, 2)


@rule("DeformConv")
def deform_conv(node: Node, c: Interpreter) -> None:
    """x[N, C, H, W], W[M, C/g, kh, kw], offset[N, o*2*kh*kw, H', W'], b[M], mask -> y[N, M, H', W']

    The channels of x share their offsets within o equal parts: all parts stay, equally long.
    """
    groups, parts = node.attr("group", 1), node.attr("offset_group", 1)
    out, inner = c.axis(node, 1, 0), c.axis(node, 1, 1)
    x = c.contract(node, 0, 1)
    if groups == 1:
        c.tie(node, x, inner)
    else:
        _grouped(node, c, x, out, inner, groups)
    if parts > 1 and x is not None:
        part = c.system.fresh(parts)
        c.freeze(node, part, f"offsets of {node.title} belong to it")
        _split(node, c, x, part, None)
    c.tie(node, out, c.axis(node, 3, 0)) if node.input(3) else None
    c.set(node, {1: out})
    c.produce(node, out)
    c.layer(node, 1, math.prod(c.out_dims(node)) * math.prod(c.dims(node, 1)[1:]), out, inner)


def _finish(
    node: Node,
    c: Interpreter,
    out: Labels | None,
    macs: float,
    axes: tuple[Labels | None, ...],
    weight: int,
    bias: int,
) -> None:
    if bias >= 0 and node.input(bias):
        c.tie(node, out, c.axis(node, bias, 0))
    spatial = {a: _spatial(node, c, a, weight) for a in range(2, len(c.dims(node, 0)))}
    c.set(node, {0: c.axis(node, 0, 0), 1: out, **spatial})
    for axis in range(2, len(c.dims(node, weight))):
        if c.constant(node, weight) is None:
            c.freeze(node, c.axis(node, weight, axis), f"kernel axis of {node.title}")
    c.produce(node, out)
    c.layer(node, weight, macs, *axes, *spatial.values())


def _spatial(node: Node, c: Interpreter, axis: int, weight: int) -> Labels | None:
    """Channels may lie along a spatial axis, as in channel attention by a 1-D convolution.

    Where it stays as long as it was, the neighbours of a removed position move together (Wang et
    al., ECA-Net, 2020, mix neighbouring channels so).
    """
    labels = c.axis(node, 0, axis)
    if labels is None:
        return None
    stride = (node.attr("strides") or [1] * axis)[axis - 2]
    same = c.out_dims(node)[axis] == labels.size and node.attr("output_shape") is None
    if stride != 1 or not same:
        c.freeze(node, labels, f"spatial axis of {node.title}")
        return None
    if c.dims(node, weight)[axis] > 1:
        c.inexact(node, labels, f"{node.title} mixes neighbours along it")
    return labels


def _grouped(
    node: Node,
    c: Interpreter,
    x: Labels | None,
    out: Labels | None,
    inner: Labels | None,
    groups: int,
) -> None:
    """Either whole groups go, or the same positions within every group."""
    if x is None or out is None:
        c.freeze(node, x, NO_CHANNELS.format(node.title))
        c.freeze(node, out, f"the input of grouped {node.title} cannot be pruned")
        c.freeze(node, inner, f"the input of grouped {node.title} cannot be pruned")
        return
    if inner is None:
        c.tie(node, np.repeat(x, out.size // x.size), out)
        return
    group = c.system.fresh(groups)
    _split(node, c, x, group, inner)
    _split(node, c, out, group, None)


def _split(
    node: Node, c: Interpreter, labels: Labels | None, group: Labels, within: Labels | None
) -> None:
    """labels[g * n + i] goes where group[g] or within[i] does."""
    if labels is None:
        c.freeze(node, group, NO_CHANNELS.format(node.title))
        c.freeze(node, within, NO_CHANNELS.format(node.title))
        return
    grid = labels.reshape(group.size, -1)
    if grid.shape[1] == 1:
        c.tie(node, labels, group)
        return
    within = c.system.fresh(grid.shape[1]) if within is None else within
    c.factor(node, grid, (group, within))
    c.prefer(within)


@rewrite("Conv", "DeformConv")
def rewrite_conv(node: Node, r: Rewriter) -> None:
    """The number of groups follows from what is left of C and C/g."""
    rewrite_groups(node, r, weight=1)


def rewrite_groups(node: Node, r: Rewriter, *, weight: int) -> None:
    """The number of groups of a convolution whose weight is in this input slot."""
    groups = node.attr("group", 1)
    if groups > 1:
        left = r.dims_after(node, 0)[1] // r.dims_after(node, weight)[1]
        if left != groups:
            r.set_attribute(node, "group", left)


@rewrite("ConvTranspose")
def rewrite_conv_transpose(node: Node, r: Rewriter) -> None:
    """The number of groups follows from what is left of M and M/g."""
    groups = node.attr("group", 1)
    if groups > 1:
        left = r.out_dims_after(node)[1] // r.dims_after(node, 1)[1]
        if left != groups:
            r.set_attribute(node, "group", left)


@rule("Gemm")
def gemm(node: Node, c: Interpreter) -> None:
    """A[M, K] (or its transpose), B[K, N] (or its transpose), C[*broadcast to M, N] -> y[M, N]"""
    affine(node, c, right=1, bias=2)


def affine(node: Node, c: Interpreter, *, right: int, bias: int, zero: int = -1) -> None:
    """A Gemm with B and C in these input slots; `zero` is the zero point of A."""
    a_inner, b_inner = (0 if node.attr("transA", 0) else 1), (1 if node.attr("transB", 0) else 0)
    c.tie(node, c.contract(node, 0, a_inner, zero), c.axis(node, right, b_inner))
    rows, out = c.axis(node, 0, 1 - a_inner), c.axis(node, right, 1 - b_inner)
    m, n = c.out_dims(node)
    dims = c.dims(node, bias)
    if dims and dims[-1] == n > 1:
        c.tie(node, out, c.axis(node, bias, -1))
    if len(dims) == 2 and dims[0] == m > 1:
        c.tie(node, rows, c.axis(node, bias, 0))
    c.set(node, {0: rows, 1: out})
    left = c.is_static(node, 0) and not c.is_static(node, right)
    c.produce(node, rows if left else out)
    k = c.dims(node, 0)[a_inner]
    weight, own = (0, rows) if left else (right, out)
    c.layer(node, weight, m * n * k, c.axis(node, right, b_inner), own)


@rule("MatMul")
def matmul(node: Node, c: Interpreter) -> None:
    """A[*B, M, K], B[*B, K, N] -> y[*B, M, N]"""
    product(node, c, range(len(c.dims(node, 0))), range(len(c.dims(node, 1))))


def product(
    node: Node,
    c: Interpreter,
    left: Sequence[int],
    right: Sequence[int],
    *,
    slot: int = 1,
    zero: int = -1,
) -> None:
    """A matrix product of input 0, whose zero point is in input `zero`, and input `slot`.

    `left` and `right` name their axes in the order in which the product takes them: batch axes,
    rows, columns.
    """
    inner = c.contract(node, 0, left[-1], zero)
    c.tie(node, inner, c.axis(node, slot, right[max(len(right) - 2, 0)]))
    out = c.out_dims(node)
    found: dict[int, Labels | None] = {}
    weight = slot if c.is_static(node, slot) else 0 if c.is_static(node, 0) else -1
    rows = c.axis(node, 0, left[-2]) if len(left) > 1 else None
    columns = c.axis(node, slot, right[-1]) if len(right) > 1 else None
    batch = max(len(left), len(right)) - 2
    for i in range(1, batch + 1):
        a, b = (axes[-2 - i] if len(axes) >= 2 + i else None for axes in (left, right))
        found[batch - i] = _batch(node, c, slot, a, b)
        own = b if weight == slot else a
        if weight >= 0 and own is not None and c.dims(node, weight)[own] > 1:
            experts(node, c, found[batch - i], (inner, rows if weight == 0 else columns))
        elif weight >= 0:
            c.prefer(found[batch - i])
    if weight < 0:
        prefer_heads(node, c, tuple(found.values()), (inner, rows, columns))
    if len(left) > 1:
        found[len(out) - (2 if len(right) > 1 else 1)] = rows
    if len(right) > 1:
        found[len(out) - 1] = columns
    c.set(node, found)
    if weight >= 0:
        c.produce(node, columns if weight == slot else rows)
    heads = tuple(v for i, v in found.items() if i < batch)
    macs = math.prod(out) * c.dims(node, 0)[left[-1]]
    c.layer(node, weight, macs, inner, rows, columns, *heads)


def _batch(node: Node, c: Interpreter, slot: int, a: int | None, b: int | None) -> Labels | None:
    """Tie batch axis `a` of input 0 with `b` of input `slot`; None where one has no such axis."""
    wide_a = a is not None and c.dims(node, 0)[a] > 1
    wide_b = b is not None and c.dims(node, slot)[b] > 1
    left = c.axis(node, 0, a) if a is not None and wide_a else None
    right = c.axis(node, slot, b) if b is not None and wide_b else None
    if wide_a and wide_b:
        c.tie(node, left, right)
    return left if left is not None else right


@rule("Einsum")
def einsum(node: Node, c: Interpreter) -> None:
    """operands named by letters; letters missing from the result are summed"""
    terms, result = _equation(node, c)
    if terms is None:
        for slot in range(len(node.inputs)):
            c.freeze_input(node, slot, f"the equation of {node.title} is not understood")
        return
    places: dict[str, list[tuple[int, int]]] = {}
    for slot, term in enumerate(terms):
        for axis, letter in enumerate(term):
            if c.dims(node, slot)[axis] > 1:
                places.setdefault(letter, []).append((slot, axis))
    summed = {letter for letter in places if letter not in result}
    found: dict[int, Labels | None] = {}
    share: list[Labels | None] = []
    for letter, where in places.items():
        labels = [c.axis(node, slot, axis) for slot, axis in where]
        for other in labels[1:]:
            c.tie(node, labels[0], other)
        known = next((v for v in labels if v is not None), None)
        share.append(known)
        if letter in result:
            found[result.index(letter)] = known
        else:
            c.contract(node, *where[0])
    c.set(node, found)
    weight = next((s for s in range(len(terms)) if c.is_static(node, s)), -1)
    shared = [i for i in places if summed and i in result and _is_batch(node, c, places[i])]
    within = [v for i, v in zip(places, share, strict=True) if i not in shared]
    for letter in shared:
        if weight >= 0 and letter in terms[weight]:
            experts(node, c, found[result.index(letter)], within)
        elif weight >= 0:
            c.prefer(found[result.index(letter)])
    if weight < 0:
        prefer_heads(node, c, [found[result.index(letter)] for letter in shared], within)
    if weight >= 0:
        own = [
            i
            for i, letter in enumerate(result)
            if letter in terms[weight]
            and all(c.is_static(node, slot) for slot, _ in places.get(letter, ()))
        ]
        for i in own:
            c.produce(node, found.get(i))
    sizes = {letter: c.dims(node, s)[a] for letter, where in places.items() for s, a in where}
    c.layer(node, weight, math.prod(sizes.values()), *share)


def _is_batch(node: Node, c: Interpreter, where: list[tuple[int, int]]) -> bool:
    """Whether a letter runs over several operands, one of them made by the model."""
    slots = {slot for slot, _ in where}
    return len(slots) > 1 and not all(c.is_static(node, slot) for slot in slots)


def _equation(node: Node, c: Interpreter) -> tuple[list[str] | None, str]:
    """The letters of each operand and of the result; '...' becomes upper-case letters."""
    equation = node.attr("equation").decode().replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    spare = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    spare = "".join(s for s in spare if s not in equation)
    most = 0
    for slot, term in enumerate(terms):
        if "..." in term:
            most = max(most, len(c.dims(node, slot)) - len(term) + 3)
    for slot, term in enumerate(terms):
        if "..." in term:
            count = len(c.dims(node, slot)) - len(term) + 3
            terms[slot] = term.replace("...", spare[most - count : most])
        if len(terms[slot]) != len(c.dims(node, slot)):
            return None, ""
    if "->" not in equation:
        joined = "".join(terms)
        right = spare[:most] + "".join(
            sorted(x for x in set(joined) if joined.count(x) == 1 and x not in spare[:most])
        )
    return terms, right.replace("...", spare[:most])
