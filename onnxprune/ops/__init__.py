"""Operator rules, one file per family, and the one function that applies them to a node."""

from __future__ import annotations

from importlib.metadata import entry_points

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node, captured_by
from onnxprune.ops import (
    attention,
    attention_microsoft,
    contraction,
    control,
    elementwise,
    fused,
    indexing,
    lengths,
    lookup,
    normalization,
    numbers,
    packed,
    quantization,
    quantized,
    quantized_attention,
    recurrent,
    reduction,
    sequences,
    shaping,
    signal,
    spatial,
)
from onnxprune.ops.registry import REWRITES, find

__all__ = ["REWRITES", "interpret_node"]

_FAMILIES = (
    attention,
    attention_microsoft,
    contraction,
    control,
    elementwise,
    fused,
    indexing,
    lookup,
    normalization,
    packed,
    quantization,
    quantized,
    quantized_attention,
    recurrent,
    reduction,
    sequences,
    shaping,
    signal,
    spatial,
)


#: Modules of other packages that register rules: entry points of this group.
ENTRY_POINTS = "onnxprune.rules"


def load_others() -> None:
    """Import the modules with rules that other packages name in their entry points."""
    for point in entry_points(group=ENTRY_POINTS):
        point.load()


load_others()


def interpret_node(state: Interpreter, node: Node) -> None:
    """Apply the rule of `node`; what no rule handles is frozen with that reason."""
    if node.op_type == "Constant" and node.domain == "":
        return
    if node.op_type == "Identity" and state.constant(node, 0) is not None:
        state.aliases[node.outputs[0]] = state.aliases.get(node.inputs[0], node.inputs[0])
        return
    numbers.follow(state, node)
    if lengths.follow(state, node):
        return
    entry = find(node, state.graph.opsets.get(node.domain, 1))
    if entry is None:
        for slot, name in enumerate(node.inputs):
            if name:
                state.freeze_input(node, slot, f"no rule for operator {node.op_type}")
        for name in captured_by(node.proto) if node.bodies else ():
            for block in state.layouts.get(name, ()):
                state.freeze(node, block.labels, f"used inside the body of {node.title}")
        state.lose(node)
        return
    known = state.shapes.known
    if not entry.partial and not (known.issuperset(node.inputs) and known.issuperset(node.outputs)):
        for slot in range(len(node.inputs)):
            state.freeze_input(node, slot, f"a shape around {node.title} is unknown")
        state.lose(node)
        return
    state.begin(node)
    entry.rule(node, state)
    state.finish(node)
