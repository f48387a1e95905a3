"""Load and save ONNX models: faithfully, atomically, at any size.

The ModelProto is the source of truth: whatever the file holds, known to onnxprune or not, is
carried from `load` to `save`. A save writes temporary files and renames them over the target, so
that a failure or Ctrl-C leaves what was there before. Above 1.9 GB (protobuf ends at 2 GiB) the
weights stream into `PATH.data` beside the model; only a skeleton is built for that, never a second
copy of the weights.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import AttributeProto, TensorProto

from onnxprune.errors import InvalidModelError, OnnxPruneError
from onnxprune.files import flush, replacing

OPSETS: Final = range(7, 29)
MAX_INLINE_BYTES: int = 1_900_000_000
_PROTOBUF_LIMIT: Final = 2**31
_STREAMED_BYTES: int = 1 << 24
_MIN_EXTERNAL_BYTES: Final = 1024  # shape inference needs the small constants in the file itself
_PAGE: Final = 4096  # the alignment that lets ONNX Runtime memory-map a tensor

_TENSOR_HOLDERS: Final = frozenset(
    message.DESCRIPTOR.name
    for message in (
        onnx.ModelProto,
        onnx.GraphProto,
        onnx.NodeProto,
        onnx.AttributeProto,
        onnx.TensorProto,
        onnx.SparseTensorProto,
        onnx.FunctionProto,
        onnx.TrainingInfoProto,
    )
)
_TENSOR_ATTRIBUTES: Final = frozenset(
    getattr(AttributeProto, kind)
    for kind in ("TENSOR", "TENSORS", "GRAPH", "GRAPHS", "SPARSE_TENSOR", "SPARSE_TENSORS")
)
_ADVICE: Final = "give a file that was exported to ONNX"
_SIGNATURES: Final = (
    (b"PK\x03\x04", "a ZIP archive (a PyTorch checkpoint?)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89HDF", "an HDF5 file (a Keras model?)"),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint?)"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
)


def load(source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """The model at a path, all its external data in memory; a ModelProto is checked and given back.

    Raises:
        InvalidModelError: The file is missing, is not ONNX, is truncated, has no nodes, or its
            opset is outside 7 to 24; or its external data is missing, too short, or outside the
            model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        _check_loaded(source, "the model")
        _check_model(source, "the model")
        return source
    path = Path(source)
    model = _streamed(path) or _parse(path, _read(path))
    _check_model(model, str(path))
    _load_external(model, path)
    return model


def _streamed(path: Path) -> onnx.ModelProto | None:
    """A large model, read without holding its bytes beside it; None leaves it to `_parse`."""
    from onnxprune.wire import read

    try:
        size = path.stat().st_size if path.is_file() else 0
        if not _STREAMED_BYTES <= size < _PROTOBUF_LIMIT:
            return None
        with path.open("rb") as stream:
            model = read(stream, size)
        return model if model.ListFields() else None
    except (OSError, DecodeError, MemoryError):
        return None


def _read(path: Path) -> bytes:
    """The bytes of the file, or one clear line."""
    try:
        if path.is_dir():
            raise InvalidModelError(f"{path} is a folder: give the path of the .onnx file in it")
        data = path.read_bytes()
    except FileNotFoundError:
        raise InvalidModelError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise InvalidModelError(f"cannot read {path}: {error.strerror or error}") from error
    if not data:
        raise InvalidModelError(f"{path} is empty: export or download the model again")
    return data


def _parse(path: Path, data: bytes) -> onnx.ModelProto:
    """The ModelProto in `data`; says what the file is instead where it is none."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise InvalidModelError(f"{path} {_diagnose(data)}") from None
    if not model.ListFields():
        raise InvalidModelError(f"{path} is not an ONNX model: {_ADVICE}")
    return model


def _diagnose(data: bytes) -> str:
    """Why these bytes are not a model, in words that follow the file's name."""
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return f"is {kind}, not an ONNX model: {_ADVICE}"
    if data[4:8] == b"ORTM":
        return "is in ONNX Runtime's own .ort format: give the .onnx file it was made from"
    if len(data) >= _PROTOBUF_LIMIT:
        return "is above 2 GiB, protobuf's limit: save it again with external data"
    missing = _missing_bytes(data)
    if missing:
        return f"is truncated ({missing:,} bytes are missing): export, copy or download it again"
    with contextlib.suppress(UnicodeDecodeError):
        data[:4096].decode("ascii")
        return f"is a text file, not an ONNX model: {_ADVICE}"
    return f"is not an ONNX model, or is damaged: {_ADVICE}"


