"""Embeddings: which tables the model's input looks up, and what is left of them.

The ids that callers pass keep their meaning: a table of int64 in front of each lookup turns them
into positions among the rows that stay, and every id that went into that of the unknown one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxprune.coupling import Coupling
from onnxprune.errors import InvalidRecipeError
from onnxprune.granularity import Vocabulary
from onnxprune.graph import Graph, Node
from onnxprune.groups import Units
from onnxprune.rewriting import Mask

_CARRIERS = frozenset(
    ("Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
)


def find_lookups(graph: Graph, vocabulary: Vocabulary) -> frozenset[int]:
    """The Gather nodes that look ids of a model input up in the tables with the most rows.

    Raises:
        InvalidRecipeError: there are none, or an id is none of theirs.
    """
    rows = {node.index: n for node in graph.top if (n := _rows(graph, node))}
    most = max(rows.values(), default=0)
    if not most:
        raise InvalidRecipeError(
            "--granularity vocab: no embedding is looked up by ids that are a model input"
        )
    if vocabulary.kept[-1] >= most:
        raise InvalidRecipeError(
            f"--vocab-keep names id {vocabulary.kept[-1]}, but the vocabulary has {most} entries"
        )
    return frozenset(index for index, count in rows.items() if count == most)


def _rows(graph: Graph, node: Node) -> int:
    """How many rows the table has that `node` looks ids up in; 0 where it does not."""
    if node.op_type != "Gather" or node.domain or node.attr("axis", 0) != 0:
        return 0
    table = graph.constants.get(_origin(graph, node.inputs[0], frozenset(("Identity",))))
    ids = _origin(graph, node.inputs[1], _CARRIERS)
    return table.dims[0] if table and len(table.dims) == 2 and ids in graph.inputs else 0


def _origin(graph: Graph, name: str, carriers: frozenset[str]) -> str:
    while name in graph.producer and graph.producer[name].op_type in carriers:
        name = graph.producer[name].inputs[0]
    return name


def decided_rows(coupling: Coupling) -> tuple[Units, Units]:
    """The units of vocabulary entries that stay, and of those that go.

    Raises:
        InvalidRecipeError: the rows of a table cannot be removed; says why.
    """
    vocabulary = coupling.granularity.vocabulary
    nobody = np.zeros(0, np.int32)
    if vocabulary is None:
        return nobody, nobody
    stay, gone = nobody, nobody
    for index, labels in coupling.lookups.items():
        units = coupling.solution.unit[np.maximum(labels, 0)]
        if not units.all():
            why = coupling.system.reasons[coupling.solution.frozen_by[np.maximum(labels, 0)].max()]
            raise InvalidRecipeError(
                f"--granularity vocab: the rows that {coupling.graph.nodes[index].title} looks up "
                f"must stay: {why.words}"
            )
        kept = np.isin(np.arange(labels.size), vocabulary.kept)
        stay, gone = np.union1d(stay, units[kept]), np.union1d(gone, units[~kept])
    return stay.astype(np.int32), gone.astype(np.int32)


def remap(mask: Mask, unknown: int) -> NDArray[np.int64]:
    """new[old] for every id: its position among those that stay, or that of `unknown`."""
    place = np.cumsum(mask) - 1
    return np.where(mask, place, place[unknown]).astype(np.int64)


def redirect(mask: Mask, unknown: int) -> NDArray[np.int64]:
    """old[old] for every id: itself where it stays, or `unknown`."""
    return np.where(mask, np.arange(mask.size), unknown).astype(np.int64)
