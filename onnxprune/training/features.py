"""Inner tensors that student and teacher are compared at, beside their outputs.

Where both have one shape, by their squared difference (Romero et al., 2015). Where pruning made the
student's narrower, by the likeness of each pair of samples, which needs no common channels: the
rows of F F^T, of length 1 each (Tung and Mori, 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxprune.errors import TrainingError

Features = Literal["none", "last"] | tuple[str, ...] | str
LAYERS = ("Conv", "Gemm", "MatMul")
EPSILON = 1e-12


def chosen(wanted: Features, student: onnx.ModelProto, teacher: onnx.ModelProto) -> list[str]:
    """The names of the tensors to compare.

    "last" is what the last layer reads, where the teacher has it too.

    Raises:
        TrainingError: one of the models lacks a tensor that was named.
    """
    if wanted == "none":
        return []
    if wanted == "last":
        name = last_features(student)
        return [name] if name is not None and name in _tensors(teacher) else []
    if isinstance(wanted, str):
        wanted = tuple(name.strip() for name in wanted.split(","))
    for whose, model in (("student", student), ("teacher", teacher)):
        missing = [name for name in wanted if name not in _tensors(model)]
        if missing:
            raise TrainingError(f"the {whose} has no inner tensor named {missing[0]!r}")
    return list(wanted)


def last_features(model: onnx.ModelProto) -> str | None:
    """What the last layer with a weight reads, where a node computes it."""
    stored = {t.name for t in model.graph.initializer}
    for node in reversed(model.graph.node):
        if node.op_type in LAYERS and len(node.input) > 1 and node.input[1] in stored:
            return node.input[0] if node.input[0] in _tensors(model) else None
    return None


def _tensors(model: onnx.ModelProto) -> set[str]:
    outputs = {o.name for o in model.graph.output}
    return {name for node in model.graph.node for name in node.output if name} - outputs


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with inner float tensors as further outputs; itself where there are none."""
    if not names:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in names:
        copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return copy


def kinds(
    student: Mapping[str, NDArray[Any]], teacher: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, Literal["square", "likeness"]]:
    """How each tensor is compared."""
    return {
        name: "square" if student[name].shape == teacher[name].shape else "likeness"
        for name in names
    }


def likeness(features: NDArray[Any]) -> NDArray[np.float32]:
    """[N, ...] -> [N, N]: products of the samples' features, each row of length 1."""
    flat = features.reshape(len(features), -1).astype(np.float64)
    products = flat @ flat.T
    length = np.sqrt(np.square(products).sum(axis=1, keepdims=True) + EPSILON)
    result: NDArray[np.float32] = (products / length).astype(np.float32)
    return result
