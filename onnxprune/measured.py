"""Shapes that inference cannot tell, read off two runs of the model.

An index that is computed from data (the tokens of an expert, the boxes that are left) hides the
shape of everything behind it. Running the model at the two assumed sizes, on different random
inputs, shows those shapes; lengths that follow data or size differ between the runs.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, helper

from onnxprune import io
from onnxprune.errors import OnnxPruneError
from onnxprune.graph import Graph
from onnxprune.protos import reads

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Dims = tuple[int, ...]
#: The numbers that were put in for the free dimensions: (input, axis) -> length.
Numbers = Mapping[tuple[str, int], int]
#: Shape and element type by tensor.
Known = Mapping[str, tuple[Dims, int]]
Pair = tuple[Known, Known]
#: Models whose activations take more are not run for their shapes alone.
LIMIT_BYTES = 1 << 31
#: How many inputs of each size are tried at most, and for how long.
RUNS = 8
SECONDS = 1.0
_PREFIX = "onnxprune measured shape "
#: ONNX Runtime's words for element types.
_TYPES = {
    "float": TensorProto.FLOAT,
    "double": TensorProto.DOUBLE,
    **{name.lower(): value for name, value in TensorProto.DataType.items()[2:]},
}


def measure(graph: Graph, names: Sequence[str], sizes: tuple[Numbers, Numbers]) -> Pair | None:
    """The shape and element type of the tensors `names` at the two `sizes`; sequences are left out.

    Several inputs are tried, and those two chosen between which the most lengths differ, so that
    one that follows data does not look fixed. None where the model does not run on random inputs
    of these sizes.
    """
    from onnxprune import runtime

    model = graph.whole()
    if runtime.dies_on_empty(model):
        return None
    try:
        kinds = _kinds(model, names)
        session = runtime.session(_telling_shapes(model, kinds), optimize=False)
        first, second = (list(_runs(session, model, kinds, numbers)) for numbers in sizes)
    except OnnxPruneError:
        return None
    base = min(first, key=_empty)
    return base, max(second, key=lambda other: (_varying(base, other), -_empty(other)))


def peak_bytes(graph: Graph, dims: Mapping[str, Dims], types: Mapping[str, int]) -> int:
    """The least memory that activations of known shape take in a run, each until its last use."""
    last = {name: node.index for node in graph.top for name in reads(node.proto)}
    ends: dict[int, list[int]] = {}
    held = peak = 0
    for node in graph.top:
        for name in node.outputs:
            if name in dims and name not in graph.constants:
                size = math.prod(dims[name]) * io.bits(types.get(name, TensorProto.FLOAT)) // 8
                ends.setdefault(last.get(name, node.index), []).append(size)
                held += size
        peak = max(peak, held)
        held -= sum(ends.pop(node.index, ()))
    return peak


def _with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def _kinds(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, int]:
    """The element types of those that are tensors, as ONNX Runtime infers them."""
    from onnxprune import runtime

    found = runtime.session(_with_outputs(model, names), optimize=False).get_outputs()
    words = ((o.name, re.fullmatch(r"tensor\((\w+)\)", o.type)) for o in found)
    return {name: _TYPES[match[1]] for name, match in words if match and match[1] in _TYPES}


def _telling_shapes(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The model, but only shapes leave it: it holds no more activations than in any run."""
    told = {name: f"{_PREFIX}{i}" for i, name in enumerate(names)}
    probed = _with_outputs(model, told.values())
    probed.graph.node.extend(helper.make_node("Shape", [n], [t]) for n, t in told.items())
    return probed


def _runs(
    session: InferenceSession, model: onnx.ModelProto, names: Mapping[str, int], numbers: Numbers
) -> Iterator[Known]:
    from onnxprune import runtime

    lengths = {f"{name}:{axis}": length for (name, axis), length in numbers.items()}
    start = time.monotonic()
    for seed in range(RUNS):
        feeds = runtime.random_feeds(model, seed=seed, sizes=lengths)
        values = runtime.run(session, feeds)
        yield {
            name: (tuple(int(n) for n in values[f"{_PREFIX}{i}"]), kind)
            for i, (name, kind) in enumerate(names.items())
        }
        if time.monotonic() - start > SECONDS:
            return


def _empty(known: Known) -> int:
    return sum(0 in dims for dims, _ in known.values())


def _varying(one: Known, other: Known) -> int:
    pairs = ((one[name][0], other[name][0]) for name in one if name in other)
    return sum(a != b for x, y in pairs for a, b in zip(x, y, strict=False))
