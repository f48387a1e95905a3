"""Sessions, runs, random inputs and latencies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune import io, runtime
from onnxprune.errors import InvalidDataError, InvalidModelError


def model(text: str, **initializers: Any) -> onnx.ModelProto:
    """A model from ONNX text; arrays given by name become initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    for name, array in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return proto


def table(rows: int, columns: int = 4) -> Any:
    return np.zeros((rows, columns), np.float32)


LINEAR = "g (float[N, 3] x) => (float[N, 2] y, float[N, 3] z) { y = MatMul(x, w)  z = Relu(x) }"
WEIGHT = np.arange(6, dtype=np.float32).reshape(3, 2)
X = np.array([[1, -1, 0]], np.float32)


def test_outputs_come_by_name() -> None:
    session = runtime.session(model(LINEAR, w=WEIGHT), threads=1)
    outputs = runtime.run(session, {"x": X})
    assert list(outputs) == ["y", "z"]
    np.testing.assert_array_equal(outputs["y"], X @ WEIGHT)
    assert list(runtime.run(session, {"x": X}, ["z"])) == ["z"]
    assert runtime.run(session, {"x": X}, []) == {}
    with pytest.raises(InvalidDataError, match=r"no output 'q': its outputs are \['y', 'z'\]"):
        runtime.run(session, {"x": X}, ["q"])


def test_sessions_come_from_paths_protos_and_large_protos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = model(LINEAR, w=np.zeros((3, 500), np.float32))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 500
    io.save(proto, tmp_path / "m.onnx", external_data=True)
    assert runtime.run(runtime.session(tmp_path / "m.onnx"), {"x": X})["y"].shape == (1, 500)
    monkeypatch.setattr(io, "MAX_INLINE_BYTES", 100)
    large = runtime.session(proto, optimize=False)
    assert runtime.run(large, {"x": X})["y"].shape == (1, 500)


@pytest.mark.parametrize(
    ("feeds", "error", "message"),
    [
        ({}, InvalidDataError, "no data for the model's input 'x': given \\[\\]"),
        (
            {"x": X, "v": X},
            InvalidDataError,
            "the model has no input 'v': its inputs are \\['x'\\]",
        ),
        (
            {"x": X.astype(float)},
            InvalidDataError,
            "feeds do not fit the model: .*Unexpected input",
        ),
        ({"x": X[0]}, InvalidDataError, "feeds do not fit the model: Invalid rank"),
        ({"x": X[:, :2]}, InvalidDataError, "feeds do not fit the model: Got invalid dimensions"),
    ],
)
def test_feeds_that_do_not_fit(
    feeds: Mapping[str, Any],
    error: type[Exception],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    session = runtime.session(model(LINEAR, w=WEIGHT))
    with pytest.raises(error, match=message) as caught:
        runtime.run(session, feeds)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_failures_of_the_model_are_quiet_and_clear(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = model("g (float[2] x) => (float[N] y) { y = Nonsense(x) }")
    with pytest.raises(InvalidModelError, match=r"cannot load the model: .*Nonsense") as caught:
        runtime.session(broken)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidModelError, match=r"cannot load the model: .*no\.onnx"):
        runtime.session(tmp_path / "no.onnx")
    reshape = model("g (float[N] x, int64[1] s) => (float[M] y) { y = Reshape(x, s) }")
    feeds = {"x": np.zeros(3, np.float32), "s": np.array([2])}
    with pytest.raises(InvalidModelError, match=r"cannot run the model: .*Reshape") as caught:
        runtime.run(runtime.session(reshape), feeds)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2fnuz]
)
def test_types_that_numpy_lacks_go_in_and_out(dtype: Any) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto = model(
        "g (float[N] x) => (float[N] y, float[N] z) { y = Identity(x)  z = Cast<to=1>(x)}"
    )
    proto.opset_import[0].version, proto.ir_version = 19, 9
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.elem_type = kind
    x = np.array([1, -2, 0.5]).astype(dtype)
    session = runtime.session(proto)
    outputs = runtime.run(session, {"x": x})
    assert outputs["y"].dtype == dtype
    np.testing.assert_array_equal(outputs["y"].view(np.uint8), x.view(np.uint8))
    np.testing.assert_array_equal(outputs["z"], [1, -2, 0.5])
    assert runtime.latency_ms(session, {"x": x}, budget_s=0) > 0
    assert runtime.random_feeds(proto)["x"].dtype == dtype


