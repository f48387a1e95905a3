"""Reductions, arg-reductions and running sums."""

from __future__ import annotations

import numpy as np

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.numbers import number
from onnxprune.ops.registry import rule

SUMS = ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum")
OTHERS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp")


@rule(*SUMS)
def sums(node: Node, c: Interpreter) -> None:
    """x[*D], axes -> y[*D without axes]; zeros add nothing"""
    _reduce(node, c, exact=True)


@rule(*OTHERS)
def others(node: Node, c: Interpreter) -> None:
    """x[*D], axes -> y[*D without axes]; a zero counts"""
    _reduce(node, c, exact=False)


def _reduced_axes(node: Node, c: Interpreter, rank: int) -> set[int] | None:
    axes = node.attr("axes")
    if node.input(1):
        value = c.value(node, 1)
        if value is None:
            return None
        axes = value.ravel().tolist()
    if axes is None or len(axes) == 0:
        return set() if node.attr("noop_with_empty_axes", 0) else set(range(rank))
    return {int(a) % rank for a in axes}


def _reduce(node: Node, c: Interpreter, *, exact: bool) -> None:
    rank = len(c.dims(node, 0))
    axes = _reduced_axes(node, c, rank)
    if axes is None:
        c.freeze_input(node, 0, f"the axes of {node.title} are computed")
        return
    keep = node.attr("keepdims", 1)
    found: dict[int, Labels | None] = {}
    place = 0
    for axis in range(rank):
        if axis not in axes:
            found[place] = c.axis(node, 0, axis)
            if axes:
                c.prefer(found[place])
        elif exact:
            c.contract(node, 0, axis)
        else:
            c.inexact(node, c.axis(node, 0, axis), f"{node.title} reduces over it")
        place += bool(keep) or axis not in axes
    c.set(node, found)


@rule("ArgMax", "ArgMin")
def arg(node: Node, c: Interpreter) -> None:
    """x[*D] -> index along one axis"""
    rank = len(c.dims(node, 0))
    own = node.attr("axis", 0) % rank
    labels = c.axis(node, 0, own)
    if c.granularity.experts:
        c.inexact(node, labels, f"{node.title} chooses along it")
        number(node, c, 0, labels)
    else:
        c.freeze(node, labels, f"{node.title} numbers it")
    _without(node, c, own, bool(node.attr("keepdims", 1)))


def _without(node: Node, c: Interpreter, own: int, keep: bool) -> None:
    rank = len(c.dims(node, 0))
    rest = [a for a in range(rank) if a != own]
    c.set(node, {a if keep or a < own else a - 1: c.axis(node, 0, a) for a in rest})


@rule("CumSum", "CumProd")
def cumulative(node: Node, c: Interpreter) -> None:
    """x[*D], axis -> y[*D], running along one axis: zeros add nothing to a sum"""
    rank = len(c.dims(node, 0))
    value = c.value(node, 1)
    if value is None:
        c.freeze_input(node, 0, f"the axis of {node.title} is computed")
        return
    own = int(value.ravel()[0]) % rank
    if node.op_type == "CumSum":
        c.contract(node, 0, own)
    else:
        c.inexact(node, c.axis(node, 0, own), f"{node.title} multiplies over it")
    c.set(node, {a: c.axis(node, 0, a) for a in range(rank)})


@rule("TopK")
def top_k(node: Node, c: Interpreter) -> None:
    """x[*D], k -> values[*D'], indices[*D'], the largest along one axis"""
    rank = len(c.dims(node, 0))
    own = node.attr("axis", -1) % rank
    labels, k = c.axis(node, 0, own), c.value(node, 1) if node.input(1) else node.attr("k")
    if not c.granularity.experts or k is None:
        c.freeze(node, labels, f"{node.title} depends on its order")
    else:
        c.inexact(node, labels, f"{node.title} chooses along it")
        c.must_keep_several(labels, int(np.ravel(k)[0]))
        number(node, c, 1, labels)
    for index in range(len(node.outputs)):
        c.set(node, {a: c.axis(node, 0, a) for a in range(rank) if a != own}, index)


@rule("ReverseSequence")
def ordered(node: Node, c: Interpreter) -> None:
    """x[*D] -> y[*D'], where one axis depends on its order or number"""
    rank = len(c.dims(node, 0))
    own = [node.attr("batch_axis", 1), node.attr("time_axis", 0)]
    for axis in own:
        c.freeze(node, c.axis(node, 0, axis), f"{node.title} depends on its order")
    labels = {a: c.axis(node, 0, a) for a in range(rank) if a not in own}
    for index in range(len(node.outputs)):
        c.set(node, labels, index)
