"""Recurrent layers: the builder differentiates one forward direction with given initial states."""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune.training.draft import Builder, Draft, Undifferentiable, attributes, rule

LAST = np.iinfo(np.int64).min


@rule("LSTM", "GRU")
def recurrent(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x[T, N, I], W[D, G H, I], R[D, G H, H], B[D, 2 G H] -> y[T, D, N, H], h[D, N, H] (, c)

    Two directions become two nodes; the backward one reads a reversed sequence.
    """
    options = attributes(node)
    if options.get("layout") or options.get("activations") or options.get("clip"):
        raise Undifferentiable(f"{node.op_type}: layout, activations or clip are not covered")
    states = 2 if node.op_type == "LSTM" else 1
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    if inputs[4] or inputs[7]:
        raise Undifferentiable(f"{node.op_type}: sequence lengths and peepholes are not covered")
    if not all(name in draft.trained for name in inputs[1:3]):
        raise Undifferentiable(f"{node.op_type}: its own weights are not trained")
    direction = options.get("direction", "forward")
    complete = bool(inputs[3]) and all(inputs[5 : 5 + states])
    outputs = [*node.output, *[""] * (1 + states - len(node.output))]
    if direction == "forward" and complete and all(outputs):
        return None
    b = Builder(draft, node)
    directions = ["forward", "reverse"] if direction == "bidirectional" else [direction]
    parts = [
        _one_direction(b, node, draft, inputs, index, len(directions), way == "reverse")
        for index, way in enumerate(directions)
    ]
    for place, name in enumerate(outputs):
        if name:
            axis = 1 if place == 0 else 0
            pieces = [part[place] for part in parts]
            b.op("Concat", *pieces, output=name, axis=axis)
    return b.nodes


def _one_direction(
    b: Builder,
    node: onnx.NodeProto,
    draft: Draft,
    inputs: list[str],
    index: int,
    count: int,
    reverse: bool,
) -> list[str]:
    """y, h (, c) of one direction."""
    states = 2 if node.op_type == "LSTM" else 1
    hidden = draft.static(node, inputs[2])[2]
    weights = [_part(b, name, index, count) for name in inputs[1:4] if name]
    if not inputs[3]:
        gates = draft.static(node, inputs[2])[1]
        weights.append(draft.constant(np.zeros((1, 2 * gates), np.float32), "bias"))
    x = _reversed(b, inputs[0]) if reverse else inputs[0]
    first = []
    for name in inputs[5 : 5 + states]:
        first.append(_part(b, name, index, count) if name else _zeros(b, inputs[0], hidden))
    names = [draft.name("recurrent") for _ in range(1 + states)]
    kept = {"hidden_size": hidden}
    if attributes(node).get("linear_before_reset"):
        kept["linear_before_reset"] = 1
    b.ops(node.op_type, x, *weights, "", *first, outputs=names, direction="forward", **kept)
    if reverse:
        names[0] = _reversed(b, names[0])
    return names


def _part(b: Builder, name: str, index: int, count: int) -> str:
    """One direction of a tensor whose first axis holds the directions."""
    if count == 1:
        return name
    return b.op("Slice", name, np.array([index]), np.array([index + 1]), np.array([0]))


def _reversed(b: Builder, x: str) -> str:
    """The sequence from its end."""
    ends = np.array([LAST + 1])
    return b.op("Slice", x, np.array([-1]), ends, np.array([0]), np.array([-1]))


def _zeros(b: Builder, x: str, hidden: int) -> str:
    """An initial state [1, N, H]."""
    batch = b.op("Shape", x, start=1, end=2)
    shape = b.op("Concat", np.array([1]), batch, np.array([hidden]), axis=0)
    return b.op("ConstantOfShape", shape)