def test_int4_outputs_are_unpacked() -> None:
    proto = model("g (float[3] x) => (int4[3] y) { y = Cast<to=22>(x) }")
    proto.opset_import[0].version, proto.ir_version = 21, 10
    y = runtime.run(runtime.session(proto), {"x": np.array([1, -2, 3], np.float32)})["y"]
    assert y.astype(int).tolist() == [1, -2, 3]


def test_sequences_come_as_lists() -> None:
    text = "g (float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x, x) }"
    y = runtime.run(runtime.session(model(text)), {"x": np.ones(2, np.float32)})["y"]
    assert isinstance(y, list)
    assert len(y) == 2


def body(ids: str) -> str:
    return f"g (int64[N, L] {ids}) => (float[N, L, C] y)"


INDICES: list[tuple[str, onnx.ModelProto, int, int]] = [
    ("gather", model(body("i") + "{ y = Gather(t, i) }", t=table(5)), 0, 4),
    ("of one", model(body("i") + "{ y = Gather(t, i) }", t=table(1)), 0, 0),
    ("axis", model(body("i") + "{ y = Gather<axis=-1>(t, i) }", t=table(9, 3)), 0, 2),
    (
        "chain",
        model(
            body("i") + "{ a = Cast<to=6>(i)  b = Unsqueeze(a, u)  c = Identity(t)  "
            "y = Gather(c, b) }",
            t=table(7),
            u=[0],
        ),
        0,
        6,
    ),
    (
        "smallest of two",
        model(
            body("i") + "{ a = Gather(t, i)  b = Gather(s, i)  y = Add(a, b) }",
            t=table(9),
            s=table(3),
        ),
        0,
        2,
    ),
    ("offset", model(body("i") + "{ a = Add(i, k)  y = Gather(t, a) }", t=table(9), k=2), 0, 6),
    ("arithmetic", model(body("i") + "{ a = Mul(i, k)  y = Gather(t, a) }", t=table(9), k=4), 0, 1),
    (
        "constant node",
        model(body("i") + "{ t = Constant<value = float[3, 1] {0, 1, 2}>()  y = Gather(t, i) }"),
        0,
        2,
    ),
    ("no table", model(body("i") + "{ y = Cast<to=1>(i) }"), 0, 1),
    ("mask by name", model(body("attention_Mask") + "{ y = Cast<to=1>(attention_Mask) }"), 1, 1),
    (
        "mask by use",
        model(body("m") + "{ a = Cast<to=1>(m)  y = Mul(a, k) }", k=np.float32(3)),
        1,
        1,
    ),
    ("mask of one", model(body("mask") + "{ y = Gather(t, mask) }", t=table(1)), 0, 0),
    ("one hot", model(body("i") + "{ y = OneHot(i, d, v) }", d=4, v=np.float32([0, 1])), 0, 3),
    ("count", model("g (int64 k) => (float[M] y) { y = Expand(t, k) }", t=np.float32([1])), 1, 1),
]


@pytest.mark.parametrize(
    ("proto", "low", "high"), [r[1:] for r in INDICES], ids=[r[0] for r in INDICES]
)
def test_integers_are_valid_indices(proto: onnx.ModelProto, low: int, high: int) -> None:
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    proto.graph.input[0].type.tensor_type.shape.dim.add(dim_value=400)
    (values,) = runtime.random_feeds(proto).values()
    assert (values.min(), values.max()) == (low, high)


def test_indices_are_followed_into_bodies() -> None:
    text = """g (bool c, int64[400] i) => (float[400, 4] y) {
      y = If<then_branch = a () => (float[400, 4] p) { p = Gather(t, i) },
             else_branch = b () => (float[400, 4] q) { q = Gather(s, i) }>(c) }"""
    feeds = runtime.random_feeds(model(text, t=table(6), s=table(4)))
    assert feeds["i"].max() == 3
    assert feeds["c"].dtype == bool
    assert feeds["c"]


def inputs(*values: tuple[str, int, list[Any]], known: str = "") -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in values]
    nodes = [helper.make_node("Shape", [name], [f"{name}_"]) for name, _, _ in values]
    given = [numpy_helper.from_array(np.float32(1), known)] if known else []
    return helper.make_model(helper.make_graph(nodes, "g", infos, [], given))


F = TensorProto.FLOAT

