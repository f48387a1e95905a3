"""Operators that graph optimizers put in: activations, sums and norms fused with their neighbours.

Most are ONNX Runtime's, in its domain com.microsoft.
"""

from __future__ import annotations

import math

import numpy as np

from onnxprune.coupling import NO_CHANNELS, Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.contraction import conv, gemm, product, rewrite_conv
from onnxprune.ops.elementwise import aligned, broadcast, unary
from onnxprune.ops.lookup import trilu
from onnxprune.ops.normalization import layer_norm
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter
from onnxprune.vendor import MICROSOFT
from onnxprune.vendor_fused import operand_order

rule("Gelu", "QuickGelu", "ScaledSiLU", domain=MICROSOFT)(unary)
rule("BiasGelu", "FastGelu", "BiasAdd", "GatedAdd", domain=MICROSOFT)(broadcast)
rule("LayerNormalization", "SimplifiedLayerNormalization", domain=MICROSOFT)(layer_norm)
rule("SimplifiedLayerNormalization")(layer_norm)
rule("FusedGemm", domain=MICROSOFT)(gemm)
rule("Trilu", domain=MICROSOFT)(trilu)
rewrite("FusedConv", domain=MICROSOFT)(rewrite_conv)


@rule("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(node: Node, c: Interpreter) -> None:
    """A[*B, M, K], B[*B, K, N], each maybe transposed -> y[*B, M, N]"""
    ranks = len(c.dims(node, 0)), len(c.dims(node, 1))
    product(node, c, operand_order(node, "A", ranks[0]), operand_order(node, "B", ranks[1]))


@rule("FusedConv", domain=MICROSOFT)
def fused_conv(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], W[M, C/g, *K], b[M], z[N, M, *S'] -> y[N, M, *S'], z added before activation"""
    conv(node, c)
    if node.input(3):
        c.tie(node, c.axis(node, 1, 0), c.axis(node, 3, 1))


@rule("GemmFastGelu", domain=MICROSOFT)
def gemm_gelu(node: Node, c: Interpreter) -> None:
    """x[*B, K], W[K, N], b[N] -> y[*B, N]"""
    product(node, c, range(len(c.dims(node, 0))), range(len(c.dims(node, 1))))
    if node.input(2):
        c.tie(node, c.axis(node, 1, -1), c.axis(node, 2, 0))


@rule("BiasDropout", domain=MICROSOFT)
def bias_dropout(node: Node, c: Interpreter) -> None:
    """x[*D], bias, residual[*D], ratio, training -> y[*D], mask[*D]"""
    rank = len(c.out_dims(node))
    slots = [slot for slot in (0, 1, 2) if node.input(slot)]
    found = {axis: aligned(node, c, slots, axis, rank) for axis in range(rank)}
    for index in range(len(node.outputs)):
        c.set(node, found, index)


@rule("BiasSplitGelu", domain=MICROSOFT)
def bias_split_gelu(node: Node, c: Interpreter) -> None:
    """x[*B, 2 * D], bias[2 * D] -> y[*B, D]: the left half times the activated right half"""
    rank = len(c.dims(node, 0))
    whole = c.axis(node, 0, rank - 1)
    c.tie(node, whole, c.axis(node, 1, 0))
    found = {axis: c.axis(node, 0, axis) for axis in range(rank - 1)}
    if whole is not None:
        half = whole.size // 2
        c.tie(node, whole[:half], whole[half:])
        found[rank - 1] = whole[:half]
    c.set(node, found)


@rule("BiasSoftmax", domain=MICROSOFT)
def bias_softmax(node: Node, c: Interpreter) -> None:
    """x[*D], bias -> y[*D]: the bias broadcasts in one of two ways, the rows are all from `axis`"""
    rank, shift = len(c.dims(node, 0)), len(c.dims(node, 1))
    for axis in range(rank - shift):
        c.freeze(node, c.axis(node, 0, axis), f"{node.title} broadcasts along it")
    first = node.attr("axis", 1) % rank
    found = {axis: aligned(node, c, [0, 1], axis, rank) for axis in range(rank)}
    for axis in range(first, rank):
        c.inexact(node, found[axis], f"{node.title} normalizes over it")
    c.set(node, found)


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(node: Node, c: Interpreter) -> None:
    """x[*B, D], skip[*B, D], gamma[D], beta[D], bias[D] -> y[*B, D], mean, deviation, sum[*B, D]

    Without beta in SkipSimplifiedLayerNormalization.
    """
    rank = len(c.out_dims(node))
    found = {axis: aligned(node, c, [0, 1], axis, rank) for axis in range(rank)}
    for axis in range(rank - 1):
        c.prefer(found[axis])
    c.inexact(node, found[rank - 1], f"{node.title} averages over it")
    for slot in range(2, len(node.inputs)):
        if node.input(slot):
            c.tie(node, found[rank - 1], c.axis(node, slot, 0))
    for index in (0, 3):
        c.set(node, found, index)


@rule("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_norm(node: Node, c: Interpreter) -> None:
    """ids[B, S], segments[B, S], tables[V, D] of words, positions and segments, gamma[D], beta[D]
    -> y[B, S, D], mask index[B], sum[B, S, D]"""
    hidden = c.axis(node, 2, 1)
    for slot in (3, 4):
        if node.input(slot):
            c.tie(node, hidden, c.axis(node, slot, 1))
    for slot in (5, 6):
        c.tie(node, hidden, c.axis(node, slot, 0))
    c.inexact(node, hidden, f"{node.title} averages over it")
    if c.is_static(node, 2):
        c.produce(node, hidden)
    for index in (0, 2):
        c.set(node, {2: hidden}, index)


@rule("GatedRMSNorm", domain=MICROSOFT)
def gated_norm(node: Node, c: Interpreter) -> None:
    """x[*B, H * C], scale[C], gate[*B, H * C] -> y[*B, H * C]; statistics over each C"""
    rank = len(c.dims(node, 0))
    found = {axis: aligned(node, c, [0, 2], axis, rank) for axis in range(rank)}
    within = c.axis(node, 1, 0)
    labels = found[rank - 1]
    if labels is not None and within is not None and labels.size == within.size:
        c.tie(node, labels, within)
        c.inexact(node, labels, f"{node.title} averages over it")
    elif labels is not None:
        grid = labels.reshape(-1, c.dims(node, 1)[0])
        c.tie(node, grid, np.broadcast_to(grid[:, :1], grid.shape))
        c.freeze(node, within, f"{node.title} averages over it")
    else:
        c.freeze(node, within, NO_CHANNELS.format(node.title))
    c.set(node, found)


@rule("GroupNorm", "SkipGroupNorm", domain=MICROSOFT)
def group_norm(node: Node, c: Interpreter) -> None:
    """x[N, *S, C] or [N, C, *S], gamma[C], beta[C], skip, bias[C] -> y and x + skip + bias

    Statistics are over groups of channels: whole groups go, or the same channels of each.
    """
    rank = len(c.dims(node, 0))
    last = bool(node.attr("channels_last", 1))
    own = rank - 1 if last else 1
    channels = c.axis(node, 0, own)
    for axis in (a for a in range(1, rank) if a != own):
        c.freeze(node, c.axis(node, 0, axis), f"spatial axis of {node.title}")
    for slot in (1, 2, 4):
        if node.input(slot):
            c.tie(node, channels, c.axis(node, slot, 0))
    if node.input(3):
        skip = len(c.dims(node, 3))
        c.tie(node, channels, c.axis(node, 3, 1 if skip == 2 or not last else skip - 1))
    groups = c.system.fresh(node.attr("groups"))
    if channels is not None:
        _per_group(node, c, channels, groups)
    c.keep_labels(node, groups)
    for index in range(len(node.outputs)):
        c.set(node, {own: channels}, index)


def _per_group(node: Node, c: Interpreter, channels: Labels, groups: Labels) -> None:
    if channels.size == groups.size:
        c.tie(node, channels, groups)
        return
    within = c.system.fresh(channels.size // groups.size)
    c.factor(node, channels.reshape(groups.size, -1), (groups, within))
    c.prefer(groups)
    c.inexact(node, within, f"{node.title} averages over it")


@rewrite("GroupNorm", "SkipGroupNorm", domain=MICROSOFT)
def rewrite_group_norm(node: Node, r: Rewriter) -> None:
    """The number of groups that are left."""
    left = r.count(r.coupling.notes[node.index])
    if left != node.attr("groups"):
        r.set_attribute(node, "groups", left)


@rule("MoE", domain=MICROSOFT)
def mixture(node: Node, c: Interpreter) -> None:
    """x[*B, D], router[T, E], w1[E, f * I, D], b1, w2[E, D, I], b2[E, D], w3[E, I, D], b3
    -> y[*B, D]; f is 2 where w1 makes gate and value, in turns or one after the other"""
    own = len(c.dims(node, 0)) - 1
    x = c.contract(node, 0, own)
    _choose_experts(node, c, c.axis(node, 1, 1))
    c.tie(node, x, c.axis(node, 2, 2))
    inner, out = c.contract(node, 4, 2), c.axis(node, 4, 1)
    c.tie(node, x, out)  # the operator gives its output the shape of its input
    parts = [(2, 1), (3, 1)]
    if node.input(6):
        c.tie(node, x, c.axis(node, 6, 2))
        parts += [(6, 1), (7, 1)]
    double = c.dims(node, 2)[1] == 2 * c.dims(node, 4)[2]
    for slot, axis in parts:
        if node.input(slot):
            _expert_width(node, c, inner, c.axis(node, slot, axis), double and slot < 4)
    if node.input(5):
        c.tie(node, out, c.axis(node, 5, 1))
    c.set(node, {own: out})
    c.produce(node, inner)
    c.produce(node, out)
    tokens = math.prod(c.dims(node, 0)[:-1]) * node.attr("k", 1)
    for slot, axes in ((2, (inner, x)), (4, (inner, out)), (6, (inner, x))):
        if node.input(slot):
            c.layer(node, slot, tokens * math.prod(c.dims(node, slot)[1:]), *axes)


def _choose_experts(node: Node, c: Interpreter, router: Labels | None) -> None:
    """All experts stay unless whole ones are asked for: then the router chooses from the rest."""
    if not c.granularity.experts:
        c.freeze(node, router, f"{node.title} chooses among the experts by number")
        return
    for slot in range(2, 8):
        if node.input(slot):
            c.tie(node, router, c.axis(node, slot, 0))
    c.inexact(node, router, f"{node.title} chooses among them")
    c.must_keep_several(router, node.attr("k", 1))


def _expert_width(
    node: Node, c: Interpreter, inner: Labels | None, rows: Labels | None, double: bool
) -> None:
    if not double or inner is None:
        c.tie(node, inner, rows)
    elif node.attr("swiglu_fusion", 0) == 1:
        c.tie(node, np.repeat(inner, 2), rows)
    else:
        c.tie(node, np.tile(inner, 2), rows)


@rule("CausalConvWithState")
@rule("CausalConvWithState", domain=MICROSOFT)
def causal_conv(node: Node, c: Interpreter) -> None:
    """x[N, C, L], w[C, 1, k], b[C], past[N, C, k - 1] -> y[N, C, L], present[N, C, k - 1]"""
    channels, kernels = c.axis(node, 0, 1), c.axis(node, 1, 0)
    c.tie(node, channels, kernels)
    if node.input(2):
        c.tie(node, channels, c.axis(node, 2, 0))
    if node.input(3):
        c.tie(node, channels, c.axis(node, 3, 1))
    for index in (0, 1):
        c.set(node, {1: channels}, index)
    c.layer(node, 1, math.prod(c.dims(node, 0)) * c.dims(node, 1)[2], kernels)
