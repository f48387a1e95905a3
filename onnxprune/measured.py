"""Shapes that inference cannot tell, read off two runs of the model.

An index that is computed from data (the tokens of an expert, the boxes that are left) hides the
shape of everything behind it. Running the model at the two assumed sizes, on different random
inputs, shows those shapes; lengths that follow data or size differ between the runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnxprune.errors import OnnxPruneError
from onnxprune.graph import Graph

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Dims = tuple[int, ...]
#: The numbers that were put in for the free dimensions: (input, axis) -> length.
Numbers = Mapping[tuple[str, int], int]
#: Shape and element type by tensor.
Known = dict[str, tuple[Dims, int]]
Pair = tuple[Known, Known]
#: How many inputs of each size are tried at most, and for how long.
RUNS = 8
SECONDS = 1.0


def measure(graph: Graph, names: Sequence[str], sizes: tuple[Numbers, Numbers]) -> Pair | None:
    """The shape and element type of the tensors `names` at the two `sizes`.

    Several inputs are tried, and those two chosen between which the most lengths differ, so that
    one that follows data does not look fixed. None where the model does not run on random inputs
    of these sizes.
    """
    from onnxprune import runtime

    model = graph.whole()
    if runtime.dies_on_empty(model):
        return None
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        session = runtime.session(probed, optimize=False)
        first, second = (list(_runs(session, model, numbers)) for numbers in sizes)
    except OnnxPruneError:
        return None
    base = min(first, key=_empty)
    return base, max(second, key=lambda other: (_varying(base, other), -_empty(other)))


def _runs(session: InferenceSession, model: onnx.ModelProto, numbers: Numbers) -> Iterator[Known]:
    from onnxprune import runtime

    lengths = {f"{name}:{axis}": length for (name, axis), length in numbers.items()}
    start = time.monotonic()
    for seed in range(RUNS):
        feeds = runtime.random_feeds(model, seed=seed, sizes=lengths)
        yield _shapes(runtime.run(session, feeds))
        if time.monotonic() - start > SECONDS:
            return


def _empty(known: Known) -> int:
    return sum(0 in dims for dims, _ in known.values())


def _varying(one: Known, other: Known) -> int:
    pairs = ((one[name][0], other[name][0]) for name in one if name in other)
    return sum(a != b for x, y in pairs for a, b in zip(x, y, strict=False))


def _shapes(values: Mapping[str, object]) -> Known:
    return {
        name: (value.shape, onnx.helper.np_dtype_to_tensor_dtype(value.dtype))
        for name, value in values.items()
        if isinstance(value, np.ndarray)
    }
