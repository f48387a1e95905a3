"""Carry out a decision: slice every weight once, rewrite shapes, drop what fell out of use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxprune.coupling import Coupling
from onnxprune.graph import RAW_TYPES, Body, Constant, Node
from onnxprune.labels import Layout
from onnxprune.ops import REWRITES
from onnxprune.pause import collection_paused
from onnxprune.plan import Slice
from onnxprune.protos import copy_fields, fresh_name, reads
from onnxprune.rewriting import Edits, Mask, Rewriter

Array = NDArray[Any]
Cuts = dict[int, Mask]


@dataclass(frozen=True)
class Applied:
    """The pruned model and where each changed weight came from."""

    model: onnx.ModelProto
    slices: Mapping[str, Slice]


@dataclass(frozen=True)
class _Cut:
    """What is left of a weight; it is computed when it is written."""

    constant: Constant
    name: str
    cuts: Cuts

    @property
    def dims(self) -> tuple[int, ...]:
        kept = {axis: int(np.count_nonzero(mask)) for axis, mask in self.cuts.items()}
        return tuple(kept.get(axis, n) for axis, n in enumerate(self.constant.dims))

    def write(self, target: onnx.TensorProto) -> None:
        array = self.constant.array()
        for axis, mask in sorted(self.cuts.items(), key=lambda cut: cut[1].mean()):
            array = np.compress(mask, array, axis=axis)
        if self.constant.dtype in RAW_TYPES:
            target.name = self.name
            target.dims.extend(array.shape)
            data = array.tobytes()
            del array  # the proto takes a copy: two at a time are enough
            target.raw_data = data
        else:
            target.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), self.name))
        target.data_type = self.constant.dtype
        target.doc_string = self.constant.tensor.doc_string


@dataclass
class _State:
    coupling: Coupling
    rewriter: Rewriter
    taken: set[str]
    aliases: Mapping[str, list[str]]
    tensors: dict[str, onnx.TensorProto | _Cut] = field(default_factory=dict)
    added: list[onnx.TensorProto | _Cut] = field(default_factory=list)
    inputs: dict[int, dict[int, str]] = field(default_factory=dict)
    slices: dict[str, Slice] = field(default_factory=dict)

    def name(self, wish: str) -> str:
        """A tensor name that is not taken yet."""
        return fresh_name(wish, self.taken)

    def rewire(self, index: int, slot: int, name: str) -> None:
        """Input `slot` of node `index` will read `name`."""
        self.inputs.setdefault(index, {})[slot] = name


@collection_paused()
def apply_keep(coupling: Coupling, keep: Mask) -> Applied:
    """The model with only the units where `keep` is true (unit 0, frozen, always stays).

    The input model is left as it is; untouched weights are not copied before they reach the result.
    """
    rewriter = Rewriter(coupling, keep)
    graph = coupling.graph
    taken = {*graph.uses, *graph.producer, *graph.constants}
    aliases: dict[str, list[str]] = {}
    for alias, name in coupling.aliases.items():
        aliases.setdefault(name, []).append(alias)
    taken |= {i.name for i in graph.model.graph.input}
    state = _State(coupling, rewriter, taken, aliases)
    for name in coupling.constants:
        _slice_constant(state, graph.constants[name])
    for node in graph.nodes:
        rewrite = REWRITES.get((node.domain, node.op_type))
        if rewrite is not None and node.index in coupling.interpreted:
            rewrite(node, rewriter)
    _keep_old_lengths(coupling, rewriter)
    _place_operands(state, rewriter.edits)
    return Applied(_assemble(state, rewriter.edits), state.slices)


def _keep_old_lengths(coupling: Coupling, rewriter: Rewriter) -> None:
    """Arithmetic on a length that shrinks gets the old length as a constant."""
    for pin in coupling.pins:
        if (pin.node, pin.slot) in rewriter.edits.operands or rewriter.mask(pin.labels).all():
            continue
        node = coupling.graph.nodes[pin.node]
        value = rewriter.value(node, pin.slot)
        assert value is not None
        rewriter.set_operand(node, pin.slot, value)


def _cuts(rewriter: Rewriter, layout: Layout) -> Cuts:
    cuts = {}
    for block in layout:
        mask = rewriter.mask(block.labels)
        if not mask.all():
            cuts[block.axes[0]] = mask
    return cuts


def _slice_constant(state: _State, constant: Constant) -> None:
    """Slice a weight once for each different way in which its uses were pruned."""
    variants: dict[bytes, tuple[Cuts, list[tuple[int, int]]]] = {}
    for use, layout in state.coupling.constants[constant.name].items():
        cuts = _cuts(state.rewriter, layout)
        key = b"".join(bytes([a]) + m.tobytes() for a, m in sorted(cuts.items()))
        variants.setdefault(key, (cuts, []))[1].append(use)
    unlabelled = _other_uses(state, constant.name)
    if all(not cuts for cuts, _ in variants.values()):
        return
    own_name_free = not unlabelled and b"" not in variants
    for cuts, uses in variants.values():
        if not cuts:
            continue
        cut = _Cut(constant, constant.name, cuts)
        name = constant.name
        if own_name_free:
            own_name_free = False
            state.tensors[name] = cut
        else:
            name = state.name(f"{constant.name}_pruned")
            state.added.append(replace(cut, name=name))
            for index, slot in uses:
                state.rewire(index, slot, name)
        keep = {str(a): tuple(np.flatnonzero(m).tolist()) for a, m in cuts.items()}
        state.slices[name] = Slice(constant.name, constant.dims, cut.dims, keep)


def _other_uses(state: _State, name: str) -> bool:
    """Whether the tensor is read where no labels were asked for, or leaves the graph."""
    graph = state.coupling.graph
    names = [name, *state.aliases.get(name, ())]
    uses = {use for n in names for use in graph.uses.get(n, ())}
    passed = {(graph.producer[alias].index, 0) for alias in names[1:] if alias in graph.producer}
    known = state.coupling.constants[name].keys()
    return bool(uses - passed - known) or any(n in graph.leaving for n in names)


def _put(target: onnx.TensorProto, source: onnx.TensorProto | _Cut) -> None:
    """Write a tensor where it belongs: a cut weight exists once only, in the result."""
    if isinstance(source, _Cut):
        source.write(target)
    else:
        target.CopyFrom(source)


def _place_operands(state: _State, edits: Edits) -> None:
    """Shape operands go into the initializer they came from where nobody else reads it."""
    graph = state.coupling.graph
    for (index, slot), value in edits.operands.items():
        node = graph.nodes[index]
        name = node.input(slot)
        own = graph.constants.get(name)
        alone = own is not None and len(graph.uses.get(name, ())) == 1 and name not in graph.leaving
        if alone:
            state.tensors[name] = numpy_helper.from_array(value, name)
        else:
            fresh = state.name(f"{node.outputs[0]}_shape" if name else f"{node.outputs[0]}_operand")
            state.added.append(numpy_helper.from_array(value, fresh))
            state.rewire(index, slot, fresh)


def _assemble(state: _State, edits: Edits) -> onnx.ModelProto:
    graph = state.coupling.graph
    source = graph.model
    model = onnx.ModelProto()
    copy_fields(source, model, {"graph"})
    _write_graph(state, edits, graph.top, source.graph, graph.initializers, model.graph)
    for tensor in state.added:
        _put(model.graph.initializer.add(), tensor)
    return model


def _write_graph(
    state: _State,
    edits: Edits,
    nodes: Sequence[Node],
    source: onnx.GraphProto,
    tensors: Iterable[onnx.TensorProto],
    target: onnx.GraphProto,
) -> None:
    """The model's graph, or a body, after pruning."""
    copy_fields(source, target, {"node", "initializer", "value_info"})
    for tensor in tensors:
        _put(target.initializer.add(), state.tensors.get(tensor.name, tensor))
    living = _place_living(nodes, _written(state, edits, nodes, target), target)
    _fill_constants(state, living, target)
    target.value_info.extend(v for v in source.value_info if v.name not in edits.unrecorded)
    for values in (target.value_info, target.input, target.output):
        _write_values(state, values)


