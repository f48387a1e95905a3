"""Labels that are tied: parts are numbered by their first label, however the ties come."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.partition import Partition


@pytest.mark.parametrize("at_once", [True, False])
def test_parts_are_numbered_by_their_first_label(at_once: bool) -> None:
    ties = [
        (np.array([1, 2, 2], np.int32), np.array([5, 6, 6], np.int32)),
        (np.array([6], np.int32), np.array([4], np.int32)),
        (np.array([3, 5], np.int32), np.array([3, 1], np.int32)),
    ]
    partition = Partition(8)
    for end in [len(ties)] if at_once else range(len(ties) + 1):
        partition.update(ties[:end])
    assert partition.part.tolist() == [0, 1, 2, 3, 2, 1, 2, 4]
    assert partition.count == 5
