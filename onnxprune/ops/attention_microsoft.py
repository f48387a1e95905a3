"""Fused attention as ONNX Runtime's optimizers and model builders write it."""

from __future__ import annotations

import numpy as np

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.attention import (
    Dimension,
    Heads,
    Sizes,
    bias_of_scores,
    cache,
    grid,
    heads_of,
    left,
    macs,
    result,
    rewrite_heads,
    stream,
    tie_wide,
)
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter
from onnxprune.vendor import MICROSOFT


def parts(labels: Labels | None, *lengths: int) -> list[Labels | None]:
    """The labels of a concatenated axis, cut into its parts."""
    if labels is None:
        return [None] * len(lengths)
    return list(np.split(labels, np.cumsum(lengths)[:-1]))


# -- Attention ------------------------------------------------------------------------------------


def _packed_sizes(node: Node, dims: Dimension) -> Sizes:
    heads = node.attr("num_heads")
    widths = node.attr("qkv_hidden_sizes") or [dims(node, 1)[1] // 3] * 3
    return Sizes(heads, heads, widths[0] // heads, widths[2] // heads)


@rule("Attention", domain=MICROSOFT)
def packed_attention(node: Node, c: Interpreter) -> None:
    """x[B, S, I], w[I, 2 * N * d + N * e], b, mask, past[2, B, N, P, d], bias[B, N, S, T]
    -> y[B, S, N * e], present[2, B, N, T, d]"""
    sizes = _packed_sizes(node, c.dims)
    c.tie(node, c.contract(node, 0, 2), c.axis(node, 1, 0))
    rotates = node.attr("do_rotary", 0)
    heads = heads_of(node, c, sizes, f"{node.title} turns pairs of its channels" if rotates else "")
    value = _projections(node, c, heads)
    if node.input(4) or len(node.outputs) > 1:
        _packed_cache(node, c, heads)
    bias_of_scores(node, c, 5, heads)
    result(node, c, heads, value)
    batch, rows, width = c.dims(node, 0)
    past = c.dims(node, 4)[3] if node.input(4) else 0
    whole = c.axis(node, 1, 1)
    c.layer(node, 1, batch * rows * width * c.dims(node, 1)[1], c.axis(node, 1, 0), whole)
    macs(node, c, heads, batch * rows, rows + past)


def _projections(node: Node, c: Interpreter, heads: Heads) -> Labels | None:
    """Columns of the weight and the bias are those of q, of k, of v; returns v's."""
    key, value = heads.query.size * heads.key.size, heads.query.size * heads.value.size
    whole = c.contract(node, 1, 1)
    found = parts(whole, key, key, value)
    for labels, within in zip(found, (heads.key, heads.key, heads.value), strict=True):
        grid(node, c, labels, heads.query, within)
        c.produce(node, labels)
    if node.input(2):
        c.tie(node, whole, c.contract(node, 2, 0))
    return found[2]


def _packed_cache(node: Node, c: Interpreter, heads: Heads) -> None:
    """past[2, B, N, P, d] and present alike: keys and values have heads of one size."""
    c.tie(node, heads.key, heads.value)
    if node.input(4):
        tie_wide(node, c, heads.query, c.axis(node, 4, 2))
        tie_wide(node, c, heads.key, c.axis(node, 4, 4))
    c.set(node, {2: heads.query, 4: heads.key}, 1)


@rewrite("Attention", domain=MICROSOFT)
def rewrite_packed_attention(node: Node, r: Rewriter) -> None:
    """The heads that are left, their widths, the original scale."""
    sizes = _packed_sizes(node, r.dims)
    rewrite_heads(node, r, sizes, {"num_heads": "query"})
    after = left(node, r, sizes)
    if after != sizes and (node.attr("qkv_hidden_sizes") or after.key != after.value):
        key, value = after.query * after.key, after.query * after.value
        r.set_attribute(node, "qkv_hidden_sizes", [key, key, value])


# -- MultiHeadAttention ---------------------------------------------------------------------------

#: Input slots of bias, bias of the scores, past key, past value.
_SLOTS = {"MultiHeadAttention": (3, 5, 6, 7), "DecoderMaskedMultiHeadAttention": (10, 4, 5, 6)}


def _multi_sizes(node: Node, dims: Dimension) -> Sizes:
    heads = node.attr("num_heads")
    query, value = dims(node, 0), dims(node, 2) if node.input(2) else ()
    size = query[4] if len(query) == 5 else query[2] // heads
    if not value:
        return Sizes(heads, heads, size, size)
    return Sizes(heads, heads, size, value[3] if len(value) == 4 else value[2] // heads)


@rule("MultiHeadAttention", "DecoderMaskedMultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(node: Node, c: Interpreter) -> None:
    """q[B, S, N * d], k[B, L, N * d], v[B, L, N * e], bias[2 * N * d + N * e], ...
    -> y[B, S, N * e], present k[B, N, T, d], present v[B, N, T, e], weights[B, N, S, T]

    Also packed qkv[B, S, N, 3, d], packed kv[B, L, N, 2, d], and k, v as [B, N, L, d].
    """
    bias, scores, *past = _SLOTS[node.op_type]
    heads = heads_of(node, c, _multi_sizes(node, c.dims))
    streams = _streams(node, c, heads)
    if node.input(bias):
        _bias(node, c, heads, streams, bias)
    if node.input(scores):
        bias_of_scores(node, c, scores, heads)
    cache(node, c, (past[0], past[1]), heads, 1)
    c.set(node, {1: heads.query}, 3)
    result(node, c, heads, streams[2])
    batch, rows = c.dims(node, 0)[:2]
    keys = c.out_dims(node, 1)[2] if len(node.outputs) > 1 and node.outputs[1] else _keys(node, c)
    macs(node, c, heads, batch * rows, keys)


def _keys(node: Node, c: Interpreter) -> int:
    dims = c.dims(node, 1) if node.input(1) else c.dims(node, 0)
    return dims[2] if len(dims) == 4 else dims[1]


def _streams(node: Node, c: Interpreter, heads: Heads) -> list[Labels | None]:
    """The labels of the last axes of q, k and v; None for those that are packed or have heads."""
    if len(c.dims(node, 0)) == 5:
        _packed(node, c, 0, heads)
        return [None] * 3
    query = stream(node, c, 0, heads.query, heads.key, summed=True)
    if not node.input(2):
        _packed(node, c, 1, heads)
        return [query, None, None]
    key = stream(node, c, 1, heads.query, heads.key)
    if len(c.dims(node, 2)) == 4:  # taken as caches, which are of one shape
        c.tie(node, heads.key, heads.value)
    return [query, key, stream(node, c, 2, heads.query, heads.value)]


def _packed(node: Node, c: Interpreter, slot: int, heads: Heads) -> None:
    """qkv[B, S, N, 3, d] or kv[B, L, N, 2, d]"""
    c.tie(node, heads.key, heads.value)
    c.freeze(node, c.axis(node, slot, 3), f"{node.title} takes it apart")
    tie_wide(node, c, heads.query, c.axis(node, slot, 2))
    tie_wide(node, c, heads.key, c.contract(node, slot, 4))


def _bias(
    node: Node, c: Interpreter, heads: Heads, streams: list[Labels | None], slot: int
) -> None:
    key, value = heads.query.size * heads.key.size, heads.query.size * heads.value.size
    found = parts(c.contract(node, slot, 0), key, key, value)
    within = (heads.key, heads.key, heads.value)
    for own, other, channels in zip(found, streams, within, strict=True):
        if other is not None:
            c.tie(node, own, other)
        else:
            grid(node, c, own, heads.query, channels)


@rewrite("MultiHeadAttention", "DecoderMaskedMultiHeadAttention", domain=MICROSOFT)
def rewrite_multi_head(node: Node, r: Rewriter) -> None:
    """The heads that are left; the original scale."""
    rewrite_heads(node, r, _multi_sizes(node, r.dims), {"num_heads": "query"})


# -- GroupQueryAttention --------------------------------------------------------------------------


def _group_sizes(node: Node, dims: Dimension) -> Sizes:
    heads, shared = node.attr("num_heads"), node.attr("kv_num_heads")
    count = heads if node.input(1) else heads + 2 * shared
    size = dims(node, 0)[2] // count
    return Sizes(heads, shared, size, size)


@rule("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(node: Node, c: Interpreter) -> None:
    """q[B, S, N * d], k[B, L, K * d], v[B, L, K * d], past k[B, K, P, d], past v, lengths, ...
    -> y[B, S, N * d], present k, present v, scores[B, N, S, T]; or q packed with k and v"""
    sizes = _group_sizes(node, c.dims)
    heads = heads_of(node, c, sizes, f"the heads of {node.title} have a fixed size")
    value = _group_streams(node, c, heads)
    if any(node.input(slot) for slot in (12, 13)):
        c.freeze(node, heads.shared, f"the cache of {node.title} is quantized")
    cache(node, c, (3, 4), heads, 1)
    if node.input(10):
        bias_of_scores(node, c, 10, heads)
    if node.input(11):
        c.tie(node, heads.query, c.axis(node, 11, 0))
    c.set(node, {1: heads.query}, 3)
    result(node, c, heads, value)
    batch, rows = c.dims(node, 0)[:2]
    past = c.dims(node, 3)[2] if node.input(3) else 0
    macs(node, c, heads, batch * rows, rows + past)


def _group_streams(node: Node, c: Interpreter, heads: Heads) -> Labels | None:
    if node.input(1):
        stream(node, c, 0, heads.query, heads.key)
        stream(node, c, 1, heads.shared, heads.key)
        return stream(node, c, 2, heads.shared, heads.value)
    many, few = heads.query.size * heads.key.size, heads.shared.size * heads.key.size
    query, key, value = parts(c.axis(node, 0, 2), many, few, few)
    grid(node, c, query, heads.query, heads.key)
    grid(node, c, key, heads.shared, heads.key)
    grid(node, c, value, heads.shared, heads.value)
    return value


@rewrite("GroupQueryAttention", domain=MICROSOFT)
def rewrite_group_query(node: Node, r: Rewriter) -> None:
    """The heads that are left."""
    names = {"num_heads": "query", "kv_num_heads": "shared"}
    rewrite_heads(node, r, _group_sizes(node, r.dims), names)


@rule("LinearAttentionGate", domain=MICROSOFT)
def linear_attention_gate(node: Node, c: Interpreter) -> None:
    """a[B, T, N], bias[N], scale[N], b[B, T, N] -> decay[B, T, N], beta[B, T, N]"""
    heads = c.axis(node, 0, 2)
    for slot in (1, 2):
        c.tie(node, heads, c.axis(node, slot, 0))
    c.set(node, {2: heads})
    if node.input(3):
        c.set(node, {2: c.axis(node, 3, 2)}, 1)
