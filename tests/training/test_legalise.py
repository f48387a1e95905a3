"""What is trained, what is frozen and why, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import TrainingError
from onnxprune.training.legalise import legalise
from onnxprune.training.parameters import find_parameters, write_back
from tests.training.test_gradients import build

LINEAR = "float[N,5] x, float[5,4] w, float[4,3] w1"


def initializer(model: onnx.ModelProto, name: str, value: Any) -> None:
    array = np.asarray(value, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(array, name))


def test_upstream_of_what_has_no_gradient_is_frozen_with_the_reason() -> None:
    model = build(17, LINEAR, "h = MatMul(x, w) f = Floor(h) y = MatMul(f, w1)")
    model.graph.node[1].name = "rounding"
    graph = legalise(model)
    assert set(graph.parameters) == {"w1"}
    assert graph.frozen == {"w": "Floor (rounding) has no gradient"}
    assert set(graph.draft.parameters) == {"w1"}


def test_a_second_path_does_not_save_a_frozen_weight() -> None:
    body = "h = MatMul(x, w) f = Floor(h) s = Add(f, h) y = MatMul(s, w1)"
    assert set(legalise(build(17, LINEAR, body)).parameters) == {"w1"}


def test_integer_paths_freeze_nothing() -> None:
    body = (
        "h = MatMul(x, w) s = Shape(h) r = Reshape(h, s) m = ArgMax<axis=1>(r) "
        "g = MatMul(r, w1) c = Cast<to=1>(m) y = Add(g, c)"
    )
    assert set(legalise(build(17, LINEAR, body)).parameters) == {"w", "w1"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = MatMul(x, w) y = com.acme.Magic(h)", "domain com.acme has no gradient"),
        ("h = MatMul(x, w) p = Shape(h) q = Cast<to=1>(p) y = Pow(h, h)", "is not constant"),
        ("h = MatMul(x, w) y = Round(h)", r"Round \(y\) has no gradient"),
    ],
)
def test_nothing_left_to_train(body: str, reason: str) -> None:
    model = build(17, LINEAR, body)
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    with pytest.raises(TrainingError, match=rf"nothing to train: all .* frozen.*{reason}"):
        legalise(model)


def test_a_quantised_model_is_refused() -> None:
    body = (
        "s = Constant<value = float {0.1}>() z = Constant<value = uint8 {0}>() "
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w)"
    )
    with pytest.raises(TrainingError, match=r"quantised model .*QuantizeLinear.*float"):
        legalise(build(17, LINEAR, body))


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(TrainingError, match="no float weights"):
        legalise(build(17, "float[N,5] x", "y = Relu(x)"))


def test_the_model_is_not_touched() -> None:
    model = build(11, LINEAR, "h = MatMul(x, w) c = Clip(h) y = MatMul(c, w1)")
    before = model.SerializeToString()
    legalise(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 19, 20, 21, 22, 23, 24])
def test_every_opset_is_brought_to_one(opset: int) -> None:
    body = "h = MatMul(x, w) r = Relu(h) y = MatMul(r, w1)"
    assert set(legalise(build(opset, LINEAR, body)).parameters) == {"w", "w1"}


def test_vectors_are_trained_and_scalars_masks_and_tables_are_not() -> None:
    body = """h = MatMul(x, w) a = Add(h, vector) b = Mul(a, scalar) c = Add(b, mask)
        d = Mul(c, rotary) e = Add(d, position) y = MatMul(e, w1)"""
    model = build(17, "float[N,2,5] x, float[5,4] w, float[4,3] w1", body)
    initializer(model, "vector", [1, 2, 3, 4])
    initializer(model, "scalar", [2])
    initializer(model, "mask", np.where(np.eye(2, 4), 0, -1e4))
    initializer(model, "rotary", np.linspace(-1, 1, 8).reshape(2, 4))
    initializer(model, "position", np.linspace(-1, 1, 8).reshape(2, 4))
    found = find_parameters(model.graph)
    assert set(found.trainable) == {"w", "w1", "vector", "position"}
    assert {n for n, p in found.trainable.items() if p.decay} == {"w", "w1"}


def test_an_exporters_alias_is_not_tied_but_a_shared_weight_is_one() -> None:
    body = "h = MatMul(x, w) a = Add(h, b) g = MatMul(a, w) i = Add(g, b) y = Tanh(i)"
    model = build(17, "float[N,4] x, float[4,4] w, float[4] b", body)
    assert set(legalise(model).parameters) == {"w", "b"}
    next(t for t in model.graph.initializer if t.name == "b").CopyFrom(
        numpy_helper.from_array(np.zeros(4, np.float32), "b")
    )
    graph = legalise(model)
    assert set(graph.parameters) == {"w"}
    assert "2 nodes share this vector of equal values" in graph.frozen["b"]


def test_weights_in_constant_nodes_count_and_are_written_back() -> None:
    model = build(17, "float[N,4] x, float[4,2] w", "y = MatMul(x, w)")
    weight = model.graph.initializer.pop()
    node = helper.make_node("Constant", [], ["w"], name="holder", value=weight)
    model.graph.node.insert(0, node)
    graph = legalise(model)
    assert set(graph.parameters) == {"w"}
    result = write_back(model, {"w": np.ones((4, 2))})
    stored = numpy_helper.to_array(result.graph.node[0].attribute[0].t)
    np.testing.assert_array_equal(stored, np.ones((4, 2), np.float32))
    assert result.graph.node[0].attribute[0].t.name == weight.name


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_other_float_types_train_in_float32(kind: int) -> None:
    model = build(17, "float[N,4] x, float[4,2] w", "h = MatMul(x, w) y = Cast<to=1>(h)")
    model.graph.node[1].attribute[0].i = kind
    model.graph.input[0].type.tensor_type.elem_type = kind
    weight = model.graph.initializer[0]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(dtype), "w"))
    graph = legalise(model)
    assert graph.parameters["w"].value.dtype == np.float32
    assert {i.type.tensor_type.elem_type for i in graph.draft.inputs} == {TensorProto.FLOAT}
    result = write_back(model, {"w": np.full((4, 2), 0.1)})
    assert result.graph.initializer[0].data_type == kind


def test_local_functions_are_inlined() -> None:
    body = helper.make_function(
        "local",
        "Twice",
        ["a", "m"],
        ["o"],
        [helper.make_node("MatMul", ["a", "m"], ["t"]), helper.make_node("Add", ["t", "t"], ["o"])],
        [helper.make_opsetid("", 17)],
    )
    model = build(17, "float[N,4] x, float[4,2] w", "y = local.Twice(x, w)")
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.append(body)
    assert set(legalise(model).parameters) == {"w"}


def test_unknown_sizes_freeze_until_they_are_given() -> None:
    body = (
        "h = Conv(x, w) p = MaxPool<kernel_shape=[2,2]>(h) g = GlobalAveragePool(p) "
        "f = Flatten(g) y = MatMul(f, w1)"
    )
    model = build(17, "float[N,2,H,W] x, float[3,2,1,1] w, float[3,2] w1", body)
    graph = legalise(model)
    assert set(graph.parameters) == {"w1"}
    assert "is not fixed" in graph.frozen["w"]
    assert set(legalise(model, sizes={"x": (4, 2, 6, 6)}).parameters) == {"w", "w1"}
