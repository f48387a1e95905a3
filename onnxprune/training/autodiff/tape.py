"""Reverse-mode differentiation of a graph: the tape, and the registry of its rules.

A rule takes one node and the gradients of its outputs, and appends to the tape the nodes that
compute the gradients of its inputs (Griewank and Walther, 2008). All of them are operators of the
ONNX standard, so that any runtime can run the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxprune.training.autodiff.recurrent import unrolled

Grad = str | None
Dim = int | str | None
Rule = Callable[[onnx.NodeProto, Sequence[Grad], "Tape"], Sequence[Grad]]

RULES: dict[str, Rule] = {}


def vjp(*op_types: str) -> Callable[[Rule], Rule]:
    """Register the rule of one or more operators: node, output gradients -> input gradients."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


@dataclass
class Tape:
    """The growing gradient graph.

    `shapes` are those of the forward tensors: a size, the name of an unknown size, or None.
    `needed` are the forward tensors that a parameter reaches.
    """

    shapes: dict[str, tuple[Dim, ...]]
    types: dict[str, int]
    constants: dict[str, NDArray[Any]]
    needed: set[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    fresh: dict[str, NDArray[Any]] = field(default_factory=dict)
    _stored: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _computed: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def name(self, hint: str) -> str:
        """A tensor name that nothing else has."""
        self._count += 1
        return f"onnxprune.autodiff.{hint.lower()}.{self._count}"

    def constant(self, value: Any) -> str:
        """A constant; Python floats become float32, Python ints int64."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._stored:
            self._stored[key] = self.name("constant")
            self.fresh[self._stored[key]] = array
        return self._stored[key]

    def op(self, op_type: str, *inputs: Any, **attributes: Any) -> str:
        """Append an operator with one output; inputs that are no names become constants."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(self, op_type: str, *inputs: Any, outputs: int, **attributes: Any) -> list[str]:
        """Append an operator with several outputs."""
        sources = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        targets = [self.name(op_type) for _ in range(outputs)]
        self.nodes.append(
            helper.make_node(op_type, sources, targets, name=targets[0], **attributes)
        )
        return targets

    def needs(self, node: onnx.NodeProto, index: int) -> bool:
        """Whether the gradient of input `index` is wanted."""
        return index < len(node.input) and node.input[index] in self.needed

    def shape(self, tensor: str) -> tuple[Dim, ...] | None:
        """The shape of a forward tensor as far as it is known."""
        return self.shapes.get(tensor)

    def rank(self, tensor: str) -> int:
        """The rank of a forward tensor, which legalised graphs tell."""
        shape = self.shapes.get(tensor)
        if shape is None:
            raise ValueError(f"the rank of {tensor!r} is not known")
        return len(shape)

    def static(self, tensor: str) -> list[int] | None:
        """The sizes of a forward tensor where all are known."""
        shape = self.shapes.get(tensor)
        if shape is None or not all(isinstance(size, int) for size in shape):
            return None
        return [size for size in shape if isinstance(size, int)]

    def shape_of(self, tensor: str) -> str:
        """The shape as a tensor [rank], a constant where it is known."""
        sizes = self.static(tensor)
        if sizes is not None:
            return self.constant(np.array(sizes, np.int64))
        if tensor not in self._computed:
            self._computed[tensor] = self.op("Shape", tensor)
        return self._computed[tensor]

    def size_of(self, tensor: str, axis: int) -> str:
        """One size as a tensor [1]."""
        size = (self.shapes.get(tensor) or {axis: None})[axis]
        if isinstance(size, int):
            return self.constant(np.array([size], np.int64))
        return self.op("Slice", self.shape_of(tensor), np.array([axis]), np.array([axis + 1]))

    def zeros_like(self, tensor: str) -> str:
        """Zeros of the shape of a forward tensor."""
        return self.op("Expand", np.zeros((), np.float32), self.shape_of(tensor))

    def value(self, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
        """The constant that is input `index`; None where it is absent or not constant."""
        if index >= len(node.input):
            return None
        return self.constants.get(node.input[index])

    def unbroadcast(self, grad: str, node: onnx.NodeProto, index: int) -> str:
        """Sum the gradient of an output over the axes along which input `index` was repeated."""
        tensor, output = node.input[index], node.output[0]
        inner, outer = self.shape(tensor), self.shape(output)
        if inner is None or outer is None:
            return self.sum_to(grad, tensor)
        extra = len(outer) - len(inner)
        axes = list(range(extra))
        for axis, size in enumerate(inner):
            full = outer[extra + axis]
            if size == 1 and full != 1:
                axes.append(extra + axis)
            elif not isinstance(size, int) and (size is None or size != full):
                return self.sum_to(grad, tensor)
        if not axes:
            return grad
        summed = self.op("ReduceSum", grad, np.array(axes), keepdims=1 if not extra else 0)
        return summed if not extra else self.op("Reshape", summed, self.shape_of(tensor))

    def sum_to(self, grad: str, tensor: str) -> str:
        """Sum a gradient to the shape of a forward tensor.

        The axes follow from the sizes at run time: leading ones, and those of length 1.
        """
        full = self.op("Shape", grad)
        own = self.op("Shape", tensor)
        missing = self.op("Sub", self.op("Size", full), self.op("Size", own))
        lead = self.op("Expand", np.array([1]), self.op("Unsqueeze", missing, np.array([0])))
        padded = self.op("Concat", lead, own, axis=0)
        same = self.op("Equal", padded, full)
        places = self.op("NonZero", self.op("Not", same))
        axes = self.op("Reshape", places, np.array([-1]))
        summed = self.op("ReduceSum", grad, axes, keepdims=1, noop_with_empty_axes=1)
        return self.op("Reshape", summed, own)


def gradient_model(model: onnx.ModelProto, trained: Sequence[str]) -> onnx.ModelProto:
    """The model with a further output `<name>_grad` for each trained graph input.

    Args:
        model: its first output is the scalar loss.
        trained: the graph inputs to differentiate by.

    Raises:
        ValueError: an operator on the way has no rule, or the loss does not depend on a parameter.
    """
    model = unrolled(model)
    tape = _tape(model, set(trained))
    loss = model.graph.output[0].name
    grads: dict[str, list[str]] = {loss: [tape.constant(np.ones((), np.float32))]}
    for node in reversed(model.graph.node):
        outputs = [_total(tape, grads, name) for name in node.output]
        if not any(outputs) or not any(name in tape.needed for name in node.input):
            continue
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            raise ValueError(f"{node.op_type} ({node.name}) has no gradient rule")
        for name, grad in zip(node.input, rule(node, outputs, tape), strict=False):
            if grad is not None and name in tape.needed:
                grads.setdefault(name, []).append(grad)
    return _assembled(model, tape, grads, trained)


def _total(tape: Tape, grads: dict[str, list[str]], name: str) -> Grad:
    """The sum of what all readers of a tensor gave."""
    parts = grads.get(name, [])
    if len(parts) > 1:
        grads[name] = [tape.op("Sum", *parts)]
    return grads[name][0] if parts else None


def _tape(model: onnx.ModelProto, trained: set[str]) -> Tape:
    graph = onnx.shape_inference.infer_shapes(_named_sizes(model), data_prop=True).graph
    shapes: dict[str, tuple[Dim, ...]] = {}
    types: dict[str, int] = {}
    for info in [*graph.input, *graph.value_info, *graph.output]:
        tensor = info.type.tensor_type
        types[info.name] = tensor.elem_type
        if tensor.HasField("shape"):
            shapes[info.name] = tuple(
                d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
                for d in tensor.shape.dim
            )
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    shapes |= {name: tuple(array.shape) for name, array in constants.items()}
    needed = set(trained)
    for node in graph.node:
        if any(name in needed for name in node.input):
            needed |= {o for o in node.output if types.get(o, 1) == TensorProto.FLOAT}
    return Tape(shapes, types, constants, needed)


def _named_sizes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every unknown size of an input has a name of its own, so that equal names
    tell equal sizes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for info in copy.graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and not dim.dim_param:
                dim.dim_param = f"{info.name}:{axis}"
    return copy


def _assembled(
    model: onnx.ModelProto, tape: Tape, grads: dict[str, list[str]], trained: Sequence[str]
) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for name in trained:
        grad = _total(tape, grads, name)
        if grad is None:
            raise ValueError(f"the loss does not depend on the parameter {name!r}")
        tape.nodes.append(helper.make_node("Identity", [grad], [f"{name}_grad"]))
        shape = tape.static(name)
        graph.output.append(helper.make_tensor_value_info(f"{name}_grad", TensorProto.FLOAT, shape))
    graph.node.extend(tape.nodes)
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in tape.fresh.items())
    return result