def _missing_bytes(data: bytes) -> int:
    """How far the last top-level field of a ModelProto reaches beyond the data, or 0."""
    known = {field.number for field in onnx.ModelProto.DESCRIPTOR.fields}
    at = 0
    with contextlib.suppress(IndexError):
        while at < len(data):
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            if number not in known or wire not in (0, 2):
                return 0
            value, at = _varint(data, at)
            at += value if wire == 2 else 0
        return at - len(data)
    return 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The protobuf varint at this offset and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _check_model(model: onnx.ModelProto, where: str) -> None:
    """Refuse what no later stage can work with: no graph, no nodes, no or a foreign opset."""
    if not model.HasField("graph"):
        raise InvalidModelError(f"{where} has no graph: it is not an ONNX model, or is damaged")
    if not model.graph.node:
        raise InvalidModelError(f"{where} has a graph without nodes: there is nothing to prune")
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise InvalidModelError(
            f"{where} names no opset of the standard ONNX operators (opset_import of domain ''): "
            "the file is cut short or malformed; export it again"
        )
    for version in versions:
        if version not in OPSETS:
            raise InvalidModelError(
                f"{where} uses opset {version}; onnxprune reads {OPSETS[0]} to {OPSETS[-1]}: "
                "export it with another opset or use onnx.version_converter.convert_version"
            )


