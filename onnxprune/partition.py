"""Which labels are tied together, kept up to date while ties are added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int32]


class Partition:
    """`part[label]` is the number of the labels tied to it; parts are numbered by first label.

    What is tied once is contracted: a later update looks at whole parts and at new ties only.
    """

    def __init__(self, size: int) -> None:
        self.part: Labels = np.arange(size, dtype=np.int32)
        self.count = size
        self._known = 0

    def update(self, ties: Sequence[tuple[Labels, Labels]]) -> None:
        """Take in the ties that were added at the end of `ties` since the last update."""
        fresh = ties[self._known :]
        self._known = len(ties)
        if not fresh:
            return
        a, b = (self.part[np.concatenate([tie[side] for tie in fresh])] for side in (0, 1))
        news = a != b
        news[1:] &= (a[1:] != a[:-1]) | (b[1:] != b[:-1])  # flattened maps repeat their ties
        if news.any():
            joined = _components(self.count, a[news], b[news])
            self.part, self.count = joined[self.part], int(joined.max()) + 1


def _components(size: int, a: Labels, b: Labels) -> Labels:
    """The connected components of a graph with edges a[i]-b[i], numbered by first node."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(a.size, np.int8), (a, b)), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int32)
