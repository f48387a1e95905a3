"""Compute what does not depend on inputs or parameters.

So that rules see values and not chains of nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxprune.training.draft import OPSET, Draft, infer

RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
}
LIMIT = 1 << 26  # elements of one folded tensor


def fold_constants(draft: Draft) -> None:
    """Replace every node that is constant by its value; Shape of a fixed shape counts."""
    for _ in range(4):  # folded sizes let inference fix more shapes
        if not _fold_once(draft):
            return
        infer(draft)


def _fold_once(draft: Draft) -> bool:
    known = set(draft.constants) | {""}
    folded: list[onnx.NodeProto] = []
    rest: list[onnx.NodeProto] = []
    for node in draft.nodes:
        shape = _fixed_shape(node, draft)
        if shape is not None:
            draft.constants[node.output[0]] = shape
            known.add(node.output[0])
        elif _is_constant(node, known):
            known |= set(node.output)
            folded.append(node)
        else:
            rest.append(node)
    if len(rest) == len(draft.nodes):
        return False
    draft.nodes = rest
    draft.constants.update(_evaluate(draft, folded))
    return True


def _fixed_shape(node: onnx.NodeProto, draft: Draft) -> NDArray[Any] | None:
    """The value of Shape or Size where inference knows it."""
    if node.op_type not in ("Shape", "Size") or node.domain:
        return None
    shape = draft.shape(node.input[0])
    if shape is None:
        return None
    limits = {a.name: a.i for a in node.attribute}
    part = shape[slice(limits.get("start", 0), limits.get("end"))]
    if any(size is None for size in part):
        return None
    sizes = np.array([s for s in part if s is not None], np.int64)
    return sizes if node.op_type == "Shape" else np.asarray(np.prod(sizes), np.int64)


def _is_constant(node: onnx.NodeProto, known: set[str]) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in RANDOM:
        return False
    if any(
        a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute
    ):
        return False
    return all(name in known for name in node.input)


def _evaluate(draft: Draft, nodes: list[onnx.NodeProto]) -> dict[str, NDArray[Any]]:
    """Run constant nodes once, in ONNX Runtime."""
    if not nodes:
        return {}
    from onnxprune import runtime

    used = {name for node in nodes for name in node.input}
    outputs = [name for node in nodes for name in node.output if name]
    graph = helper.make_graph(
        nodes,
        "constants",
        [],
        [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in draft.constants.items() if n in used],
    )
    inferred = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    )
    return runtime.run(runtime.session(inferred, threads=1, optimize=False), {})
