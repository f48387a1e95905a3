"""Tensors whose values number the indices of a prunable axis: TopK's and ArgMax's positions.

Where such an axis loses indices, the producer numbers what is left, and whoever looks something up
by these numbers must see an axis that lost the same. A number that enters arithmetic freezes it.
"""

from __future__ import annotations

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels

#: Operators that pass the numbers in these inputs on; None: in all of them.
CARRIERS: dict[str, tuple[int, ...] | None] = {
    "Cast": (0,),
    "Concat": None,
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "Identity": (0,),
    "Reshape": (0,),
    "Slice": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
}
#: Inputs by which operators look up; their rules tie the axis.
READERS = frozenset(
    (("Gather", 1), ("GatherElements", 1), ("ScatterElements", 1), ("OneHot", 0), ("Shape", 0))
)


def follow(state: Interpreter, node: Node) -> None:
    """Pass numbers on to the outputs of `node`, or freeze what they number."""
    if state.numbers.keys().isdisjoint(node.inputs):
        return
    slots = [s for s, name in enumerate(node.inputs) if name in state.numbers]
    kinds = [state.numbers[node.inputs[s]] for s in slots]
    carried = CARRIERS.get(node.op_type, ()) if node.domain == "" else ()
    if carried is None and len(slots) == len(node.inputs):
        for other in kinds[1:]:
            state.tie(node, kinds[0], other)
    elif carried is None or tuple(slots) != carried:
        for slot, labels in zip(slots, kinds, strict=True):
            if node.domain != "" or (node.op_type, slot) not in READERS:
                state.freeze(node, labels, f"the positions that {node.title} reads are numbers")
        return
    for name in node.outputs:
        if name:
            state.numbers[name] = kinds[0]


def numbered(node: Node, c: Interpreter, slot: int, labels: Labels | None) -> bool:
    """Tie an axis that is looked up by input `slot` to what that numbers; False: by other data."""
    numbers = c.numbers.get(node.input(slot))
    if numbers is None:
        return False
    c.tie(node, labels, numbers)
    return labels is not None and labels.size == numbers.size


def number(node: Node, c: Interpreter, index: int, labels: Labels | None) -> None:
    """The values of output `index` are positions along an axis with these labels."""
    if labels is not None and index < len(node.outputs) and node.outputs[index]:
        c.numbers[node.outputs[index]] = labels
