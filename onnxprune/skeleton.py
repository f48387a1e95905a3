"""The model without its weights, for onnx's inference of the shapes of all tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import onnx

from onnxprune.graph import Graph
from onnxprune.protos import bodies

#: Tensors of more elements are left without data.
DATA_LIMIT = 1024


@dataclass(frozen=True)
class Skeleton:
    """The model without large tensors' data, made when it is asked for."""

    graph: Graph

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The model, without inputs and without recorded shapes."""
        return _without_data(self.graph)

    def inferred(self, inputs: Iterable[onnx.ValueInfoProto]) -> Iterable[onnx.ValueInfoProto]:
        """What onnx infers for tensors and outputs, with these inputs; nothing where it fails."""
        del self.model.graph.input[:]
        self.model.graph.input.extend(inputs)
        try:
            found = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        except Exception:  # the inference of one operator fails: the walk goes on without
            return ()
        return (*found.value_info, *found.output)


def _without_data(graph: Graph) -> onnx.ModelProto:
    source = graph.model
    model = onnx.ModelProto(ir_version=source.ir_version)
    model.opset_import.extend(source.opset_import)
    model.functions.extend(source.functions)
    model.graph.name = source.graph.name or "graph"
    model.graph.node.extend(node.proto for node in graph.top)
    _drop_all_data(model.graph.node)
    model.graph.output.extend(onnx.ValueInfoProto(name=o.name) for o in source.graph.output)
    for constant in (graph.constants[tensor.name] for tensor in graph.initializers):
        if constant.node is None:
            small = constant.size <= DATA_LIMIT
            model.graph.initializer.append(constant.tensor if small else _empty(constant.tensor))
    return model


def _drop_all_data(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        if node.op_type == "Constant":
            _drop_data(node)
        for body in bodies(node):
            _drop_all_data(body.node)
            for tensor in body.initializer:
                if math.prod(tensor.dims) > DATA_LIMIT:
                    tensor.CopyFrom(_empty(tensor))


def _drop_data(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "value" and math.prod(attribute.t.dims) > DATA_LIMIT:
            attribute.t.CopyFrom(_empty(attribute.t))


def _empty(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
