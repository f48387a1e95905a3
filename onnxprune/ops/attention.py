"""Fused attention: whole heads go, or the same channels of every head.

Query head h reads key and value head h // g, where g query heads share one. Scores sum over the
size d of a head: zeros there equal removal as long as the scale stays 1/sqrt(the original d), so a
rewrite writes that down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from onnxprune.coupling import NO_CHANNELS, Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.operator_shapes import Dims
from onnxprune.ops.choices import prefer_heads
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter
from onnxprune.vendor import MICROSOFT

Dimension = Callable[[Node, int], Dims]


@dataclass(frozen=True)
class Sizes:
    """The number of query heads and of key and value heads, the sizes of a key and a value head."""

    query: int
    shared: int
    key: int
    value: int


@dataclass(frozen=True, eq=False)
class Heads:
    """Labels of query heads, of key and value heads, of channels within a key and a value head."""

    query: Labels
    shared: Labels
    key: Labels
    value: Labels


def heads_of(node: Node, c: Interpreter, sizes: Sizes, frozen: str = "") -> Heads:
    """New labels for a node's heads; `frozen` is why the channels within them must stay."""
    shared = c.system.fresh(sizes.shared)
    query = shared
    if sizes.query != sizes.shared:
        query = c.system.fresh(sizes.query)
    if sizes.query != sizes.shared > 1:
        group = c.system.fresh(sizes.query // sizes.shared)
        c.factor(node, query.reshape(sizes.shared, -1), (shared, group))
    key, value = c.system.fresh(sizes.key), c.system.fresh(sizes.value)
    if frozen:
        c.freeze(node, np.concatenate([key, value]), frozen)
    prefer_heads(node, c, (query, shared), (key, value))
    c.keep_labels(node, np.concatenate([query, shared, key, value]))
    return Heads(query, shared, key, value)


def grid(node: Node, c: Interpreter, labels: Labels | None, heads: Labels, within: Labels) -> None:
    """labels[h * d + i] goes where heads[h] or within[i] does."""
    if labels is None:
        for part in (heads, within):
            c.freeze(node, part, NO_CHANNELS.format(node.title))
    elif within.size == 1:
        c.tie(node, labels, heads)
    elif heads.size == 1:
        c.tie(node, labels, within)
    else:
        c.factor(node, labels.reshape(heads.size, within.size), (heads, within))


def stream(
    node: Node, c: Interpreter, slot: int, heads: Labels, within: Labels, *, summed: bool = False
) -> Labels | None:
    """x[B, S, N * d] or x[B, N, S, d]; returns the labels of a joint last axis."""
    rank = len(c.dims(node, slot))
    read = c.contract if summed else c.axis
    last = read(node, slot, rank - 1)
    if rank == 4:
        tie_wide(node, c, heads, c.axis(node, slot, 1))
        tie_wide(node, c, within, last)
        return None
    grid(node, c, last, heads, within)
    return last


def tie_wide(node: Node, c: Interpreter, own: Labels, other: Labels | None) -> None:
    """Tie axes that are longer than 1: shorter ones have no labels."""
    if own.size > 1:
        c.tie(node, own, other)


def cache(node: Node, c: Interpreter, slots: tuple[int, int], heads: Heads, first: int) -> None:
    """past key[B, K, P, d] and value in `slots`, present ones in outputs `first` and the next."""
    for slot, within in zip(slots, (heads.key, heads.value), strict=True):
        if node.input(slot):
            tie_wide(node, c, heads.shared, c.axis(node, slot, 1))
            tie_wide(node, c, within, c.axis(node, slot, 3))
    for index, within in ((first, heads.key), (first + 1, heads.value)):
        c.set(node, {1: heads.shared, 3: within}, index)


def bias_of_scores(node: Node, c: Interpreter, slot: int, heads: Heads) -> None:
    """bias[B or 1, N or 1, S, T], or fewer axes; what it adds to the scores."""
    dims = c.dims(node, slot)
    if len(dims) > 2 and dims[-3] > 1:
        c.tie(node, heads.query, c.axis(node, slot, len(dims) - 3))


def result(node: Node, c: Interpreter, heads: Heads, value: Labels | None) -> None:
    """y[B, S, N * e] or y[B, N, S, e]; `value`: the labels of v's last axis where y has them."""
    rank = len(c.out_dims(node))
    if rank == 4:
        c.set(node, {1: heads.query, 3: heads.value})
        return
    if value is None or heads.query is not heads.shared:
        value = c.system.fresh(heads.query.size * heads.value.size)
        grid(node, c, value, heads.query, heads.value)
    c.set(node, {rank - 1: value})


def macs(node: Node, c: Interpreter, heads: Heads, rows: int, keys: int) -> None:
    """Multiply-adds of the scores and of the weighted sums, for `rows` queries over `keys` keys."""
    for within in (heads.key, heads.value):
        whole = float(rows * keys * heads.query.size * within.size)
        c.layer(node, -1, whole, heads.query, within)


def left(node: Node, r: Rewriter, sizes: Sizes) -> Sizes:
    """What stays of a node's heads."""
    before = [getattr(sizes, f.name) for f in fields(sizes)]
    parts = np.split(r.coupling.notes[node.index], np.cumsum(before)[:-1])
    return Sizes(*(r.count(part) for part in parts))


def rewrite_heads(node: Node, r: Rewriter, sizes: Sizes, names: Mapping[str, str]) -> None:
    """Numbers of heads (`names`: attribute -> field), and the scale where heads shrink."""
    after = left(node, r, sizes)
    for attribute, field in names.items():
        count = getattr(after, field)
        if node.attr(attribute, 0) and count != getattr(sizes, field):
            r.set_attribute(node, attribute, count)
    if after.key != sizes.key and not node.attr("scale", 0.0):
        r.set_attribute(node, "scale", 1.0 / math.sqrt(sizes.key))


# -- ai.onnx --------------------------------------------------------------------------------------

_STANDARD = {"q_num_heads": "query", "kv_num_heads": "shared"}


def _standard_sizes(node: Node, dims: Dimension) -> Sizes:
    query, key, value = (dims(node, slot) for slot in range(3))
    if len(query) == 4:
        return Sizes(query[1], key[1], query[3], value[3])
    n, k = node.attr("q_num_heads"), node.attr("kv_num_heads")
    return Sizes(n, k, query[2] // n, value[2] // k)


@rule("Attention")
def attention(node: Node, c: Interpreter) -> None:
    """q[B, S, N * d] or [B, N, S, d], k, v, mask[*broadcast to B, N, S, T], past k[B, K, P, d], v
    -> y like q, present k, present v, scores[B, N, S, T]"""
    sizes = _standard_sizes(node, c.dims)
    heads = heads_of(node, c, sizes)
    stream(node, c, 0, heads.query, heads.key, summed=True)
    stream(node, c, 1, heads.shared, heads.key)
    value = stream(node, c, 2, heads.shared, heads.value)
    bias_of_scores(node, c, 3, heads)
    cache(node, c, (4, 5), heads, 1)
    c.set(node, {1: heads.query}, 3)
    result(node, c, heads, value)
    past = c.dims(node, 4)[2] if node.input(4) else 0
    rows, keys = c.dims(node, 0)[-2], c.dims(node, 1)[-2] + past
    macs(node, c, heads, c.dims(node, 0)[0] * rows, keys)


@rewrite("Attention")
def rewrite_attention(node: Node, r: Rewriter) -> None:
    """The heads that are left; the original scale."""
    rewrite_heads(node, r, _standard_sizes(node, r.dims), _STANDARD)


@rule("RotaryEmbedding")
@rule("RotaryEmbedding", "MRotaryEmbedding", domain=MICROSOFT)
def rotary(node: Node, c: Interpreter) -> None:
    """x[B, S, N * d] or [B, N, S, d], positions, cosines[P, d / 2], sines -> y like x"""
    heads = c.system.fresh(_rotary_heads(node, c.dims))
    c.prefer(heads)
    rank, words = len(c.dims(node, 0)), f"{node.title} turns pairs of its channels"
    last = c.axis(node, 0, rank - 1)
    if rank == 4:
        c.freeze(node, last, words)
        c.set(node, {1: c.axis(node, 0, 1)})
        return
    within = c.system.fresh(c.dims(node, 0)[rank - 1] // heads.size)
    grid(node, c, last, heads, within)
    c.freeze(node, within, words)
    c.keep_labels(node, heads)
    c.set(node, {rank - 1: last})


def _rotary_heads(node: Node, dims: Dimension) -> int:
    """Without the attribute, a cache of cosines [P, d / 2] tells the size of a head."""
    x = dims(node, 0)
    if len(x) == 4:
        return x[1]
    heads: int = node.attr("num_heads", 0)
    cosines = dims(node, 1 if node.domain == "" else 2)
    return heads or x[-1] // (2 * cosines[-1])


@rewrite("RotaryEmbedding")
@rewrite("RotaryEmbedding", "MRotaryEmbedding", domain=MICROSOFT)
def rewrite_rotary(node: Node, r: Rewriter) -> None:
    """The number of heads that are left."""
    if node.attr("num_heads", 0) and node.index in r.coupling.notes:
        count = r.count(r.coupling.notes[node.index])
        if count != node.attr("num_heads"):
            r.set_attribute(node, "num_heads", count)


@rule("TensorScatter")
def tensor_scatter(node: Node, c: Interpreter) -> None:
    """past[B, *D], update[B, *D'], positions[B] -> present[B, *D]; one axis is written to"""
    rank = len(c.dims(node, 0))
    own = node.attr("axis", -2) % rank
    found: dict[int, Labels | None] = {}
    for axis in (a for a in range(rank) if a != own and c.dims(node, 0)[a] > 1):
        found[axis] = c.axis(node, 0, axis)
        c.tie(node, found[axis], c.axis(node, 1, axis))
    c.set(node, found)


def _linear_sizes(node: Node, dims: Dimension) -> Sizes:
    n, k = node.attr("q_num_heads"), node.attr("kv_num_heads")
    return Sizes(n, k, dims(node, 0)[2] // n, dims(node, 2)[2] // k)


@rule("LinearAttention")
@rule("LinearAttention", domain=MICROSOFT)
def linear_attention(node: Node, c: Interpreter) -> None:
    """q[B, T, N * d], k[B, T, K * d], v[B, T, K * e], state[B, K, d, e], decay[B, T, K * d or K],
    beta[B, T, K or 1] -> y[B, T, N * e], state[B, K, d, e]"""
    sizes = _linear_sizes(node, c.dims)
    if sizes.query < sizes.shared or node.attr("state_window", 0):
        for slot in range(len(node.inputs)):
            c.freeze_input(node, slot, f"{node.title} has more states than queries")
        return
    heads = heads_of(node, c, sizes)
    stream(node, c, 0, heads.query, heads.key, summed=True)
    stream(
        node, c, 1, heads.shared, heads.key, summed=True
    )  # the delta rule reads k from its state
    value = stream(node, c, 2, heads.shared, heads.value)
    for axis, labels in ((1, heads.shared), (2, heads.key), (3, heads.value)):
        if node.input(3):
            tie_wide(node, c, labels, c.axis(node, 3, axis))
    for slot in (4, 5):
        if node.input(slot) and c.dims(node, slot)[2] == sizes.shared:
            tie_wide(node, c, heads.shared, c.axis(node, slot, 2))
        elif node.input(slot) and c.dims(node, slot)[2] > 1:
            grid(node, c, c.axis(node, slot, 2), heads.shared, heads.key)
    c.set(node, {1: heads.shared, 2: heads.key, 3: heads.value}, 1)
    result(node, c, heads, value)
    macs(node, c, heads, math.prod(c.dims(node, 0)[:2]), sizes.value)


@rewrite("LinearAttention")
@rewrite("LinearAttention", domain=MICROSOFT)
def rewrite_linear_attention(node: Node, r: Rewriter) -> None:
    """The heads that are left; the original scale."""
    rewrite_heads(node, r, _linear_sizes(node, r.dims), _STANDARD)
