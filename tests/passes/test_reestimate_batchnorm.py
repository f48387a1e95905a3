"""BatchNormalization statistics against the definition in numpy."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxprune import runtime
from onnxprune.data import open_data
from onnxprune.errors import InvalidRecipeError
from onnxprune.passes.reestimate_batchnorm import ReestimateBatchNorm

Array = NDArray[Any]


def model(body: str, *, opset: int = 17, batch: str = "N", shared: bool = False) -> onnx.ModelProto:
    """Two normalized convolutions, with statistics that fit nothing."""
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (float[{batch},2,5,5] x) => (float[{batch},C,H,W] y) {{ {body} }}"""
    result = parser.parse_model(text)
    rng = np.random.default_rng(0)
    values = {
        "w": rng.standard_normal((3, 2, 3, 3)),
        "v": rng.standard_normal((4, 3, 1, 1)),
        "s": rng.uniform(0.5, 1.5, 3),
        "b": rng.standard_normal(3),
        "t": rng.uniform(0.5, 1.5, 4),
        "c": rng.standard_normal(4),
        "m": np.zeros(3),
        "r": np.ones(3),
        "n": np.zeros(4),
        "q": np.ones(4),
    }
    used = {name for node in result.graph.node for name in node.input}
    for name, value in values.items():
        if name in used:
            result.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return result


TWO = """h = Conv(x, w) i = BatchNormalization<epsilon=0.001>(h, s, b, m, r) j = Relu(i)
k = Conv(j, v) y = BatchNormalization(k, t, c, n, q)"""


def stored(proto: onnx.ModelProto, name: str) -> Array:
    return next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


def inputs(count: int) -> Array:
    return np.random.default_rng(1).standard_normal((count, 2, 5, 5)).astype(np.float32) * 3 + 1


def intermediate(proto: onnx.ModelProto, name: str, x: Array) -> Array:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    return runtime.run(runtime.session(copy, threads=1), {"x": x})[name]


@pytest.mark.parametrize("opset", [9, 13, 15, 17, 21])
def test_statistics_are_those_of_the_data(opset: int) -> None:
    proto, x = model(TWO, opset=opset), inputs(48)
    result = ReestimateBatchNorm(samples=48, batch_size=48)(proto, open_data({"x": x}, proto))
    h = intermediate(proto, "h", x)
    np.testing.assert_allclose(stored(result, "m"), h.mean(axis=(0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(stored(result, "r"), h.var(axis=(0, 2, 3)), rtol=1e-4)
    # in one batch, what the second layer sees is what the result gives it
    k = intermediate(result, "k", x)
    np.testing.assert_allclose(stored(result, "n"), k.mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(stored(result, "q"), k.var(axis=(0, 2, 3)), rtol=1e-3)


def test_unequal_batches_combine_to_the_whole() -> None:
    proto, x = model(TWO), inputs(40)
    x[:16] += 5  # batches differ: the variance between them counts
    result = ReestimateBatchNorm(samples=40, batch_size=16)(proto, open_data({"x": x}, proto))
    h = intermediate(proto, "h", x)
    np.testing.assert_allclose(stored(result, "m"), h.mean(axis=(0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(stored(result, "r"), h.var(axis=(0, 2, 3)), rtol=1e-4)


def test_only_the_statistics_change() -> None:
    proto = model(TWO)
    proto.graph.doc_string = "kept"
    before = proto.SerializeToString()
    result = ReestimateBatchNorm()(proto, open_data({"x": inputs(20)}, proto))
    assert proto.SerializeToString() == before
    for name in ("m", "r", "n", "q"):
        tensor = next(t for t in result.graph.initializer if t.name == name)
        old = next(t for t in proto.graph.initializer if t.name == name)
        tensor.CopyFrom(old)
    assert result.SerializeToString() == before


def test_no_more_samples_than_asked_for() -> None:
    proto, x = model(TWO), inputs(64)
    few = ReestimateBatchNorm(samples=32, batch_size=16)(proto, open_data({"x": x}, proto))
    same = ReestimateBatchNorm(batch_size=16)(proto, open_data({"x": x[:32]}, proto))
    assert few.SerializeToString() == same.SerializeToString()


def test_aliased_statistics_get_apart() -> None:
    body = """h = Conv(x, w) i = BatchNormalization(h, s, b, m, r) j = Relu(i)
    y = BatchNormalization(j, s, b, m, r)"""
    proto, x = model(body), inputs(32)
    result = ReestimateBatchNorm(batch_size=32)(proto, open_data({"x": x}, proto))
    first, second = (n for n in result.graph.node if n.op_type == "BatchNormalization")
    j = intermediate(result, "j", x)
    np.testing.assert_allclose(stored(result, second.input[3]), j.mean(axis=(0, 2, 3)), rtol=1e-3)
    assert first.input[3] != second.input[3]


@pytest.mark.parametrize("blocked", [False, True])
def test_a_fixed_batch_of_one(blocked: bool) -> None:
    head = "h0 = Constant<value = int64[4] {1,2,5,5}>() x0 = Reshape(x, h0) " if blocked else ""
    body = TWO.replace("Conv(x, w)", "Conv(x0, w)") if blocked else TWO
    proto, x = model(head + body, batch="1"), inputs(40)
    result = ReestimateBatchNorm(batch_size=40)(proto, open_data({"x": x}, proto))
    free = ReestimateBatchNorm(batch_size=40)(model(TWO), open_data({"x": x}, model(TWO)))
    for name in ("m", "r", "n", "q"):
        np.testing.assert_allclose(stored(result, name), stored(free, name), rtol=1e-3, atol=1e-4)


def test_float16_statistics_are_measured_in_float32() -> None:
    from onnx import TensorProto

    proto = model("h = Relu(x) y = BatchNormalization(h, s, b, m, r)")
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    x = np.random.default_rng(2).standard_normal((64, 3, 5, 5)).astype(np.float16) * 100
    result = ReestimateBatchNorm()(proto, open_data({"x": x}, proto))
    relu = np.maximum(x.astype(np.float32), 0)
    np.testing.assert_allclose(stored(result, "r"), relu.var(axis=(0, 2, 3)), rtol=2e-3)


def test_a_model_without_batchnorm_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    proto = model("y = Conv(x, w)")
    with caplog.at_level(logging.INFO):
        assert ReestimateBatchNorm()(proto, open_data({"x": inputs(2)}, proto)) is proto
    assert "no BatchNormalization" in caplog.text


def test_options_are_checked() -> None:
    with pytest.raises(InvalidRecipeError, match="samples is 0; it must be at least 1"):
        ReestimateBatchNorm(samples=0)
