"""Models on the wire, measured and written without serializing the weights as a whole."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

import onnxprune.io
from models import zoo
from onnxprune import wire
from onnxprune.errors import InvalidModelError
from onnxprune.wire import model_bytes, read, write

NAMES = ("misc-glu-dyn", "misc-bilstm-dyn", "hf-albert-dyn", "tv-squeezenet1_0-ts")


def _model(*tensors: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Identity", ["x"], ["y"])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    return helper.make_model(helper.make_graph([node], "g", values[:1], values[1:], list(tensors)))


def _large(dtype: int = TensorProto.FLOAT, **fields: object) -> TensorProto:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    tensor = numpy_helper.from_array(np.zeros((70, 101), kind), "weight")
    for name, value in fields.items():
        setattr(tensor, name, value)
    return tensor


def _annotated() -> TensorProto:
    tensor = _large()
    tensor.metadata_props.add(key="source", value="layer.weight")
    return tensor


def _typed() -> TensorProto:
    return helper.make_tensor("weight", TensorProto.FLOAT, [80, 80], np.arange(6400.0).tolist())


@pytest.mark.parametrize("name", NAMES)
def test_exports(name: str) -> None:
    model = zoo.load(name)
    assert model_bytes(model) == model.ByteSize()


@pytest.mark.parametrize(
    "tensor",
    [
        _large(),
        _large(TensorProto.FLOAT16, doc_string="made by hand"),
        _large(TensorProto.INT4),
        _large(doc_string="", data_location=TensorProto.DEFAULT),
        _annotated(),
        _typed(),
        _large(name="größer"),
    ],
    ids=lambda tensor: TensorProto.DataType.Name(tensor.data_type),
)
def test_every_field_of_a_large_tensor_counts(tensor: TensorProto) -> None:
    model = _model(tensor)
    assert model_bytes(model) == model.ByteSize()


def _written(model: onnx.ModelProto) -> bytes:
    stream = io.BytesIO()
    write(model, stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_exports_are_written_as_protobuf_does(name: str) -> None:
    model = zoo.load(name)
    model.metadata_props.add(key="by", value="hand")
    model.graph.doc_string = "größer"
    model.doc_string, model.domain, model.model_version = "d", "e", -1
    assert _written(model) == model.SerializeToString()


@pytest.mark.parametrize("tensor", [_large(), _annotated(), _typed(), _large(doc_string="x")])
def test_tensors_are_written_as_protobuf_does(tensor: TensorProto) -> None:
    model = _model(tensor, _large(TensorProto.FLOAT16, name="half"))
    assert _written(model) == model.SerializeToString()


@pytest.mark.parametrize("place", ["model", "graph", "node", "tensor"])
def test_fields_of_later_versions_are_written(place: str) -> None:
    model = _model(_large())
    parts = {"model": model, "graph": model.graph, "node": model.graph.node[0]}
    part = parts.get(place, model.graph.initializer[0])
    later = b"\xda\x3f\x03new"  # field 1019
    part.MergeFromString(later)
    written = _written(model)
    assert later in written
    assert written == model.SerializeToString()


def test_empty_messages_are_written() -> None:
    assert _written(onnx.ModelProto()) == b""
    model = onnx.ModelProto(ir_version=8)
    model.graph.SetInParent()
    assert _written(model) == model.SerializeToString()


def test_a_graph_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_LIMIT", 1000)
    with pytest.raises(ValueError, match="the graph takes 28,3"):
        _written(_model(_large()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [0, 100, 1 << 20])
def test_exports_are_read_as_protobuf_does(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "CHUNK", chunk)
    data = zoo.load(name).SerializeToString()
    assert read(io.BytesIO(data), len(data)).SerializeToString() == data


def test_fields_of_every_kind_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CHUNK", 8)
    model = _model(_large(), _typed())
    model.metadata_props.add(key="by", value="a hand that wrote more than eight bytes")
    model.model_version = -1
    model.graph.node[0].attribute.append(helper.make_attribute("a", [0.5] * 9))
    later = b"\xd9\x3f12345678\xdd\x3f1234\xda\x3f\x0babcdefghijk\xd8\x3f\x80\x01"
    for part in (model, model.graph, model.graph.node[0], model.graph.initializer[0]):
        part.MergeFromString(later)
    data = model.SerializeToString()
    found = read(io.BytesIO(data), len(data))
    assert found == model
    assert found.SerializeToString() == data


def test_what_is_no_message_is_not_read() -> None:
    data = _model(_large()).SerializeToString()
    broken = (data[:-200], b"\x0b\x0b", b"\xff" * 12, b"\x08", data + b"\x3a")
    for wrong in broken:
        with pytest.raises(DecodeError):
            read(io.BytesIO(wrong), len(wrong))


def test_large_files_are_read_field_by_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "model.onnx", zoo.load(NAMES[0])
    onnxprune.io.save(model, path)
    monkeypatch.setattr(onnxprune.io, "_STREAMED_BYTES", 0)
    parse = onnxprune.io._parse
    monkeypatch.setattr(onnxprune.io, "_parse", lambda *_: pytest.fail("read as a whole"))
    assert onnxprune.io.load(path) == model
    monkeypatch.setattr(onnxprune.io, "_parse", parse)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InvalidModelError, match=r"is truncated \([\d,]+ bytes are missing\)"):
        onnxprune.io.load(path)
