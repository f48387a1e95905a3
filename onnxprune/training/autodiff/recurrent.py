"""Write recurrent layers out step by step, so that their gradients are those of plain operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.training.draft import attributes

STATES = {"LSTM": 2, "GRU": 1}


def unrolled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without LSTM and GRU: one direction, given initial states, sequences of one length.

    Raises:
        ValueError: the length of a sequence is not fixed.
    """
    if not any(node.op_type in STATES for node in model.graph.node):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    shapes = _first_sizes(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type in STATES and node.domain in ("", "ai.onnx"):
            nodes += _Unrolling(node, shapes.get(node.input[0], 0), result.graph).nodes
        else:
            nodes.append(node)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _first_sizes(model: onnx.ModelProto) -> dict[str, int]:
    """The length of the first axis of every tensor, 0 where it is not known."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    return {v.name: (d[0].dim_value if (d := v.type.tensor_type.shape.dim) else 0) for v in values}


class _Unrolling:
    """The nodes that replace one recurrent node.

    x[T, N, I], W[1, G H, I], R[1, G H, H], B[1, 2 G H], h[1, N, H] (, c) -> y[T, 1, N, H], h (, c)
    """

    def __init__(self, node: onnx.NodeProto, length: int, graph: onnx.GraphProto) -> None:
        if length < 1:
            raise ValueError(f"{node.op_type} ({node.name}): its sequences have no fixed length")
        self.node, self.graph = node, graph
        self.nodes: list[onnx.NodeProto] = []
        self.label = node.name or node.output[0]
        self.hidden = int(attributes(node)["hidden_size"])
        self._write(length)

    def op(self, op_type: str, *inputs: Any, outputs: int = 1, **options: Any) -> Any:
        """Append an operator; arrays become initializers. Its output, or their list."""
        label = f"{self.label}.{len(self.nodes)}"
        names = [i if isinstance(i, str) else self._stored(i, label) for i in inputs]
        made = [f"{label}.{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op_type, names, made, name=label, **options))
        return made if outputs > 1 else made[0]

    def _stored(self, value: Any, label: str) -> str:
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = f"{label}.constant{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _write(self, length: int) -> None:
        first = np.array([0])
        weight, recurrence, bias = (self.op("Squeeze", n, first) for n in self.node.input[1:4])
        states = [self.op("Squeeze", n, first) for n in self.node.input[5:7] if n]
        gates = 4 if self.node.op_type == "LSTM" else 3
        own, back = self.op("Split", bias, outputs=2, axis=0, num_outputs=2)
        turned = self.op("Transpose", weight, perm=[1, 0])
        entering = self.op("Add", self.op("MatMul", self.node.input[0], turned), own)
        steps = [entering]
        if length > 1:
            steps = self.op("Split", entering, outputs=length, axis=0, num_outputs=length)
        step = self._lstm if gates == 4 else self._gru
        seen = []
        for entry in steps:
            states = step(self.op("Squeeze", entry, first), states, recurrence, back)
            seen.append(self.op("Unsqueeze", states[0], np.array([0, 1])))
        self._name(self.op("Concat", *seen, axis=0), 0)
        for place, state in enumerate(states, 1):
            self._name(self.op("Unsqueeze", state, first), place)

    def _name(self, tensor: str, place: int) -> None:
        """Give a tensor the name of the node's output, where it has one."""
        if place < len(self.node.output) and self.node.output[place]:
            self.nodes.append(helper.make_node("Identity", [tensor], [self.node.output[place]]))

    def _lstm(self, entry: str, states: list[str], recurrence: str, bias: str) -> list[str]:
        """i, o, f = sigmoid, g = tanh of the gates;  c <- f c + i g,  h <- o tanh(c)"""
        h, c = states
        gates = self.op("Add", entry, self.op("Gemm", h, recurrence, bias, transB=1))
        i, o, f, g = self.op("Split", gates, outputs=4, axis=1, num_outputs=4)
        i, o, f = (self.op("Sigmoid", gate) for gate in (i, o, f))
        gain = self.op("Mul", i, self.op("Tanh", g))
        c = self.op("Add", self.op("Mul", f, c), gain)
        return [self.op("Mul", o, self.op("Tanh", c)), c]

    def _gru(self, entry: str, states: list[str], recurrence: str, bias: str) -> list[str]:
        """z, r = sigmoid of the gates, n = tanh of the candidate;  h <- (1 - z) n + z h"""
        (h,) = states
        size = self.hidden
        parts = [size, size, size]
        z, r, n = self.op("Split", entry, np.array(parts), outputs=3, axis=1)
        if attributes(self.node).get("linear_before_reset"):
            past = self.op("Gemm", h, recurrence, bias, transB=1)
            past_z, past_r, past_n = self.op("Split", past, np.array(parts), outputs=3, axis=1)
            r = self.op("Sigmoid", self.op("Add", r, past_r))
            n = self.op("Tanh", self.op("Add", n, self.op("Mul", r, past_n)))
        else:
            weights = self.op("Split", recurrence, np.array(parts), outputs=3, axis=0)
            biases = self.op("Split", bias, np.array(parts), outputs=3, axis=0)
            past_z, past_r = (self.op("Gemm", h, weights[k], biases[k], transB=1) for k in range(2))
            r = self.op("Sigmoid", self.op("Add", r, past_r))
            reset = self.op("Mul", r, h)
            past_n = self.op("Gemm", reset, weights[2], biases[2], transB=1)
            n = self.op("Tanh", self.op("Add", n, past_n))
        z = self.op("Sigmoid", self.op("Add", z, past_z))
        kept = self.op("Sub", h, n)
        return [self.op("Add", n, self.op("Mul", z, kept))]