SHAPES: list[tuple[list[list[Any]], dict[str, Any], list[tuple[int, ...]]]] = [
    ([[1, 3, 8, 8]], {}, [(1, 3, 8, 8)]),
    ([["N", 3, None, None]], {}, [(2, 3, 64, 64)]),
    ([[None, 3, "H", 9]], {"batch": 5}, [(5, 3, 16, 9)]),
    ([[-1, 3], [0, 0]], {}, [(2, 3), (2, 0)]),
    ([["N", "L"], ["N", "L", 4], ["L", "N"]], {"batch": 3}, [(3, 3), (3, 3, 4), (3, 3)]),
    ([["N", "L"], ["N", "P"]], {"sizes": {"L": 7}}, [(2, 7), (2, 16)]),
    ([["N", "L"]], {"sizes": {"N": 1}, "batch": 9}, [(1, 16)]),
    ([["N", None], [None]], {"sizes": {"i0:1": 5, "i1:0": 6}}, [(2, 5), (6,)]),
    (
        [["N", "p"], ["N", "s"], ["N", "p + s"], ["N", "p - 1"]],
        {},
        [(2, 16)] * 2 + [(2, 32), (2, 15)],
    ),
    ([["N", "2*p // 3"], [1, "p"]], {}, [(2, 10), (1, 16)]),
    ([["batch-size", "a b"], ["N", "size"]], {}, [(2, 16), (2, 16)]),
    ([[]], {}, [()]),
]


@pytest.mark.parametrize(("dims", "options", "shapes"), SHAPES)
def test_shapes(
    dims: list[list[Any]], options: dict[str, Any], shapes: list[tuple[int, ...]]
) -> None:
    proto = inputs(*[(f"i{index}", F, list(shape)) for index, shape in enumerate(dims)])
    feeds = runtime.random_feeds(proto, **options)
    assert [array.shape for array in feeds.values()] == shapes


@pytest.mark.parametrize(
    ("kind", "dtype", "low", "high"),
    [
        (TensorProto.FLOAT, np.float32, -6, 6),
        (TensorProto.DOUBLE, np.float64, -6, 6),
        (TensorProto.FLOAT16, np.float16, -6, 6),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16, -6, 6),
        (TensorProto.INT8, np.int8, 0, 1),
        (TensorProto.INT16, np.int16, 0, 1),
        (TensorProto.INT32, np.int32, 0, 1),
        (TensorProto.UINT16, np.uint16, 0, 1),
        (TensorProto.UINT64, np.uint64, 0, 1),
        (TensorProto.UINT8, np.uint8, 0, 255),
        (TensorProto.INT4, ml_dtypes.int4, 0, 1),
        (TensorProto.BOOL, np.bool_, 1, 1),
        (TensorProto.COMPLEX64, np.complex64, -6, 6),
    ],
)
def test_types(kind: int, dtype: Any, low: int, high: int) -> None:
    array = runtime.random_feeds(inputs(("x", kind, [3, 50, 50])))["x"]
    assert array.dtype == dtype
    numbers = array.real.astype(np.float64)
    assert low <= numbers.min()
    assert numbers.max() <= high
    assert numbers.std() > 0 or kind == TensorProto.BOOL


def test_strings_and_float_masks() -> None:
    feeds = runtime.random_feeds(inputs(("s", TensorProto.STRING, [2]), ("key_mask", F, [3])))
    assert feeds["s"].tolist() == ["text", "text"]
    assert feeds["key_mask"].tolist() == [1, 1, 1]


def test_seeds_and_independence_of_other_inputs() -> None:
    one, two = inputs(("x", F, [9])), inputs(("a", F, [4]), ("x", F, [9]))
    np.testing.assert_array_equal(runtime.random_feeds(one)["x"], runtime.random_feeds(two)["x"])
    assert (runtime.random_feeds(one)["x"] != runtime.random_feeds(one, seed=1)["x"]).all()


def test_inputs_with_a_default_are_not_fed() -> None:
    assert list(runtime.random_feeds(inputs(("x", F, [9]), ("w", F, []), known="w"))) == ["x"]


