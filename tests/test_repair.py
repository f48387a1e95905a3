"""Repairs without gradients: exact where the removed channels follow from those that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxprune.analysis import Analysis, analyse
from onnxprune.calibration.editable import Editable
from onnxprune.calibration.sequential import Repaired
from onnxprune.calibration.sites import find_sites
from onnxprune.errors import InvalidRecipeError
from onnxprune.passes.apply import apply_keep
from onnxprune.passes.compensate import CompensateBias
from onnxprune.passes.match_moments import MatchMoments
from onnxprune.passes.reconstruct import Reconstruct
from onnxprune.rewriting import Rewriter
from tests.graphs import build, outputs, prune, shapes, weight

Array = NDArray[Any]
SPACE = "(float[N,3,9,9] x) => (float[N,M,P,Q] y)"
ROWS = "(float[N,5] x) => (float[N,M] y)"
#: Readers of h, whose channels 4 to 7 are mixtures of 0 to 3: name -> (nodes, weights).
READERS: dict[str, tuple[str, str]] = {
    "conv": ("y = Conv<pads=[1,1,1,1]>(h, w, b)", "w:4,8,3,3 b:4"),
    "no bias": ("y = Conv(h, w)", "w:4,8,3,3"),
    "strided": ("y = Conv<strides=[2,1], pads=[0,1,2,0]>(h, w, b)", "w:4,8,3,2 b:4"),
    "dilated": ("y = Conv<dilations=[2,3], pads=[2,3,2,3]>(h, w, b)", "w:4,8,3,3 b:4"),
    "auto pad": ('y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(h, w, b)', "w:4,8,3,3 b:4"),
    "transposed": (
        "y = ConvTranspose<strides=[2,2], output_padding=[1,0], pads=[1,0,0,1]>(h, w, b)",
        "w:8,4,3,3 b:4",
    ),
    "normalized": (
        "c = Conv<pads=[1,1,1,1]>(h, w)  y = BatchNormalization(c, gamma, beta, mean, var)",
        "w:4,8,3,3 gamma:4 beta:4 mean:4 var:4",
    ),
    "scaled": (
        "c = Conv(h, w, b)  d = Mul(c, s)  e = Add(d, t)  y = Identity(e)",
        "w:4,8,3,3 b:4 s:4,1,1 t:1,4,1,1",
    ),
    "added": ("c = Conv(h, w, b)  d = Conv(x, v)  y = Add(d, c)", "w:4,8,1,1 b:4 v:4,3,2,2"),
}


def mixed(tensor: onnx.TensorProto, axis: int) -> None:
    """Slices 4 to 7 of an axis of length 8 become mixtures of slices 0 to 3."""
    array = np.moveaxis(numpy_helper.to_array(tensor).copy(), axis, 0)
    mix = np.random.default_rng(5).normal(0, 0.7, (4, 4)).astype(np.float32)
    array[4:] = np.tensordot(mix, array[:4], 1)
    tensor.CopyFrom(numpy_helper.from_array(np.moveaxis(array, 0, axis), tensor.name))


def without(analysis: Analysis, tensor: str, axis: int, gone: slice) -> NDArray[np.bool_]:
    """The choice that removes some channels of a tensor."""
    block = next(b for b in analysis.coupling.layouts[tensor] if b.axes == (axis,))
    keep = analysis.everything
    keep[analysis.coupling.solution.unit[block.labels[gone]]] = False
    return keep


def feeds(model: onnx.ModelProto, count: int = 6, seed: int = 0) -> list[Mapping[str, Array]]:
    rng = np.random.default_rng(seed)
    dims = [d.dim_value or 16 for d in model.graph.input[0].type.tensor_type.shape.dim]
    return [{"x": rng.normal(0.3, 1, dims).astype(np.float32)} for _ in range(count)]


def halved(model: onnx.ModelProto, axis: int = 1) -> tuple[onnx.ModelProto, Rewriter]:
    """The model without the channels 4 to 7 of h."""
    analysis = analyse(model)
    keep = without(analysis, "h", axis, slice(4, 8))
    return apply_keep(analysis.coupling, keep).model, Rewriter(analysis.coupling, keep)


def gap(a: onnx.ModelProto, b: onnx.ModelProto) -> float:
    """The largest difference of the outputs on fresh inputs, relative to the largest output."""
    inputs = feeds(a, 1, seed=9)[0]
    ours, theirs = outputs(a, inputs)[0], outputs(b, inputs)[0]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", READERS)
def test_a_convolution_is_reconstructed_where_that_is_possible(name: str) -> None:
    body, spec = READERS[name]
    model = build(SPACE, f"h = Conv(x, w0)  {body}", f"w0:8,3,2,2 {spec}")
    mixed(model.graph.initializer[0], 0)
    pruned, rewriter = halved(model)
    assert gap(pruned, model) > 0.05
    result = Reconstruct(threads=1)(pruned, rewriter, feeds(model))
    assert result.skipped == {}
    assert gap(result.model, model) < 2e-3


@pytest.mark.parametrize(
    ("body", "spec"),
    [
        ("y = Gemm<transB=1, alpha=0.5, beta=2.0>(h, w, b)", "w:4,8 b:4"),
        ("y = Gemm(h, w)", "w:8,4"),
        ("c = MatMul(h, w)  y = Add(b, c)", "w:8,4 b:4"),
        ("y = MatMul(h, w)", "w:8,4"),
        ("c = MatMul(h, w)  d = MatMul(x, v)  y = Add(c, d)", "w:8,4 v:5,4"),
    ],
)
def test_a_matrix_product_is_reconstructed(body: str, spec: str) -> None:
    model = build(ROWS, f"h = MatMul(x, w0)  {body}", f"w0:5,8 {spec}")
    mixed(model.graph.initializer[0], 1)
    pruned, rewriter = halved(model)
    assert gap(pruned, model) > 0.05
    assert gap(Reconstruct(threads=1)(pruned, rewriter, feeds(model)).model, model) < 2e-3


@pytest.mark.parametrize(
    ("body", "spec"),
    [
        ("y, last = LSTM<hidden_size=3>(h, w, r, b)", "w:1,12,8 r:1,12,3 b:1,24"),
        ('y = GRU<hidden_size=3, direction="bidirectional">(h, w, r)', "w:2,9,8 r:2,9,3"),
        ("empty, y = RNN<hidden_size=3>(h, w, r)", "w:1,3,8 r:1,3,3"),
    ],
)
def test_a_recurrent_cell_is_reconstructed(body: str, spec: str) -> None:
    signature = "(float[7,N,5] x) => (float[P,Q,R,S] y)".replace(
        ",R,S", ",R" if "empty" in body else ",R,S"
    )
    model = build(signature, f"h = MatMul(x, w0)  {body}", f"w0:5,8 {spec}")
    for node in model.graph.node:
        node.output[:] = ["" if name == "empty" else name for name in node.output]
    mixed(model.graph.initializer[0], 1)
    pruned, rewriter = halved(model, 2)
    assert gap(pruned, model) > 0.03
    result = Reconstruct(threads=1)(pruned, rewriter, feeds(model, 12))
    assert (result.solved, result.skipped) == (2, {})
    assert gap(result.model, model) < 5e-3


def test_the_hidden_units_of_a_cell_may_go_too() -> None:
    body = """h = MatMul(x, w0)  g, last = LSTM<hidden_size=4>(h, w, r, b)
    s = Squeeze(last, axis)  y = MatMul(s, v)"""
    model = build(
        "(float[7,N,5] x) => (float[N,2] y)", body, "w0:5,8 w:1,16,8 r:1,16,4 b:1,32 v:4,2 axis=0"
    )
    analysis = analyse(model)
    assert len(analysis.groups) == 2
    report = prune(model, channels=0.5, repair="reconstruct").report
    assert report.rebuild[1]["solved"] == 3
    assert report.rebuild[1]["output_error"] < report.rebuild[0]["output_error"]


def test_a_grouped_convolution_is_reconstructed_group_by_group() -> None:
    """Positions 2 and 3 of both groups go; they are mixtures of 0 and 1 of the same group."""
    model = build(
        SPACE,
        "h = Conv(x, w0)  y = Conv<group=2, pads=[1,1,1,1]>(h, w, b)",
        "w0:8,3,1,1 w:4,4,3,3 b:4",
    )
    array = numpy_helper.to_array(model.graph.initializer[0]).copy()
    array[2], array[3] = array[0] - array[1], 0.5 * array[0]
    array[6], array[7] = 2 * array[4], array[4] + array[5]
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w0"))
    analysis = analyse(model)
    keep = without(analysis, "h", 1, slice(2, 4))
    pruned = apply_keep(analysis.coupling, keep).model
    assert shapes(pruned)["w"] == (4, 2, 3, 3)
    result = Reconstruct(threads=1)(pruned, Rewriter(analysis.coupling, keep), feeds(model))
    assert gap(pruned, model) > 0.05
    assert gap(result.model, model) < 2e-3


def test_a_depthwise_convolution_takes_part() -> None:
    model = build(
        SPACE,
        "h = Conv(x, w0)  d = Conv<group=8, pads=[1,1,1,1]>(h, w1, b1)  y = Conv(d, w, b)",
        "w0:8,3,1,1 w1:8,1,3,3 b1:8 w:4,8,1,1 b:4",
    )
    pruned, rewriter = halved(model)
    result = Reconstruct(threads=1)(pruned, rewriter, feeds(model))
    assert (result.solved, result.skipped) == (3, {})
    assert gap(result.model, model) < gap(pruned, model)


def test_the_parallel_form_solves_on_the_original_s_inputs() -> None:
    model = build(
        SPACE, "h = Conv(x, w0)  y = Conv<pads=[1,1,1,1]>(h, w, b)", "w0:8,3,2,2 w:4,8,3,3 b:4"
    )
    mixed(model.graph.initializer[0], 0)
    pruned, rewriter = halved(model)
    result = Reconstruct(inputs="original", threads=1)(pruned, rewriter, feeds(model))
    assert gap(result.model, model) < 2e-3


def test_a_branch_makes_good_what_the_stream_lost() -> None:
    """The first branch is rebuilt badly (no inputs left to do better); the second corrects it."""
    body = """s = Conv(x, w0)  h = Conv(x, w1)  a = Conv(h, w2, b2)  t = Add(s, a)
    k = Conv(x, w3)  c = Conv(k, w4, b4)  y = Add(t, c)"""
    model = build(SPACE, body, "w0:4,3,1,1 w1:8,3,1,1 w2:4,8,1,1 b2:4 w3:9,3,1,1 w4:4,9,1,1 b4:4")
    analysis = analyse(model)
    keep = without(analysis, "h", 1, slice(1, 8))
    pruned = apply_keep(analysis.coupling, keep).model
    last = next(s for s in find_sites(Editable(pruned)) if s.output == "c")
    assert (last.other, last.target) == ("t", "y")
    result = Reconstruct(threads=1)(pruned, Rewriter(analysis.coupling, keep), feeds(model))
    assert gap(pruned, model) > 0.05
    assert gap(result.model, model) < 2e-3


def test_the_mean_is_right_at_padded_borders() -> None:
    """Removed channels are constant (h = bias), but not where zero padding surrounds them."""
    model = build(
        SPACE,
        "h = Conv(x, w0, b0)  y = Conv<pads=[2,2,2,2]>(h, w, b)",
        "w0:8,3,1,1 b0:8 w:4,8,3,3 b:4",
    )
    array = numpy_helper.to_array(model.graph.initializer[0]).copy()
    array[4:] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w0"))
    pruned, rewriter = halved(model)
    data = feeds(model)
    repaired = CompensateBias(threads=1)(pruned, rewriter, data).model

    def mean(of: onnx.ModelProto) -> Array:
        return np.mean([outputs(of, f)[0].mean((0, 2, 3)) for f in data], axis=0)

    assert np.abs(mean(pruned) - mean(model)).max() > 0.05
    np.testing.assert_allclose(mean(repaired), mean(model), atol=1e-4)
    np.testing.assert_array_equal(weight(repaired, "w"), weight(pruned, "w"))


def test_moments_are_matched() -> None:
    model = build(SPACE, "h = Conv(x, w0)  y = Conv(h, w, b)", "w0:8,3,1,1 w:4,8,3,3 b:4")
    pruned, rewriter = halved(model)
    data = feeds(model)
    repaired = MatchMoments(threads=1)(pruned, rewriter, data).model

    def moments(of: onnx.ModelProto) -> tuple[Array, Array]:
        y = np.concatenate([outputs(of, f)[0] for f in data])
        return y.mean((0, 2, 3)), y.var((0, 2, 3))

    for ours, theirs in zip(moments(repaired), moments(model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_folded_normalization_changes_nothing() -> None:
    """What is solved is the channel behind the normalization: both exports end alike."""
    spec = "w0:8,3,1,1 w:8,8,3,3 v:4,8,1,1 gamma:8 beta:8 mean:8 var:8"
    whole = build(
        SPACE,
        """h = Conv(x, w0)  c = Conv(h, w)  n = BatchNormalization(c, gamma, beta, mean, var)
        r = Relu(n)  y = Conv(r, v)""",
        spec,
    )
    folded = build(SPACE, "h = Conv(x, w0)  n = Conv(h, w, b)  r = Relu(n)  y = Conv(r, v)", spec)
    gamma, beta, mean, var = (weight(whole, n) for n in ("gamma", "beta", "mean", "var"))
    scale = gamma / np.sqrt(var + 1e-5)
    values = {"w": weight(whole, "w") * scale[:, None, None, None], "b": beta - mean * scale}
    kept = [t for t in folded.graph.initializer if t.name in ("w0", "v")]
    del folded.graph.initializer[:]
    folded.graph.initializer.extend(kept)
    folded.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in values.items())
    assert gap(folded, whole) < 1e-5
    ends = []
    for model in (whole, folded):
        pruned, rewriter = halved(model)
        ends.append(Reconstruct(threads=1)(pruned, rewriter, feeds(model)).model)
    assert gap(*ends) < 2e-3


def test_recorded_statistics_are_those_of_the_repaired_model() -> None:
    body, spec = READERS["normalized"]
    model = build(SPACE, f"h = Conv(x, w0)  {body}", f"w0:8,3,1,1 {spec}")
    pruned, rewriter = halved(model)
    data = feeds(model)
    repaired = Reconstruct(threads=1)(pruned, rewriter, data).model
    probe = onnx.ModelProto()
    probe.CopyFrom(repaired)
    probe.graph.output.append(onnx.ValueInfoProto(name="c"))
    inner = np.concatenate([outputs(probe, f)[1] for f in data])
    np.testing.assert_allclose(weight(repaired, "mean"), inner.mean((0, 2, 3)), atol=0.02)
    np.testing.assert_allclose(weight(repaired, "var"), inner.var((0, 2, 3)), rtol=0.05)


def test_shared_weights_stay_and_shared_biases_part() -> None:
    body = "h = Conv(x, w0)  a = Conv(h, w, b)  r = Relu(a)  c = Conv(r, v, b)  y = Conv(c, v, b)"
    model = build(SPACE, body, "w0:8,3,1,1 w:4,8,1,1 v:4,4,1,1 b:4")
    pruned, rewriter = halved(model)
    result = Reconstruct(threads=1)(pruned, rewriter, feeds(model))
    assert result.solved == 2
    np.testing.assert_array_equal(weight(result.model, "v"), weight(model, "v"))
    np.testing.assert_array_equal(weight(result.model, "b"), weight(model, "b"))
    bound = Reconstruct(may_grow=False, threads=1)(pruned, rewriter, feeds(model)).model
    assert shapes(bound) == shapes(pruned)


def test_inputs_that_hardly_vary_are_solved_all_the_same() -> None:
    """Sums in float32 leave a covariance indefinite where a mean is large and ranks are low."""
    model = build(ROWS, "h = MatMul(x, w0)  y = MatMul(h, w)", "w0:5,8 w:8,4")
    pruned, rewriter = halved(model)
    data = [{"x": 1e3 + 1e-3 * f["x"]} for f in feeds(model)]
    result = Reconstruct(threads=1)(pruned, rewriter, data)
    assert (result.solved, result.skipped) == (2, {})
    data[0]["x"][0] = np.nan
    result = Reconstruct(threads=1)(pruned, rewriter, data)
    assert set(result.skipped) == {"h", "y"}
    assert result.model == pruned


def test_weights_in_constant_nodes_are_written() -> None:
    model = build(ROWS, "h = MatMul(x, w0)  y = MatMul(h, w)", "w0:5,8 w:8,4")
    mixed(model.graph.initializer[0], 1)
    stored = model.graph.initializer.pop()
    node = onnx.helper.make_node("Constant", [], ["w"], value=stored)
    model.graph.node.insert(0, node)
    pruned, rewriter = halved(model)
    assert gap(Reconstruct(threads=1)(pruned, rewriter, feeds(model)).model, model) < 2e-3


@pytest.mark.parametrize("make", [Reconstruct, MatchMoments, CompensateBias])
def test_inputs_stay_as_they_were(make: Callable[..., Any]) -> None:
    model = build(SPACE, "h = Conv(x, w0)  y = Conv(h, w, b)", "w0:8,3,1,1 w:4,8,3,3 b:4")
    pruned, rewriter = halved(model)
    before = pruned.SerializeToString(), model.SerializeToString()
    result = make(threads=1)(pruned, rewriter, feeds(model))
    assert isinstance(result, Repaired)
    assert (pruned.SerializeToString(), model.SerializeToString()) == before


class TestPipeline:
    """`prune` repairs by default, says with what, and drops what does not help."""

    MODEL = build(
        "(float[N,3,12,12] x) => (float[N,4,10,10] y)",
        """c = Conv<pads=[1,1,1,1]>(x, w0)  n = BatchNormalization(c, gamma, beta, mean, var)
        r = Relu(n)  y = Conv(r, w, b)""",
        "w0:12,3,3,3 gamma:12 beta:12 mean:12 var:12 w:4,12,3,3 b:4",
    )

    def data(self) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        return {"x": rng.normal(size=(96, 3, 12, 12)).astype(np.float32)}

    @pytest.mark.parametrize("repair", ["auto", "reconstruct", "moments", "bias"])
    def test_a_repair_brings_the_outputs_nearer(self, repair: str) -> None:
        report = prune(self.MODEL, channels=0.5, data=self.data(), repair=repair).report
        pruned, step = report.rebuild
        assert step["step"] == ("reconstruct" if repair == "auto" else repair)
        assert step["output_error"] < pruned["output_error"]
        assert (step["inputs"], step["samples"], report.notes) == ("data", 96, ())
        assert report.options["criterion"] == "reconstruction"

    def test_without_data_inputs_are_made_up_and_the_report_says_so(self) -> None:
        report = prune(self.MODEL, channels=0.5, repair="auto").report
        assert report.rebuild[1]["inputs"] == "synthesized images"
        assert report.notes == ("repaired without data, with synthesized images",)
        rows = build(ROWS, "h = MatMul(x, w0)  r = Relu(h)  y = MatMul(r, w)", "w0:5,8 w:8,4")
        report = prune(rows, channels=0.5, repair="auto").report
        assert report.notes == ("repaired without data, with random inputs",)
        assert report.options["criterion"] == "l2"

    def test_a_large_model_is_repaired_without_data_only_if_asked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("onnxprune.rebuild.LARGE", 100)
        report = prune(self.MODEL, channels=0.5, repair="auto").report
        assert [s["step"] for s in report.rebuild] == ["pruned"]
        assert "--repair reconstruct does it with made-up inputs" in report.notes[0]
        assert report.options["criterion"] == "l2"
        report = prune(self.MODEL, channels=0.5, repair="reconstruct").report
        assert [s["step"] for s in report.rebuild] == ["pruned", "reconstruct"]

    def test_a_repair_that_does_not_help_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def worse(self: Any, model: onnx.ModelProto, *_: Any, **__: Any) -> Repaired:
            broken = onnx.ModelProto()
            broken.CopyFrom(model)
            for tensor in broken.graph.initializer:
                array = 3 * numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            return Repaired(broken)

        monkeypatch.setattr(Reconstruct, "__call__", worse)
        options = {"channels": 0.5, "data": self.data(), "criterion": "l2"}
        result = prune(self.MODEL, repair="reconstruct", **options)
        assert result.report.notes == (
            "no repair was kept (reconstruct: the outputs came no nearer)",
        )
        assert shapes(result.model) == shapes(prune(self.MODEL, **options).model)

    def test_a_budget_of_parameters_holds_after_repair(self) -> None:
        report = prune(self.MODEL, params=0.5, data=self.data(), repair="auto").report
        assert report.after.params <= 0.5 * report.before.params
        assert report.rebuild[1]["step"] == "reconstruct"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"repair": "magic"}, "--repair 'magic' is unknown: choose auto, none, reconstruct"),
            ({"repair": "bn"}, "--repair bn measures statistics: add --data"),
            ({"criterion": "wanda"}, "--criterion wanda measures on inputs: add --data"),
            ({"criterion": "taste"}, "choose one of bn-scale, flap, fpgm"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidRecipeError, match=words):
            prune(self.MODEL, channels=0.5, **options)
