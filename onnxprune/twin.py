"""The masked twin: the original model with zeros where channels will be removed.

pruned(x) == twin(x) up to float rounding, on every input. Contractions see zeros. A node that
averages, compares or normalizes over removed channels sees only those that stay, and zeros are put
back behind it, so that groups through LayerNormalization and channel means are verified as well.
The twin is made from the original weights: it shares no slicing and no rewritten shape with the
pruned model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxprune.coupling import Coupling
from onnxprune.graph import Node
from onnxprune.labels import Labels, Layout
from onnxprune.ops import REWRITES
from onnxprune.protos import bodies
from onnxprune.rewriting import Mask, Rewriter
from onnxprune.vocabulary import redirect

Array = NDArray[Any]
Cuts = dict[int, Mask]
#: Integers that quantized activations are made of.
_SMALL = frozenset((TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16))
#: What ONNX Runtime's Where selects from.
_SELECTABLE = frozenset(
    getattr(TensorProto, n) for n in ("FLOAT", "FLOAT16", "DOUBLE", "INT32", "INT64", "UINT8")
)


@dataclass
class _Twin:
    coupling: Coupling
    rewriter: Rewriter
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    zeros: dict[tuple[int, int], int] = field(default_factory=dict)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node(op_type, inputs, [output], name=f"twin.{output}", **attributes)
        )
        return output


def masked_twin(coupling: Coupling, keep: Mask) -> onnx.ModelProto:
    """The original model, blind to what `keep` removes."""
    twin = _Twin(coupling, Rewriter(coupling, keep))
    masks: dict[tuple[int, int], Cuts] = {}
    for c in coupling.contractions:
        mask = twin.rewriter.mask(c.labels)
        if not mask.all():
            masks.setdefault((c.node, c.slot), {})[c.axis] = mask
            twin.zeros[c.node, c.slot] = c.zero
    compact = {s.node for s in coupling.statistics if not twin.rewriter.mask(s.labels).all()}
    return _model(twin, _emit(twin, coupling.graph.top, masks, compact))


def _emit(
    twin: _Twin, nodes: Sequence[Node], masks: Mapping[tuple[int, int], Cuts], compact: Set[int]
) -> list[onnx.NodeProto]:
    """The nodes of one graph, and of the bodies in it, with what the twin adds."""
    outer, twin.nodes = twin.nodes, []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node.proto)
        for body, graph in zip(node.bodies, bodies(copy), strict=True):
            del graph.node[:]
            graph.node.extend(_emit(twin, body.nodes, masks, compact))
        if node.index in compact:
            _compact(twin, node, copy)
            continue
        for slot in range(len(node.inputs)):
            use = (node.index, slot)
            if use in masks:
                copy.input[slot] = _masked(twin, node, slot, masks[use], twin.zeros[use])
        if node.index in twin.coupling.lookups:
            _redirect(twin, node, copy)
        twin.nodes.append(copy)
    made, twin.nodes = twin.nodes, outer
    return made


def _masked(twin: _Twin, node: Node, slot: int, masks: Cuts, zero: int) -> str:
    """Input `slot` with zeros wherever one of its contracted axes is removed.

    What was dequantized just before is set to its zero point and dequantized anew: ONNX Runtime
    then computes in integers where it does so in the pruned model.
    """
    source = node.inputs[slot]
    rank = len(twin.rewriter.dims(node, slot))
    kept = np.ones((1,) * rank, bool)
    for axis, mask in masks.items():
        kept = kept & mask.reshape([-1 if a == axis else 1 for a in range(rank)])
    name = f"{node.index}.{slot}.masked"
    before = twin.coupling.graph.producer.get(source)
    if zero < 0 and before is not None and _steps_from_integers(twin, before):
        inner = _zeroed(twin, before.inputs[0], kept, before.input(2), f"{name}.quantized")
        again = onnx.NodeProto()
        again.CopyFrom(before.proto)
        again.name, again.input[0], again.output[0] = name, inner, name
        twin.nodes.append(again)
        return name
    return _zeroed(twin, source, kept, node.input(zero) if zero >= 0 else "", name)


def _steps_from_integers(twin: _Twin, node: Node) -> bool:
    """Whether `node` dequantizes 8- or 16-bit integers with one zero point."""
    shapes = twin.coupling.shapes
    return (
        node.op_type == "DequantizeLinear"
        and shapes.types.get(node.inputs[0]) in _SMALL
        and all(n == 1 for n in shapes.dims(node.input(2)) or ())
    )


def _zeroed(twin: _Twin, source: str, kept: Array, zero: str, name: str) -> str:
    """`source` where `kept`, elsewhere its zero point: 0 where `zero` is no tensor."""
    kind = twin.coupling.shapes.types.get(source, TensorProto.FLOAT)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    selects = kind in _SELECTABLE and twin.coupling.graph.opset >= 9
    if not selects and kind not in _SMALL:
        return twin.node("Mul", [source, twin.constant(f"{name}.mask", kept.astype(dtype))], name)
    mask = twin.constant(f"{name}.mask", kept)
    fill = zero or twin.constant(f"{name}.zero", np.zeros((), dtype))
    if len(twin.coupling.shapes.dims(zero) or ()) == 1:  # one, or one for each row of a matrix
        shape = twin.constant(f"{name}.shape", np.array([-1, 1] if kept.ndim > 1 else [-1]))
        fill = twin.node("Reshape", [zero, shape], f"{name}.fill")
    if selects:
        return twin.node("Where", [mask, source, fill], name)
    wide = [
        twin.node("Cast", [x], f"{name}.{i}", to=TensorProto.INT32)
        for i, x in enumerate((source, fill))
    ]
    twin.node("Where", [mask, *wide], f"{name}.wide")
    return twin.node("Cast", [f"{name}.wide"], name, to=kind)


def _compact(twin: _Twin, node: Node, copy: onnx.NodeProto) -> None:
    """Run the node on what stays, and put zeros back where channels were removed."""
    for slot, name in enumerate(node.inputs):
        if name:
            for axis, mask in _cuts(twin, twin.rewriter.layout(node, slot)):
                index = twin.constant(f"{node.index}.{slot}.{axis}.kept", np.flatnonzero(mask))
                name = f"{node.index}.{slot}.{axis}.compact"
                twin.node("Gather", [copy.input[slot], index], name, axis=axis)
                copy.input[slot] = name
    _fit_attributes(twin, node, copy)
    twin.nodes.append(copy)
    for i, name in enumerate(node.outputs):
        cuts = _cuts(twin, twin.coupling.layouts.get(name, ()))
        if name in twin.coupling.numbers:
            copy.output[i] = f"{node.index}.{i}.compact"
            kept = np.flatnonzero(twin.rewriter.mask(twin.coupling.numbers[name]))
            place = twin.constant(f"{node.index}.{i}.place", kept)
            twin.node("Gather", [place, copy.output[i]], name)
        elif cuts:
            inner = copy.output[i] = f"{node.index}.{i}.inner"
            for axis, mask in cuts[:-1]:
                inner = _spread(twin, node, inner, f"{inner}.{axis}", axis, mask, i)
            _spread(twin, node, inner, name, *cuts[-1], i)


def _fit_attributes(twin: _Twin, node: Node, copy: onnx.NodeProto) -> None:
    """Attributes that count what is cut (hidden_size) follow the cut operands."""
    rewrite = REWRITES.get((node.domain, node.op_type))
    if rewrite is None:
        return
    rewrite(node, twin.rewriter)
    for name, value in twin.rewriter.edits.attributes.get(node.index, {}).items():
        rest = [a for a in copy.attribute if a.name != name]
        del copy.attribute[:]
        copy.attribute.extend([*rest, helper.make_attribute(name, value)])


def _redirect(twin: _Twin, node: Node, copy: onnx.NodeProto) -> None:
    """Ids that go are read as the unknown one."""
    vocabulary = twin.coupling.granularity.vocabulary
    mask = twin.rewriter.mask(twin.coupling.lookups[node.index])
    if vocabulary is not None and not mask.all():
        table = twin.constant(f"{node.index}.ids", redirect(mask, vocabulary.unknown))
        copy.input[1] = twin.node("Gather", [table, node.inputs[1]], f"{node.index}.redirected")


def _cuts(twin: _Twin, layout: Layout) -> list[tuple[int, Mask]]:
    """The axes of which something is removed, and what stays."""
    found: list[tuple[int, Labels]] = []
    for block in layout:
        if block.joint:
            found += list(twin.coupling.settled[id(block)][1].items())
        else:
            found.append((block.axes[0], block.labels))
    masks = ((axis, twin.rewriter.mask(labels)) for axis, labels in found)
    return [(axis, mask) for axis, mask in masks if not mask.all()]


def _spread(
    twin: _Twin, node: Node, source: str, target: str, axis: int, mask: Mask, index: int
) -> str:
    """Indices of `source` go back to their places along `axis`; zeros fill the rest."""
    rank = len(twin.rewriter.out_dims(node, index))
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + axis] = 1
    padded = f"{target}.padded"
    if twin.coupling.graph.opset < 11:
        twin.node("Pad", [source], padded, pads=pads.tolist())
    else:
        twin.node("Pad", [source, twin.constant(f"{padded}.pads", pads)], padded)
    place = np.where(mask, np.cumsum(mask) - 1, mask.sum()).astype(np.int64)
    twin.node("Gather", [padded, twin.constant(f"{padded}.place", place)], target, axis=axis)
    return target


def _model(twin: _Twin, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    source = twin.coupling.graph.model
    model = onnx.ModelProto(ir_version=source.ir_version)
    model.opset_import.extend(source.opset_import)
    model.functions.extend(source.functions)
    graph = model.graph
    graph.name = source.graph.name or "graph"
    graph.node.extend(nodes)
    graph.initializer.extend(twin.coupling.graph.initializers)
    graph.initializer.extend(twin.tensors)
    graph.sparse_initializer.extend(source.graph.sparse_initializer)
    graph.input.extend(source.graph.input)
    graph.output.extend(source.graph.output)
    return model
