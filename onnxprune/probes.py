"""Where a model's outputs say nothing about its arithmetic, inner tensors are compared instead.

A detector that finds nothing on random images returns empty boxes, and no error shows in them; one
whose random weights let the image fade away returns the same boxes for every image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from onnxprune.coupling import Coupling
from onnxprune.graph import FLOATS
from onnxprune.rewriting import Mask, Rewriter

#: How many inner tensors are compared.
COUNT = 32
#: Larger ones, in elements at the first assumed size, are compared only where all are larger.
LARGE = 1 << 22
#: Differences between samples, relative to the largest value, that rounding may explain.
_VARIATION = 1e-4


def are_telling(outputs: Iterable[Any], *, integers: bool = False) -> bool:
    """Whether at least one output holds a finite number, by default one that is no integer."""
    kinds = "OSU" if integers else "OSUiub"
    return any(
        are_telling(value, integers=integers) if isinstance(value, list) else _has(value, kinds)
        for value in outputs
    )


def _has(value: Any, without: str) -> bool:
    array = np.asarray(value)
    return array.dtype.kind not in without and bool(np.isfinite(array.astype(np.float32)).any())


def follow_inputs(outputs: Iterable[Any], samples: int) -> bool:
    """Whether any output differs between the samples of a batch, beyond what rounding explains.

    Outputs without a batch axis count as if they did.
    """
    found = [v for v in outputs if not isinstance(v, list) and _has(v, "OSUiub")]
    batched = [v for v in found if samples > 1 and v.ndim and v.shape[0] == samples]
    return len(batched) < len(found) or not found or any(map(_varies, batched))


def _varies(array: Any) -> bool:
    x = np.nan_to_num(np.asarray(array, np.float64), posinf=0.0, neginf=0.0)
    return bool(np.abs(x - x[:1]).max() > _VARIATION * np.abs(x).max())


@dataclass(frozen=True)
class Probe:
    """An inner tensor, and what stays of its axes in the pruned model."""

    name: str
    cuts: tuple[tuple[int, Mask], ...]

    def kept(self, array: NDArray[Any]) -> NDArray[Any]:
        """The part of the twin's tensor that the pruned model computes as well."""
        for axis, mask in self.cuts:
            array = np.compress(mask, array, axis=axis)
        return array


def probes(coupling: Coupling, keep: Mask, pruned: onnx.ModelProto) -> tuple[Probe, ...]:
    """Float tensors spread over the model: alike in a pruned model and its twin where both have
    them.
    """
    rewriter = Rewriter(coupling, keep)
    made = {name for node in pruned.graph.node for name in node.output}
    found = [
        Probe(name, cuts)
        for name in _candidates(coupling)
        if name in made and (cuts := _cuts(rewriter, name)) is not None
    ]
    small = [probe for probe in found if math.prod(coupling.shapes.first.dims[probe.name]) <= LARGE]
    found = small or found[-1:]
    if len(found) <= COUNT:
        return tuple(found)
    picked = np.linspace(0, len(found) - 1, COUNT).round().astype(int)
    return tuple(found[i] for i in picked)


def _candidates(coupling: Coupling) -> Iterator[str]:
    """Float tensors that depend on the inputs, in the order in which the model computes them."""
    types, outputs = coupling.shapes.types, coupling.graph.outputs
    following = set(coupling.graph.inputs)
    for node in coupling.graph.top:
        if following.isdisjoint(node.inputs):
            continue
        following.update(node.outputs)
        for name in node.outputs:
            if name and types.get(name) in FLOATS and name not in outputs:
                yield name


def _cuts(rewriter: Rewriter, name: str) -> tuple[tuple[int, Mask], ...] | None:
    """What stays along each axis.

    None where axes are cut jointly, where batch and channels share one, or the shape is unknown.
    """
    shapes, layout = rewriter.shapes, rewriter.coupling.layouts.get(name, ())
    if shapes.dims(name) is None:
        return None
    cut = [(b, m) for b in layout for m in (rewriter.mask(b.labels),) if not m.all()]
    if any(block.joint for block, _ in cut):
        return None
    lasting = (shapes.is_fixed(name, block.axes[0]) for block, _ in cut)
    if name not in shapes.doubted and not all(lasting):
        return None
    return tuple((block.axes[0], mask) for block, mask in cut)


def with_outputs(
    model: onnx.ModelProto, coupling: Coupling, names: Iterable[str]
) -> onnx.ModelProto:
    """A copy of the model that also returns the tensors `names`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in names:
        copy.graph.output.append(
            helper.make_tensor_value_info(name, coupling.shapes.types[name], None)
        )
    return copy
