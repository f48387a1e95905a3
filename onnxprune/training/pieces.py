"""Cut batches into pieces whose gradients are added up, so that a step needs less memory.

Where BatchNormalization acts as in inference and no term of the loss compares samples with each
other, the gradient of a batch is the sum of those of its pieces: smaller ones take less memory for
as many products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.data import Batch
from onnxprune.training.draft import Draft
from onnxprune.training.loss import Objective

BUDGET_BYTES = 16 << 20  # of the tensors that a piece leaves for the way back
SMALLEST = 32  # samples; fewer would waste time on small products
ITEM_BYTES = 4


def piece_rows(draft: Draft) -> int:
    """The samples of a piece, as far as the sizes of the graph's tensors are known."""
    values = 0
    for node in draft.nodes:
        for name in node.output:
            shape = draft.shapes.get(name) if name in draft.trained else None
            rest = shape[1:] if shape and shape[0] is None else (0,)
            values += int(np.prod([size or 0 for size in rest], dtype=np.int64))
    return max(SMALLEST, BUDGET_BYTES // max(1, values * ITEM_BYTES))


def separable(objective: Objective) -> bool:
    """Whether the loss is a sum over samples."""
    return all(term.kind != "likeness" for term in objective.terms)


def cut(batch: Batch, rows: int, objective: Objective) -> list[tuple[Batch, float]]:
    """The batch in pieces of at most `rows` samples, each with its share of the samples."""
    arrays = [*batch.feeds.values(), *([] if batch.labels is None else [batch.labels])]
    counts = {array.shape[0] if array.ndim else 0 for array in arrays}
    count = counts.pop()
    if counts or count <= rows or not _all_count(batch.labels, objective):
        return [(batch, 1.0)]
    number = -(-count // rows)
    size = -(-count // number)
    pieces = []
    for begin in range(0, count, size):
        part = slice(begin, min(begin + size, count))
        feeds = {name: array[part] for name, array in batch.feeds.items()}
        labels = None if batch.labels is None else batch.labels[part]
        pieces.append((Batch(feeds, labels), (part.stop - begin) / count))
    return pieces


def _all_count(labels: NDArray[Any] | None, objective: Objective) -> bool:
    """Whether no label is one that the loss leaves out: a piece's mean would be over fewer."""
    classes = next((term.classes for term in objective.terms if term.classes), 0)
    if labels is None or not classes or labels.dtype.kind not in "iu":
        return True
    return bool(labels.min() >= 0 and labels.max() < classes)
