"""Single weights go: how many, which, and how well the others make up for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune import io, runtime, verify
from onnxprune.data import open_data
from onnxprune.errors import InvalidRecipeError, VerificationError
from onnxprune.graph import Graph
from onnxprune.matrices import find_matrices
from onnxprune.passes.prune_weights import PruneWeights
from onnxprune.sparse_file import with_sparse_initializers
from onnxprune.sparsity import Pattern, choose, exchange, obs, resolve
from tests.graphs import build, outputs, tensors, weight
from tests.quantized import dq, weights

LAYERS = {
    "conv": (
        "(float[N,4,8,8] x) => (float[N,6,?,?] y)",
        "y = Conv<pads=[1,2,1,0],strides=[2,1],dilations=[1,2]>(x, w, b)",
        "w:6,4,3,3 b:6",
    ),
    "conv-same": (
        "(float[N,4,9,9] x) => (float[N,6,?,?] y)",
        'y = Conv<auto_pad="SAME_LOWER",strides=[2,2]>(x, w)',
        "w:6,4,2,2",
    ),
    "conv-grouped": (
        "(float[N,4,8,8] x) => (float[N,6,?,?] y)",
        "y = Conv<group=2>(x, w, b)",
        "w:6,2,3,3 b:6",
    ),
    "conv-1d": ("(float[N,4,8] x) => (float[N,6,?] y)", "y = Conv(x, w)", "w:6,4,3"),
    "gemm": ("(float[N,8] x) => (float[N,6] y)", "y = Gemm(x, w, b)", "w:8,6 b:6"),
    "gemm-trans": ("(float[N,8] x) => (float[N,6] y)", "y = Gemm<transB=1>(x, w)", "w:6,8"),
    "matmul": ("(float[N,5,8] x) => (float[N,5,6] y)", "y = MatMul(x, w)", "w:8,6"),
    "matmul-left": ("(float[N,8,5] x) => (float[N,6,5] y)", "y = MatMul(w, x)", "w:6,8"),
}


def dataset(model: onnx.ModelProto, samples: int = 64) -> Any:
    feeds = runtime.random_feeds(model, batch=samples)
    return open_data([feeds], model)


@pytest.mark.parametrize("name", LAYERS)
def test_matrices_compute_what_the_layer_does(name: str) -> None:
    model = build(*LAYERS[name])
    (matrix,) = find_matrices(Graph.of(model))
    value = weight(model, "w")
    rows = matrix.read(value)
    assert np.array_equal(matrix.write(rows), value)
    assert rows.shape[2] == matrix.width
    feeds = runtime.random_feeds(model, batch=3)
    bias = weight(model, "b").reshape(-1) if "b" in LAYERS[name][2] else 0
    (y,) = outputs(model, feeds)
    found = matrix.moments([feeds["x"]], [feeds["x"]], 0)
    square, _ = found.means(False)
    energy = np.einsum("gmk,gkl,gml->", rows, square, rows) * found.rows
    axis = 1 if y.ndim > 2 and name != "matmul" else -1
    plain = np.moveaxis(y, axis, -1) - bias
    assert np.isclose(energy, float((plain.astype(np.float64) ** 2).sum()), rtol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_half_of_the_weights_go(name: str, method: Any) -> None:
    model = build(*LAYERS[name])
    result = PruneWeights(0.5, method=method, threads=1)(model, dataset(model))
    assert abs(float((weight(result.model, "w") == 0).mean()) - 0.5) < 0.1
    assert abs(result.sparsity - 0.5) < 0.1
    assert np.array_equal(weight(model, "w") == 0, np.zeros_like(weight(model, "w"), bool))
    onnx.checker.check_model(result.model, full_check=True)
    assert result.compressed_after < result.compressed_before


def test_updates_are_better_than_zeros_alone() -> None:
    model = build(*LAYERS["conv"])
    data = dataset(model, 256)
    feeds = runtime.random_feeds(model, seed=5, batch=64)
    errors = []
    for method in ("sparsegpt", "magnitude"):
        result = PruneWeights(0.5, method=method, threads=1)(model, data)  # type: ignore[arg-type]
        gap = outputs(result.model, feeds)[0] - outputs(model, feeds)[0]
        errors.append(float((gap**2).mean()))
    assert errors[0] < errors[1]


def test_two_of_four_channels_stay() -> None:
    model = build(*LAYERS["conv"])
    result = PruneWeights(pattern="2:4", threads=1)(model, dataset(model))
    kept = (weight(result.model, "w") != 0).sum(axis=1)
    assert (kept == 2).all()


def test_blocks_go_as_a_whole() -> None:
    model = build(*LAYERS["gemm"])
    result = PruneWeights(0.5, pattern="2x4", method="magnitude")(model)
    blocks = (weight(result.model, "w").T != 0).reshape(3, 2, 2, 4)
    assert ((blocks.sum(axis=(1, 3)) == 0) | (blocks.sum(axis=(1, 3)) == 8)).all()
    assert (blocks.sum(axis=(1, 3)) == 0).sum() == 3


def test_what_does_not_divide_or_is_named_stays() -> None:
    model = build(
        "(float[N,3] x) => (float[N,4] y)",
        "a = Gemm(x, w1) h = Relu(a) c = Gemm(h, w2) r = Relu(c) y = Gemm(r, w3)",
        "w1:3,8 w2:8,8 w3:8,4",
    )
    result = PruneWeights(pattern="2:4", method="magnitude", keep=("w3",))(model)
    notes = {layer.name: layer.note for layer in result.layers}
    assert notes == {"w1": "its shape does not divide into 2:4", "w2": "", "w3": "kept by name"}


def test_recurrent_weights() -> None:
    model = build(
        "(float[S,N,6] x) => (float[S,1,N,8] y)",
        "y, h, c = LSTM<hidden_size=8>(x, w, r)",
        "w:1,32,6 r:1,32,8",
    )
    result = PruneWeights(0.5, allocation="layer", threads=1)(model, dataset(model))
    assert [round(layer.sparsity, 1) for layer in result.layers] == [0.5, 0.5]


def test_global_allocation_spares_what_matters() -> None:
    model = build(
        "(float[N,8] x) => (float[N,8] y)",
        "a = Gemm(x, w1) h = Relu(a) y = Gemm(h, w2)",
        "w1:8,16 w2:16,8",
    )
    small = weight(model, "w1") * 0.01
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(small, "w1"))
    result = PruneWeights(0.5, method="magnitude", allocation="global")(model)
    first, second = (layer.sparsity for layer in result.layers)
    assert first > 0.9
    assert second < 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "sparsity 1: a share must be in"),
        ({"pattern": "4:2"}, "pattern '4:2': give unstructured, N:M as in 2:4, or RxC as in 4x1"),
        ({"method": "best"}, "method 'best': choose magnitude, wanda, sparsegpt"),
        ({"allocation": "x"}, "allocation 'x': choose layer, global"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRecipeError, match=words):
        PruneWeights(**options)


def test_methods_that_need_data_say_so() -> None:
    with pytest.raises(InvalidRecipeError, match="method wanda needs data to calibrate on"):
        PruneWeights(method="wanda")(build(*LAYERS["gemm"]))


def test_obs_keeps_the_outputs_of_correlated_inputs() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2))
    x = np.concatenate([x, x + 0.01 * rng.normal(size=x.shape)], axis=1)
    hessian = x.T @ x / len(x)
    w = rng.normal(size=(3, 4))
    pattern = Pattern.parse("unstructured")
    new = obs(w, hessian, 0.5, pattern, 1e-3)
    best = resolve(w, new != 0, hessian, hessian, 1e-3)
    plain = np.where(choose(np.abs(w)[None], 0.5, pattern)[0], w, 0)
    gaps = [float(((v - w) @ hessian * (v - w)).sum()) for v in (best, new, plain)]
    assert gaps[0] <= gaps[1] * 1.01 < gaps[2]


def test_digits_at_half(root: Path) -> None:
    from onnxprune.metrics import evaluate

    model = io.load(root / "models" / "digits_cnn.onnx")
    data = open_data(str(root / "models" / "digits_train.npz"), model)
    test = open_data(str(root / "models" / "digits_test.npz"), model)
    result = PruneWeights(0.5, samples=256, threads=1)(model, data)
    before, after = (evaluate(m, test, threads=1)["accuracy"] for m in (model, result.model))
    assert before - after < 0.01


def test_sparse_initializers_run_alike() -> None:
    model = build(*LAYERS["conv"])
    pruned = PruneWeights(0.8, method="magnitude", allocation="layer")(model).model
    sparse = with_sparse_initializers(pruned)
    assert [t.values.name for t in sparse.graph.sparse_initializer] == ["w"]
    assert sparse.ByteSize() < pruned.ByteSize()
    feeds = runtime.random_feeds(model)
    assert verify.difference(outputs(sparse, feeds), outputs(pruned, feeds)) == 0
    onnx.checker.check_model(sparse)


def test_weights_of_a_pattern_change_places_where_that_helps() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 16)) @ rng.normal(size=(16, 16))
    hessian, w = x.T @ x / len(x), rng.normal(size=(5, 16))
    pattern = Pattern.parse("2:4")
    start = resolve(w, choose(np.abs(w)[None], 0.5, pattern)[0], hessian, hessian, 1e-3)
    new = exchange(w, start, hessian, hessian, pattern, 1e-3)
    assert ((new != 0).reshape(5, 4, 4).sum(axis=2) == 2).all()
    gaps = [np.einsum("mk,kl,ml->m", v - w, hessian, v - w) for v in (new, start)]
    assert (gaps[0] <= gaps[1] * 1.001).all()
    assert gaps[0].sum() < 0.9 * gaps[1].sum()


TARGETS = {
    "conv-transpose": (
        "(float[N,8,5,5] x) => (float[N,6,?,?] y)",
        "y = ConvTranspose<group=2,strides=[2,2]>(x, w, b)",
        "w:8,3,3,3 b:6",
        "",
    ),
    "stack": (
        "(float[N,3,5,8] x) => (float[N,3,5,4] y)",
        "y = MatMul(x, w)",
        "w:3,8,4",
        "chosen by magnitude: it is a stack of matrices",
    ),
    "no-hidden-state": (
        "(float[S,N,8] x) => (float[1,N,8] h)",
        "y_, h = GRU<hidden_size=8>(x, w2, w)",
        "w2:1,24,8 w:1,24,8",
        "",
    ),
    "batch-first": (
        "(float[N,S,8] x) => (float[N,1,8] h)",
        "y_, h = RNN<hidden_size=8,layout=1>(x, w2, w)",
        "w2:1,8,8 w:1,8,8",
        "chosen by magnitude: its inputs are not at hand",
    ),
    "shared": (
        "(float[N,8] x) => (float[N,8] y)",
        "a = Gemm(x, w) h = Relu(a) y = Gemm(h, w)",
        "w:8,8",
        "",
    ),
    "shared-in-two-ways": (
        "(float[N,8] x) => (float[N,8] y)",
        "a = Gemm(x, w) h = Relu(a) y = Gemm<transB=1>(h, w)",
        "w:8,8",
        "chosen by magnitude: layers read it in different ways",
    ),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_two_of_four_wherever_a_weight_is(name: str, method: Any) -> None:
    *parts, note = TARGETS[name]
    model = build(*parts)
    if name == "batch-first":  # ONNX Runtime has no such cell: nothing can be measured
        method = "magnitude"
    run = PruneWeights(pattern="2:4", method=method, threads=1)
    result = run(model, None if method == "magnitude" else dataset(model))
    layer = next(row for row in result.layers if row.name == "w")
    assert layer.note == ("" if method == "magnitude" else note)
    assert layer.sparsity == 0.5
    matrix = next(m for m in find_matrices(Graph.of(result.model)) if m.name == "w")
    rows = matrix.read(weight(result.model, "w"))
    assert ((rows != 0).reshape(*rows.shape[:2], -1, 4).sum(axis=3) == 2).all()
    if name != "batch-first":
        outputs(result.model, runtime.random_feeds(model))


def test_a_shared_weight_is_measured_in_both_places() -> None:
    model = build(*TARGETS["shared"][:3])
    (matrix,) = find_matrices(Graph.of(model))
    assert [m.x for m in (matrix, *matrix.shared)] == ["x", "h"]


def test_weights_in_branches_are_pruned() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        "g (float[N,8] x, bool c) => (float[N,8] y) {\n"
        "y = If(c) <then_branch = a () => (float[N,8] p) { p = MatMul(x, w1) }, "
        "else_branch = b () => (float[N,8] q) { q = MatMul(x, w2) }>\n}"
    )
    for number, attribute in enumerate(model.graph.node[0].attribute, 1):
        attribute.g.initializer.extend(tensors(f"w{number}:8,8"))
    for method in ("magnitude", "sparsegpt"):
        run = PruneWeights(pattern="2:4", method=method, threads=1)  # type: ignore[arg-type]
        result = run(model, None if method == "magnitude" else dataset(model))
        assert [row.sparsity for row in result.layers] == [0.5, 0.5]
        stored = [t for a in result.model.graph.node[0].attribute for t in a.g.initializer]
        assert [(numpy_helper.to_array(t) == 0).mean() for t in stored] == [0.5, 0.5]
    assert result.layers[0].note == "chosen by magnitude: it is inside of a loop or branch"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("t = Transpose(w) y = MatMul(x, t)", "it is computed from a stored tensor: fold"),
        ("y = Gemm(w, x)", "this input of Gemm is none that is pruned"),
    ],
)
def test_weights_that_are_not_seen_are_reported(body: str, words: str) -> None:
    model = build("(float[8,8] x) => (float[8,8] y)", body, "w:8,8")
    (row,) = PruneWeights(method="magnitude")(model).layers
    assert (row.name, row.shape, row.sparsity) == ("w", (8, 8), 0.0)
    assert row.note.startswith(words)


def test_quantized_weights_are_reported() -> None:
    model = build("(float[N,8] x) => (float[N,4] y)", f"{dq('w')} y = MatMul(x, w)")
    model.graph.initializer.extend(weights("w_q:i8:8,4 sw:f: zw:i8:"))
    (row,) = PruneWeights(method="magnitude")(model).layers
    assert row.note == "it is quantized: set weights to zero before quantizing"


def test_half_precision_stays() -> None:
    model = build(*LAYERS["gemm"])
    half = numpy_helper.from_array(weight(model, "w").astype(np.float16), "w")
    graph = build("(float16[N,8] x) => (float16[N,6] y)", "y = MatMul(x, w)")
    graph.graph.initializer.append(half)
    result = PruneWeights(pattern="2:4", threads=1)(graph, dataset(graph))
    assert weight(result.model, "w").dtype == np.float16
    assert (weight(result.model, "w") == 0).mean() == 0.5
    outputs(result.model, runtime.random_feeds(graph))


def test_a_weight_against_the_pattern_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pattern.parse("2:4")
    assert pattern.holds(np.array([[[1, 0, 2, 0, 0, 0, 0, 3]]]))
    assert not pattern.holds(np.array([[[1, 1, 2, 0]]]))
    monkeypatch.setattr("onnxprune.passes.prune_weights.choose", lambda s, *_, **__: s > -1)
    with pytest.raises(VerificationError, match="w: not 2:4; please report it"):
        PruneWeights(pattern="2:4", method="magnitude")(build(*LAYERS["gemm"]))
