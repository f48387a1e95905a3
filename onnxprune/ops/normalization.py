"""Normalizations and the softmax family."""

from __future__ import annotations

from onnxprune.coupling import NO_CHANNELS, Interpreter
from onnxprune.graph import Node
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter


def pass_through(node: Node, c: Interpreter, slot: int = 0, index: int = 0) -> None:
    """Output `index` has the labels of input `slot`."""
    c.set_layout(node, c.settle_all(c.layout(node, slot), node), index)


@rule("BatchNormalization", "InstanceNormalization")
def per_channel(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], parameters [C] -> y[N, C, *S]; statistics per channel, recorded or measured"""
    channels = c.axis(node, 0, 1)
    c.prefer(channels)
    for slot in range(1, len(node.inputs)):
        c.tie(node, channels, c.axis(node, slot, 0))
    trains = node.attr("training_mode", 0) or (c.graph.opset < 14 and len(node.outputs) > 1)
    if node.op_type == "InstanceNormalization" or trains:
        for axis in (a for a in range(len(c.dims(node, 0))) if a != 1):
            c.inexact(node, c.axis(node, 0, axis), f"{node.title} averages over it")
    pass_through(node, c)
    if channels is None and len(node.inputs) > 1:
        c.freeze(node, c.axis(node, 1, 0), NO_CHANNELS.format(node.title))


@rule("LayerNormalization", "RMSNormalization")
def layer_norm(node: Node, c: Interpreter) -> None:
    """x[*B, *D], scale[*D], bias[*D] -> y[*B, *D]; statistics are over D"""
    rank = len(c.dims(node, 0))
    first = node.attr("axis", -1) % rank
    for axis in range(rank):
        labels = c.axis(node, 0, axis)
        if axis < first:
            c.prefer(labels)
            continue
        c.inexact(node, labels, f"{node.title} averages over it")
        for slot in range(1, len(node.inputs)):
            dims = c.dims(node, slot)
            own = axis - (rank - len(dims))
            if own >= 0 and dims[own] > 1:
                c.tie(node, labels, c.axis(node, slot, own))
    pass_through(node, c)


@rule("GroupNormalization")
def group_norm(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], scale[C or groups], bias -> y[N, C, *S]; statistics over channel groups"""
    groups = node.attr("num_groups")
    x = c.axis(node, 0, 1)
    pass_through(node, c)
    for axis in range(2, len(c.dims(node, 0))):
        c.inexact(node, c.axis(node, 0, axis), f"{node.title} averages over it")
    group = c.system.fresh(groups)
    if x is None:
        c.freeze(node, group, NO_CHANNELS.format(node.title))
    elif x.size == groups:
        c.tie(node, x, group)
    else:
        within = c.system.fresh(x.size // groups)
        c.factor(node, x.reshape(groups, -1), (group, within))
        c.prefer(group)
        c.inexact(node, within, f"{node.title} averages over it")
    for slot in (1, 2):
        per_group = c.dims(node, slot)[0] == groups
        c.tie(node, group if per_group else x, c.axis(node, slot, 0))
    c.keep_labels(node, group)


@rewrite("GroupNormalization")
def rewrite_group_norm(node: Node, r: Rewriter) -> None:
    """The number of groups that are left."""
    left = r.count(r.coupling.notes[node.index])
    if left != node.attr("num_groups"):
        r.set_attribute(node, "num_groups", left)


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: Node, c: Interpreter) -> None:
    """x[*D] -> y[*D]; sums over one axis (before opset 13 over all axes from `axis` on)"""
    rank = len(c.dims(node, 0))
    old = c.graph.opset < 13
    first = node.attr("axis", 1 if old else -1) % rank
    for axis in range(rank):
        labels = c.axis(node, 0, axis)
        if axis == first or (old and axis > first):
            c.inexact(node, labels, f"{node.title} normalizes over it")
        else:
            c.prefer(labels)
    pass_through(node, c)


@rule("LpNormalization")
def lp_norm(node: Node, c: Interpreter) -> None:
    """x[*D] -> y[*D], divided by its norm along one axis: zeros add nothing to a norm"""
    rank = len(c.dims(node, 0))
    own = node.attr("axis", -1) % rank
    for axis in range(rank):
        if axis == own:
            c.contract(node, 0, axis)
        else:
            c.prefer(c.axis(node, 0, axis))
    pass_through(node, c)


@rule("LRN")
def local_response(node: Node, c: Interpreter) -> None:
    """x[N, C, *S] -> y[N, C, *S]; divides by a sum over neighbouring channels"""
    c.inexact(node, c.axis(node, 0, 1), f"{node.title} sums over its neighbours")
    pass_through(node, c)


@rule("MeanVarianceNormalization")
def mean_variance(node: Node, c: Interpreter) -> None:
    """x[*D] -> y[*D], normalized over some axes"""
    rank = len(c.dims(node, 0))
    own = {a % rank for a in node.attr("axes", (0, 2, 3))}
    for axis in range(rank):
        labels = c.axis(node, 0, axis)
        if axis in own:
            c.inexact(node, labels, f"{node.title} averages over it")
        else:
            c.prefer(labels)
    pass_through(node, c)
