"""Where a model's outputs say nothing about its arithmetic, inner tensors are compared instead.

A detector that finds nothing on random images returns empty boxes, and no error shows in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxprune.coupling import Coupling
from onnxprune.graph import FLOATS
from onnxprune.rewriting import Mask, Rewriter

#: How many inner tensors are compared, the last ones that the model computes.
COUNT = 32


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


def probes(coupling: Coupling, keep: Mask, pruned: onnx.ModelProto) -> tuple[str, ...]:
    """The last float tensors of which nothing is removed: equal in a pruned model and its twin."""
    rewriter = Rewriter(coupling, keep)
    made = {name for node in pruned.graph.node for name in node.output}
    found = (name for name in _candidates(coupling) if name in made and _whole(rewriter, name))
    return tuple(name for name, _ in zip(found, range(COUNT), strict=False))


def _candidates(coupling: Coupling) -> Iterator[str]:
    types, outputs = coupling.shapes.types, coupling.graph.outputs
    for node in reversed(coupling.graph.top):
        for name in node.outputs:
            if name and types.get(name) in FLOATS and name not in outputs:
                yield name


def _whole(rewriter: Rewriter, name: str) -> bool:
    dims = rewriter.shapes.dims(name)
    layout = rewriter.coupling.layouts.get(name, ())
    return dims is not None and rewriter.resized(dims, layout) == dims


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
