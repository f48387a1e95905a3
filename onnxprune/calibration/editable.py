"""A model whose weights can be read and written as arrays, each belonging to one reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxprune.graph import FLOATS
from onnxprune.protos import reads, topological_order

Array = NDArray[Any]


class Editable:
    """A copy of a model: `nodes` in topological order, stored tensors by name.

    Constant nodes count as stored tensors and are not among `nodes`. A weight that one Transpose
    reads, as exporters leave it without constant folding, is stored as that gives it. Unless the
    model `may_grow`, no tensor is added: neither a bias where none was, nor a copy of a shared one.
    """

    def __init__(self, model: onnx.ModelProto, *, may_grow: bool = True) -> None:
        self.may_grow = may_grow
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model)
        _transpose_weights(self.proto.graph)
        graph = self.proto.graph
        order = topological_order(
            [list(n.output) for n in graph.node], [list(reads(n)) for n in graph.node]
        )
        protos = [graph.node[i] for i in order]
        self.nodes = [n for n in protos if n.op_type != "Constant"]
        self.constants = {n.output[0]: n for n in protos if n.op_type == "Constant"}
        self.tensors = {t.name: t for t in graph.initializer}
        self.aliases = {
            n.output[0]: n.input[0]
            for n in self.nodes
            if n.op_type == "Identity" and n.domain in ("", "ai.onnx")
        }
        self.inputs = [i.name for i in graph.input if i.name not in self.tensors]
        self.outputs = {o.name for o in graph.output}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in reads(node):
                if name:
                    self.readers.setdefault(name, []).append(index)
        self.maker = {n: i for i, node in enumerate(self.nodes) for n in node.output if n}
        self._last = {name: max(where) for name, where in self.readers.items()}

    # -- structure ---------------------------------------------------------------------------------

    def is_stored(self, name: str) -> bool:
        """Whether the tensor's value is in the file."""
        return name in self.tensors or name in self.constants

    def only_reader(self, name: str) -> int | None:
        """The one node that reads an activation; None where it leaves the graph or is read more."""
        where = self.readers.get(name, [])
        return where[0] if len(where) == 1 and name not in self.outputs else None

    def read_from(self, position: int) -> set[str]:
        """Names that nodes from `position` on read."""
        return {name for name, last in self._last.items() if last >= position}

    def part(
        self,
        nodes: Sequence[onnx.NodeProto],
        feeds: Sequence[Mapping[str, Array]],
        outputs: Sequence[str],
    ) -> onnx.ModelProto:
        """A model of some of the nodes, whose inputs have the types and shapes of `feeds`."""
        from onnxprune.calibration.walk import value_info

        model = onnx.ModelProto(ir_version=self.proto.ir_version)
        model.opset_import.extend(self.proto.opset_import)
        model.functions.extend(self.proto.functions)
        graph = model.graph
        graph.name = "part"
        read = sorted({name for node in nodes for name in reads(node)})
        graph.node.extend(self.constants[n] for n in read if n in self.constants)
        graph.node.extend(nodes)
        graph.initializer.extend(self.tensors[n] for n in read if n in self.tensors)
        graph.input.extend(value_info(name, [f[name] for f in feeds]) for name in feeds[0])
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return model

    # -- weights -----------------------------------------------------------------------------------

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """The proto of a stored tensor, also behind Identity nodes; None for anything else."""
        while name in self.aliases:
            name = self.aliases[name]
        stored: onnx.TensorProto | None = self.tensors.get(name)
        node = self.constants.get(name)
        if node is not None and node.attribute[0].name == "value":
            stored = node.attribute[0].t
        return stored

    def weight(self, name: str) -> Array | None:
        """The value of a stored float tensor in float64, None for anything else."""
        tensor = self.tensor(name)
        if tensor is None or tensor.data_type not in FLOATS:
            return None
        return numpy_helper.to_array(tensor).astype(np.float64)

    def is_own(self, name: str) -> bool:
        """Whether a stored tensor is read once and is neither an input nor an output."""
        inputs = {i.name for i in self.proto.graph.input}
        shared = self.outputs | inputs | self.aliases.keys()
        return len(self.readers.get(name, ())) == 1 and name not in shared

    def can_write(self, index: int, slot: int) -> bool:
        """Whether input `slot` of node `index` is stored in a tensor of its own, or can be."""
        node = self.nodes[index]
        name = node.input[slot] if slot < len(node.input) else ""
        if not name:
            return self.may_grow
        return self.weight(name) is not None and (self.may_grow or self.is_own(name))

    def write(self, index: int, slot: int, value: Array) -> None:
        """Input `slot` of node `index` holds `value`; the tensor's other readers are left alone."""
        node = self.nodes[index]
        name = node.input[slot] if slot < len(node.input) else ""
        if name and self.is_own(name):
            tensor = self.tensor(name)
            assert tensor is not None
            _fill(tensor, value)
            return
        kind = self.tensor(name).data_type if name else self._kind(index)  # type: ignore[union-attr]
        self._attach(index, slot, name or f"{node.output[0]}_bias", value, kind)

    def _kind(self, index: int) -> int:
        """The type of a node's weight, for a bias beside it."""
        found = (self.tensor(n) for n in self.nodes[index].input)
        return next(t.data_type for t in found if t is not None and t.data_type in FLOATS)

    def _attach(self, index: int, slot: int, wish: str, value: Array, kind: int) -> None:
        node = self.nodes[index]
        name, count = wish, 1
        while name in self.readers or name in self.tensors or name in self.maker:
            name, count = f"{wish}_{count}", count + 1
        tensor = onnx.TensorProto(name=name, data_type=kind)
        _fill(tensor, value)
        self.proto.graph.initializer.append(tensor)
        self.tensors[name] = self.proto.graph.initializer[-1]
        while len(node.input) <= slot:
            node.input.append("")
        if node.input[slot]:
            self.readers[node.input[slot]].remove(index)
        node.input[slot] = name
        self.readers[name] = [index]
        self._last[name] = index

    def model(self) -> onnx.ModelProto:
        """The model as it is now."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        return copy


def _fill(tensor: onnx.TensorProto, value: Array) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    fresh = numpy_helper.from_array(np.ascontiguousarray(value.astype(dtype)), tensor.name)
    fresh.doc_string = tensor.doc_string
    tensor.CopyFrom(fresh)


def _transpose_weights(graph: onnx.GraphProto) -> None:
    """Store W^T under its name where a node transposes a float weight that nothing else reads."""
    stored = {t.name: t for t in graph.initializer}
    fixed = {i.name for i in graph.input} | {o.name for o in graph.output}
    times = Counter(name for node in graph.node for name in reads(node))
    kept = []
    for node in graph.node:
        tensor = stored.get(node.input[0]) if node.op_type == "Transpose" else None
        name = node.output[0] if node.output else ""
        if (
            tensor is None
            or node.domain not in ("", "ai.onnx")
            or tensor.data_type not in FLOATS
            or times[tensor.name] > 1
            or {tensor.name, name} & fixed
        ):
            kept.append(node)
            continue
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        value = np.ascontiguousarray(np.transpose(numpy_helper.to_array(tensor), perm))
        tensor.CopyFrom(numpy_helper.from_array(value, name))
    if len(kept) < len(graph.node):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(nodes)
