"""What does not matter goes, and the model answers as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxprune import io, runtime, verify
from onnxprune.errors import InvalidDataError, InvalidModelError, VerificationError
from onnxprune.passes import lossless
from onnxprune.passes.apply import apply_keep
from onnxprune.passes.lossless import Lossless, LosslessResult
from tests.graphs import build, outputs, prune, shapes, weight
from tests.masks import chosen, mask_producers, mask_readers, spoiled
from tests.properties.models import random_model

IMAGE = "(float[N,3,8,8] x) => (float[N,4,?,?] y)"
FLAT = "(float[N,6] x) => (float[N,4] y)"
SEQUENCE = "(float[S,N,6] x) => (float[S,N,4] y)"


@dataclass(frozen=True)
class Row:
    """`zero`: "weight[index along the first axis]=value" edits; `small`: shapes that result."""

    name: str
    signature: str
    body: str
    weights: str
    edits: str
    small: str
    nodes: int | None = None


ROWS = [
    Row(
        "zero filters",
        IMAGE,
        "a = Conv(x, w1, b1) h = Relu(a) y = Conv<pads=[1,1,1,1]>(h, w2)",
        "w1:8,3,3,3 b1:8 w2:4,8,3,3",
        "w1[:3]=0 b1[:3]=0",
        "w1:5,3,3,3 w2:4,5,3,3",
    ),
    Row(
        "unread channels",
        IMAGE,
        "a = Conv(x, w1, b1) h = Relu(a) y = Conv<pads=[1,1,1,1]>(h, w2)",
        "w1:8,3,3,3 b1:8 w2:4,8,3,3",
        "w2[:,:3]=0",
        "w1:5,3,3,3 w2:4,5,3,3",
    ),
    Row(
        "dead after relu by the sign of the bias",
        IMAGE,
        "a = Conv(x, w1, b1) h = Relu(a) y = Conv<pads=[1,1,1,1]>(h, w2)",
        "w1:8,3,3,3 b1:8 w2:4,8,3,3",
        "w1[2:5]=0 b1[2:5]=-0.5",
        "w1:5,3,3,3 w2:4,5,3,3",
    ),
    Row(
        "dead after relu by bounds through two layers",
        FLAT,
        "a = MatMul(x, w1) s = Sigmoid(a) c = Gemm(s, w2, b2) r = Relu(c) y = MatMul(r, w3)",
        "w1:6,8 w2:8,8 b2:8 w3:8,4",
        "b2[:4]=-100",
        "w1:6,8 w2:8,4 w3:4,4",
    ),
    Row(
        "dead through batch normalization",
        IMAGE,
        "a = Conv(x, w1) n = BatchNormalization(a, s, t, mean, var) h = Relu(n) y = Conv(h, w2)",
        "w1:8,3,3,3 s:8 t:8 mean:8 var:8 w2:4,8,1,1",
        "s[:4]=0 t[:4]=-1",
        "w1:4,3,3,3 s:4 w2:4,4,1,1",
    ),
    Row(
        "constant channels go into the bias",
        IMAGE,
        "a = Conv(x, w1, b1) h = Sigmoid(a) y = Conv(h, w2)",
        "w1:8,3,3,3 b1:8 w2:4,8,1,1",
        "w1[:4]=0",
        "w1:4,3,3,3 w2:4,4,1,1 y_bias:4",
    ),
    Row(
        "constant channels stay in front of padding",
        IMAGE,
        "a = Conv(x, w1, b1) h = Sigmoid(a) y = Conv<pads=[1,1,1,1]>(h, w2)",
        "w1:8,3,3,3 b1:8 w2:4,8,3,3",
        "w1[:1]=0",
        "w1:8,3,3,3 w2:4,8,3,3",
    ),
    Row(
        "constants of a matrix product go into the add behind it",
        FLAT,
        "a = Gemm(x, w1, b1) h = Tanh(a) m = MatMul(h, w2) y = Add(m, b2)",
        "w1:6,8 b1:8 w2:8,4 b2:4",
        "w1[:,:3]=0",
        "w1:6,5 b1:5 w2:5,4",
    ),
    Row(
        "constants of a matrix product get an add",
        FLAT,
        "a = Gemm(x, w1, b1) h = Tanh(a) y = MatMul(h, w2)",
        "w1:6,8 b1:8 w2:8,4",
        "w1[:,:3]=0",
        "w1:6,5 b1:5 w2:5,4",
        nodes=4,
    ),
    Row(
        "gemm with factors",
        FLAT,
        "a = Gemm(x, w1, b1) h = Tanh(a) y = Gemm<alpha=0.5,beta=2.0,transB=1>(h, w2, b2)",
        "w1:6,8 b1:8 w2:4,8 b2:4",
        "w1[:,:3]=0",
        "w1:6,5 b1:5 w2:4,5",
    ),
    Row(
        "grouped convolution",
        IMAGE,
        "a = Conv(x, w1, b1) h = Tanh(a) g = Conv<group=8>(h, wg, bg) r = Relu(g) y = Conv(r, w2)",
        "w1:8,3,3,3 b1:8 wg:8,1,3,3 bg:8 w2:4,8,1,1",
        "wg[:3]=0 bg[:3]=-1 bg[3:]=1",
        "w1:5,3,3,3 wg:5,1,3,3 w2:4,5,1,1",
    ),
    Row(
        "a residual stream needs all that writes to it",
        IMAGE,
        "a = Conv(x, w1) b = Conv(a, wb) s = Add(a, b) h = Relu(s) y = Conv(h, w2)",
        "w1:8,3,3,3 wb:8,8,1,1 w2:4,8,1,1",
        "w1[:3]=0 wb[:2]=0",
        "w1:6,3,3,3 wb:6,6,1,1 w2:4,6,1,1",
    ),
    Row(
        "a branch that adds nothing",
        IMAGE,
        "a = Conv(x, w1) b = Conv(a, wb) r = Relu(b) s = Add(a, r) y = Conv(s, w2)",
        "w1:8,3,3,3 wb:8,8,1,1 w2:4,8,1,1",
        "wb[:]=0",
        "w1:8,3,3,3 w2:4,8,1,1",
        nodes=2,
    ),
    Row(
        "a chain that leads nowhere",
        FLAT,
        "a = MatMul(x, w1) r = Relu(a) b = MatMul(r, w2) t = Relu(b) y = MatMul(t, w3)",
        "w1:6,8 w2:8,8 w3:8,4",
        "w3[:4]=0 w2[:3,4:]=0",
        "w1:6,5 w2:5,4 w3:4,4",
    ),
    Row(
        "hidden units of a cell that never start",
        SEQUENCE,
        "h, e, f = LSTM<hidden_size=8>(x, w, r) q = Squeeze(h, one) y = MatMul(q, w2)",
        "w:1,32,6 r:1,32,8 one=1 w2:8,4",
        "w[:,24:27]=0 r[:,24:27]=0",
        "w:1,20,6 r:1,20,5 w2:5,4",
    ),
    Row(
        "layers that do nothing",
        FLAT,
        "i = Identity(x) d = Dropout(i) t = Transpose<perm=[0,1]>(d) f = Flatten(t) "
        "o = Mul(f, one1) s = Slice(o, st, en) z = Add(s, z0) c = Cast<to=1>(z) "
        "m = MatMul(c, w1) y = Identity(m)",
        "w1:6,4 one1: z0:6 st=0,0 en=9223372036854775807,6",
        "z0[:]=0 one1=1",
        "w1:6,4",
        nodes=1,
    ),
    Row(
        "a slice of one channel reads it",
        IMAGE,
        "a = Conv(x, w1) p = GlobalAveragePool(a) u = Conv(p, wu) m = Mul(a, u) "
        "s = Slice(m, st, en, ax) y = Conv(s, w2)",
        "w1:4,3,1,1 wu:4,4,1,1 w2:4,1,1,1 st=0 en=1 ax=1",
        "",
        "w1:4,3,1,1 wu:4,4,1,1",
    ),
    Row(
        "repeated filters",
        IMAGE,
        "a = Conv(x, w1, b1) h = Sigmoid(a) y = Conv<pads=[1,1,1,1]>(h, w2)",
        "w1:8,3,3,3 b1:8 w2:4,8,3,3",
        "w1[1]=array[0] b1[0:2]=0.3 w1[5]=array[4] b1[4:6]=-0.1",
        "w1:6,3,3,3 w2:4,6,3,3",
    ),
    Row(
        "repeated filters with two readers",
        IMAGE,
        "a = Conv(x, w1) h = Relu(a) p = Conv(h, w2) q = Conv(h, w3) y = Add(p, q)",
        "w1:8,3,3,3 w2:4,8,1,1 w3:4,8,1,1",
        "w1[1]=array[0]*2",
        "w1:7,3,3,3 w2:4,7,1,1 w3:4,7,1,1",
    ),
    Row(
        "multiples through a rectifier and a pool, flattened",
        "(float[N,3,8,8] x) => (float[N,4] y)",
        "a = Conv(x, w1) h = Relu(a) p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(h) "
        "f = Flatten(p) y = Gemm(f, w2)",
        "w1:8,3,3,3 w2:72,4",
        "w1[1]=array[0]*3.7 w1[2]=array[0]*-2",
        "w1:7,3,3,3 w2:63,4",
    ),
    Row(
        "multiples through batch normalization and a sum",
        IMAGE,
        "a = Conv(x, w1) n = BatchNormalization(a, s, t, mean, var) b = Conv(x, wb) "
        "q = Add(n, b) h = Relu(q) y = Conv(h, w2)",
        "w1:8,3,3,3 wb:8,3,3,3 s:8 t:8 mean:8 var:8 w2:4,8,1,1",
        "w1[1]=array[0]*2 mean[1]=array[0]*2 var[1]=array[0] s[1]=array[0] t[1]=array[0]*2 "
        "wb[1]=array[0]*2",
        "w1:7,3,3,3 s:7 w2:4,7,1,1",
    ),
    Row(
        "constants in front of padding share one channel",
        IMAGE,
        "a = Conv(x, w1, b1) h = Sigmoid(a) y = Conv<pads=[1,1,1,1]>(h, w2)",
        "w1:8,3,3,3 b1:8 w2:4,8,3,3",
        "w1[:4]=0",
        "w1:5,3,3,3 w2:4,5,3,3",
    ),
    Row(
        "repeated depthwise filters",
        IMAGE,
        "a = Conv(x, w1) h = Relu(a) g = Conv<group=8>(h, wg, bg) r = Relu(g) y = Conv(r, w2)",
        "w1:8,3,3,3 wg:8,1,3,3 bg:8 w2:4,8,1,1",
        "w1[1]=array[0]*2 wg[1]=array[0] bg[1]=array[0]*2 bg[:]=abs(array)",
        "w1:7,3,3,3 wg:7,1,3,3 w2:4,7,1,1",
    ),
    Row(
        "multiples through padding, a slice and interpolation",
        "(float[2,3,8,8] x) => (float[2,4,?,?] y)",
        "a = Conv(x, w1) h = Relu(a) p = Pad(h, pads) c = Slice(p, st, en, ax) "
        "r = Resize(c, , , sizes) y = Conv(r, w2)",
        "w1:8,3,3,3 w2:4,8,1,1 pads=0,0,1,1,0,0,1,1 st=1 en=6 ax=2 sizes=2,8,10,20",
        "w1[1]=array[0]*3 w1[2]=array[0]*-2",
        "w1:7,3,3,3 w2:4,7,1,1",
    ),
    Row(
        "repeated channels through padding with a value",
        "(float[N,3,8,8] x) => (float[N,4,?,?] y)",
        "a = Conv(x, w1) h = Relu(a) p = Pad(h, pads, half) y = Conv(p, w2)",
        "w1:8,3,3,3 w2:4,8,1,1 pads=0,0,1,1,0,0,1,1 half:",
        "w1[1]=array[0] w1[2]=array[0]*2",
        "w1:7,3,3,3 w2:4,7,1,1",
    ),
    Row(
        "repeated channels through a power and a mean",
        "(float[N,3,8,8] x) => (float[N,4] y)",
        "a = Conv(x, w1) h = Pow(a, three) m = ReduceMean<keepdims=0>(h, ax) y = Gemm(m, w2)",
        "w1:8,3,3,3 w2:8,4 three: ax=2,3",
        "w1[1]=array[0] w1[2]=array[0]*2 three[...]=3",
        "w1:7,3,3,3 w2:7,4",
    ),
    Row(
        "what reaches no output",
        FLAT,
        "y = MatMul(x, w1) u = MatMul(x, w2) v = Relu(u)",
        "w1:6,4 w2:6,9",
        "",
        "w1:6,4",
        nodes=1,
    ),
]


def edited(row: Row) -> onnx.ModelProto:
    model = build(row.signature, row.body, row.weights)
    for edit in row.edits.split():
        place, _, value = edit.partition("=")
        name, _, index = place.partition("[")
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = np.array(numpy_helper.to_array(tensor))
        scope = {"array": array}
        exec(f"array[{index or '...]'}= {value}", scope)
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model


def agree(model: onnx.ModelProto, result: LosslessResult) -> None:
    feeds = runtime.random_feeds(model, seed=7)
    error = verify.difference(outputs(result.model, feeds), outputs(model, feeds))
    assert error < 1e-5


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_what_goes(row: Row) -> None:
    model = edited(row)
    result = Lossless(threads=1)(model)
    expected = {
        w.partition(":")[0]: tuple(int(n) for n in w.partition(":")[2].split(","))
        for w in row.small.split()
    }
    found = shapes(result.model)
    assert {name: found.get(name, found.get(f"{name}_1")) for name in expected} == expected
    if row.nodes is not None:
        assert len(result.model.graph.node) == row.nodes
    agree(model, result)


@pytest.mark.parametrize(
    "row",
    [r for r in ROWS if r.nodes is None and "-100" not in r.edits],
    ids=lambda r: r.name,
)
def test_a_dense_model_stays_the_same_object(row: Row) -> None:
    model = build(row.signature, row.body, row.weights)
    result = Lossless(threads=1)(model)
    assert result.model is model
    assert not result.modified


@pytest.mark.parametrize("mask", [mask_producers, mask_readers])
@pytest.mark.parametrize("name", ["digits_cnn", "digits_cnn_folded", "digits_mlp"])
def test_masked_channels_all_go(
    root: Path, name: str, mask: Callable[..., tuple[onnx.ModelProto, int]]
) -> None:
    from onnxprune.analysis import analyse

    model = io.load(root / "models" / f"{name}.onnx")
    masked, count = mask(model, 0.3, seed=1)
    assert count > 50
    result = Lossless(threads=1)(masked)
    analysis = analyse(model)
    assert shapes(result.model) == shapes(
        apply_keep(analysis.coupling, chosen(analysis, 0.3, 1)).model
    )
    assert result.max_error < 1e-5


def test_a_wrong_step_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = edited(ROWS[0])

    def wrong(coupling: object, reads: object) -> object:
        keep = real(coupling, reads)  # type: ignore[arg-type]
        keep[-1] = keep.all()
        return keep

    real = lossless.living
    monkeypatch.setattr(lossless, "living", wrong)
    with pytest.raises(VerificationError, match=r"outputs differ by .*; please report this model"):
        Lossless(threads=1)(model)


def test_zero_weights_stay_where_a_mean_over_channels_counts_them() -> None:
    body = "a = Conv(x, w1) m = ReduceMean<keepdims=1>(a, one) s = Mul(a, m) y = Conv(s, w2)"
    model = build(IMAGE, body, "w1:8,3,3,3 w2:4,8,1,1 one=1")
    array = weight(model, "w1").copy()
    array[:3] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w1"))
    result = Lossless(threads=1)(model)
    assert shapes(result.model)["w1"] == (8, 3, 3, 3)


def test_pipeline_removes_without_a_budget_and_replays(root: Path) -> None:
    from onnxprune import pipeline
    from onnxprune.plan import Plan

    model = io.load(root / "models" / "digits_mlp.onnx")
    masked, count = mask_producers(model, 0.3)
    result = prune(masked, lossless=True)
    assert result.report.notes == (f"removed without loss: {count} channels and 0 operators",)
    assert result.report.budget["kind"] == "lossless"
    assert result.report.checks[0].reference == "the original model"
    assert result.report.after.params < result.report.before.params == 18_986
    plan = Plan.from_json(result.plan.to_json())
    assert plan.lossless
    again = pipeline.apply(masked, plan)
    assert again.SerializeToString() == result.model.SerializeToString()


def test_a_budget_counts_what_went_before(root: Path) -> None:
    from onnxprune import pipeline

    model = io.load(root / "models" / "digits_mlp.onnx")
    masked, _ = mask_producers(model, 0.3)
    result = prune(masked, params=0.4)
    assert 0.35 < result.report.after.params / result.report.before.params <= 0.4
    assert result.report.layers[0].shape_before == (128, 64)
    again = pipeline.apply(masked, result.plan)
    assert again.SerializeToString() == result.model.SerializeToString()
    plain = prune(masked, params=0.4, lossless=False)
    assert not plain.plan.lossless


def test_a_failure_beforehand_is_a_note_unless_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = mask_producers(io.load(root / "models" / "digits_mlp.onnx"), 0.3)
    monkeypatch.setattr(lossless, "compare", lambda *_: (1.0, 1e-5))
    result = prune(model, params=0.5)
    assert result.report.notes[0].startswith("nothing was removed beforehand: lossless: outputs")
    with pytest.raises(VerificationError, match="outputs differ by 1"):
        prune(model, lossless=True)


def test_nothing_to_remove_is_said(root: Path) -> None:
    result = prune(io.load(root / "models" / "digits_mlp.onnx"), lossless=True)
    assert result.report.notes == ("no channel and no operator is without effect",)


@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 10))
def test_random_models_answer_as_before(seed: int, count: int) -> None:
    """The pass itself raises where the outputs differ."""
    model = spoiled(random_model(seed, count), seed)
    assume(not any("Random" in n.op_type or n.op_type == "Bernoulli" for n in model.graph.node))
    try:
        runtime.working_feeds(model, threads=1)
    except (InvalidModelError, InvalidDataError):
        assume(False)
    Lossless(threads=1)._result(model, (), merge=True)
