"""Models as ONNX Runtime's optimizer saves them: pruned like the exports that they come from."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest

from benchmarks.conformance import prune
from models import zoo
from onnxprune import runtime, verify
from onnxprune.cost import count_params

#: Model and what fusions it must have got, so that the test does not become empty.
MODELS = {
    "hf-electra-dyn": {"SkipLayerNormalization", "FusedMatMul"},
    "hf-albert-dyn": {"FastGelu", "FusedGemm"},
    "hf-clipvision-dyn": {"QuickGelu"},
    "hf-whisperenc-dyn": {"SkipLayerNormalization"},
    "hf-segformer-ts": {"Gelu", "FusedConv"},
    "timm-efficientvit_m0-ts": {"FusedConv", "FusedMatMul"},
    "timm-mobilenetv3_small_050-ts": {"FusedConv"},
}


def optimized(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model after ONNX Runtime's fusions, which are the same on every processor."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    providers = ["CPUExecutionProvider"]
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    return onnx.load(folder / "optimized.onnx")


@pytest.mark.parametrize("name", MODELS)
def test_an_optimized_model_is_pruned_like_its_export(name: str, tmp_path: Path) -> None:
    export = zoo.load(name)
    model = optimized(export, tmp_path)
    assert {n.op_type for n in model.graph.node if n.domain == "com.microsoft"} >= MODELS[name]
    feeds = runtime.working_feeds(model)
    for scope in ("exact", "all"):
        analysis, keep, applied = prune(model, scope)
        assert verify.structure_problems(applied.model, model) == []
        error = verify.twin_error(analysis.coupling, keep, applied.model, feeds, threads=1)
        assert error <= verify.default_tolerance(model)
        plain = prune(export, scope)[2].model
        share = count_params(applied.model) / count_params(model)
        assert share <= count_params(plain) / count_params(export) + 0.02
