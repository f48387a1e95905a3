"""How long a model is in protobuf's wire format, without building it: weights are not copied."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx
from onnx import TensorProto

from onnxprune import io
from onnxprune.graph import Graph
from onnxprune.protos import copy_fields

#: Below this many elements a tensor is small enough to be measured by serializing it.
_LARGE = 4096
_OPTIONAL = ("doc_string", "data_location")
_KNOWN = ("dims", "data_type", "name", "metadata_props", "raw_data", *_OPTIONAL)
_OTHERS = tuple(f for f in TensorProto.DESCRIPTOR.fields if f.name not in _KNOWN)


def model_bytes(model: onnx.ModelProto) -> int:
    """The length of `model.SerializeToString()`, also where that would exceed protobuf's 2 GiB."""
    return _total(model, model.graph.node, model.graph.initializer)


def graph_bytes(graph: Graph) -> int:
    """The length of the model that `graph` is an index of."""
    return _total(graph.model, [node.proto for node in graph.top], graph.initializers)


def _total(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], tensors: Iterable[TensorProto]
) -> int:
    head, rest = onnx.ModelProto(), onnx.GraphProto()
    copy_fields(model, head, {"graph"})
    copy_fields(model.graph, rest, {"node", "initializer"})
    inner = int(rest.ByteSize())
    inner += sum(_field(node.ByteSize()) for node in nodes)
    inner += sum(_field(_tensor_bytes(tensor)) for tensor in tensors)
    return int(head.ByteSize()) + _field(inner)


def _tensor_bytes(tensor: TensorProto) -> int:
    if math.prod(tensor.dims) < _LARGE or not tensor.HasField("raw_data") or _is_unusual(tensor):
        return int(tensor.ByteSize())
    light = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    light.metadata_props.extend(tensor.metadata_props)
    for name in _OPTIONAL:
        if tensor.HasField(name):
            setattr(light, name, getattr(tensor, name))
    return int(light.ByteSize()) + _field(io.tensor_bytes(tensor))


def _is_unusual(tensor: TensorProto) -> bool:
    return any(
        len(getattr(tensor, field.name)) if field.is_repeated else tensor.HasField(field.name)
        for field in _OTHERS
    )


def _field(length: int) -> int:
    """A length-delimited field with a number below 16: its tag, its length, its content."""
    return 1 + max(1, (length.bit_length() + 6) // 7) + length
