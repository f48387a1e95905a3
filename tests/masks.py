"""Models as mask-based pruning leaves them: channels set to zero, shapes as they were."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.analysis import Analysis, analyse
from onnxprune.rewriting import Mask


def chosen(analysis: Analysis, share: float, seed: int) -> Mask:
    """keep[unit] that drops `share` of each exact group."""
    rng = np.random.default_rng(seed)
    keep = analysis.everything.copy()
    for group in analysis.groups:
        if group.exact:
            count = int(group.size * share)
            keep[rng.permutation(group.units)[:count]] = False
    return keep


def mask_producers(
    model: onnx.ModelProto, share: float = 0.3, *, seed: int = 0
) -> tuple[onnx.ModelProto, int]:
    """Every filter, scale, shift and bias that makes a dropped channel is zero; how many units."""
    return _masked(model, share, seed, makers=True)


def mask_readers(
    model: onnx.ModelProto, share: float = 0.3, *, seed: int = 0
) -> tuple[onnx.ModelProto, int]:
    """Every weight that reads a dropped channel is zero; how many units."""
    return _masked(model, share, seed, makers=False)


def spoiled(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Some slices of each weight zero, negative, or multiples of another slice."""
    rng = np.random.default_rng(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or not tensor.dims:
            continue
        array = np.array(numpy_helper.to_array(tensor))
        positive = bool((array > 0).all())  # a variance, perhaps
        for axis in (a for a, n in enumerate(array.shape) if n > 1):
            slices = np.moveaxis(array, axis, 0)
            part = slices[: rng.integers(0, len(slices) // 2 + 1)]
            kind = rng.integers(0, 6)
            if kind < 2:
                part[:] = slices[-1] * (1, 2.5)[kind]
            elif kind < 4 and not positive:
                part[:] = (0, -np.abs(part))[kind - 2]
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


def _masked(
    model: onnx.ModelProto, share: float, seed: int, *, makers: bool
) -> tuple[onnx.ModelProto, int]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    analysis = analyse(copy)
    coupling, unit = analysis.coupling, analysis.coupling.solution.unit
    keep = chosen(analysis, share, seed)
    contracted = {(c.node, c.labels.tobytes()) for c in coupling.contractions}
    summed = {unit[np.maximum(c.labels, 0)].tobytes() for c in coupling.contractions}
    made = {id(labels) for _, labels in coupling.products}
    assert contracted and summed
    for tensor in copy.graph.initializer:
        uses = coupling.constants.get(tensor.name, {})
        array = np.array(numpy_helper.to_array(tensor))
        for (index, slot), layout in uses.items():
            node = coupling.graph.nodes[index]
            for block in layout:
                is_maker = id(block.labels) in made or array.ndim == 1
                if is_maker is not makers or (array.ndim == 1 and slot == 4):
                    continue
                if not is_maker and node.op_type == "Conv" and node.attr("group", 1) > 1:
                    continue
                mask = keep[unit[np.maximum(block.labels, 0)]]
                shape = [-1 if a == block.axes[0] else 1 for a in range(array.ndim)]
                array = array * mask.reshape(shape).astype(array.dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy, int((~keep).sum())
