"""A site's weights as matrices, its intercept, and results back into the model."""

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
    if site.is_cell:
        return weight.reshape(1, -1, weight.shape[2])
    if site.op_type == "Conv":
        return weight.reshape(site.groups, weight.shape[0] // site.groups, -1)
    if site.op_type == "ConvTranspose":
        split = weight.reshape(site.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        return split.transpose(0, 2, 1, 3).reshape(site.groups, weight.shape[1], -1)
    given = attributes(node)
    if site.op_type == "Gemm":
        return np.asarray(
            given.get("alpha", 1.0) * (weight if given.get("transB", 0) else weight.T)
        )[None]
    return weight.T[None]


def write_matrices(model: Editable, site: Site, value: Array) -> None:
    """Put [G, M / G, D] back into the operator's weight."""
    node = model.nodes[site.node]
    weight = model.weight(node.input[site.slot])
    assert weight is not None
    given = attributes(node)
    if site.op_type == "Conv" or site.is_cell:
        fresh = value.reshape(weight.shape)
    elif site.op_type == "ConvTranspose":
        split = value.reshape(site.groups, weight.shape[1], -1, int(np.prod(weight.shape[2:])))
        fresh = split.transpose(0, 2, 1, 3).reshape(weight.shape)
    elif site.op_type == "Gemm":
        matrix = value[0] / given.get("alpha", 1.0)
        fresh = matrix if given.get("transB", 0) else matrix.T
    else:
        fresh = value[0].T
    model.write(site.node, site.slot, fresh)


def own_bias(model: Editable, site: Site) -> Array | None:
    """The operator's bias [M], zero where it has none; None where it varies over positions."""
    node = model.nodes[site.node]
    if site.is_cell:
        both = _cell_bias(model, site)
        return None if both is None else both[:, : both.shape[1] // 2].ravel()
    if site.op_type == "MatMul" or len(node.input) < 3 or not node.input[2]:
        return np.zeros(site.channels)
    value = model.weight(node.input[2])
    if value is None or value.size not in (1, site.channels):
        return None
    if value.size > 1 and value.shape[-1] != value.size:
        return None
    return np.broadcast_to(_beta(model, site) * value.ravel(), (site.channels,)).copy()


def intercept(model: Editable, site: Site) -> Array | None:
    """What z is where x is 0, [M]; None where it varies over positions."""
    value = own_bias(model, site)
    for step in site.path if value is not None else ():
        value = value * step.scale + step.shift
    return value


def can_shift(model: Editable, site: Site) -> bool:
    """Whether there is a place for a change of the intercept."""
    return _has_slot(model, site) or _place(model, site) is not None


def shift(model: Editable, site: Site, change: Array) -> None:
    """Add `change` [M] to z, in a bias of the path if there is one, else in the operator's own."""
    index = _place(model, site)
    if index is None:
        if site.is_cell:
            return _shift_cell(model, site, change)
        own = own_bias(model, site)
        assert own is not None
        value = own + _over(change, site.scale())
        return model.write(site.node, 2, value / _beta(model, site))
    step = site.path[index]
    behind = np.ones(site.channels)
    for later in site.path[index + 1 :]:
        behind = behind * later.scale
    slot = 2 if step.op_type == "BatchNormalization" else step.slot
    old = model.weight(model.nodes[step.node].input[slot])
    assert old is not None
    delta = _over(change, -behind if step.op_type == "Sub" else behind)
    return model.write(step.node, slot, old + delta.reshape(old.shape))


def _cell_bias(model: Editable, site: Site) -> Array | None:
    """[directions, 2 * rows]: the biases of the inputs, then those of the hidden state."""
    node = model.nodes[site.node]
    if len(node.input) > 3 and node.input[3]:
        return model.weight(node.input[3])
    weight = model.weight(node.input[site.slot])
    assert weight is not None
    return np.zeros((weight.shape[0], 2 * weight.shape[1]))


def _shift_cell(model: Editable, site: Site, change: Array) -> None:
    both = _cell_bias(model, site)
    assert both is not None
    rows = both.shape[1] // 2
    both[:, :rows] += change.reshape(-1, rows)
    model.write(site.node, site.bias_slot, both)


def _has_slot(model: Editable, site: Site) -> bool:
    """Whether the operator itself has or can get a bias."""
    return (
        site.op_type != "MatMul"
        and _beta(model, site) != 0
        and model.can_write(site.node, site.bias_slot)
    )


def _place(model: Editable, site: Site) -> int | None:
    """The step whose vector takes a change of the intercept; None: the operator's own bias."""
    norms = [
        i
        for i, s in enumerate(site.path)
        if s.op_type == "BatchNormalization" and model.can_write(s.node, 2)
    ]
    if norms:
        return norms[-1]
    if _has_slot(model, site):
        return None
    for i, step in enumerate(site.path):
        vector = model.weight(model.nodes[step.node].input[step.slot])
        fits = vector is not None and vector.size == site.channels
        if step.op_type in ("Add", "Sub") and fits and model.can_write(step.node, step.slot):
            return i
    return None


def _beta(model: Editable, site: Site) -> float:
    """The factor of a Gemm's bias."""
    given = attributes(model.nodes[site.node])
    return float(given.get("beta", 1.0)) if site.op_type == "Gemm" else 1.0


def _over(change: Array, scale: Array) -> Array:
    return np.divide(change, scale, out=np.zeros_like(change), where=scale != 0)


def record_statistics(model: Editable, step: Affine, mean: Array, var: Array) -> None:
    """Store new statistics in a BatchNormalization, which goes on computing what it computed."""
    node = model.nodes[step.node]
    eps = attributes(node).get("epsilon", 1e-5)
    model.write(step.node, 1, step.scale * np.sqrt(var + eps))
    model.write(step.node, 2, step.shift + step.scale * mean)
    model.write(step.node, 3, mean)
    model.write(step.node, 4, var)
