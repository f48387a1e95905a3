"""The masked twin: the original model with zeros where channels will be removed.

For groups that are removed exactly, pruned(x) == twin(x) up to float rounding, on every input. The twin is made from the
original weights by masks alone, so it shares no slicing and no rewritten shape with the pruned model.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.coupling import Contraction, Coupling
from onnxprune.rewriting import Mask, Rewriter


def masked_twin(coupling: Coupling, keep: Mask) -> onnx.ModelProto:
    """The original model with each contraction blind to what `keep` removes."""
    rewriter = Rewriter(coupling, keep)
    source = coupling.graph.model
    model = onnx.ModelProto()
    model.CopyFrom(source)
    del model.graph.value_info[:]
    masks: dict[tuple[int, int], list[Contraction]] = {}
    for contraction in coupling.contractions:
        if not rewriter.mask(contraction.labels).all():
            masks.setdefault((contraction.node, contraction.slot), []).append(contraction)
    nodes = [onnx.NodeProto() for _ in coupling.graph.nodes]
    for copy, node in zip(nodes, coupling.graph.nodes, strict=True):
        copy.CopyFrom(node.proto)
    del model.graph.node[:]
    for node, copy in zip(coupling.graph.nodes, nodes, strict=True):
        for slot in range(len(node.inputs)):
            if (node.index, slot) in masks:
                name = f"{node.index}.{slot}.masked"
                _add_mask(model, coupling, rewriter, masks[node.index, slot], name)
                copy.input[slot] = name
        model.graph.node.append(copy)
    return model


def _add_mask(
    model: onnx.ModelProto,
    coupling: Coupling,
    rewriter: Rewriter,
    contractions: list[Contraction],
    name: str,
) -> None:
    """Append name = input * mask for the masks of all contracted axes of one input."""
    first = contractions[0]
    source = coupling.graph.nodes[first.node].inputs[first.slot]
    rank = len(coupling.shapes.dims(source) or ())
    kind = coupling.shapes.types.get(source, TensorProto.FLOAT)
    mask = np.ones((1,) * rank, bool)
    for c in contractions:
        shape = [1] * rank
        shape[c.axis] = c.labels.size
        mask = mask & rewriter.mask(c.labels).reshape(shape)
    values = mask.astype(helper.tensor_dtype_to_np_dtype(kind))
    model.graph.initializer.append(numpy_helper.from_array(values, f"{name}.mask"))
    model.graph.node.append(helper.make_node("Mul", [source, f"{name}.mask"], [name], name=name))
