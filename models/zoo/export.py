"""Export models as skeletons: real graphs without their weights.

    python -m models.zoo.export FOLDER [FAMILY ...]

Needs an environment of its own with torch, torchvision, timm, transformers, onnx and onnxscript;
nothing else of onnxprune does. Models are randomly initialized, so nothing is downloaded. A float
tensor of more than 64 elements keeps no data; its doc_string says `fill MEAN STD`. `pack` puts a
folder of skeletons into an archive, with a manifest beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

KEPT = 64
#: Sizes that most configurations of Hugging Face models take; each model ignores the rest.
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "vocab_size": 200, "max_position_embeddings": 64, "d_model": 64, "num_layers": 2,
    "num_heads": 4, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "d_ff": 128,
    "d_kv": 16, "num_decoder_layers": 2, "ffn_dim": 128, "n_layers": 2, "n_heads": 4, "dim": 64,
    "hidden_dim": 128, "attn_implementation": "eager", "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}
TEXT: dict[str, dict[str, Any]] = {
    **{name: {} for name in (
        "bert", "roberta", "distilbert", "deberta", "deberta-v2", "mpnet", "convbert", "ibert",
        "roformer", "nystromformer", "esm", "layoutlm", "gpt2", "gpt_neox", "opt", "bloom",
        "phi", "stablelm", "olmo", "olmo2", "granite", "biogpt", "xglm", "longformer",
        "big_bird", "modernbert", "rwkv",
    )},
    **dict.fromkeys(("llama", "mistral", "qwen2", "starcoder2", "phi3"), GROUPED),
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {**GROUPED, "head_dim": 16},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mamba": {"state_size": 8},
    "fnet": {},
}  # fmt: skip
PIXELS = {"image_size": 64, "attn_implementation": "eager"}
PATCHES = {
    **PIXELS, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
WINDOWS = {
    **PATCHES, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "patch_size": 4,
}  # fmt: skip
PATCHED = (
    "vit", "vit_mae", "vit_msn", "dinov2", "ijepa", "data2vec-vision", "clip_vision_model",
    "siglip_vision_model", "hiera",
)  # fmt: skip
#: Model type: (side of its square images, configuration).
VISION: dict[str, tuple[int, dict[str, Any]]] = {
    "swin": (64, WINDOWS),
    "swinv2": (64, WINDOWS),
    "bit": (128, PIXELS),
    "regnet": (128, PIXELS),
    "resnet": (128, PIXELS),
    "efficientnet": (128, PIXELS),
    "mobilenet_v1": (128, PIXELS),
    "poolformer": (128, PIXELS),
    "pvt": (64, PIXELS),
    "glpn": (64, PIXELS),
    "convnextv2": (64, {**PIXELS, "depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64]}),
    "focalnet": (64, {
        **PIXELS, "embed_dim": 32, "depths": [2, 2], "focal_levels": [2, 2],
        "focal_windows": [3, 3], "patch_size": 4,
    }),
    "detr": (64, {
        **PIXELS, "use_timm_backbone": False, "d_model": 64, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    }),
    **dict.fromkeys(PATCHED, (64, PATCHES)),
    "yolos": (64, {**PATCHES, "image_size": [64, 64]}),
}  # fmt: skip
WAVES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "attn_implementation": "eager", "conv_dim": [32] * 7, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
SPEECH = ("wav2vec2", "data2vec-audio", "wav2vec2-conformer", "unispeech", "wavlm", "hubert")
TORCHVISION = (
    "googlenet", "mobilenet_v3_small", "mobilenet_v3_large", "maxvit_t", "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_1", "resnext50_32x4d", "vit_b_16",
    "swin_t", "swin_v2_t", "convnext_tiny", "efficientnet_v2_s", "mnasnet1_0", "densenet121",
    "regnet_y_800mf", "resnet50", "vgg13",
)  # fmt: skip
DETECTORS = (
    "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn",
)  # fmt: skip
TIMM = (
    "ghostnet_100", "ghostnetv2_100", "seresnet18", "ecaresnet26t", "res2net50_26w_4s",
    "resnest14d", "nfnet_l0", "ese_vovnet19b_dw", "dla34", "tinynet_e", "rexnet_100",
    "convmixer_768_32", "mixer_s32_224", "volo_d1_224", "xcit_nano_12_p16_224", "crossvit_9_240",
    "edgenext_xx_small", "davit_tiny", "focalnet_tiny_srf", "hiera_tiny_224", "nextvit_small",
    "repvit_m0_9", "starnet_s1", "mambaout_femto", "tiny_vit_5m_224", "efficientvit_b0",
    "fastvit_t8", "poolformer_s12", "caformer_s18", "inception_next_atto", "gernet_s",
    "cspresnet50", "lcnet_050", "mobilenetv4_conv_small", "visformer_tiny", "coat_tiny",
    "convit_tiny", "eva02_tiny_patch14_224", "coatnet_0_rw_224", "mobilevit_xxs",
    "mobilevitv2_050", "bat_resnext26ts", "gcresnext26ts", "regnetz_b16", "regnetv_040",
    "resnetv2_50", "hardcorenas_a", "semnasnet_075", "spnasnet_100", "mixnet_s", "cspdarknet53",
    "vovnet39a", "nasnetalarge", "twins_pcpvt_small", "nest_tiny", "sebotnet33ts_256",
    "swinv2_cr_tiny_224", "efficientvit_m2", "rdnet_tiny", "convnextv2_atto", "shvit_s1",
    "gmlp_s16_224",
)  # fmt: skip

#: A model, example inputs, and the names of the inputs.
Case = tuple[str, Any, tuple[Any, ...], Sequence[str]]


def _named(model: Any, names: Sequence[str]) -> Any:
    """The model with positional inputs and at most three tensors as outputs."""
    import torch

    def tensors(value: Any) -> Iterator[Any]:
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, (tuple, list)):
            for part in value:
                yield from tensors(part)

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            result = self.model(**dict(zip(names, values, strict=True)))
            return tuple(tensors(result.to_tuple()))[:3]

    return Named()


def _hugging_face(kind: str, config: dict[str, Any], names: Sequence[str], *inputs: Any) -> Case:
    from transformers import AutoConfig, AutoModel

    found = AutoConfig.for_model(kind, **config)
    found.use_cache = False
    model = AutoModel.from_config(found)
    return f"hf-{kind}", _named(model, names), inputs, names


def text() -> Iterator[Callable[[], Case]]:
    """Encoders and decoders of Hugging Face."""
    import torch

    tokens, mask = torch.randint(3, 190, (2, 16)), torch.ones(2, 16, dtype=torch.int64)
    for kind, extra in TEXT.items():
        names = (
            ["input_ids"] if kind in ("fnet", "mamba", "rwkv") else ["input_ids", "attention_mask"]
        )
        inputs = (tokens, mask)[: len(names)]
        yield lambda k=kind, e=extra, n=names, i=inputs: _hugging_face(k, {**SMALL, **e}, n, *i)


def vision() -> Iterator[Callable[[], Case]]:
    """Image models of Hugging Face."""
    import torch

    for kind, (side, config) in VISION.items():
        x = torch.randn(2, 3, side, side)
        yield lambda k=kind, c=config, x=x: _hugging_face(k, c, ["pixel_values"], x)


def speech() -> Iterator[Callable[[], Case]]:
    """Speech encoders of Hugging Face."""
    import torch

    for kind in SPEECH:
        x = torch.randn(2, 4000)
        yield lambda k=kind, x=x: _hugging_face(k, WAVES, ["input_values"], x)


def torchvision() -> Iterator[Callable[[], Case]]:
    """Classifiers of torchvision."""
    import torch
    from torchvision import models

    for name in TORCHVISION:
        x = torch.randn(2, 3, 224, 224)
        yield lambda n=name, x=x: (f"tv-{n}", models.get_model(n, weights=None), (x,), ["x"])


def detection() -> Iterator[Callable[[], Case]]:
    """Detectors of torchvision, with what they do to images and boxes."""
    import torch
    from torchvision import models

    class Detector(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.model = models.get_model(name, weights=None, weights_backbone=None)

        def forward(self, x: Any) -> Any:
            return tuple(self.model([x])[0].values())

    for name in DETECTORS:
        yield lambda n=name: (f"tvdet-{n}", Detector(n), (torch.rand(3, 320, 320),), ["x"])


def timm() -> Iterator[Callable[[], Case]]:
    """Classifiers of timm."""
    import timm as library
    import torch

    for name in TIMM:

        def make(name: str = name) -> Case:
            model = library.create_model(name, exportable=True)
            size = model.default_cfg.get("input_size", (3, 224, 224))
            return f"timm-{name}", model, (torch.randn(1, *size),), ["x"]

        yield make


FAMILIES = {f.__name__: f for f in (text, vision, speech, torchvision, detection, timm)}


def export(case: Case, kind: str, path: Path) -> None:
    """Write the skeleton; `kind` is ts (TorchScript exporter) or dyn (torch.export)."""
    import torch

    name, model, inputs, names = case
    model = model.eval().requires_grad_(False)
    free = not name.startswith("tvdet-")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        target = Path(folder) / "model.onnx"
        options: dict[str, Any] = {"input_names": list(names)}
        if kind == "ts":
            axes = {n: {0: "batch"} for n in names} if free else {}
            options |= {"dynamo": False, "opset_version": 17, "dynamic_axes": axes}
        else:
            auto = tuple({0: torch.export.Dim.AUTO} for _ in names)
            shapes = (auto,) if name.startswith("hf-") else auto
            options |= {"dynamo": True, "opset_version": 20, "dynamic_shapes": shapes}
        torch.onnx.export(model, inputs, str(target), **options)
        proto = onnx.load(str(target))
    strip(proto)
    onnx.save(proto, str(path))


def strip(model: onnx.ModelProto) -> None:
    """Replace large float tensors by mean and deviation; leave out the exporter's notes."""
    for tensor in _tensors(model.graph):
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) > KEPT:
            values = numpy_helper.to_array(tensor)
            note = f"fill {values.mean():.6g} {values.std():.6g}"
            dims, name = list(tensor.dims), tensor.name
            tensor.Clear()
            tensor.MergeFrom(onnx.TensorProto(dims=dims, data_type=1, name=name, doc_string=note))
    for node in model.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


