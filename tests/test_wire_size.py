"""The length of a model on the wire, computed without serializing the weights."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import zoo
from onnxprune.wire import model_bytes

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
