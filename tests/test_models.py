"""The committed models are those of the manifest, and as good as it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from models import digits, graphs
from onnxprune.data import open_data
from onnxprune.metrics import evaluate
from onnxprune.runtime import random_feeds, run, session

FOLDER = Path(__file__).resolve().parent.parent / "models"
MANIFEST: list[dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text())["models"]
by_model = pytest.mark.parametrize("entry", MANIFEST, ids=lambda entry: entry["name"])


def test_the_manifest_lists_every_file() -> None:
    assert {e["file"] for e in MANIFEST} == {p.name for p in FOLDER.glob("*.onnx")}
    assert sum(p.stat().st_size for p in FOLDER.glob("*.npz")) < 300_000


@by_model
def test_a_file_is_what_the_manifest_says(entry: dict[str, Any]) -> None:
    content = (FOLDER / entry["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert len(content) == entry["bytes"] < 1_000_000
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)


@by_model
def test_held_out_accuracy(entry: dict[str, Any]) -> None:
    model = onnx.load(FOLDER / entry["file"])
    data = open_data(FOLDER / "digits_test.npz", model)
    accuracy = evaluate(model, data, threads=1)["accuracy"]
    assert len(data) == 500
    assert accuracy == pytest.approx(entry["accuracy"], abs=0.002)
    assert accuracy >= (0.95 if "mlp" in entry["name"] else 0.97)


def test_the_folded_twin_answers_alike() -> None:
    model = onnx.load(FOLDER / "digits_cnn.onnx")
    data = open_data(FOLDER / "digits_test.npz", model)
    twin = evaluate(FOLDER / "digits_cnn_folded.onnx", data, reference=model, threads=1)
    assert twin["agreement"] == 1
    assert twin["mse"] < 1e-8


@pytest.mark.parametrize(("name", "make"), [("train", digits.train), ("test", digits.test)])
def test_the_npz_files_are_scikit_learns_digits(name: str, make: Any) -> None:
    stored = np.load(FOLDER / f"digits_{name}.npz")
    for key, array in make().items():
        np.testing.assert_array_equal(stored[key], array)
        assert stored[key].dtype == array.dtype


def test_the_parts_do_not_overlap() -> None:
    train, test = digits.train()["x"], digits.test()["x"]
    assert len(train) + len(test) == 1797
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in test)


def test_a_script_is_a_data_source() -> None:
    model = onnx.load(FOLDER / "digits_mlp.onnx")
    data = open_data(f"{FOLDER / 'digits.py'}:test", model)
    assert next(iter(data.batches(8))).feeds["image"].shape == (8, 64)


def _names(model: onnx.ModelProto) -> set[str]:
    return {t.name for t in model.graph.initializer}


CNNS = [graphs.digits_cnn, graphs.fashion_resnet, graphs.fashion_vgg]
by_cnn = pytest.mark.parametrize("build", CNNS, ids=lambda build: build.__name__)


@by_cnn
def test_both_forms_have_the_same_parameters(build: graphs.Builder) -> None:
    training, inference = build(3, training=True), build(3, training=False)
    shared = _names(training) & _names(inference)
    statistics = {n for n in _names(inference) if n.endswith(("running_mean", "running_var"))}
    assert shared == _names(inference) - statistics
    assert _names(training) - shared == {"batch_axes", "spatial_axes", "epsilon"}
    back = graphs.to_inference(build, training, seed=4)
    feeds = random_feeds(inference, batch=2)
    outputs = [run(session(m, threads=1), feeds) for m in (back, inference)]
    for name, value in outputs[0].items():
        np.testing.assert_array_equal(value, outputs[1][name])


@by_cnn
def test_the_training_form_normalizes_by_the_batch(build: graphs.Builder) -> None:
    model = build(0, training=True)
    name = next(n.output[0] for n in model.graph.node if n.name.endswith("bn.out"))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    value = run(session(model, threads=1), random_feeds(model, batch=8), [name])[name]
    np.testing.assert_allclose(value.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(value.std(axis=(0, 2, 3)), 1, atol=1e-2)


@by_cnn
def test_folding_keeps_the_function(build: graphs.Builder) -> None:
    model = build(1)
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:  # statistics and scales as training leaves them
        if ".bn." in tensor.name:
            value = rng.uniform(0.5, 1.5, tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    folded = graphs.fold(model)
    assert all(node.op_type != "BatchNormalization" for node in folded.graph.node)
    feeds = random_feeds(model, batch=2)
    expected, got = (run(session(m, threads=1), feeds) for m in (model, folded))
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-4 * abs(value).max())
