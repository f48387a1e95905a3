"""Fused attention on integers, as ONNX Runtime quantizes its packed attention."""

from __future__ import annotations

import math

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.ops.attention import Dimension, Sizes, grid, heads_of, macs, result, rewrite_heads
from onnxprune.ops.attention_microsoft import parts
from onnxprune.ops.quantization import read_quantized, tie_parameters
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter
from onnxprune.vendor import MICROSOFT

_W, _BIAS, _SCALE, _X_ZERO, _W_ZERO, _PAST = 1, 2, 4, 6, 7, 8


def _sizes(node: Node, dims: Dimension) -> Sizes:
    heads = node.attr("num_heads")
    within = dims(node, _W)[1] // 3 // heads
    return Sizes(heads, heads, within, within)


@rule("QAttention", domain=MICROSOFT)
def quantized_attention(node: Node, c: Interpreter) -> None:
    """x[B, S, I], w[I, 3 * N * d], b[3 * N * d], scales of x and w, mask, zero points of x and w,
    past[2, B, N, P, d] -> y[B, S, N * d], present
    """
    sizes = _sizes(node, c.dims)
    c.tie(node, c.contract(node, 0, 2, _X_ZERO if node.input(_X_ZERO) else -1), c.axis(node, _W, 0))
    words = _why_whole(node, c)
    heads = heads_of(node, c, sizes, words)
    if words:
        c.freeze(node, heads.query, words)
    c.tie(node, heads.key, heads.value)
    single = node.input(_W_ZERO) and math.prod(c.dims(node, _W_ZERO)) == 1
    whole = c.contract(node, _W, 1, _W_ZERO if single else -1)  # many of them are zeros here
    found = parts(whole, *[heads.query.size * heads.key.size] * 3)
    for labels in found:
        grid(node, c, labels, heads.query, heads.key)
        c.produce(node, labels)
    if node.input(_BIAS):
        c.tie(node, whole, c.contract(node, _BIAS, 0))
    tie_parameters(node, c, _W, 1, _SCALE, _W_ZERO)
    result(node, c, heads, found[2])
    batch, rows, width = c.dims(node, 0)
    c.layer(node, _W, batch * rows * width * c.dims(node, _W)[1], c.axis(node, _W, 0), whole)
    macs(node, c, heads, batch * rows, rows)
    read_quantized(node, c, _W, _SCALE, _W_ZERO, 1)


def _why_whole(node: Node, c: Interpreter) -> str:
    """Why the heads of a node must stay; empty where they may go."""
    if node.input(_PAST) or len([name for name in node.outputs if name]) > 1:
        return f"the cache of {node.title} holds it"
    zero = c.constant(node, _W_ZERO)
    if zero is not None and zero.size > 1 and zero.array().any():
        return f"{node.title} has a zero point for each of its channels"
    if node.attr("do_rotary", 0):
        return f"{node.title} turns pairs of its channels"
    return ""


@rewrite("QAttention", domain=MICROSOFT)
def rewrite_quantized_attention(node: Node, r: Rewriter) -> None:
    """The heads that are left, the original scale."""
    rewrite_heads(node, r, _sizes(node, r.dims), {"num_heads": "query"})
