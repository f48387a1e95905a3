"""Two linear layers with nothing between become one, where that takes no more parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxprune.graph import Constant, Graph, Node
from onnxprune.noops import remove_dead
from onnxprune.protos import fresh_name, reads

Array = NDArray[Any]
_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True)
class Layer:
    """A linear layer in float64: `weight` is [inputs, outputs], a Conv's [outputs, inputs, *taps].

    `nodes` are one, or a MatMul and the Add behind it; `constants` are what they read; `kind` is
    the element type. The weight is `scale` times `stored`, and is computed when it is asked for.
    """

    nodes: tuple[Node, ...]
    stored: Array
    bias: Array | None
    constants: tuple[str, ...]
    kind: int
    scale: float = 1.0

    @cached_property
    def weight(self) -> Array:
        """What the input is multiplied by."""
        return np.asarray(self.stored.astype(np.float64) * self.scale)

    @property
    def target(self) -> str:
        """The tensor that it makes."""
        return self.nodes[-1].outputs[0]

    @property
    def is_conv(self) -> bool:
        """A convolution."""
        return self.nodes[0].op_type == "Conv"

    @property
    def is_point(self) -> bool:
        """A convolution of one tap."""
        return math.prod(self.stored.shape[2:]) == 1

    @property
    def strides(self) -> list[int]:
        """Of a convolution, along its spatial axes."""
        return list(self.nodes[0].attr("strides") or [1] * (self.stored.ndim - 2))

    @property
    def is_unpadded(self) -> bool:
        """A convolution that reads nothing beyond the border."""
        node = self.nodes[0]
        automatic = node.attr("auto_pad", b"NOTSET")
        return automatic == b"VALID" or (automatic == b"NOTSET" and not any(node.attr("pads", ())))


def merge_layers(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """`model` with pairs of Conv, or of Gemm and MatMul, merged, and how many layers went.

    The given model, untouched, where there are none.
    """
    merged, count = model, 0
    while (pair := _find_pair(graph := Graph.of(merged))) is not None:
        if merged is model:
            merged = onnx.ModelProto()
            merged.CopyFrom(model)
            continue  # find the pair again, among the nodes of the copy
        _replace(merged, graph, *pair)
        count += 1
    return merged, count


def _find_pair(graph: Graph) -> tuple[Layer, Layer] | None:
    if graph.opset < 7:  # Gemm and Add broadcast by an attribute
        return None
    top = {node.index for node in graph.top}
    for node in graph.top:
        first = _layer(graph, node)
        reader = None if first is None else _only_reader(graph, first.target)
        if first is None or reader is None or reader.index not in top:
            continue
        second = _layer(graph, reader)
        if second is not None and second.kind == first.kind and _can_merge(graph, first, second):
            return first, second
    return None


# -- what is a layer -------------------------------------------------------------------------------


def _only_reader(graph: Graph, name: str) -> Node | None:
    """The node that alone reads a tensor, as its first input."""
    uses = graph.uses.get(name, ())
    if len(uses) != 1 or name in graph.leaving or uses[0][1] != 0:
        return None
    return graph.nodes[uses[0][0]]


def _layer(graph: Graph, node: Node) -> Layer | None:
    """The layer that begins with this node."""
    read = _READERS.get(node.op_type) if node.domain == "" else None
    weight = graph.constants.get(node.input(1))
    if read is None or weight is None or weight.dtype not in _TYPES:
        return None
    if node.input(2) and node.input(2) not in graph.constants:
        return None
    return read(graph, node, weight)


def _bias(constant: Constant | None, width: int, most_axes: int) -> Array | None:
    """A bias of `width` channels on the last axis; None where the constant is another."""
    if constant is None or len(constant.dims) > most_axes:
        return None
    if constant.size != 1 and (constant.size != width or constant.dims[-1] != width):
        return None
    return np.array(np.broadcast_to(constant.array().astype(np.float64).ravel(), width))


def _gemm(graph: Graph, node: Node, constant: Constant) -> Layer | None:
    if node.attr("transA", 0):
        return None
    weight = constant.array().T if node.attr("transB", 0) else constant.array()
    names: tuple[str, ...] = (node.input(1),)
    bias = None
    if node.input(2):
        bias = _bias(graph.constants[node.input(2)], weight.shape[1], 2)
        if bias is None:
            return None
        names, bias = node.inputs[1:3], bias * node.attr("beta", 1.0)
    return Layer((node,), weight, bias, names, constant.dtype, node.attr("alpha", 1.0))


def _matmul(graph: Graph, node: Node, constant: Constant) -> Layer | None:
    if len(constant.dims) != 2:
        return None
    weight = constant.array()
    nodes: tuple[Node, ...] = (node,)
    names, bias = node.inputs[1:2], None
    uses = graph.uses.get(node.outputs[0], ())
    if len(uses) == 1 and node.outputs[0] not in graph.leaving:
        add, slot = graph.nodes[uses[0][0]], uses[0][1]
        if (add.op_type, add.domain) == ("Add", "") and add in graph.top:
            bias = _bias(graph.constants.get(add.inputs[1 - slot]), weight.shape[1], 1)
            if bias is not None:
                nodes, names = (node, add), (*names, add.inputs[1 - slot])
    return Layer(nodes, weight, bias, names, constant.dtype)


def _conv(graph: Graph, node: Node, constant: Constant) -> Layer | None:
    if node.attr("group", 1) != 1 or constant.size == 0:
        return None
    bias = None
    if node.input(2):
        bias = graph.constants[node.input(2)].array().astype(np.float64)
    names = tuple(name for name in node.inputs[1:] if name)
    return Layer((node,), constant.array(), bias, names, constant.dtype)


_READERS: dict[str, Callable[[Graph, Node, Constant], Layer | None]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Conv": _conv,
}


# -- merging two -----------------------------------------------------------------------------------


def _can_merge(graph: Graph, first: Layer, second: Layer) -> bool:
    """Whether one layer computes the same, with no more parameters than go."""
    if first.is_conv != second.is_conv:
        return False
    if first.is_conv and not (_point_follows(first, second) or _point_leads(first, second)):
        return False
    freed = sum(
        graph.constants[name].size
        for name in {*first.constants, *second.constants}
        if len(graph.uses[name]) == 1 and name not in graph.leaving
    )
    return _merged_size(first, second) <= freed


def _merged_size(first: Layer, second: Layer) -> int:
    width = second.stored.shape[0 if first.is_conv else 1]
    inputs = first.stored.shape[1 if first.is_conv else 0]
    taps = math.prod((*first.stored.shape[2:], *second.stored.shape[2:]))
    biased = first.bias is not None or second.bias is not None
    return int(width * inputs * taps + width * biased)


def _point_follows(first: Layer, second: Layer) -> bool:
    """Any convolution, then one of a single tap: what it skips, the first one can skip."""
    same = first.nodes[0].attr("auto_pad", b"").startswith(b"SAME")  # pads as the strides ask
    strided = any(s != 1 for s in second.strides)
    return second.is_point and second.is_unpadded and not (same and strided)


def _point_leads(first: Layer, second: Layer) -> bool:
    """A single tap, then any convolution: a bias of the first would be missing in the padding."""
    biased = first.bias is not None and bool(first.bias.any())
    if not (first.is_point and first.is_unpadded and all(s == 1 for s in first.strides)):
        return False
    return second.is_unpadded or not biased


def _merged(first: Layer, second: Layer) -> tuple[Array, Array | None]:
    """The weight and bias of one layer that does what the two do."""
    if not first.is_conv:
        weight, back = first.weight @ second.weight, second.weight.T
    else:
        taps = tuple(range(2, second.weight.ndim))
        back = second.weight.sum(axis=taps)
        if _point_follows(first, second):
            weight = np.tensordot(back, first.weight, axes=1)
        else:
            inner = first.weight.reshape(first.weight.shape[:2])
            weight = np.moveaxis(np.tensordot(second.weight, inner, axes=(1, 0)), -1, 1)
    if first.bias is None:
        return weight, second.bias
    return weight, back @ first.bias + (0.0 if second.bias is None else second.bias)


def _replace(model: onnx.ModelProto, graph: Graph, first: Layer, second: Layer) -> None:
    """Put one layer where `second` ends; both, and the weights that nobody else reads, go."""
    taken = {*graph.producer, *graph.constants, *graph.inputs, *graph.leaving}
    weight, bias = _merged(first, second)
    kind = helper.tensor_dtype_to_np_dtype(first.kind)
    names = []
    for value in (weight, bias):
        if value is not None:
            names.append(fresh_name(f"{second.constants[0]}_merged", taken))
            tensor = numpy_helper.from_array(np.ascontiguousarray(value, kind), names[-1])
            model.graph.initializer.append(tensor)
    last = second.nodes[-1].proto
    at = next(i for i, node in enumerate(model.graph.node) if node is last)
    for i, node in enumerate(_nodes(first, second, names, taken)):
        model.graph.node.insert(at + 1 + i, node)
    gone = {id(node.proto) for layer in (first, second) for node in layer.nodes}
    for i in reversed(range(len(model.graph.node))):
        if id(model.graph.node[i]) in gone:
            del model.graph.node[i]
    _forget_inputs(model, {*first.constants, *second.constants})
    remove_dead(model)


def _nodes(
    first: Layer, second: Layer, names: list[str], taken: set[str]
) -> Iterator[onnx.NodeProto]:
    """The nodes of the merged layer, whose weight and bias are `names`."""
    source, target, title = first.nodes[0].inputs[0], second.target, second.nodes[0].proto.name
    if first.is_conv:
        node = onnx.NodeProto()
        node.CopyFrom((first if _point_follows(first, second) else second).nodes[0].proto)
        strides = [a * b for a, b in zip(first.strides, second.strides, strict=True)]
        kept = [a for a in node.attribute if a.name != "strides"]
        del node.input[:], node.output[:], node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("strides", strides)])
        node.input.extend([source, *names])
        node.output.append(target)
        node.name = title
        yield node
    elif "Gemm" in (first.nodes[0].op_type, second.nodes[0].op_type):
        yield helper.make_node("Gemm", [source, *names], [target], name=title)
    elif len(names) == 1:
        yield helper.make_node("MatMul", [source, *names], [target], name=title)
    else:
        inner = fresh_name(f"{target}_unbiased", taken)
        yield helper.make_node("MatMul", [source, names[0]], [inner], name=title)
        yield helper.make_node("Add", [inner, names[1]], [target], name=second.nodes[-1].proto.name)


def _forget_inputs(model: onnx.ModelProto, names: set[str]) -> None:
    """Old files list weights as inputs; those that nothing reads any more are none."""
    read = {name for node in model.graph.node for name in reads(node)}
    for i in reversed(range(len(model.graph.input))):
        if model.graph.input[i].name in names - read:
            del model.graph.input[i]
