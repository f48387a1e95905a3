"""Which shape values are the same for every input, proven from where they come from.

Equal values at two sizes of the input are evidence; a branch may be left out only on proof.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxprune.folding import FOLDS
from onnxprune.graph import Graph, Node
from onnxprune.shapes import Shapes

#: Positions of a value's elements, None for all of them.
Positions = frozenset[int] | None
_SAME_ELEMENTS = frozenset(("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"))


def is_proven(graph: Graph, shapes: Shapes, name: str) -> bool:
    """Whether the folded value `name` follows from constants and fixed dimensions alone."""
    seen: set[tuple[str, Positions]] = set()
    waiting: list[tuple[str, Positions]] = [(name, None)]
    while waiting:
        item = waiting.pop()
        if item in seen:
            continue
        seen.add(item)
        found = _sources(graph, shapes, *item)
        if found is None:
            return False
        waiting += found
    return True


def _sources(
    graph: Graph, shapes: Shapes, name: str, wanted: Positions
) -> list[tuple[str, Positions]] | None:
    """What these elements of `name` are computed from; None where they depend on the input."""
    if name in graph.constants:
        return []
    node = graph.producer.get(name)
    if node is None or node.domain or node.op_type not in FOLDS or shapes.value(name) is None:
        return None
    if node.op_type in ("Shape", "Size"):
        return _dimensions(node, shapes, wanted)
    if node.op_type in _SAME_ELEMENTS:
        return [(node.inputs[0], wanted), *_all(node.inputs[1:])]
    if node.op_type in ("Gather", "Slice"):
        return [(node.inputs[0], _picked(node, shapes, wanted)), *_all(node.inputs[1:])]
    return _all(node.inputs)


def _all(names: Iterable[str]) -> list[tuple[str, Positions]]:
    return [(name, None) for name in names if name]


def _dimensions(
    node: Node, shapes: Shapes, wanted: Positions
) -> list[tuple[str, Positions]] | None:
    rank = len(shapes.dims(node.inputs[0]) or ())
    axes = list(range(rank))[node.attr("start", 0) : node.attr("end", None)]
    used = axes if wanted is None or node.op_type == "Size" else [axes[i] for i in wanted]
    return [] if all(shapes.is_fixed(node.inputs[0], axis) for axis in used) else None


def _picked(node: Node, shapes: Shapes, wanted: Positions) -> Positions:
    source = shapes.value(node.inputs[0])
    if source is None:
        return None
    places = np.arange(source.size).reshape(source.shape)
    rest = [shapes.value(name) if name else None for name in node.inputs[1:]]
    picked = np.ravel(FOLDS[node.op_type](node, places, *rest))
    chosen = picked if wanted is None else picked[sorted(wanted)]
    return frozenset(int(i) for i in chosen)
