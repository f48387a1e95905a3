"""Inputs made up without data, and models that see them as if they were data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.analysis import analyse
from onnxprune.calibration import sequential
from onnxprune.calibration.adapt import adapt
from onnxprune.calibration.editable import Editable
from onnxprune.calibration.gram import OPERATIONS, affordable
from onnxprune.calibration.inputs import made_up
from onnxprune.calibration.sequential import kept_indices
from onnxprune.calibration.synthetic import (
    deviations,
    herded,
    image_axes,
    recorded,
    synthesize,
)
from onnxprune.calibration.varied import chosen_by_class, draw, surest
from onnxprune.passes.apply import apply_keep
from onnxprune.passes.reconstruct import Reconstruct
from onnxprune.rebuild import parted
from onnxprune.rewriting import Rewriter
from tests.graphs import build, mlp, outputs, replaced

Array = NDArray[Any]
BODY = """c = Conv(x, w)  d = BatchNormalization(c, gamma, beta, mean, var)  e = Relu(d)
f = Conv(e, v)  g = BatchNormalization(f, gamma2, beta2, mean2, var2)  h = GlobalAveragePool(g)
y = Flatten(h)"""
WEIGHTS = """w:8,1,3,3 gamma:8 beta:8 mean:8 var:8 v:4,8,3,3 gamma2:4 beta2:4 mean2:4 var2:4"""


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    """Two normalized convolutions, and scores of 4 classes."""
    model = build("(float[N,1,16,16] x) => (float[N,4] y)", BODY, WEIGHTS)
    return replaced(replaced(model, "var", np.full(8, 0.5)), "var2", np.full(4, 0.7))


def images(count: int, seed: int = 0, scale: float = 1.0) -> list[dict[str, Array]]:
    """Batches of 32."""
    rng = np.random.default_rng(seed)
    return [
        {"x": (scale * rng.normal(size=(32, 1, 16, 16)) + 1).astype(np.float32)}
        for _ in range(count)
    ]


def test_adapted_norms_have_the_statistics_of_their_inputs(net: onnx.ModelProto) -> None:
    """Behind each one is what it gives on real data: mean beta and variance gamma^2."""
    data = images(4)
    adapted = adapt(net, data, threads=1)
    assert adapted is not None
    model = Editable(adapted.model)
    for node in ("d", "g"):
        probe = model.model()
        probe.graph.output.append(onnx.ValueInfoProto(name=node))
        got = np.concatenate([outputs(probe, f)[1] for f in data])
        own, _ = adapted.norms[node]
        np.testing.assert_allclose(got.mean((0, 2, 3)), own.beta, atol=1e-3)
        np.testing.assert_allclose(got.std((0, 2, 3)), np.abs(own.gamma), rtol=1e-3, atol=1e-3)


def test_the_way_back_is_the_way_in_reversed(net: onnx.ModelProto) -> None:
    adapted = adapt(net, images(2), threads=1)
    assert adapted is not None
    inside = adapted.enter(net, {})
    feeds = images(1, 5)[0]
    np.testing.assert_allclose(
        outputs(inside, feeds)[0], outputs(adapted.model, feeds)[0], rtol=1e-4, atol=1e-4
    )
    back = adapted.leave(inside, {})
    np.testing.assert_allclose(
        outputs(back, feeds)[0], outputs(net, feeds)[0], rtol=1e-4, atol=1e-4
    )


def test_a_shift_of_the_input_comes_back_in_the_input_s_units(net: onnx.ModelProto) -> None:
    adapted = adapt(net, images(2, scale=9.0), threads=1)
    assert adapted is not None
    own, real = adapted.norms["d"]
    changed = Editable(adapted.model)
    moved = own.beta + 0.25 * own.scale
    changed.write(next(i for i, n in enumerate(changed.nodes) if n.output[0] == "d"), 2, moved)
    back = Editable(adapted.leave(changed.model(), {}))
    beta = back.weight(back.nodes[1].input[2])
    assert beta is not None
    np.testing.assert_allclose(beta, real.beta + 0.25 * real.scale, rtol=1e-4, atol=1e-5)


def test_a_repair_on_unlike_inputs_holds_on_real_ones(net: onnx.ModelProto) -> None:
    """A channel that repeats another may go, though the made-up inputs are far from the data."""
    w = Editable(net).weight("w")
    assert w is not None
    model = replaced(net, "w", w[[0, 1, 2, 3, 0, 1, 2, 3]])
    for name in ("gamma", "beta", "mean", "var"):
        value = Editable(model).weight(name)
        assert value is not None
        model = replaced(model, name, value[[0, 1, 2, 3, 0, 1, 2, 3]])
    analysis = analyse(model)
    group = next(g for g in analysis.groups if g.size == 8)
    keep = np.ones(analysis.coupling.solution.units, bool)
    keep[group.units[4:]] = False
    rewriter = Rewriter(analysis.coupling, keep)
    data = images(4, scale=5.0)
    adapted = adapt(model, data, threads=1)
    assert adapted is not None
    kept = {n: at[1] for n in adapted.norms if 1 in (at := kept_indices(rewriter, n))}
    assert kept["d"].tolist() == [0, 1, 2, 3]
    pruned = apply_keep(analysis.coupling, keep).model
    result = Reconstruct(threads=1)(
        adapted.enter(pruned, kept), rewriter, data, original=adapted.model
    )
    repaired = adapted.leave(result.model, kept)
    feeds = images(1, 9, scale=0.3)[0]
    wanted = outputs(model, feeds)[0]
    np.testing.assert_allclose(outputs(repaired, feeds)[0], wanted, atol=0.02 * np.ptp(wanted))


def test_nothing_is_adapted_without_recorded_statistics(net: onnx.ModelProto) -> None:
    assert adapt(mlp(5, 8, 3), [{"x": np.ones((2, 5), np.float32)}], threads=1) is None
    model = onnx.ModelProto()
    model.CopyFrom(net)
    model.graph.node[1].input[3] = "beta"  # shared: a number of its own would make the file larger
    strict = adapt(model, images(1), may_grow=False, threads=1)
    assert strict is not None and set(strict.norms) == {"g"}


def test_images_are_chosen_by_recorded_statistics(
    net: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their deviation from the record is less than that of images taken as they come."""
    monkeypatch.setattr("onnxprune.calibration.synthetic.NORMS", 1)
    axes = image_axes(net)
    target = draw(net, axes, 64, 3, np.random.default_rng(3))
    bright = {"x": (0.3 * target["x"] + 0.6).astype(np.float32)}
    probe = onnx.ModelProto()
    probe.CopyFrom(net)
    probe.graph.output.append(onnx.ValueInfoProto(name="c"))
    inner = outputs(probe, bright)[1]
    model = replaced(net, "mean", inner.mean((0, 2, 3)))
    model = replaced(model, "var", inner.var((0, 2, 3)))
    norms = recorded(Editable(model))[:1]
    sizes = []
    for tries in (0, 1000):
        found = synthesize(model, 128, tries=tries, threads=1)
        assert found is not None and sum(len(b["x"]) for b in found) == 128
        off = deviations(Editable(model), norms, found, threads=1)
        assert off is not None
        sizes.append(float(np.linalg.norm(off.mean(axis=0))))
    assert sizes[1] < 0.3 * sizes[0]


