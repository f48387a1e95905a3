"""A copy of a model whose weights are edited node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxprune.graph import Graph, Node
from onnxprune.protos import fresh_name


def input_axis(node: Node, rank: int) -> int:
    """The axis of a layer's weight (input 1, of this rank) along which its inputs are summed."""
    if node.op_type == "Gemm":
        return 1 if node.attr("transB", 0) else 0
    return {"Conv": 1, "ConvTranspose": 0}.get(node.op_type, max(rank - 2, 0))


class Edit:
    """A copy of a model; nodes are named by their positions in the original."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = Graph.of(self.model)
        self._taken = set(self.graph.producer) | set(self.graph.constants)

    def weight(self, index: int, slot: int) -> NDArray[Any]:
        """The constant in input `slot` of node `index`."""
        name = self.graph.nodes[index].proto.input[slot]
        for tensor in self.model.graph.initializer:
            if tensor.name == name:
                return numpy_helper.to_array(tensor)
        return self.graph.constants[name].array()

    def set_weight(self, index: int, slot: int, value: NDArray[Any], kind: int) -> None:
        """Input `slot` of node `index` becomes `value`, for this node only."""
        node = self.graph.nodes[index]
        while len(node.proto.input) <= slot:
            node.proto.input.append("")
        old = node.proto.input[slot]
        alone = len(self.graph.uses.get(old, ())) == 1 and old not in self.graph.outputs
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), old)
        tensor.data_type = kind
        for initializer in self.model.graph.initializer:
            if alone and initializer.name == old:
                initializer.CopyFrom(tensor)
                return
        tensor.name = node.proto.input[slot] = self._fresh(old or f"{node.outputs[0]}_bias")
        self.model.graph.initializer.append(tensor)

    def replace(self, name: str, value: NDArray[Any], kind: int) -> None:
        """The constant `name` becomes `value`, wherever it is read."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        tensor.data_type = kind
        self.graph.constants[name].tensor.CopyFrom(tensor)

    def _fresh(self, wish: str) -> str:
        return fresh_name(wish, self._taken)

    def absorb(self, index: int, value: NDArray[Any]) -> None:
        """Channels of the known `value` are no longer read; a bias brings what they brought."""
        node = self.graph.nodes[index]
        weight = self.weight(node.index, 1)
        axis = input_axis(node, weight.ndim)
        rows = np.moveaxis(weight, axis, 0).astype(np.float64)
        if node.op_type == "Conv":
            shift = self._conv_shift(node.attr("group", 1), weight, value)
        else:
            shift = value @ rows * node.attr("alpha", 1.0)
        kind = self.graph.constants[node.inputs[1]].dtype
        shape = [1] * weight.ndim
        if node.op_type == "Conv" and node.attr("group", 1) > 1:
            cut = self._grouped_cut(node.attr("group", 1), weight, value)
        else:
            shape[axis] = -1
            cut = np.asarray(value == 0).reshape(shape)
        self.set_weight(node.index, 1, np.where(cut, weight, 0).astype(weight.dtype), kind)
        self.add_bias(node.index, shift.astype(weight.dtype), kind)

    def redirect(
        self, index: int, sources: NDArray[Any], target: NDArray[Any], factor: NDArray[Any]
    ) -> None:
        """Channels `sources` are `factor` times channels `target`, and are read there instead."""
        node = self.graph.nodes[index]
        weight = np.array(self.weight(node.index, 1))
        axis = input_axis(node, weight.ndim)
        rows = np.moveaxis(weight, axis, 0)
        exact = rows.astype(np.float64)
        for source, goal, times in zip(sources, target, factor, strict=True):
            exact[goal] += times * exact[source]
            exact[source] = 0
        rows[...] = exact.astype(weight.dtype)
        self.set_weight(index, 1, weight, self.graph.constants[node.inputs[1]].dtype)

    def _conv_shift(self, groups: int, weight: NDArray[Any], value: NDArray[Any]) -> NDArray[Any]:
        taps = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        sums = taps.astype(np.float64).sum(axis=3)
        return np.asarray((sums @ value.reshape(groups, -1, 1)).ravel())

    def _grouped_cut(self, groups: int, weight: NDArray[Any], value: NDArray[Any]) -> NDArray[Any]:
        keep = (value == 0).reshape(groups, 1, -1)
        rows = np.repeat(keep, weight.shape[0] // groups, axis=1)
        return rows.reshape(weight.shape[:2] + (1,) * (weight.ndim - 2))

    def add_bias(self, index: int, shift: NDArray[Any], kind: int) -> None:
        """What layer `index` gives is moved by `shift`."""
        node = self.graph.nodes[index]
        if node.op_type == "MatMul":
            self._insert_add(index, shift, kind)
            return
        old = self.weight(index, 2) * node.attr("beta", 1.0) if node.input(2) else 0
        if node.attr("beta", 1.0) != 1.0:
            for attribute in node.proto.attribute:
                if attribute.name == "beta":
                    attribute.f = 1.0
        self.set_weight(index, 2, (old + shift).astype(shift.dtype), kind)

    def _insert_add(self, index: int, shift: NDArray[Any], kind: int) -> None:
        """MatMul has no bias: the Add behind it takes it, or a new one."""
        node = self.graph.nodes[index]
        out = node.outputs[0]
        uses = self.graph.uses.get(out, ())
        follower = self.graph.nodes[uses[0][0]] if len(uses) == 1 else None
        if follower is not None and follower.op_type == "Add" and out not in self.graph.outputs:
            slot = 1 - uses[0][1]
            constant = self.graph.constants.get(follower.inputs[slot])
            if constant is not None and constant.dims[-1:] == shift.shape:
                bias = self.weight(follower.index, slot) + shift
                self.set_weight(follower.index, slot, bias.astype(shift.dtype), kind)
                return
        inner = self._fresh(f"{out}_unbiased")
        node.proto.output[0] = inner
        add = onnx.helper.make_node("Add", [inner, ""], [out], name=self._fresh(f"{out}_bias"))
        name = self._fresh(f"{out}_bias")
        tensor = numpy_helper.from_array(shift, name)
        tensor.data_type = kind
        self.model.graph.initializer.append(tensor)
        add.input[1] = name
        at = next(i for i, n in enumerate(self.model.graph.node) if n is node.proto)
        self.model.graph.node.insert(at + 1, add)
