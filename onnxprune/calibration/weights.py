"""A site's weights as matrices, and results back into the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.calibration.editable import Editable
from onnxprune.calibration.sites import Affine, Site, attributes

Array = NDArray[Any]


def matrices(model: Editable, site: Site) -> Array:
    """The weights as [G, M / G, D]: what unfolded inputs are multiplied with."""
    node = model.nodes[site.node]
    weight = model.weight(node.input[site.slot])
    assert weight is not None
    if site.op_type == "Conv":
        return weight.reshape(site.groups, weight.shape[0] // site.groups, -1)
    if site.op_type == "ConvTranspose":
        split = weight.reshape(site.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        moved = split.transpose(0, 2, 1, 3)
        return moved.reshape(site.groups, weight.shape[1], -1)
    given = attributes(node)
    if site.op_type == "Gemm":
        matrix = weight if given.get("transB", 0) else weight.T
        return given.get("alpha", 1.0) * matrix[None]
    return weight.T[None]


def write_matrices(model: Editable, site: Site, value: Array) -> None:
    """Put [G, M / G, D] back into the operator's weight."""
    node = model.nodes[site.node]
    weight = model.weight(node.input[site.slot])
    assert weight is not None
    if site.op_type == "Conv":
        fresh = value.reshape(weight.shape)
    elif site.op_type == "ConvTranspose":
        taps = int(np.prod(weight.shape[2:]))
        split = value.reshape(site.groups, weight.shape[1], -1, taps)
        fresh = split.transpose(0, 2, 1, 3).reshape(weight.shape)
    elif site.op_type == "Gemm":
        given = attributes(node)
        matrix = value[0] / given.get("alpha", 1.0)
        fresh = matrix if given.get("transB", 0) else matrix.T
    else:
        fresh = value[0].T
    model.write(site.node, site.slot, fresh)


def bias(model: Editable, site: Site) -> Array | None:
    """The operator's own bias [M], zero where it has none; None where it is no vector."""
    node = model.nodes[site.node]
    if site.op_type == "MatMul" or len(node.input) < 3 or not node.input[2]:
        return np.zeros(site.channels)
    value = model.weight(node.input[2])
    if value is None or (value.size != value.shape[-1] if value.ndim else value.size != 1):
        return None
    beta = attributes(node).get("beta", 1.0) if site.op_type == "Gemm" else 1.0
    return np.broadcast_to(beta * value.ravel(), (site.channels,)).copy()


def intercept(model: Editable, site: Site) -> Array | None:
    """What z is where x is 0, [M]: the bias through the path; None where it cannot be told."""
    value = bias(model, site)
    if value is None:
        return None
    for step in site.path:
        value = value * step.scale + step.shift
    return value


def can_shift(model: Editable, site: Site) -> bool:
    """Whether there is a place for a change of the intercept."""
    return site.op_type != "MatMul" or any(s.op_type != "Mul" and s.op_type != "Div"
                                           for s in site.path)


def shift(model: Editable, site: Site, change: Array) -> None:
    """Add `change` [M] to z, through the last BatchNormalization, else the first place for a bias."""
    norms = [i for i, s in enumerate(site.path) if s.op_type == "BatchNormalization"]
    adds = [i for i, s in enumerate(site.path) if s.op_type in ("Add", "Sub")]
    if norms:
        _shift_step(model, site, norms[-1], 2, change)
    elif site.op_type != "MatMul":
        node = model.nodes[site.node]
        own = bias(model, site)
        assert own is not None
        beta = attributes(node).get("beta", 1.0) if site.op_type == "Gemm" else 1.0
        value = own + _over(change, site.scale())
        model.write(site.node, 2, value / beta)
    elif adds:
        step = site.path[adds[0]]
        _shift_step(model, site, adds[0], step.slot, -change if step.op_type == "Sub" else change)


def _over(change: Array, scale: Array) -> Array:
    return np.divide(change, scale, out=np.zeros_like(change), where=scale != 0)


def _shift_step(model: Editable, site: Site, index: int, slot: int, change: Array) -> None:
    step = site.path[index]
    behind = np.ones(site.channels)
    for later in site.path[index + 1 :]:
        behind = behind * later.scale
    name = model.nodes[step.node].input[slot]
    old = model.weight(name)
    assert old is not None
    delta = _over(change, behind)
    if old.size == 1 and site.channels > 1:
        shape = [site.channels] + [1] * 0
        model.write(step.node, slot, np.broadcast_to(old.ravel(), shape) + delta)
        return
    model.write(step.node, slot, old + delta.reshape(old.shape))


def refresh_norm(model: Editable, step: Affine, mean: Array, var: Array) -> None:
    """Record new statistics of a BatchNormalization whose function stays as it is."""
    node = model.nodes[step.node]
    beta = model.weight(node.input[2])
    assert beta is not None
    eps = attributes(node).get("epsilon", 1e-5)
    shift = step.shift
    model.write(step.node, 1, step.scale * np.sqrt(var + eps))
    model.write(step.node, 2, shift + step.scale * mean)
    model.write(step.node, 3, mean)
    model.write(step.node, 4, var)
