"""Replace slow nodes of a gradient graph by faster ones of the same value.

Measured on ONNX Runtime 1.19, one thread, 0.4 million elements: ReluGrad takes 1.6 ms, comparing,
casting and multiplying 0.22 ms, the two operators below 0.11 ms.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxprune.training.blocked import use_blocks
from onnxprune.training.draft import attributes

STEEP = 3e38  # times the smallest normal number it is still above 1


def polish(gradient: bytes, block: int = 0) -> bytes:
    """The gradient graph with its derivatives of max(x, 0) as dx = dy * min(STEEP * y, 1).

    `block`: channels of a block of the runtime's convolutions, see `blocked`; 0: it has none.
    """
    model = onnx.load_from_string(gradient)
    changed = _replace_masks(model)
    if block:
        changed |= use_blocks(model, block)
    return bytes(model.SerializeToString()) if changed else gradient


def _replace_masks(model: onnx.ModelProto) -> bool:
    """y > 0 as a float, and what multiplies with it, in place; whether there was any."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    compared = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Greater" and _is_zero(constants.get(node.input[1]))
    }
    nodes: list[onnx.NodeProto] = []
    changed = False
    for node in model.graph.node:
        fresh = [node]
        if node.op_type == "ReluGrad":
            factor = f"{node.output[0]}.factor"
            product = helper.make_node("Mul", [node.input[0], factor], node.output, name=node.name)
            fresh = [_step(node.input[1], factor), product]
        elif node.op_type == "Cast" and node.input[0] in compared and _to_float(node):
            fresh = [_step(compared[node.input[0]], node.output[0])]
        changed |= fresh[0] is not node
        nodes += fresh
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return changed


def _is_zero(value: NDArray[np.generic] | None) -> bool:
    return value is not None and value.dtype == np.float32 and value.size == 1 and not value.any()


def _to_float(cast: onnx.NodeProto) -> bool:
    return bool(attributes(cast)["to"] == TensorProto.FLOAT)


def _step(y: str, output: str) -> onnx.NodeProto:
    """1 where y > 0, else 0."""
    return helper.make_node(
        "HardSigmoid", [y], [output], name=f"{output}.step", alpha=STEEP, beta=0.0
    )