def test_herded_rows_cancel() -> None:
    rows = np.array([[3.0, 0], [1, 1], [-1, -1], [0, 9], [0.5, -0.5], [-0.5, 0.5]])
    assert sorted(herded(rows, 4).tolist()) == [1, 2, 4, 5]


def test_every_class_gives_its_surest_examples() -> None:
    sure = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert surest(sure, 2).tolist() == [0, 3]


def test_classes_choose_where_nothing_is_recorded() -> None:
    model = build(
        "(float[N,1,16,16] x) => (float[N,4] y)",
        "c = Conv(x, w)  h = GlobalMaxPool(c)  y = Flatten(h)",
        "w:4,1,3,3",
    )
    axes = image_axes(model)
    session, spreads = runtime.session(model, threads=1), []
    for tries in (0, 2000):
        pool = chosen_by_class(model, axes, 128, tries, 64, np.random.default_rng(0), threads=1)
        assert pool["x"].shape == (128, 1, 16, 16)
        scores = runtime.run(session, pool)["y"]
        counts = np.bincount(scores.argmax(axis=1), minlength=4)
        spreads.append((counts.min(), np.sort(scores, axis=1)[:, -1].mean()))
    assert spreads[1][0] >= spreads[0][0]
    assert spreads[1][1] > spreads[0][1]


def test_what_is_made_up_fits_the_model(net: onnx.ModelProto) -> None:
    found = made_up(net, threads=1)
    assert (found.source, found.is_real, found.is_typical) == ("synthesized images", False, True)
    assert found.samples == 2048
    assert made_up(net, macs=1e9, threads=1).samples < 200
    assert made_up(net, macs=1e12, threads=1).samples == 32
    assert synthesize(mlp(5, 8, 3), 64) is None
    assert made_up(mlp(5, 8, 3), threads=1).source == "random inputs"
    assert made_up(mlp(5, 8, 3), threads=1).batches[0]["x"].shape == (64, 5)


def test_wide_layers_see_fewer_rows() -> None:
    assert affordable([16384, 16384], [100, 200]) == [16384, 16384]
    few = affordable([32768] * 4, [4608] * 4)
    assert sum(n * 4608**2 for n in few) <= OPERATIONS and min(few) >= 2 * 4608


def test_no_rows_are_reserved_that_the_batches_do_not_have(
    net: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def spy(rows: Sequence[int], widths: Sequence[int]) -> list[int]:
        asked.append(list(rows))
        return affordable(rows, widths)

    monkeypatch.setattr(sequential, "affordable", spy)
    analysis = analyse(net)
    keep = np.ones(analysis.coupling.solution.units, bool)
    keep[next(g for g in analysis.groups if g.size == 8).units[6:]] = False
    pruned = apply_keep(analysis.coupling, keep).model
    rewriter = Rewriter(analysis.coupling, keep)
    Reconstruct(rows=16384, threads=1)(pruned, rewriter, images(1))
    assert max(asked[0]) == 32 * 14 * 14


def test_a_repair_is_judged_on_samples_of_its_own() -> None:
    batches = images(16)
    fitted, judged = parted(batches)
    assert (len(fitted), len(judged)) == (14, 2)
    assert not {id(b) for b in fitted} & {id(b) for b in judged}
    assert parted(batches[:1]) == (batches[:1], batches[:1])