def test_inputs_that_cannot_be_made_up() -> None:
    proto = model("g (seq(float[2]) s) => (int64 y) { y = SequenceLength(s) }")
    with pytest.raises(InvalidModelError, match=r"input 's' is no tensor \(sequence\): random"):
        runtime.random_feeds(proto)
    proto = inputs(("x", F, []))
    proto.graph.input[0].type.CopyFrom(helper.make_optional_type_proto(proto.graph.input[0].type))
    with pytest.raises(InvalidModelError, match=r"input 'x' is no tensor \(optional\)"):
        runtime.random_feeds(proto)
    proto.graph.input[0].type.CopyFrom(helper.make_tensor_type_proto(F, None))
    with pytest.raises(InvalidModelError, match=r"input 'x' has no shape: .*; give data"):
        runtime.random_feeds(proto)
    with pytest.raises(InvalidDataError, match=r"no input has a dynamic axis 'M'"):
        runtime.random_feeds(inputs(("x", F, ["N"])), sizes={"M": 3})


def test_latencies_alternate_and_keep_to_the_budget() -> None:
    session = runtime.session(model(LINEAR, w=WEIGHT), threads=1)
    assert 0 < runtime.latency_ms(session, {"x": X}, budget_s=0.01) < 1000
    both = runtime.latencies_ms([(session, {"x": X})] * 2, budget_s=0, min_runs=3)
    assert len(both) == 2
    assert min(both) > 0
    with pytest.raises(InvalidDataError, match="no data for"):
        runtime.latency_ms(session, {})


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }", [(2, 4), (3, 4)]),
        ("g (float[1,4] x) => (float[1,4] y) { y = Relu(x) }", [(1, 4)]),
        (
            'g (float[N,L] x) => (float[N,M] y) { y = Pad<mode="reflect">(x, p) }',
            [(2, 64), (3, 64)],
        ),
    ],
    ids=["two-batch-sizes", "one-size", "needs-a-longer-signal"],
)
def test_working_feeds_run(text: str, shapes: list[tuple[int, ...]]) -> None:
    proto = model(text, p=np.array([0, 40, 0, 40]))
    assert [feeds["x"].shape for feeds in runtime.working_feeds(proto)] == shapes


def test_a_scan_along_its_second_axis_is_fed_long_signals_first() -> None:
    """ONNX Runtime divides by zero where such a Scan gets none, and the process ends."""
    proto = model(
        "g (float[N,T] x) => (float[N,4] y) {"
        "  d = Slice(x, s, e, a)  r = Reshape(d, t)  h = ReduceMax<axes=[1], keepdims=0>(r)"
        "  y, u = Scan<scan_input_axes=[1], num_scan_inputs=1,"
        "  body = b (float[N,4] p, float[N,4] q)"
        "  => (float[N,4] f, float[N,4] o) { f = Add(p, q)  o = Tanh(f) }>(h, r) }",
        s=np.array([40]),
        e=np.array([1 << 40]),
        a=np.array([1]),
        t=np.array([0, -1, 4]),
    )
    assert [feeds["x"].shape[1] > 40 for feeds in runtime.working_feeds(proto)] == [True, True]


def test_working_feeds_of_a_recurrent_state() -> None:
    proto = model(
        "g (float[N,4] x, float[1,?,4] h) => (float[2,N,4] y)"
        "{ u = Reshape(x, s)  y = Concat<axis=0>(u, h) }",
        s=np.array([1, -1, 4]),
    )
    first = runtime.working_feeds(proto)[0]
    assert (first["x"].shape, first["h"].shape) == ((2, 4), (1, 2, 4))


def test_a_model_that_runs_on_no_input() -> None:
    proto = model("g (float[N,4] x) => (float[N,3] y) { y = Reshape(x, s) }", s=np.array([7, 3]))
    with pytest.raises(InvalidDataError, match="does not run on random inputs"):
        runtime.working_feeds(proto)


def test_a_total_length_is_that_of_the_past_and_the_new() -> None:
    proto = model(
        "g (float[N,tokens] x, float[N,past_tokens] p, float[N,total_tokens] t)"
        " => (float[N,total_tokens] y) { u = Concat<axis=1>(p, x)  y = Add(u, t) }"
    )
    shapes = {name: value.shape for name, value in runtime.random_feeds(proto).items()}
    assert shapes == {"x": (2, 16), "p": (2, 16), "t": (2, 32)}
    given = runtime.random_feeds(proto, sizes={"past_tokens": 3})
    assert given["t"].shape == (2, 19)
    assert runtime.random_feeds(proto, sizes={"total_tokens": 5})["t"].shape == (2, 5)
