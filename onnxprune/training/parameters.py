"""Which tensors of a model are its trainable parameters, and how trained values get back into it.

A parameter is known by what reads it: the weight and bias places of an operator, or an added,
multiplied vector. Scalars, masks and position tables that only look like weights stay as they are.
Weights in Constant nodes count too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxprune.training.draft import FLOATS

#: Share of zeros from which they are taken for pruned weights.
SPARSE = 0.2

# input places that hold weights; True: weight decay applies
PLACES: dict[str, dict[int, bool]] = {
    "Conv": {1: True, 2: False},
    "ConvTranspose": {1: True, 2: False},
    "Gemm": {0: True, 1: True, 2: False},
    "MatMul": {0: True, 1: True},
    "Einsum": {0: True, 1: True},
    "BatchNormalization": {1: False, 2: False},
    "InstanceNormalization": {1: False, 2: False},
    "GroupNormalization": {1: False, 2: False},
    "LayerNormalization": {1: False, 2: False},
    "RMSNormalization": {1: False},
    "PRelu": {1: False},
    "Gather": {0: False},
    "LSTM": {1: True, 2: True, 3: False},
    "GRU": {1: True, 2: True, 3: False},
    "RNN": {1: True, 2: True, 3: False},
}
VECTOR_PLACES = {"Add", "Sub", "Mul", "Div", "Sum", "Mean"}
# operators a weight may pass on its way to the place where it is used
CARRIERS = {
    *(
        "Cast",
        "Concat",
        "Flatten",
        "Identity",
        "Reshape",
        "Slice",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
}
TABLE_LIMIT = 20.0  # larger added values are masks (-100, -1e4, -inf), not learnt positions


@dataclass(frozen=True)
class Parameter:
    """A trainable tensor; `value` is float32 whatever the model holds."""

    name: str
    value: NDArray[np.float32]
    decay: bool


@dataclass(frozen=True)
class Parameters:
    """The trainable tensors of a model by name, and why others are not."""

    trainable: dict[str, Parameter]
    frozen: dict[str, str]


def find_parameters(graph: onnx.GraphProto) -> Parameters:
    """Find the trainable tensors of a graph (main graph only)."""
    tensors = stored_tensors(graph)
    carried = _carried(graph, tensors)
    sites: dict[str, list[bool]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            for source in sorted(carried.get(name, ())):
                decay = _place(node, index, numpy_helper.to_array(tensors[source]))
                if decay is not None:
                    sites.setdefault(source, []).append(decay)
    trainable, frozen = {}, {}
    for name, decays in sites.items():
        value = numpy_helper.to_array(tensors[name]).astype(np.float32)
        reason = _aliased(value, len(decays))
        if reason:
            frozen[name] = reason
        else:
            trainable[name] = Parameter(name, value, any(decays))
    return Parameters(trainable, frozen)


def stored_tensors(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Float initializers, and the values of float Constant nodes, by the name that readers use."""
    inputs = {i.name for i in graph.input}
    found = {t.name: t for t in graph.initializer if t.data_type in FLOATS}
    for node in graph.node:
        tensor = constant_tensor(node)
        if tensor is not None and tensor.data_type in FLOATS and node.output[0] not in inputs:
            found[node.output[0]] = tensor
    return found


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node that has one."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return next((a.t for a in node.attribute if a.name == "value"), None)


def constant_value(node: onnx.NodeProto) -> NDArray[Any]:
    """What a Constant node holds, in any of its forms."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        return numpy_helper.to_array(attribute.t)
    dtype = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    value = onnx.helper.get_attribute_value(attribute)
    return np.asarray(value, dtype.get(attribute.name, object))


def _carried(graph: onnx.GraphProto, tensors: Mapping[str, Any]) -> dict[str, set[str]]:
    """Tensor name -> the stored tensors that it consists of, up to their layout."""
    carried = {name: {name} for name in tensors}
    for node in graph.node:
        if node.op_type not in CARRIERS or not node.input:
            continue
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        if all(name in carried for name in sources):
            carried[node.output[0]] = set().union(*(carried[name] for name in sources))
    return carried


def _place(node: onnx.NodeProto, index: int, value: NDArray[Any]) -> bool | None:
    """Whether decay applies to the tensor at this place; None where it is no parameter."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in PLACES:
        return PLACES[node.op_type].get(index)
    if node.op_type not in VECTOR_PLACES or value.size < 2:
        return None
    if sum(size > 1 for size in value.shape) == 1:
        return False
    is_table = node.op_type == "Add" and bool(np.abs(value).max() <= TABLE_LIMIT)
    return False if is_table else None


def _aliased(value: NDArray[np.float32], sites: int) -> str | None:
    """An exporter stores equal tensors once.

    Training such an alias would tie layers that are not.
    """
    if sites > 1 and sum(size > 1 for size in value.shape) <= 1 and np.ptp(value) == 0:
        return f"{sites} nodes share this vector of equal values; training it would tie them"
    return None


def still_zero(parameters: Mapping[str, Parameter], masked: bool | None) -> dict[str, NDArray[Any]]:
    """Where weights may move, by name; none where they may everywhere."""
    masks = {}
    for name, parameter in parameters.items():
        moving = parameter.value != 0
        share = 1 - float(moving.mean())
        sparse = parameter.decay and SPARSE <= share < 1 if masked is None else masked
        if sparse and share:
            masks[name] = moving
    return masks


def write_back(model: onnx.ModelProto, values: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """A copy of the model in which the named tensors hold these values; nothing else differs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = stored_tensors(result.graph)
    for name, value in values.items():
        tensor = tensors[name]
        dtype = numpy_helper.to_array(tensor).dtype
        fresh = numpy_helper.from_array(np.ascontiguousarray(value.astype(dtype)), tensor.name)
        fresh.doc_string = tensor.doc_string
        tensor.CopyFrom(fresh)
    return result
