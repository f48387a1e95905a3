"""Models that ONNX Runtime's own quantizer writes, from trained and from random weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from models import zoo
from onnxprune import runtime, verify
from onnxprune.cost import count_params
from tests.graphs import prune_half

MODELS = Path(__file__).parent.parent / "models"


class Random(CalibrationDataReader):  # type: ignore[misc]
    """Two batches of random inputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.feeds: Iterator[dict[str, Any]] = iter(
            [runtime.random_feeds(model, seed=seed) for seed in range(2)]
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, None at the end."""
        return next(self.feeds, None)


def _load(name: str) -> onnx.ModelProto:
    path = MODELS / f"{name}.onnx"
    return onnx.load(path) if path.exists() else zoo.load(name)


STATIC = {
    "qdq": {"quant_format": QuantFormat.QDQ, "per_channel": False},
    "qdq-channels": {"quant_format": QuantFormat.QDQ, "per_channel": True},
    "qdq-signed": {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QInt8,
        "extra_options": {"ActivationSymmetric": True},
    },
    "integers": {"quant_format": QuantFormat.QOperator, "per_channel": False},
    "integers-channels": {"quant_format": QuantFormat.QOperator, "per_channel": True},
    "integers-unsigned": {
        "quant_format": QuantFormat.QOperator,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QUInt8,
        "extra_options": {"WeightSymmetric": False},
    },
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The quantizer warns that models should be preprocessed."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def _compare(model: onnx.ModelProto, original: onnx.ModelProto, tolerance: float = 1e-6) -> None:
    pruned, as_float = prune_half(model), prune_half(original)
    assert verify.structure_problems(pruned.model, model) == []
    assert pruned.error <= tolerance
    assert pruned.effect > 1e-3
    left = count_params(pruned.model) / count_params(model)
    expected = count_params(as_float.model) / count_params(original)
    assert abs(left - expected) < 0.03


def _static(model: onnx.ModelProto, mode: str, folder: Path) -> onnx.ModelProto:
    source, target = folder / "float.onnx", folder / "quantized.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), source)
    quantize_static(source, target, Random(model), **STATIC[mode])
    return onnx.load(target)


@pytest.mark.parametrize("mode", STATIC)
def test_integers_from_end_to_end_agree_to_the_last_bit(mode: str, tmp_path: Path) -> None:
    original = _load("digits_cnn_folded")
    _compare(_static(original, mode, tmp_path), original)


def test_floats_between_integers_may_flip_a_step(tmp_path: Path) -> None:
    original = _load("misc-unet_deconv-ts")  # ONNX Runtime sums transposed convolutions in floats
    model = _static(original, "qdq-channels", tmp_path)
    assert verify.default_tolerance(model) == 2e-2
    _compare(model, original, tolerance=2e-2)


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8], ids=str)
@pytest.mark.parametrize("name", ["digits_mlp", "misc-bilstm-ts", "hf-electra-dyn"])
def test_dynamic(name: str, kind: QuantType, tmp_path: Path) -> None:
    original = _load(name)
    source, target = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    onnx.save(original, source)
    quantize_dynamic(source, target, weight_type=kind, per_channel=kind == QuantType.QInt8)
    _compare(onnx.load(target), original)


def test_the_ranking_is_that_of_the_float_model(tmp_path: Path) -> None:
    original = _load("digits_cnn_folded")
    model = _static(original, "qdq-channels", tmp_path)
    ours, theirs = prune_half(model), prune_half(original)
    assert len(ours.analysis.groups) == len(theirs.analysis.groups)
    same = [
        np.mean(ours.keep[a.units] == theirs.keep[b.units])
        for a, b in zip(ours.analysis.groups, theirs.analysis.groups, strict=True)
    ]
    assert min(same) > 0.85
