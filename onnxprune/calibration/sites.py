"""Where weights can be re-solved: a linear operator, what follows it per channel, and its target.

A site computes z = a * (W x + b) + c, with a and c from BatchNormalization and per-channel
arithmetic behind the operator, and perhaps adds a residual stream to it. Its target is the same
tensor of the original model, restricted to the channels that were kept. A recurrent cell's inputs
are a site of their own: z is what they add to its gates.
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
_CELLS = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Affine:
    """One per-channel step behind a site: z = scale * y + shift, [M]; `slot` holds its vector."""

    node: int
    op_type: str
    slot: int
    scale: Array
    shift: Array


@dataclass
class Site:
    """A linear operator at `node` that multiplies `x` with the weight in input `slot`.

    `target` is the tensor to reproduce, `other` the residual stream that is added on the way (empty
    where none is), `path` the per-channel steps from the operator to there. The output channels are
    on `axis`, 1 or -1.
    """

    node: int
    op_type: str
    slot: int
    x: str
    output: str
    target: str
    channels: int
    axis: int
    groups: int = 1
    other: str = ""
    behind: int = 0
    path: list[Affine] = field(default_factory=list)

    @property
    def is_conv(self) -> bool:
        """Whether x[N, C, *S] is unfolded before it is multiplied."""
        return self.op_type in _CONVS

    @property
    def is_cell(self) -> bool:
        """Whether this is a recurrent cell, of which the input weights of all gates are solved."""
        return self.op_type in _CELLS

    @property
    def bias_slot(self) -> int:
        """The input with the operator's own bias."""
        return 3 if self.is_cell else 2

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
        site = linear(model, index)
        if site is not None and model.is_own(node.input[site.slot]):
            if not site.is_cell:
                follow(model, site)
            yield site


def linear(model: Editable, index: int) -> Site | None:
    """The linear operator at `index`, without what follows; None where it is something else."""
    node = model.nodes[index]
    kind = node.op_type
    if kind not in (*_CONVS, *_CELLS, "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
        return None
    weight = model.weight(node.input[1])
    if weight is None or model.is_stored(node.input[0]) or weight.ndim < 2:
        return None
    given = attributes(node)
    if (kind == "MatMul" and weight.ndim != 2) or given.get("alpha", 1.0) == 0:
        return None
    groups = given.get("group", 1)
    channels = {
        "Conv": weight.shape[0],
        "ConvTranspose": weight.shape[1] * groups,
        "Gemm": weight.shape[0 if given.get("transB", 0) else 1],
        "MatMul": weight.shape[1],
    }.get(kind, weight.shape[0] * weight.shape[1])
    x, y = node.input[0], next(name for name in node.output if name)
    axis, behind = (1, weight.ndim - 2) if kind in _CONVS else (-1, 0)
    return Site(index, kind, 1, x, y, y, channels, axis, groups, behind=behind)


def follow(model: Editable, site: Site) -> None:
    """Walk from the operator through per-channel steps to a residual addition, if there is one."""
    while (reader := model.only_reader(site.target)) is not None:
        node = model.nodes[reader]
        step = affine(model, site, reader)
        if step is not None:
            site.path.append(step)
        elif node.op_type == "Add":
            return _residual(model, site, node)
        elif node.op_type != "Identity":
            return None
        site.target = node.output[0]
    return None


def _residual(model: Editable, site: Site, node: onnx.NodeProto) -> None:
    """What is added must be there before the site is: only then can its error be made good."""
    other = node.input[1] if node.input[0] == site.target else node.input[0]
    is_earlier = not model.is_stored(other) and model.maker.get(other, -1) < site.node
    if other != site.target and is_earlier:
        site.other, site.target = other, node.output[0]


def affine(model: Editable, site: Site, index: int) -> Affine | None:
    """The per-channel step at node `index` that reads the site's target; None for others."""
    node = model.nodes[index]
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "BatchNormalization" and (site.is_conv or site.op_type == "Gemm"):
        return _batchnorm(model, index) if node.input[0] == site.target else None
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    slot = 1 if node.input[0] == site.target else 0
    stored = model.weight(node.input[slot])
    if stored is None or (slot == 0 and node.op_type in ("Sub", "Div")):
        return None
    vector = per_channel(stored, site)
    if vector is None or (node.op_type == "Div" and not vector.all()):
        return None
    one, zero = np.ones(site.channels), np.zeros(site.channels)
    if node.op_type in ("Add", "Sub"):
        return Affine(index, node.op_type, slot, one, vector if node.op_type == "Add" else -vector)
    return Affine(index, node.op_type, slot, vector if node.op_type == "Mul" else 1 / vector, zero)


def per_channel(value: Array, site: Site) -> Array | None:
    """[M] where a stored operand has one number a channel, or one for all."""
    if value.size == 1:
        return np.full(site.channels, value.item())
    if value.size != site.channels or value.size != max(value.shape):
        return None
    behind = value.ndim - 1 - value.shape.index(value.size)  # axes after the long one
    return value.ravel() if behind == site.behind else None


def _batchnorm(model: Editable, index: int) -> Affine | None:
    node = model.nodes[index]
    given = attributes(node)
    if given.get("training_mode", 0) or len([o for o in node.output if o]) > 1:
        return None
    parts = [model.weight(name) for name in node.input[1:5]]
    if any(p is None for p in parts):
        return None
    gamma, beta, mean, var = (p for p in parts if p is not None)
    scale = gamma / np.sqrt(var + given.get("epsilon", 1e-5))
    return Affine(index, node.op_type, 1, scale, beta - mean * scale)