def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model, of its bodies, functions and training graphs."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
        for attribute in function.attribute_proto:
            yield from _attribute_tensors(attribute)
    for training in model.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Sequence[onnx.NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type in _TENSOR_ATTRIBUTES:
                yield from _attribute_tensors(attribute)


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("sparse_tensor"):
        yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
    for sparse in attribute.sparse_tensors:
        yield from (sparse.values, sparse.indices)
    if attribute.HasField("g"):
        yield from _graph_tensors(attribute.g)
    for graph in attribute.graphs:
        yield from _graph_tensors(graph)


def tensor_bytes(tensor: TensorProto) -> int:
    """The size of the values, packed as in `raw_data`; for strings the sum of their lengths."""
    if tensor.data_type == TensorProto.STRING:
        return sum(len(value) for value in tensor.string_data)
    count: int = math.prod(tensor.dims)
    return (count * bits(tensor.data_type) + 7) // 8


def bits(data_type: int) -> int:
    """The width of one value, 0 for a type that is not set."""
    if data_type == TensorProto.UNDEFINED:
        return 0
    name = TensorProto.DataType.Name(data_type)
    if name in ("INT4", "UINT4", "FLOAT4E2M1"):
        return 4
    if name in ("INT2", "UINT2"):
        return 2
    bits: int = onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8
    return bits


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _check_loaded(model: onnx.ModelProto, where: str) -> None:
    """Refuse a proto whose weights lie in files: nobody knows any more in which folder."""
    for tensor in tensors(model):
        if _is_external(tensor):
            raise InvalidModelError(
                f"{where} keeps tensor '{tensor.name}' in external data that is not loaded: "
                "give the model's path instead, or load it with external data"
            )


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    """Replace references to external data by the data, each file opened once."""
    waiting: dict[str, list[TensorProto]] = {}
    for tensor in tensors(model):
        if _is_external(tensor):
            waiting.setdefault(_entry(tensor, "location"), []).append(tensor)
    for location, of_file in waiting.items():
        file = _external_path(path, location, of_file[0].name)
        try:
            with file.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                for tensor in of_file:
                    _fill(tensor, stream, size, file)
        except FileNotFoundError:
            raise InvalidModelError(
                f"{file} is missing: {path} keeps {len(of_file)} tensors there, the first is "
                f"'{of_file[0].name}'; put the file beside the model"
            ) from None
        except OSError as error:
            raise InvalidModelError(
                f"cannot read {file}, the weights of {path}: {error.strerror or error}"
            ) from error


def _entry(tensor: TensorProto, key: str) -> str:
    """A value of the tensor's external_data, empty if absent."""
    return next((entry.value for entry in tensor.external_data if entry.key == key), "")


def _external_path(path: Path, location: str, name: str) -> Path:
    """Where external data lies: in the folder of the model or of what its link points to."""
    file = path.parent / location
    folders = (path.parent.resolve(), path.resolve().parent)
    lexical = Path(os.path.normpath(location))
    escapes = not location or "\0" in location or Path(location).is_absolute()
    escapes = escapes or ".." in lexical.parts or "\\" in location
    if escapes or not any(file.resolve().is_relative_to(folder) for folder in folders):
        raise InvalidModelError(
            f"{path}: tensor '{name}' has its data at {location!r}, outside the model's folder; "
            "this is refused: keep the data beside the model under a plain file name"
        )
    return file


def _fill(tensor: TensorProto, stream: BinaryIO, size: int, file: Path) -> None:
    """Read one tensor's values out of the open data file."""
    expected = tensor_bytes(tensor)
    try:
        offset = int(_entry(tensor, "offset") or 0)
        length = int(_entry(tensor, "length") or expected)
    except ValueError:
        raise InvalidModelError(
            f"tensor '{tensor.name}' has a malformed offset or length in {file}: "
            "export the model again"
        ) from None
    if length != expected or offset < 0:
        raise InvalidModelError(
            f"tensor '{tensor.name}' of shape {list(tensor.dims)} needs {expected:,} bytes, its "
            f"entry in {file} says {length:,} at offset {offset:,}: export the model again"
        )
    if offset + length > size:
        raise InvalidModelError(
            f"{file} is truncated: tensor '{tensor.name}' needs bytes {offset:,} to "
            f"{offset + length:,}, the file has {size:,}; copy or download it again"
        )
    stream.seek(offset)
    tensor.raw_data = stream.read(length)
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")


def save(
    model: onnx.ModelProto, path: str | os.PathLike[str], *, external_data: bool | None = None
) -> None:
    """Write the model, all or nothing; above 1.9 GB, or on demand, with its weights in `PATH.data`.

    Args:
        model: Is not changed.
        path: May be the file the model came from.
        external_data: True and False decide where the weights go; None goes by their size.

    Raises:
        OnnxPruneError: The target cannot be written or the disk is full; nothing has changed.
        InvalidModelError: The model refers to external data that is not loaded.
    """
    target = Path(path)
    _check_loaded(model, "the model to save")
    if external_data is None:
        external_data = sum(map(tensor_bytes, tensors(model))) > MAX_INLINE_BYTES
    if external_data:
        _save_external(model, target)
        return
    from onnxprune.wire import write

    try:
        with replacing(target) as (temporary,), temporary.open("r+b") as stream:
            write(model, stream)
            flush(stream)
    except (EncodeError, ValueError) as error:
        raise OnnxPruneError(
            f"cannot write {target} as one file, protobuf ends at 2 GiB: save it with external data"
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) all or nothing, as `save` does.

    Raises:
        OnnxPruneError: The target cannot be written or the disk is full; nothing has changed.
    """
    with replacing(Path(path)) as (temporary,), temporary.open("r+b") as stream:
        stream.write(text.encode())
        flush(stream)


def _save_external(model: onnx.ModelProto, target: Path) -> None:
    """Stream the weights to a fresh `PATH.data` and write the rest of the model beside it."""
    data = target.with_name(f"{target.name}.data")
    with replacing(data, target) as (data_temporary, model_temporary):
        skeleton = onnx.ModelProto()
        with data_temporary.open("r+b") as stream:
            _copy(model, skeleton, lambda tensor: _spill(tensor, stream, data.name))
            flush(stream)
        with model_temporary.open("r+b") as stream:
            stream.write(skeleton.SerializeToString())
            flush(stream)


def _copy(source: Message, target: Message, spill: Callable[[TensorProto], TensorProto]) -> None:
    """Copy a message field by field, every tensor in it through `spill`."""
    for field, value in source.ListFields():
        holder = field.message_type is not None and field.message_type.name in _TENSOR_HOLDERS
        if isinstance(value, Message):
            _copy_message(value, getattr(target, field.name), holder, spill)
        elif isinstance(value, (bytes, str, int, float)):
            setattr(target, field.name, value)
        elif not holder:
            getattr(target, field.name).extend(value)
        else:
            into = getattr(target, field.name)
            for item in value:
                _copy_message(item, into.add(), True, spill)


def _copy_message(
    source: Any, target: Any, holder: bool, spill: Callable[[TensorProto], TensorProto]
) -> None:
    """Copy one message: a tensor through `spill`, one that holds no tensors as a whole."""
    if isinstance(source, TensorProto):
        target.CopyFrom(spill(source))
    elif isinstance(source, onnx.NodeProto) and not any(
        attribute.type in _TENSOR_ATTRIBUTES for attribute in source.attribute
    ):
        target.CopyFrom(source)
    elif holder:
        target.SetInParent()
        _copy(source, target, spill)
    else:
        target.CopyFrom(source)


def _spill(tensor: TensorProto, stream: BinaryIO, location: str) -> TensorProto:
    """The tensor with its values moved to the data file; a small one as it is."""
    if tensor.data_type == TensorProto.STRING or tensor_bytes(tensor) < _MIN_EXTERNAL_BYTES:
        return tensor
    data = _raw_bytes(tensor)
    offset = stream.tell()
    padding = -offset % (_PAGE if len(data) >= _PAGE else 64)
    stream.write(b"\0" * padding)
    stream.write(data)
    moved = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    if tensor.HasField("doc_string"):
        moved.doc_string = tensor.doc_string
    moved.metadata_props.extend(tensor.metadata_props)
    moved.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": offset + padding, "length": len(data)}
    for key, value in entries.items():
        moved.external_data.add(key=key, value=str(value))
    return moved


def _raw_bytes(tensor: TensorProto) -> bytes:
    """The values as `raw_data` holds them, also where they are in a typed field."""
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data
