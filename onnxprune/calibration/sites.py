"""Where weights can be re-solved: a linear operator, what follows it per channel, and its target.

A site computes z = a * (W x + b) + c, with a and c from BatchNormalization and per-channel
arithmetic behind the operator, and perhaps adds a residual stream to it. Its target is the same
tensor of the original model, restricted to the channels that were kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from onnxprune.calibration.editable import Editable

Array = NDArray[Any]
_CONVS = ("Conv", "ConvTranspose")
_CELLS = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass
class Affine:
    """One per-channel step behind a site: z = scale * y + shift, in float64 [M]."""

    node: int
    op_type: str
    slot: int
    scale: Array
    shift: Array


@dataclass
class Site:
    """A linear operator at `node` reading `x` through weight slot `slot`.

    `target` is the tensor to reproduce, `other` the residual stream that is added on the way (empty
    where none is), `path` the per-channel steps from the operator to there.
    """

    node: int
    op_type: str
    slot: int
    x: str
    target: str
    channels: int
    axis: int
    groups: int = 1
    other: str = ""
    path: list[Affine] = field(default_factory=list)

    @property
    def is_conv(self) -> bool:
        """Whether x[N, C, *S] is unfolded before it is multiplied."""
        return self.op_type in _CONVS

    def scale(self) -> Array:
        """The factor a of the whole path, [M]."""
        total = np.ones(self.channels)
        for step in self.path:
            total = total * step.scale
        return total


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attribute values by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def find_sites(model: Editable) -> Iterator[Site]:
    """Every linear operator with a stored weight of its own, in topological order."""
    for index, node in enumerate(model.nodes):
        if node.domain in ("", "ai.onnx"):
            site = _site(model, index, node)
            if site is not None:
                _follow(model, site)
                yield site


def _site(model: Editable, index: int, node: onnx.NodeProto) -> Site | None:
    kind = node.op_type
    if kind not in (*_CONVS, "Gemm", "MatMul"):
        return None
    slot = 1
    if kind == "MatMul" and model.tensor(node.input[1]) is None:
        return None
    weight = model.weight(node.input[slot])
    if weight is None or not model.is_own(node.input[slot]) or model.is_stored(node.input[0]):
        return None
    given = attributes(node)
    if kind == "MatMul" and weight.ndim != 2:
        return None
    if kind == "Gemm" and given.get("alpha", 1.0) == 0:
        return None
    groups = given.get("group", 1)
    channels = {
        "Conv": lambda: weight.shape[0],
        "ConvTranspose": lambda: weight.shape[1] * groups,
        "Gemm": lambda: weight.shape[0 if given.get("transB", 0) else 1],
        "MatMul": lambda: weight.shape[1],
    }[kind]()
    axis = 1 if kind != "MatMul" else -1
    return Site(index, kind, slot, node.input[0], node.output[0], channels, axis, groups)


def _follow(model: Editable, site: Site) -> None:
    """Walk from the operator through per-channel steps to a residual addition, if there is one."""
    value = site.target
    while True:
        reader = model.only_reader(value)
        if reader is None:
            return
        node = model.nodes[reader]
        step = _affine(model, site, reader, node, value)
        if step is not None:
            site.path.append(step)
        elif node.op_type == "Identity":
            pass
        else:
            if node.op_type == "Add":
                _residual(model, site, node, value)
            return
        value = site.target = node.output[0]


def _residual(model: Editable, site: Site, node: onnx.NodeProto, value: str) -> None:
    other = node.input[1] if node.input[0] == value else node.input[0]
    if other == value or model.is_stored(other):
        return
    if model.maker.get(other, -1) < site.node:
        site.other, site.target = other, node.output[0]


def _affine(
    model: Editable, site: Site, index: int, node: onnx.NodeProto, value: str
) -> Affine | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "BatchNormalization" and site.axis == 1:
        return _batchnorm(model, index, node)
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    slot = 1 if node.input[0] == value else 0
    vector = model.weight(node.input[slot])
    if vector is None or (slot == 0 and node.op_type in ("Sub", "Div")):
        return None
    vector = _per_channel(vector, site)
    if vector is None:
        return None
    one, zero = np.ones(site.channels), np.zeros(site.channels)
    scale, shift = {
        "Add": lambda: (one, vector),
        "Sub": lambda: (one, -vector),
        "Mul": lambda: (vector, zero),
        "Div": lambda: (1 / np.where(vector == 0, np.inf, vector), zero),
    }[node.op_type]()
    return Affine(index, node.op_type, slot, scale, shift)


def _per_channel(value: Array, site: Site) -> Array | None:
    """[M] where a stored operand has one number a channel, or one for all."""
    if value.size == 1:
        return np.full(site.channels, value.item())
    if value.size != site.channels or value.size != max(value.shape):
        return None
    behind = value.ndim - 1 - value.shape.index(value.size)  # axes after the long one
    if site.axis == -1:
        return value.ravel() if behind == 0 else None
    if site.op_type == "Gemm":
        return value.ravel() if behind == 0 else None
    return value.ravel() if behind >= 1 else None


def _batchnorm(model: Editable, index: int, node: onnx.NodeProto) -> Affine | None:
    given = attributes(node)
    if given.get("training_mode", 0) or len([o for o in node.output if o]) > 1:
        return None
    parts = [model.weight(name) for name in node.input[1:5]]
    if any(p is None for p in parts):
        return None
    gamma, beta, mean, var = (p for p in parts if p is not None)
    scale = gamma / np.sqrt(var + given.get("epsilon", 1e-5))
    return Affine(index, node.op_type, 0, scale, beta - mean * scale)
