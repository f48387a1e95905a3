"""Small models from ONNX text, pruned and compared with their masked twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxprune import pipeline, runtime, verify
from onnxprune.analysis import Analysis, analyse
from onnxprune.passes.apply import Applied, apply_keep
from onnxprune.passes.score import score
from onnxprune.passes.select import Budget, Limits, select
from onnxprune.result import Result
from onnxprune.rewriting import Mask
from onnxprune.twin import masked_twin

TOLERANCE = 1e-4
NOBODY = np.zeros(0, np.int32)


def tensors(spec: str, seed: int = 0) -> list[onnx.TensorProto]:
    """Initializers from "w:8,3 b:8 shape=0,-1 mask?1,0": random floats by shape, int64 after `=`.

    `?` gives booleans. Names that start with "var" are positive.
    """
    rng = np.random.default_rng(seed)
    found = []
    for word in spec.split():
        if "=" in word:
            name, values = word.split("=")
            array = np.array([int(v) for v in values.split(",")], np.int64)
        elif "?" in word:
            name, values = word.split("?")
            array = np.array([v == "1" for v in values.split(",")])
        else:
            name, _, dims = word.partition(":")
            shape = [int(n) for n in dims.split(",") if n]
            array = rng.normal(0, 0.5, shape).astype(np.float32)
            array = np.asarray(np.abs(array) + np.float32(0.5)) if name.startswith("var") else array
        found.append(numpy_helper.from_array(array, name))
    return found


def build(
    signature: str, body: str, weights: str = "", *, opset: int = 18, imports: str = "", ir: int = 8
) -> onnx.ModelProto:
    """A model from the text of its signature, "(float[N,8] x) => (float[N,2] y)", and its nodes."""
    header = f'<ir_version: {ir}, opset_import: ["": {opset}{imports}]>'
    model = parser.parse_model(f"{header} g {signature} {{ {body} }}")
    model.graph.initializer.extend(tensors(weights))
    return model


def mlp(*widths: int, last: str = "") -> onnx.ModelProto:
    """Gemm layers w0, b0, w1, ... with Relu between them; `last` is an activation at the end."""
    count = len(widths) - 1
    lines, spec = [], []
    value = "x"
    for i in range(count):
        result = "y" if i == count - 1 and not last else f"h{i}"
        lines.append(f"{result} = Gemm<transB=1>({value}, w{i}, b{i})")
        spec.append(f"w{i}:{widths[i + 1]},{widths[i]} b{i}:{widths[i + 1]}")
        value = result
        if i < count - 1:
            lines.append(f"r{i} = Relu({value})")
            value = f"r{i}"
    if last:
        lines.append(f"y = {last}({value})")
    signature = f"(float[N,{widths[0]}] x) => (float[N,{widths[-1]}] y)"
    return build(signature, "\n".join(lines), " ".join(spec))


@dataclass(frozen=True)
class Pruned:
    """A model before and after, and how far the result is from its twin."""

    analysis: Analysis
    keep: Mask
    applied: Applied
    error: float
    effect: float

    @property
    def model(self) -> onnx.ModelProto:
        """The pruned model."""
        return self.applied.model


def prune_half(
    model: onnx.ModelProto,
    scope: str = "all",
    *,
    ratio: float = 0.5,
    seed: int = 0,
    criterion: str = "l2",
) -> Pruned:
    """Keep `ratio` of every group; `effect` is how far the twin is from the original."""
    analysis = analyse(model)
    coupling = analysis.coupling
    keep = select(
        coupling,
        analysis.groups,
        score(coupling, criterion, seed=seed),
        analysis.cost,
        Budget("channels", ratio),
        Limits(min_keep=0.1, scope=scope),  # type: ignore[arg-type]
        NOBODY,
    )
    applied = apply_keep(coupling, keep)
    feeds = runtime.working_feeds(model, seed=seed, threads=1)
    error = verify.twin_error(coupling, keep, applied.model, feeds, threads=1)
    ours, theirs = outputs(masked_twin(coupling, keep), feeds[0]), outputs(model, feeds[0])
    return Pruned(analysis, keep, applied, error, verify.difference(ours, theirs))


def prune(model: onnx.ModelProto, **options: Any) -> Result:
    """`pipeline.prune` on one thread, without repair, nor its seconds of latency measurements."""
    options.setdefault("repair", "none")
    with mock.patch.object(runtime, "latencies_ms", return_value=[1.0, 1.0]):
        return pipeline.prune(model, threads=1, **options)


def outputs(model: onnx.ModelProto, feeds: verify.Feeds) -> list[NDArray[np.float32]]:
    """What a model answers."""
    return list(runtime.run(runtime.session(model, threads=1), feeds).values())


def replaced(model: onnx.ModelProto, name: str, value: NDArray[Any]) -> onnx.ModelProto:
    """A copy with another value of an initializer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    return copy


def weight(model: onnx.ModelProto, name: str) -> NDArray[np.float32]:
    """The value of an initializer."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    return numpy_helper.to_array(tensor)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shape of every initializer."""
    return {t.name: tuple(t.dims) for t in model.graph.initializer}
