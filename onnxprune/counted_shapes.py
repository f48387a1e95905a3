"""Operators of which one output length is a count that data decide; all other lengths are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from onnx import TensorProto

from onnxprune.graph import Node

#: A shape in which None is the count.
Counted = tuple["int | None", ...]
#: The shape and element type of each output; type 0 is that of the first input.
Outputs = list[tuple[Counted, int]]


def _nonzero(_: Node, x: Sequence[int]) -> Outputs:
    return [((max(1, len(x)), None), TensorProto.INT64)]


def _boxes(_: Node, __: Sequence[int]) -> Outputs:
    return [((None, 3), TensorProto.INT64)]


def _along(node: Node, x: Sequence[int]) -> Counted:
    """The count in place of the attribute's axis, or of all axes."""
    axis = node.attr("axis")
    if axis is None:
        return (None,)
    own = axis % max(1, len(x))
    return (*x[:own], None, *x[own + 1 :])


def _compress(node: Node, x: Sequence[int]) -> Outputs:
    return [(_along(node, x), 0)]


def _unique(node: Node, x: Sequence[int]) -> Outputs:
    axis = node.attr("axis")
    places: Counted = (math.prod(x) if axis is None else x[axis],)
    counts: Counted = (None,)
    return [(_along(node, x), 0), *((dims, TensorProto.INT64) for dims in (counts, places, counts))]


def most(node: Node, x: Sequence[int]) -> int:
    """No count is larger: as many as there are elements, or indices along the axis."""
    axis = node.attr("axis")
    return math.prod(x) if axis is None else x[axis]


#: (node, shape of the first input) -> its outputs.
COUNTED: dict[str, Callable[[Node, Sequence[int]], Outputs]] = {
    "NonZero": _nonzero,
    "NonMaxSuppression": _boxes,
    "Compress": _compress,
    "Unique": _unique,
}
