"""A float32 copy of a model in another precision, for checks where no kernel computes in its types.

ONNX Runtime's CPU provider casts float16 to float32 where it has to, but lacks most kernels of
bfloat16 and several of float16 and float64. Pruning does not depend on the element type: what holds
of the copies of the original and the pruned model holds of the structure of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxprune import io
from onnxprune.errors import InvalidDataError, InvalidModelError
from onnxprune.protos import bodies

if TYPE_CHECKING:
    from onnxprune.data import Batch, Dataset

HALVES = frozenset((TensorProto.FLOAT16, TensorProto.BFLOAT16))
_OTHERS = HALVES | {TensorProto.DOUBLE}
#: Attributes that hold an element type.
_TYPE_ATTRIBUTES = frozenset(("to", "dtype", "output_dtype", "softmax_precision"))


def uses_halves(model: onnx.ModelProto) -> bool:
    """Whether anything that is declared is float16 or bfloat16."""
    return _uses(model, HALVES)


def _uses(model: onnx.ModelProto, kinds: frozenset[int]) -> bool:
    if any(t.data_type in kinds for t in io.tensors(model)):
        return True
    values = (*model.graph.input, *model.graph.output)
    if any(v.type.tensor_type.elem_type in kinds for v in values):
        return True
    return any(
        n.op_type == "Cast" and any(a.name == "to" and a.i in kinds for a in n.attribute)
        for n in _nodes(model.graph)
    )


def needs_float32(model: onnx.ModelProto, threads: int | None = None) -> bool:
    """Whether ONNX Runtime runs only a float32 copy of `model` on the CPU."""
    return (
        _uses(model, _OTHERS) and not _runs(model, threads) and _runs(float32_copy(model), threads)
    )


def _runs(model: onnx.ModelProto, threads: int | None) -> bool:
    from onnxprune import runtime

    try:
        runtime.working_feeds(model, threads=threads)
    except (InvalidModelError, InvalidDataError):
        return False
    return True


def float32_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` with float32 wherever it has float16, bfloat16 or float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in io.tensors(copy):
        if tensor.data_type in _OTHERS:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for graph in _graphs(copy.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _make_float32(value.type)
    for node in _nodes(copy.graph):
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _OTHERS:
                attribute.i = TensorProto.FLOAT
    return copy


def float32_feeds(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same feeds for the float32 copy."""
    kinds = {helper.tensor_dtype_to_np_dtype(kind) for kind in _OTHERS}
    return {n: a.astype(np.float32) if a.dtype in kinds else a for n, a in feeds.items()}


@dataclass(frozen=True)
class Float32Data:
    """A dataset whose feeds are those of the float32 copy."""

    data: Dataset

    def batches(self, size: int, *, rng: np.random.Generator | None = None) -> Iterator[Batch]:
        """See `onnxprune.data.Dataset.batches`."""
        for batch in self.data.batches(size, rng=rng):
            yield replace(batch, feeds=float32_feeds(batch.feeds))

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.data)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from _graphs(body)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for inner in _graphs(graph):
        yield from inner.node


def _make_float32(kind: onnx.TypeProto) -> None:
    which = kind.WhichOneof("value")
    if which in ("sequence_type", "optional_type"):
        _make_float32(getattr(kind, which).elem_type)
    elif kind.tensor_type.elem_type in _OTHERS:
        kind.tensor_type.elem_type = TensorProto.FLOAT
