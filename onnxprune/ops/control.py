"""If, Loop and Scan: labels flow into bodies, through them, and out again.

What a body captures from around it needs no rule: names are unique, so its nodes read the labels of
the outer tensors as any node does.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxprune.body_shapes import branch, scan_axis
from onnxprune.coupling import Interpreter
from onnxprune.fixed import is_proven
from onnxprune.graph import Body, Node
from onnxprune.labels import Block, Labels, Layout
from onnxprune.ops.registry import rule

Axes = Mapping[int, Labels]


@rule("If", partial=True)
def branches(node: Node, c: Interpreter) -> None:
    """cond -> the outputs of one of two bodies, which so must agree"""
    taken = _taken(node, c)
    if taken is not None:
        c.taken[node.index] = taken
        _walk(node, c, taken)
        for index, name in enumerate(taken.outputs):
            c.set_layout(node, c.layouts.get(name, ()), index)
        return
    for body in node.bodies:
        _walk(node, c, body)
    for index, name in enumerate(node.outputs):
        first, second = (_leaving(node, c, body.outputs[index]) for body in node.bodies)
        ranks = {len(c.shapes.dims(body.outputs[index]) or ()) for body in node.bodies}
        if len(ranks) > 1:
            for axes in (first, second):
                _freeze(node, c, axes, f"the branches of {node.title} differ in rank")
            continue
        for axis in sorted(first.keys() | second.keys()):
            c.tie(node, first.get(axis), second.get(axis))
        if name:
            c.set_layout(node, _layout(first), index)


def _taken(node: Node, c: Interpreter) -> Body | None:
    """The branch that always runs: shapes that do not depend on the input decide."""
    value = c.shapes.value(node.inputs[0])
    if value is None or not is_proven(c.graph, c.shapes, node.inputs[0]):
        return None
    return branch(node, bool(value.item()))


@rule("Loop", partial=True)
def loop(node: Node, c: Interpreter) -> None:
    """trips, cond, states... -> final states..., stacked values [trips, *D]..."""
    body = node.bodies[0]
    count = len(node.inputs) - 2
    entered = [_enter(node, c, 2 + k, body.inputs[2 + k]) for k in range(count)]
    _walk(node, c, body)
    for k, axes in enumerate(entered):
        _carry(node, c, axes, body.outputs[1 + k], k)
    for k in range(count, len(node.outputs)):
        axes = _leaving(node, c, body.outputs[1 + k])
        _stack(node, c, axes, 0, k)


@rule("Scan", since=9, partial=True)
def scan(node: Node, c: Interpreter) -> None:
    """states..., sequences[.., T, ..]... -> final states..., stacked values[.., T, ..]..."""
    body = node.bodies[0]
    slices = int(node.attr("num_scan_inputs"))
    count = len(node.inputs) - slices
    entered = [_enter(node, c, k, body.inputs[k]) for k in range(count)]
    trips = 1
    for k in range(count, len(node.inputs)):
        trips = _slice(node, c, k, body.inputs[k], scan_axis(node, "scan_input_axes", k - count))
    _walk(node, c, body, trips)
    for k, axes in enumerate(entered):
        _carry(node, c, axes, body.outputs[k], k)
    for k in range(count, len(node.outputs)):
        axes = _leaving(node, c, body.outputs[k])
        _stack(node, c, axes, scan_axis(node, "scan_output_axes", k - count), k)


def _walk(node: Node, c: Interpreter, body: Body, trips: int = 1) -> None:
    from onnxprune.ops import interpret_node

    touched, repeats = c.touched, c.repeats
    c.repeats *= trips
    for inner in body.nodes:
        interpret_node(c, inner)
    c.touched, c.repeats = touched, repeats


def _layout(axes: Axes) -> Layout:
    return tuple(Block((axis,), labels) for axis, labels in sorted(axes.items()))


def _separate(node: Node, c: Interpreter, layout: Layout) -> Axes:
    return {b.axes[0]: b.labels for b in c.settle_all(layout, node)}


def _leaving(node: Node, c: Interpreter, name: str) -> Axes:
    """The labels with which `name` leaves a body; a constant carries none and so stays whole."""
    return _separate(node, c, c.layouts.get(name, ()))


def _freeze(node: Node, c: Interpreter, axes: Axes, words: str) -> None:
    for labels in axes.values():
        c.freeze(node, labels, words)


def _enter(node: Node, c: Interpreter, slot: int, name: str) -> Axes:
    """Input `slot` is the first value of the state that the body knows as `name`."""
    axes = _separate(node, c, c.layout(node, slot))
    if c.shapes.dims(name) is None:
        _freeze(node, c, axes, f"its shape changes while {node.title} runs")
        return {}
    if axes:
        c.layouts[name] = _layout(axes)
    return axes


def _carry(node: Node, c: Interpreter, entered: Axes, name: str, index: int) -> None:
    """A state leaves the body as it enters it."""
    left = _leaving(node, c, name)
    for axis in sorted(entered.keys() | left.keys()):
        c.tie(node, entered.get(axis), left.get(axis))
    if node.outputs[index] and entered:
        c.set_layout(node, _layout(entered), index)


def _slice(node: Node, c: Interpreter, slot: int, name: str, axis: int) -> int:
    """The body sees one index along `axis` of input `slot` at a time; returns how many."""
    dims = c.dims(node, slot)
    if not dims:
        c.freeze_input(node, slot, f"a shape around {node.title} is unknown")
        return 1
    own = axis % len(dims)
    axes = dict(_separate(node, c, c.layout(node, slot)))
    c.freeze(node, axes.pop(own, None), f"{node.title} iterates over it")
    c.layouts[name] = _layout({a - (a > own): labels for a, labels in axes.items()})
    return dims[own]


def _stack(node: Node, c: Interpreter, axes: Axes, axis: int, index: int) -> None:
    """Output `index` collects a value of each iteration along a new `axis`."""
    rank = len(c.out_dims(node, index))
    if not rank or not node.outputs[index]:
        _freeze(node, c, axes, f"a shape around {node.title} is unknown")
        return
    own = axis % rank
    c.set_layout(node, _layout({a + (a >= own): labels for a, labels in axes.items()}), index)
