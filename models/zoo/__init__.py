"""The conformance set: real exports as skeletons, filled with deterministic weights on loading.

`skeletons.tar.xz` holds FAMILY-NAME-EXPORTER.onnx: graphs exported from torchvision, timm,
Hugging Face transformers, ultralytics and small nets of tricky structure, randomly initialized;
`-ts` by the TorchScript exporter, `-dyn` by torch.export. Large float tensors carry no data; their
doc_string is `fill MEAN STD`.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ARCHIVE = Path(__file__).with_name("skeletons.tar.xz")
MANIFEST = Path(__file__).with_name("skeletons.json")


@lru_cache(maxsize=1)
def _skeletons() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.name.endswith(".onnx") else None
            if stream is not None:
                found[Path(member.name).stem] = stream.read()
    return dict(sorted(found.items()))


def manifest() -> list[dict[str, Any]]:
    """One row for each model: name, family, exporter, opset, nodes, parameters, sha256."""
    rows: list[dict[str, Any]] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return rows


def names() -> tuple[str, ...]:
    """The names of all models."""
    return tuple(_skeletons())


def skeleton(name: str) -> bytes:
    """The model `name` as it is stored, without its weights."""
    return _skeletons()[name]


def load(name: str) -> onnx.ModelProto:
    """The model `name` with weights, the same ones at every call."""
    model = onnx.load_from_string(skeleton(name))
    for tensor in _tensors(model.graph):
        if tensor.doc_string.startswith("fill "):
            _fill(tensor)
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


def _fill(tensor: onnx.TensorProto) -> None:
    """Normal numbers of the mean and deviation in the doc string, seeded by the tensor's name."""
    mean, std = map(float, tensor.doc_string.split()[1:3])
    rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    values = rng.standard_normal(tuple(tensor.dims), dtype=np.float32) * std + mean
    if mean > 3 * std or (mean > 0.5 and std < 0.5):
        values = np.abs(values) + 1e-3  # variances and scales stay positive
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.raw_data = values.astype(kind).tobytes()
    tensor.doc_string = ""