def pack(folder: Path, archive: Path) -> None:
    """Pack the skeletons in `folder`; beside the archive, a manifest says what it holds."""
    rows = []
    with tarfile.open(archive, "w:xz", preset=9) as target:
        for path in sorted(folder.glob("*.onnx")):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            with path.open("rb") as stream:
                target.addfile(member, stream)
            rows.append(_row(path))
    manifest = archive.with_name(archive.name.removesuffix(".tar.xz") + ".json")
    manifest.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _row(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    model = onnx.load_from_string(data)
    sizes = (np.prod(t.dims, dtype=np.int64) for t in _tensors(model.graph) if t.data_type == 1)
    return {
        "name": path.stem,
        "family": path.stem.split("-")[0],
        "exporter": path.stem.rsplit("-", 1)[1],
        "opset": max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        "nodes": len(model.graph.node),
        "parameters": int(sum(sizes)),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def main() -> int:
    """Export the named families, or all, with the TorchScript exporter and with torch.export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []])
    parser.add_argument("--kinds", default="ts", help="ts, dyn, or both with a comma")
    parser.add_argument("--pack", type=Path, help="only pack the folder into this archive")
    options = parser.parse_args()
    if options.pack:
        pack(options.folder, options.pack)
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for family in options.families or FAMILIES:
        for make in FAMILIES[family]():
            for kind in options.kinds.split(","):
                try:
                    case = make()
                    path = options.folder / f"{case[0]}-{kind}.onnx"
                    if not path.exists():
                        export(case, kind, path)
                    print(f"{path.stem}: ok", flush=True)
                except Exception as error:  # exporters fail in their own ways; the others go on
                    failed += 1
                    print(f"{family}: {type(error).__name__}: {str(error)[:120]!r}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