def _written(
    state: _State, edits: Edits, nodes: Sequence[Node], graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """The nodes of one graph after pruning; those that did not change are those of the source."""
    overridden = {index for index, _ in edits.overrides}
    replaced = edits.gathers.keys() | edits.bypassed | edits.reshapes.keys()
    if state.slices:  # a branch that never runs is in nobody's way before
        replaced |= state.coupling.taken.keys()
    edited = edits.attributes.keys() | edits.dropped.keys()
    protos: list[onnx.NodeProto] = []
    for node in nodes:
        index = node.index
        if index in replaced:
            protos += _replacement(state, edits, node, graph)
            continue
        if index in overridden:
            for slot in range(len(node.inputs)):
                override = edits.overrides.get((index, slot))
                if override is not None:
                    protos.append(_where(state, index, slot, *override))
        if index in edits.remaps:
            protos.append(_remap(state, index, edits.remaps[index]))
        if not (node.bodies or index in edited or index in state.inputs):
            protos.append(node.proto)
            continue
        proto = onnx.NodeProto()
        if node.bodies:
            _write_bodies(state, edits, node, proto)
        else:
            proto.CopyFrom(node.proto)
        _edit_node(state, edits, index, proto)
        protos.append(proto)
    return protos


def _replacement(
    state: _State, edits: Edits, node: Node, graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """What takes the place of a node."""
    if node.index in edits.gathers:
        return [_gather(state, node.index, *edits.gathers[node.index])]
    if node.index in edits.bypassed:
        names = [node.inputs[0]], [node.outputs[0]]
        return [helper.make_node("Identity", *names, name=node.proto.name)]
    if node.index in edits.reshapes:
        return [_reshape(state, node.index, *edits.reshapes[node.index])]
    return _taken(state, edits, node, graph)


def _taken(state: _State, edits: Edits, node: Node, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The only branch that ever runs takes the place of its If; the other one no longer fits."""
    body = state.coupling.taken[node.index]
    for tensor in body.proto.initializer:
        _put(graph.initializer.add(), state.tensors.get(tensor.name, tensor))
    protos = _written(state, edits, body.nodes, graph)
    for inner, outer in zip(body.outputs, node.outputs, strict=True):
        if outer:
            protos.append(helper.make_node("Identity", [inner], [outer], name=outer))
    return protos


def _write_bodies(state: _State, edits: Edits, node: Node, proto: onnx.NodeProto) -> None:
    copy_fields(node.proto, proto, {"attribute"})
    inner = iter(node.bodies)
    for attribute in node.proto.attribute:
        copy = proto.attribute.add()
        copy_fields(attribute, copy, {"g", "graphs"})
        if attribute.HasField("g"):
            _write_body(state, edits, next(inner), copy.g)
        for _ in attribute.graphs:
            _write_body(state, edits, next(inner), copy.graphs.add())


def _write_body(state: _State, edits: Edits, body: Body, target: onnx.GraphProto) -> None:
    _write_graph(state, edits, body.nodes, body.proto, body.proto.initializer, target)


def _fill_constants(state: _State, living: Sequence[Node | None], graph: onnx.GraphProto) -> None:
    """Cut weights that Constant nodes hold go where they came from."""
    for position, node in enumerate(living):
        if node is not None and node.op_type == "Constant" and node.outputs[0] in state.tensors:
            proto = graph.node[position]
            del proto.attribute[:]
            attribute = proto.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
            _put(attribute.t, state.tensors[proto.output[0]])


def _edit_node(state: _State, edits: Edits, index: int, proto: onnx.NodeProto) -> None:
    changed = edits.attributes.get(index, {})
    dropped = edits.dropped.get(index, set())
    if changed or dropped:
        rest = [a for a in proto.attribute if a.name not in changed and a.name not in dropped]
        rest += [helper.make_attribute(name, value) for name, value in changed.items()]
        del proto.attribute[:]
        proto.attribute.extend(rest)
    for slot, name in sorted(state.inputs.get(index, {}).items()):
        while len(proto.input) <= slot:
            proto.input.append("")
        proto.input[slot] = name


def _gather(state: _State, index: int, source: str, axis: int, picked: Array) -> onnx.NodeProto:
    node = state.coupling.graph.nodes[index]
    name = state.name(f"{node.outputs[0]}_index")
    state.added.append(numpy_helper.from_array(picked, name))
    return helper.make_node(
        "Gather", [source, name], list(node.outputs), name=node.proto.name, axis=axis
    )


def _reshape(state: _State, index: int, source: str, target: Array) -> onnx.NodeProto:
    node = state.coupling.graph.nodes[index]
    name = state.name(f"{node.outputs[0]}_shape")
    state.added.append(numpy_helper.from_array(target, name))
    return helper.make_node("Reshape", [source, name], list(node.outputs), name=node.proto.name)


def _remap(state: _State, index: int, table: Array) -> onnx.NodeProto:
    """Ids pass through `table` before the lookup in input 1."""
    node = state.coupling.graph.nodes[index]
    name, fresh = state.name(f"{node.outputs[0]}_remap"), state.name(f"{node.outputs[0]}_ids")
    state.added.append(numpy_helper.from_array(table, name))
    state.rewire(index, 1, fresh)
    return helper.make_node("Gather", [name, node.inputs[1]], [fresh], name=fresh)


def _where(state: _State, index: int, slot: int, mask: Array, target: Array) -> onnx.NodeProto:
    node = state.coupling.graph.nodes[index]
    fresh = state.name(f"{node.outputs[0]}_shape")
    names = [state.name(f"{fresh}_mask"), state.name(f"{fresh}_value")]
    state.added += [
        numpy_helper.from_array(a, n) for a, n in zip((mask, target), names, strict=True)
    ]
    state.rewire(index, slot, fresh)
    return helper.make_node("Where", [*names, node.input(slot)], [fresh], name=fresh)


def _write_values(state: _State, values: Iterable[onnx.ValueInfoProto]) -> None:
    """Recorded shapes keep what they said, except where pruning changed it."""
    rewriter, shapes = state.rewriter, state.coupling.shapes
    for value in values:
        changed = state.tensors.get(state.coupling.aliases.get(value.name, value.name))
        if changed is not None:
            for dim, size in zip(value.type.tensor_type.shape.dim, changed.dims, strict=False):
                dim.dim_value = size
            continue
        before = shapes.dims(value.name)
        if before is None or not value.type.tensor_type.HasField("shape"):
            continue
        after = rewriter.resized(before, state.coupling.layouts.get(value.name, ()))
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis < len(after) and before[axis] != after[axis] and dim.HasField("dim_value"):
                dim.dim_value = after[axis]


def _place_living(
    before: Sequence[Node], after: Sequence[onnx.NodeProto], graph: onnx.GraphProto
) -> list[Node | None]:
    """Put the nodes in, without those that only replaced parts used, and drop their initializers.

    What was unused before is none of our business. The result says of each node put in which one it
    was before, if it did not change.
    """
    known = {id(node.proto): node for node in before}
    used = {value.name for value in graph.output}
    used_before = used.union(*map(_reads, before))
    living: list[onnx.NodeProto] = []
    nodes: list[Node | None] = []
    for proto in reversed(after):
        node = known.get(id(proto))
        outputs = proto.output if node is None else node.outputs
        if used.isdisjoint(outputs) and not used_before.isdisjoint(outputs):
            continue
        used.update(reads(proto) if node is None else _reads(node))
        living.append(proto)
        nodes.append(node)
    graph.node.extend(reversed(living))
    inputs = {value.name for value in graph.input}
    for i, name in reversed(list(enumerate(tensor.name for tensor in graph.initializer))):
        if name not in used and name in used_before and name not in inputs:
            del graph.initializer[i]
    return nodes[::-1]


def _reads(node: Node) -> Iterable[str]:
    return reads(node.proto) if node.bodies else node.inputs
