"""Shapes inside the bodies of control-flow nodes, and of what comes out of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import onnx

from onnxprune.graph import Body, Node

if TYPE_CHECKING:
    from onnxprune.operator_shapes import Dims
    from onnxprune.shape_walk import Walk


def visit_bodies(walk: Walk, node: Node) -> None:
    """Walk through the bodies of `node`, then note the shapes of its outputs."""
    if node.op_type == "If":
        _branches(walk, node)
    elif node.op_type == "Loop":
        _loop(walk, node)
    elif node.op_type == "Scan" and walk.graph.opset >= 9:
        _scan(walk, node)


def _branches(walk: Walk, node: Node) -> None:
    for body in node.bodies:
        _visit(walk, body)
    taken = walk.value(node.inputs[0])
    for index, name in enumerate(node.outputs):
        found = [walk.dims.get(body.outputs[index]) for body in _chosen(node, taken)]
        same = found[0] if all(dims == found[0] for dims in found) else None
        _note(walk, name, same, walk.types.get(node.bodies[0].outputs[index]))


def _chosen(node: Node, taken: object) -> tuple[Body, ...]:
    """The branches that may run: one where the condition is known."""
    if taken is None:
        return node.bodies
    return (branch(node, bool(taken)),)


def branch(node: Node, condition: bool) -> Body:
    """The body of an If that runs under `condition`."""
    which = "then_branch" if condition else "else_branch"
    return next(body for body in node.bodies if body.attribute == which)


def _loop(walk: Walk, node: Node) -> None:
    body = node.bodies[0]
    count = len(node.inputs) - 2
    _note(walk, body.inputs[0], (), onnx.TensorProto.INT64)
    _note(walk, body.inputs[1], (), onnx.TensorProto.BOOL)
    states = list(zip(node.inputs[2:], body.inputs[2:], body.outputs[1:], strict=False))
    _repeat(walk, body, states)
    for k, (_, inner, _) in enumerate(states):
        _note(walk, node.outputs[k], walk.dims.get(inner), walk.types.get(inner))
    limit = walk.value(node.inputs[0]) if node.inputs[0] else None
    trips = walk.unknown if limit is None else int(limit.item())
    for k in range(count, len(node.outputs)):
        _stacked(walk, node.outputs[k], body.outputs[1 + k], trips, 0)


def _scan(walk: Walk, node: Node) -> None:
    body = node.bodies[0]
    count = len(node.inputs) - int(node.attr("num_scan_inputs"))
    trips = walk.unknown
    for k in range(count, len(node.inputs)):
        dims = walk.dims.get(node.inputs[k])
        if dims:
            axis = scan_axis(node, "scan_input_axes", k - count) % len(dims)
            trips = dims[axis]
            dims = dims[:axis] + dims[axis + 1 :]
        _note(walk, body.inputs[k], dims, walk.types.get(node.inputs[k]))
    states = list(zip(node.inputs[:count], body.inputs[:count], body.outputs, strict=False))
    _repeat(walk, body, states)
    for k, (_, inner, _) in enumerate(states):
        _note(walk, node.outputs[k], walk.dims.get(inner), walk.types.get(inner))
    for k in range(count, len(node.outputs)):
        axis = scan_axis(node, "scan_output_axes", k - count)
        _stacked(walk, node.outputs[k], body.outputs[k], trips, axis)


def scan_axis(node: Node, name: str, index: int) -> int:
    """The axis that attribute `name` of a Scan gives its input or output `index`; 0 by default."""
    axes = node.attr(name)
    return int(axes[index]) if axes else 0


def _repeat(walk: Walk, body: Body, states: Iterable[tuple[str, str, str]]) -> None:
    """Visit the body with its states; a state that comes out with another shape has no known one.

    Each turn forgets at least one state's shape, so it ends.
    """
    known = {(first, inner, out) for first, inner, out in states if first in walk.dims}
    for first, inner, _ in states:
        _note(walk, inner, walk.dims.get(first), walk.types.get(first))
    while True:
        _visit(walk, body)
        changing = {s for s in known if walk.dims.get(s[2]) != walk.dims[s[1]]}
        if not changing:
            return
        for name in _made(body):
            walk.forget(name)
        for _, inner, _ in changing:
            walk.dims.pop(inner, None)
        known -= changing


def _made(body: Body) -> Iterator[str]:
    for node in body.nodes:
        yield from node.outputs
        for inner in node.bodies:
            yield from inner.inputs
            yield from _made(inner)


def _visit(walk: Walk, body: Body) -> None:
    for node in body.nodes:
        walk.visit(node)


def _stacked(walk: Walk, name: str, inner: str, trips: int, axis: int) -> None:
    dims = walk.dims.get(inner)
    if dims is not None:
        own = axis % (len(dims) + 1)
        dims = (*dims[:own], trips, *dims[own:])
    _note(walk, name, dims, walk.types.get(inner))


def _note(walk: Walk, name: str, dims: Dims | None, kind: int | None) -> None:
    if kind is not None and name:
        walk.types.setdefault(name, kind)
    if dims is not None and name:
        walk.dims[name] = dims
