"""Models in protobuf's wire format, measured and written piece by piece: weights are not copied.

Fields lie in the order of their numbers, so a message is the concatenation of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import onnx
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import TensorProto

from onnxprune import io
from onnxprune.graph import Graph
from onnxprune.protos import copy_fields

#: Below this many elements a tensor is small enough to be measured by serializing it.
_LARGE = 4096
#: Numbers of the fields in which weights lie, and one behind all fields.
_GRAPH, _NODE, _INITIALIZER, _RAW = (
    message.DESCRIPTOR.fields_by_name[name].number
    for message, name in (
        (onnx.ModelProto, "graph"),
        (onnx.GraphProto, "node"),
        (onnx.GraphProto, "initializer"),
        (TensorProto, "raw_data"),
    )
)
_END = 1 << 29
#: The wire type of strings and messages.
_DELIMITED = 2
#: Fields of more bytes are read on their own.
CHUNK = 1 << 20
#: protobuf's limit for a message.
_LIMIT = (1 << 31) - 1
_OPTIONAL = ("doc_string", "data_location")
_KNOWN = ("dims", "data_type", "name", "metadata_props", "raw_data", *_OPTIONAL)
_OTHERS = tuple(f for f in TensorProto.DESCRIPTOR.fields if f.name not in _KNOWN)


def model_bytes(model: onnx.ModelProto) -> int:
    """The length of `model.SerializeToString()`, also where that would exceed protobuf's 2 GiB."""
    return _total(model, model.graph.node, model.graph.initializer)


def graph_bytes(graph: Graph) -> int:
    """The length of the model that `graph` is an index of."""
    return _total(graph.model, [node.proto for node in graph.top], graph.initializers)


def write(model: onnx.ModelProto, stream: BinaryIO) -> None:
    """Write what `model.SerializeToString()` gives, one tensor or node at a time.

    Raises:
        ValueError, EncodeError: a message ends beyond protobuf's 2 GiB.
    """
    graph = model.graph
    if not model.HasField("graph") or len(UnknownFieldSet(model)) + len(UnknownFieldSet(graph)):
        stream.write(model.SerializeToString())
        return
    inner = _graph_length(graph, graph.node, graph.initializer)
    if inner > _LIMIT:
        raise ValueError(f"the graph takes {inner:,} bytes")
    stream.write(_part(model, range(_GRAPH)))
    stream.write(_tag(_GRAPH, inner))
    for node in graph.node:
        data = node.SerializeToString()
        stream.write(_tag(_NODE, len(data)) + data)
    stream.write(_part(graph, range(_NODE + 1, _INITIALIZER)))
    for tensor in graph.initializer:
        stream.write(_tag(_INITIALIZER, _tensor_bytes(tensor)))
        stream.writelines(_tensor_parts(tensor))
    stream.write(_part(graph, range(_INITIALIZER + 1, _END)))
    stream.write(_part(model, range(_GRAPH + 1, _END)))


def read(stream: BinaryIO, length: int) -> onnx.ModelProto:
    """What `ParseFromString` makes of the next `length` bytes; large fields are read one by one.

    Raises:
        DecodeError: the bytes are no message, or end too early.
    """
    model = onnx.ModelProto()
    _merge(model, stream, length)
    return model


def _merge(message: Any, stream: BinaryIO, length: int) -> None:
    """Merge the fields in the next `length` bytes into `message`."""
    end = stream.tell() + length
    small = bytearray()
    fields = message.DESCRIPTOR.fields_by_number
    while stream.tell() < end:
        start = stream.tell()
        number, kind = divmod(_varint(stream), 8)
        size = _varint(stream) if kind == _DELIMITED else 0
        header = stream.tell() - start
        field = fields.get(number)
        if size > CHUNK and field is not None and field.message_type is not None:
            message.MergeFromString(bytes(small))
            small.clear()
            place = getattr(message, field.name)
            _merge_large(place.add() if field.is_repeated else place, stream, size)
            continue
        if kind == 0:
            _varint(stream)
            size = stream.tell() - start - header
        size = {0: size, 1: 8, _DELIMITED: size, 5: 4}.get(kind, length)
        stream.seek(start)
        small += _exactly(stream, header + size)
    message.MergeFromString(bytes(small))


def _merge_large(message: Any, stream: BinaryIO, size: int) -> None:
    if isinstance(message, TensorProto):
        message.MergeFromString(_exactly(stream, size))
    else:
        message.SetInParent()
        _merge(message, stream, size)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise DecodeError("the message is truncated")
    return data


def _varint(stream: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = _exactly(stream, 1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
        if shift > 63:
            raise DecodeError("a number is too long")


def _tensor_parts(tensor: TensorProto) -> Iterator[bytes]:
    """The bytes of a tensor; its values, where they are many, in a part of their own."""
    if _is_short(tensor):
        yield tensor.SerializeToString()
        return
    values = tensor.raw_data
    yield _part(tensor, range(_RAW))
    yield _tag(_RAW, len(values))
    yield values
    yield _part(tensor, range(_RAW + 1, _END))


def _part(message: Any, numbers: range) -> bytes:
    """The fields of these numbers."""
    names = {field.name for field in message.DESCRIPTOR.fields if field.number not in numbers}
    part = type(message)()
    copy_fields(message, part, names)
    data: bytes = part.SerializeToString()
    return data


def _tag(number: int, length: int) -> bytes:
    """What stands before the content of a length-delimited field."""
    digits = [number << 3 | 2]
    while length > 127:
        digits.append(length & 127 | 128)
        length >>= 7
    return bytes([*digits, length])


def _total(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], tensors: Iterable[TensorProto]
) -> int:
    head = onnx.ModelProto()
    copy_fields(model, head, {"graph"})
    return int(head.ByteSize()) + _field(_graph_length(model.graph, nodes, tensors))


def _graph_length(
    graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto], tensors: Iterable[TensorProto]
) -> int:
    rest = onnx.GraphProto()
    copy_fields(graph, rest, {"node", "initializer"})
    length = int(rest.ByteSize())
    length += sum(_field(node.ByteSize()) for node in nodes)
    return length + sum(_field(_tensor_bytes(tensor)) for tensor in tensors)


def _tensor_bytes(tensor: TensorProto) -> int:
    if _is_short(tensor):
        return int(tensor.ByteSize())
    light = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    light.metadata_props.extend(tensor.metadata_props)
    for name in _OPTIONAL:
        if tensor.HasField(name):
            setattr(light, name, getattr(tensor, name))
    return int(light.ByteSize()) + _field(io.tensor_bytes(tensor))


def _is_short(tensor: TensorProto) -> bool:
    """Whether the tensor is handled as a whole: small, or not of the usual kind."""
    usual = tensor.HasField("raw_data") and not _is_unusual(tensor)
    return math.prod(tensor.dims) < _LARGE or not usual or len(UnknownFieldSet(tensor)) > 0


def _is_unusual(tensor: TensorProto) -> bool:
    return any(
        len(getattr(tensor, field.name)) if field.is_repeated else tensor.HasField(field.name)
        for field in _OTHERS
    )


def _field(length: int) -> int:
    """A length-delimited field with a number below 16: its tag, its length, its content."""
    return 1 + max(1, (length.bit_length() + 6) // 7) + length
