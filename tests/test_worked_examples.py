"""Two networks small enough to follow by hand."""

from __future__ import annotations

import io

import numpy as np
import onnx
from rich.console import Console

from onnxprune import runtime, verify
from onnxprune.analysis import analyse
from onnxprune.pipeline import apply
from onnxprune.report.console import show_report
from tests.graphs import mlp, outputs, prune, weight


def test_ten_five_two_loses_its_weakest_hidden_neuron() -> None:
    model = mlp(10, 5, 2)
    incoming, outgoing = weight(model, "w0"), weight(model, "w1")
    parts = [(incoming**2).sum(axis=1), (outgoing**2).sum(axis=0)]
    importance = sum(p / p.mean() for p in parts)
    stay = np.delete(np.arange(5), importance.argmin())

    result = prune(model, channels=0.8)

    np.testing.assert_array_equal(weight(result.model, "w0"), incoming[stay])
    np.testing.assert_array_equal(weight(result.model, "b0"), weight(model, "b0")[stay])
    np.testing.assert_array_equal(weight(result.model, "w1"), outgoing[:, stay])
    np.testing.assert_array_equal(weight(result.model, "b1"), weight(model, "b1"))
    assert result.plan.initializers["w0"].keep == {"0": tuple(stay)}
    assert result.plan.initializers["w1"].keep == {"1": tuple(stay)}
    assert (result.report.before.params, result.report.after.params) == (67, 54)
    assert (result.report.before.macs, result.report.after.macs) == (60, 48)
    assert all(c.passed for c in result.report.checks)


def test_the_pruned_network_is_the_one_with_a_silent_neuron() -> None:
    model = mlp(10, 5, 2)
    result = prune(model, channels=0.8)
    (gone,) = set(range(5)) - set(result.plan.initializers["w0"].keep["0"])
    silent = onnx.ModelProto()
    silent.CopyFrom(model)
    for tensor in silent.graph.initializer:
        if tensor.name == "w1":
            values = weight(model, "w1").copy()
            values[:, gone] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, "w1"))
    feeds = runtime.random_feeds(model)
    assert verify.difference(outputs(result.model, feeds), outputs(silent, feeds)) <= 1e-6


def test_a_dense_classifier_with_a_fifth_of_its_neurons_removed() -> None:
    model = mlp(784, 128, 64, 32, 10, last="Softmax")

    result = prune(model, channels=0.8)

    rows = [(r.shape_before, r.shape_after) for r in result.report.layers]
    assert rows == [
        ((128, 784), (102, 784)),
        ((64, 128), (51, 102)),
        ((32, 64), (26, 51)),
        ((10, 32), (10, 26)),
    ]
    params = [(r.params_before, r.params_after) for r in result.report.layers]
    assert params == [
        (128 * 785, 102 * 785),
        (64 * 129, 51 * 103),
        (32 * 65, 26 * 52),
        (10 * 33, 10 * 27),
    ]
    assert result.report.before.params == sum(before for before, _ in params)
    assert result.report.after.params == sum(after for _, after in params)
    twin, behaviour = result.report.checks
    assert twin.passed
    assert twin.max_error is not None
    assert twin.max_error <= 1e-5
    assert behaviour.passed
    assert apply(model, result.plan).SerializeToString() == result.model.SerializeToString()


def test_the_layer_table_shows_the_widths_before_and_after() -> None:
    result = prune(mlp(784, 128, 64, 32, 10, last="Softmax"), channels=0.8)
    text = io.StringIO()
    show_report(Console(file=text, width=200, color_system=None), result.report, layers=True)
    lines = [line for line in text.getvalue().splitlines() if "Gemm" in line]
    wanted = (("128", "102", "784"), ("64", "51", "128"), ("32", "26", "64"), ("10", "26", "32"))
    assert len(lines) == len(wanted)
    for line, numbers in zip(lines, wanted, strict=True):
        assert all(n in line for n in numbers)
    assert "100,480" in lines[0]
    assert "80,070" in lines[0]


def test_the_dense_classifier_has_three_groups() -> None:
    groups = analyse(mlp(784, 128, 64, 32, 10, last="Softmax")).groups
    assert [(g.size, g.width, g.exact) for g in groups] == [
        (128, 1, True),
        (64, 1, True),
        (32, 1, True),
    ]
