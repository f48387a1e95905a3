"""Importance of each unit, from the weights alone.

A criterion gives every index of one weight axis a number; a unit's importance is their sum (or
mean, or largest) over all weights that it reaches: what makes the channel, and what reads it (Fang
et al., DepGraph, 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxprune.coupling import Coupling
from onnxprune.errors import InvalidRecipeError
from onnxprune.graph import Node
from onnxprune.labels import Labels

Scores = NDArray[np.float64]
Reduction = Literal["sum", "mean", "max"]
Role = Literal["makes", "reads", "scales"]


@dataclass(frozen=True)
class Member:
    """One labelled axis of a weight: `array` is [n, *rest], that axis first; `role`: its use."""

    array: NDArray[Any]
    name: str
    role: Role
    node: Node
    rng: np.random.Generator


Criterion = Callable[[Member], "NDArray[Any] | None"]
_CRITERIA: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a criterion under the name that `--criterion` takes."""

    def register(function: Criterion) -> Criterion:
        _CRITERIA[name] = function
        return function

    return register


def criteria() -> Mapping[str, Criterion]:
    """The registered criteria by name."""
    return MappingProxyType(_CRITERIA)


def _flat(member: Member) -> NDArray[np.float32]:
    return np.ascontiguousarray(member.array, np.float32).reshape(member.array.shape[0], -1)


#: Elements that are worked on at a time: they fit into a core's cache.
_BLOCK = 1 << 18


def _slice_sums(member: Member, size: np.ufunc) -> Scores:
    """The sum of `size` over each slice, [n].

    It is read in the order in which it lies in memory, and copied in blocks only.
    """
    array = member.array
    if not array.size:
        return np.zeros(array.shape[0])
    order = sorted(range(array.ndim), key=lambda axis: (-abs(array.strides[axis]), axis))
    n, before = array.shape[0], math.prod(array.shape[a] for a in order[: order.index(0)])
    rows = array.transpose(order).reshape(before, n, -1)
    inner = rows.shape[2]
    if before == 1:
        step = max(1, _BLOCK // max(inner, 1))
        parts = [size(_float(rows[0, i : i + step])).sum(axis=1) for i in range(0, n, step)]
        return np.concatenate(parts).astype(np.float64)
    total = np.zeros(n * inner)
    flat, step = rows.reshape(before, n * inner), max(1, _BLOCK // max(n * inner, 1))
    for i in range(0, before, step):
        total += size(_float(flat[i : i + step])).sum(axis=0)
    return np.asarray(total.reshape(n, inner).sum(axis=1))


def _float(array: NDArray[Any]) -> NDArray[np.float32]:
    return array.astype(np.float32, copy=False)


@criterion("l2")
def l2(member: Member) -> NDArray[Any] | None:
    """Squared L2 norm of each slice; their sum is the unit's squared norm (Li et al., 2017)."""
    if member.role == "scales":
        return None
    return _slice_sums(member, np.square)


@criterion("l1")
def l1(member: Member) -> NDArray[Any] | None:
    """L1 norm of each slice (Li et al., Pruning Filters for Efficient ConvNets, 2017)."""
    if member.role == "scales":
        return None
    return _slice_sums(member, np.absolute)


@criterion("bn-scale")
def bn_scale(member: Member) -> NDArray[Any] | None:
    """Size of the BatchNormalization scale (Liu et al., Network Slimming, 2017)."""
    if member.role != "scales" or member.node.op_type != "BatchNormalization":
        return None
    return np.asarray(np.abs(_flat(member)).sum(axis=1))


@criterion("fpgm")
def fpgm(member: Member) -> NDArray[Any] | None:
    """Distance to all others: near the geometric median is redundant (He et al., FPGM, 2019)."""
    if member.role != "makes":
        return None
    x = _flat(member).astype(np.float64)
    square = np.einsum("ij,ij->i", x, x)
    distance = np.maximum(square[:, None] + square[None, :] - 2 * (x @ x.T), 0)
    return np.asarray(np.sqrt(distance).sum(axis=1))


@criterion("lamp")
def lamp(member: Member) -> NDArray[Any] | None:
    """Squared norm over the sum of all squared norms not smaller (Lee et al., LAMP, 2021)."""
    norm = l2(member)
    if norm is None:
        return None
    order = np.argsort(norm)
    tail = np.cumsum(norm[order][::-1])[::-1]
    score = np.empty_like(norm)
    score[order] = norm[order] / np.maximum(tail, np.finfo(np.float32).tiny)
    return score


@criterion("random")
def random(member: Member) -> NDArray[Any] | None:
    """Uniform random numbers: the control group."""
    if member.role != "makes":
        return None
    return member.rng.random(member.array.shape[:1])


def score(
    coupling: Coupling, name: str = "l2", *, reduction: Reduction = "mean", seed: int = 0
) -> Scores:
    """Importance of every unit, [units]; unit 0 (frozen) gets infinity.

    Raises:
        InvalidRecipeError: no criterion has this name.
    """
    if name not in _CRITERIA:
        raise InvalidRecipeError(
            f"no criterion {name!r}: choose one of {', '.join(sorted(_CRITERIA))}"
        )
    rng = np.random.default_rng(seed)
    total = np.zeros(coupling.solution.units)
    seen = np.zeros(coupling.solution.units)
    for labels, values in _members(coupling, _CRITERIA[name], rng):
        unit = coupling.solution.unit[np.maximum(labels, 0)]
        if reduction == "max":
            np.maximum.at(total, unit, values)
        else:
            seen[0] += 1
            live = unit > 0
            if not live.all():
                unit, values = unit[live], values[live]
            if not unit.size:
                continue
            first, last = int(unit.min()), int(unit.max()) + 1  # units of one axis lie together
            total[first:last] += np.bincount(unit - first, values, last - first)
            seen[first:last] += np.bincount(unit - first, minlength=last - first)
    if not seen.any() and reduction != "max" and name != "l2":
        return score(coupling, "l2", reduction=reduction, seed=seed)
    if reduction == "mean":
        total /= np.maximum(seen, 1)
    total[0] = np.inf
    return total


def _members(
    coupling: Coupling, rule: Criterion, rng: np.random.Generator
) -> Iterator[tuple[Labels, Scores]]:
    makers = {id(labels) for _, labels in coupling.products}
    for name, uses in coupling.constants.items():
        constant = coupling.graph.constants[name]
        decode = coupling.decoders.get(name)
        if not constant.is_float and decode is None:
            continue
        free = {use: [b for b in layout if (b.labels > 0).any()] for use, layout in uses.items()}
        chosen = list(free.items()) if constant.is_vector else list(free.items())[:1]
        array: NDArray[Any] | None = None
        for (index, _), blocks in chosen:
            node = coupling.graph.nodes[index]
            for block in blocks:
                if array is None:
                    array = constant.array() if decode is None else decode(constant.array())
                makes: Role = "makes" if id(block.labels) in makers else "reads"
                role: Role = "scales" if constant.is_vector else makes
                member = Member(np.moveaxis(array, block.axes[0], 0), name, role, node, rng)
                with np.errstate(over="ignore", invalid="ignore"):
                    values = rule(member)
                if values is not None and np.isfinite(values).all():  # a mask of -inf says nothing
                    yield block.labels, _relative(np.asarray(values, np.float64))


def _relative(values: Scores) -> Scores:
    """Values as multiples of their mean: wide or large weights do not outvote the others."""
    mean = float(values.mean())
    return values / mean if mean > 0 else values
