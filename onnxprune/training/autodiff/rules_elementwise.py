"""Gradients of elementwise operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.training.autodiff.tape import Grad, Tape, vjp
from onnxprune.training.draft import attributes


def as_float(t: Tape, condition: str) -> str:
    """1 where a condition holds, else 0."""
    return t.op("Cast", condition, to=TensorProto.FLOAT)


@vjp("Identity")
def identity(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = x"""
    return grads


@vjp("Cast")
def cast(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = x: legalised graphs know one float type."""
    return grads


@vjp("Add", "Sub")
def add(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = a + b, y = a - b"""
    dy = _only(grads)
    da = t.unbroadcast(dy, node, 0) if t.needs(node, 0) else None
    if not t.needs(node, 1):
        return [da]
    db = t.unbroadcast(dy, node, 1)
    return [da, t.op("Neg", db) if node.op_type == "Sub" else db]


@vjp("Mul")
def mul(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = a b"""
    dy, (a, b) = _only(grads), node.input
    return [
        t.unbroadcast(t.op("Mul", dy, other), node, i) if t.needs(node, i) else None
        for i, other in enumerate((b, a))
    ]


@vjp("Div")
def div(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = a / b: da = dy / b, db = -dy y / b"""
    dy, (_, b) = _only(grads), node.input
    scaled = t.op("Div", dy, b)
    da = t.unbroadcast(scaled, node, 0) if t.needs(node, 0) else None
    if not t.needs(node, 1):
        return [da]
    product = t.op("Mul", scaled, node.output[0])
    return [da, t.op("Neg", t.unbroadcast(product, node, 1))]


@vjp("Pow")
def power(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = x ^ e: dx = dy e x ^ (e - 1), for a constant e"""
    exponent = t.value(node, 1)
    if exponent is None or t.needs(node, 1):
        raise ValueError(f"Pow ({node.name}): the exponent is not constant")
    e = exponent.astype(np.float32)
    x = node.input[0]
    slope = x if np.all(e == 2) else t.op("Pow", x, e - 1)
    product = t.op("Mul", t.op("Mul", _only(grads), slope), e)
    return [t.unbroadcast(product, node, 0)]


@vjp("Max", "Min")
def extreme(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """The gradient goes to the first operand that is the largest (smallest)."""
    dy = left = _only(grads)
    result: list[Grad] = []
    for index, x in enumerate(node.input):
        if len(node.input) == 1:
            return [dy]
        chosen = as_float(t, t.op("Equal", x, node.output[0]))
        part = t.op("Mul", left, chosen)
        left = t.op("Sub", left, part)
        result.append(t.unbroadcast(part, node, index) if t.needs(node, index) else None)
    return result


@vjp("Where")
def where(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = a where the condition holds, else b"""
    dy, condition = _only(grads), node.input[0]
    zero = np.zeros((), np.float32)
    da = t.op("Where", condition, dy, zero) if t.needs(node, 1) else None
    db = t.op("Where", condition, zero, dy) if t.needs(node, 2) else None
    return [None, da and t.unbroadcast(da, node, 1), db and t.unbroadcast(db, node, 2)]


@vjp("Clip")
def clip(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = min(max(x, low), high): the gradient passes between the limits."""
    x, dx = node.input[0], _only(grads)
    for index, compare in ((1, "GreaterOrEqual"), (2, "LessOrEqual")):
        if len(node.input) > index and node.input[index]:
            dx = t.op("Mul", dx, as_float(t, t.op(compare, x, node.input[index])))
    return [dx]


@vjp("Relu")
def relu(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """dx = dy (y > 0)"""
    passes = t.op("Greater", node.output[0], np.zeros((), np.float32))
    return [t.op("Mul", _only(grads), as_float(t, passes))]


@vjp("LeakyRelu")
def leaky_relu(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """dx = dy where x > 0, else alpha dy"""
    alpha = attributes(node).get("alpha", 0.01)
    passes = as_float(t, t.op("Greater", node.input[0], np.zeros((), np.float32)))
    slope = t.op("Add", t.op("Mul", passes, 1 - alpha), alpha)
    return [t.op("Mul", _only(grads), slope)]


@vjp("Gelu")
def gelu(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = x P(x): dx = dy (P(x) + x p(x)), p and P of the normal distribution, or tanh's form"""
    x = node.input[0]
    if attributes(node).get("approximate", "none") == "tanh":
        return [t.op("Mul", _only(grads), _tanh_slope(t, x))]
    whole = t.op("Mul", t.op("Add", t.op("Erf", t.op("Mul", x, 0.5**0.5)), 1.0), 0.5)
    bell = t.op("Exp", t.op("Mul", t.op("Mul", x, x), -0.5))
    density = t.op("Mul", bell, (2 * np.pi) ** -0.5)
    slope = t.op("Add", whole, t.op("Mul", x, density))
    return [t.op("Mul", _only(grads), slope)]


def _tanh_slope(t: Tape, x: str) -> str:
    """Of x/2 (1 + tanh(k (x + c x^3))): (1 + h)/2 + x/2 (1 - h^2) k (1 + 3 c x^2)"""
    k, c = (2 / np.pi) ** 0.5, 0.044715
    square = t.op("Mul", x, x)
    inner = t.op("Mul", t.op("Mul", x, t.op("Add", t.op("Mul", square, c), 1.0)), k)
    h = t.op("Tanh", inner)
    first = t.op("Mul", t.op("Add", h, 1.0), 0.5)
    steep = t.op("Mul", t.op("Add", t.op("Mul", square, 3 * c), 1.0), 0.5 * k)
    falling = t.op("Sub", np.ones((), np.float32), t.op("Mul", h, h))
    return t.op("Add", first, t.op("Mul", t.op("Mul", x, falling), steep))


@vjp("Abs", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Sigmoid", "Tanh", "Erf", "Sin", "Cos")
def unary(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y = f(x): dx = dy f'(x)"""
    dy, x, y = _only(grads), node.input[0], node.output[0]
    if node.op_type == "Neg":
        return [t.op("Neg", dy)]
    if node.op_type == "Log":
        return [t.op("Div", dy, x)]
    if node.op_type == "Sqrt":
        return [t.op("Div", t.op("Mul", dy, 0.5), y)]
    return [t.op("Mul", dy, _slope(t, node.op_type, x, y))]


def _slope(t: Tape, kind: str, x: str, y: str) -> str:
    """f'(x), from x or from y = f(x)."""
    one = np.ones((), np.float32)
    if kind == "Abs":
        return t.op("Sign", x)
    if kind == "Exp":
        return y
    if kind == "Reciprocal":
        return t.op("Neg", t.op("Mul", y, y))
    if kind == "Sigmoid":
        return t.op("Mul", y, t.op("Sub", one, y))
    if kind == "Tanh":
        return t.op("Sub", one, t.op("Mul", y, y))
    if kind == "Erf":
        return t.op("Mul", t.op("Exp", t.op("Neg", t.op("Mul", x, x))), 2 / np.pi**0.5)
    return t.op("Cos", x) if kind == "Sin" else t.op("Neg", t.op("Sin", x))


def _only(grads: Sequence[Grad]) -> str:
    """The gradient of the first output, which is the only one."""
    assert grads[0] is not None
    return grads[0]
