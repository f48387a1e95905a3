"""Half, mixed and double precision: pruned like float32, verified with an honest tolerance."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune import verify
from onnxprune.errors import InvalidModelError
from onnxprune.float32 import float32_copy, float32_feeds, needs_float32, uses_halves
from onnxprune.pipeline import check
from tests.graphs import build, prune, prune_half, shapes, weight

HALF, BRAIN, DOUBLE = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE

CNN = (
    "(float[N,3,8,8] x) => (float[N,4,6,6] y)",
    """a = Conv(x, w1, b1)  n = BatchNormalization(a, s, t, m, var)  h = Relu(n)
    g = Conv<group=8, pads=[1,1,1,1]>(h, wg)  p = Add(g, h)  y = Conv(p, w2)""",
    "w1:8,3,3,3 b1:8 s:8 t:8 m:8 var:8 wg:8,1,3,3 w2:4,8,1,1",
)
ATTENTION = (
    "(float[N,S,8] x) => (float[N,S,8] y)",
    """n = LayerNormalization(x, g, b)  q0 = MatMul(n, wq)  k0 = MatMul(n, wk)  v0 = MatMul(n, wv)
    q1 = Reshape(q0, heads)  k1 = Reshape(k0, heads)  v1 = Reshape(v0, heads)
    q = Transpose<perm=[0,2,1,3]>(q1)  k = Transpose<perm=[0,2,3,1]>(k1)
    v = Transpose<perm=[0,2,1,3]>(v1)  s = MatMul(q, k)  p = Softmax(s)  o = MatMul(p, v)
    o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, back)  y = MatMul(o2, wo)""",
    "g:8 b:8 wq:8,16 wk:8,16 wv:8,16 wo:16,8 heads=0,0,4,4 back=0,0,16",
)
LSTM = (
    "(float[5,N,6] x) => (float[5,N,4] y)",
    "h4 = LSTM<hidden_size=8>(x, w, r, b)  h = Squeeze(h4, one)  y = MatMul(h, w2)",
    "w:1,32,6 r:1,32,8 b:1,64 one=1 w2:8,4",
)
MODELS = {"cnn": CNN, "attention": ATTENTION, "lstm": LSTM}


def converted(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The float model with every tensor of another floating point type."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    return model


def made(name: str, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """One of the small models in another precision."""
    signature, body, weights = MODELS[name]
    return converted(build(signature, body, weights, opset=22, ir=10), kind)


@pytest.mark.parametrize("scope", ["all", "exact"])
@pytest.mark.parametrize(
    ("name", "kind"), [(n, HALF) for n in MODELS] + [("attention", DOUBLE)], ids=str
)
def test_half_of_every_group_equals_the_twin(name: str, kind: int, scope: str) -> None:
    model = made(name, kind)
    pruned = prune_half(model, scope)
    assert verify.structure_problems(pruned.model, model) == []
    assert pruned.error <= verify.default_tolerance(model)
    assert pruned.effect > 0.05
    assert {t.data_type for t in pruned.model.graph.initializer} == {
        t.data_type for t in model.graph.initializer
    }
    as_float = prune_half(made(name), scope)
    assert shapes(pruned.model) == shapes(as_float.model)


@pytest.mark.parametrize("kind", [HALF, BRAIN, DOUBLE], ids=["float16", "bfloat16", "float64"])
def test_importance_does_not_depend_on_the_precision(kind: int) -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)", "a = MatMul(x, w1)  y = MatMul(a, w2)", "w1:6,8 w2:8,4"
    )
    kept = weight(prune(model, channels=0.5).model, "w1")
    other = weight(prune(converted(model, kind), channels=0.5).model, "w1")
    np.testing.assert_allclose(other.astype(np.float32), kept, rtol=1e-2)


def test_mixed_precision() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """i = Cast<to=10>(x)  a = MatMul(i, w1)  f = Cast<to=1>(a)  n = LayerNormalization(f, s, b)
        c = Cast<to=10>(n)  d = MatMul(c, w2)  y = Cast<to=1>(d)""",
        "w1:6,8 s:8 b:8 w2:8,4",
    )
    for tensor in model.graph.initializer:
        if tensor.name.startswith("w"):
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    pruned = prune_half(model)
    assert pruned.error <= 1e-2
    assert pruned.effect > 1e-2
    assert shapes(pruned.model) == {"w1": (6, 4), "s": (4,), "b": (4,), "w2": (4, 4)}


def test_an_overflow_in_a_removed_channel_does_not_reach_the_twin() -> None:
    model = made("cnn", HALF)
    bias = next(t for t in model.graph.initializer if t.name == "b1")
    first = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w1"))
    least = int(np.square(first.astype(np.float32)).sum(axis=(1, 2, 3)).argmin())
    values = numpy_helper.to_array(bias).copy()
    values[least] = np.inf
    bias.CopyFrom(numpy_helper.from_array(values, "b1"))
    pruned = prune_half(model, ratio=0.75)
    assert np.isfinite(weight(pruned.model, "b1")).all()
    assert pruned.error <= 1e-2


def test_a_cast_inside_a_channel_shuffle_stays() -> None:
    model = build(
        "(float[N,3,8,8] x) => (float[N,4,6,6] y)",
        """a = Conv(x, w1, b1)  g = Reshape(a, five)  i = Cast<to=11>(g)
        t = Transpose<perm=[0,2,1,3,4]>(i)  e = Cast<to=1>(t)  h = Reshape(e, four)
        y = Conv(h, w2)""",
        "w1:8,3,3,3 b1:8 five=0,2,4,6,6 four=0,8,6,6 w2:4,8,1,1",
    )
    model = onnx.shape_inference.infer_shapes(model)
    for seed in range(4):  # some choices are a product of the shuffle's factors, some are not
        pruned = prune_half(model, ratio=0.6, seed=seed, criterion="random")
        assert verify.structure_problems(pruned.model, model) == []
        assert pruned.error <= 1e-6
        assert shapes(pruned.model)["w1"][0] < 8


@pytest.mark.parametrize(
    ("name", "kind"), [("cnn", BRAIN), ("cnn", DOUBLE), ("attention", BRAIN), ("lstm", DOUBLE)]
)
def test_what_runs_only_as_float32_is_checked_so_and_says_so(name: str, kind: int) -> None:
    model = made(name, kind)
    assert needs_float32(model)
    result = prune(model, channels=0.5)
    report = result.report
    twin = report.checks[0]
    assert twin.passed
    assert twin.max_error is not None
    assert twin.max_error <= 1e-4
    assert "float32 copies" in twin.reference
    assert report.before.latency_ms is report.after.latency_ms is None
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert all(
        types.get(t.name, t.data_type) == t.data_type for t in result.model.graph.initializer
    )
    assert 0 < report.after.params < 0.7 * report.before.params
    compared = check(model, result.model, threads=1)
    assert compared.passed
    assert "float32 copies" in compared.reference


@pytest.mark.parametrize("kind", [BRAIN, DOUBLE], ids=["bfloat16", "float64"])
def test_what_runs_only_as_float32_is_measured_on_data(kind: int) -> None:
    model = made("cnn", kind)
    dims = [d.dim_value or 8 for d in model.graph.input[0].type.tensor_type.shape.dim]
    data = {"x": np.random.default_rng(0).normal(size=dims).astype(np.float32)}
    report = prune(model, channels=0.5, data=data, repair="auto").report
    assert report.checks[0].passed
    assert report.after.metrics["mse"] > 0
    assert any("not repaired: ONNX Runtime does not run" in note for note in report.notes)


def test_float16_runs_as_it_is() -> None:
    model = made("cnn", HALF)
    assert not needs_float32(model)
    report = prune(model, channels=0.5).report
    assert report.checks[0].reference == "the masked twin"


def test_a_model_that_runs_in_no_precision_keeps_its_error() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        "a = MatMul(x, w1)  h = acme.Blend(a)  y = MatMul(h, w2)",
        "w1:6,8 w2:8,4",
        imports=', "acme": 1',
    )
    brain = converted(model, BRAIN)
    assert not needs_float32(brain)
    with pytest.raises(InvalidModelError, match="Blend"):
        prune(brain, channels=0.5)


def test_the_float32_copy_reaches_attributes_and_bodies() -> None:
    model = build(
        "(bfloat16[N] x, bool c) => (float[N] y)",
        """i = If<then_branch = yes () => (bfloat16[N] r) { r = Neg(x) },
                else_branch = no () => (bfloat16[N] s) { s = Cast<to=16>(f) }>(c)
        y = Cast<to=1>(i)""".replace("(f)", "(x)"),
        opset=18,
    )
    assert uses_halves(model)
    wide = float32_copy(model)
    assert not uses_halves(wide)
    branch = wide.graph.node[0].attribute[1].g
    assert branch.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert branch.node[0].attribute[0].i == TensorProto.FLOAT
    assert uses_halves(model)
    brain = helper.tensor_dtype_to_np_dtype(BRAIN)
    fed = float32_feeds({"x": np.ones(2, brain), "c": np.array(True)})
    assert {name: array.dtype for name, array in fed.items()} == {"x": np.float32, "c": np.bool_}


def test_a_cast_alone_makes_a_model_use_halves() -> None:
    model = build("(float[N] x) => (float[N] y)", "h = Cast<to=16>(x)  y = Cast<to=1>(h)")
    assert uses_halves(model)


def test_differences_of_bfloat16_are_numbers() -> None:
    brain = helper.tensor_dtype_to_np_dtype(BRAIN)
    a, b = np.array([1.0, 2.0], brain), np.array([1.0, 4.0], brain)
    assert verify.difference([a], [b]) == 0.5
    assert verify.difference([a], [np.array([1.0, np.nan], brain)]) == np.inf
