"""Operators that treat every element alike, with numpy broadcasting."""

from __future__ import annotations

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.registry import rule

UNARY = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "BitwiseNot",
]
VARIADIC = [
    "Add",
    "And",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "SwiGLU",
    "Where",
    "Xor",
]


@rule("Identity", "Cast", "CastLike", "BitCast", "Dropout", partial=True)
def carry(node: Node, c: Interpreter) -> None:
    """x[*D] -> y[*D], jointly labelled axes included"""
    if node.op_type == "Dropout" and _drops(node, c):
        c.freeze_input(node, 0, f"{node.title} draws as many numbers as it has elements")
        return
    if node.op_type == "CastLike":
        c.layout(node, 1)
    layout = c.carried(node, c.layout(node, 0))
    for index, name in enumerate(node.outputs):
        if c.out_dims(node, index) == c.dims(node, 0):
            c.set_layout(node, layout, index)
        elif c.graph.uses.get(name) or name in c.graph.leaving:
            c.freeze_input(node, 0, f"a shape around {node.title} is unknown")


def _drops(node: Node, c: Interpreter) -> bool:
    """Whether Dropout is in training mode, or might be."""
    if not node.input(2):
        return False
    training, ratio = c.value(node, 2), c.value(node, 1)
    none = ratio is not None and not ratio.any()
    return not none and (training is None or bool(training.any()))


@rule(*UNARY)
def unary(node: Node, c: Interpreter) -> None:
    """x[*D] -> y[*D]"""
    c.set_layout(node, c.settle_all(c.layout(node, 0), node))


@rule(*VARIADIC)
def broadcast(node: Node, c: Interpreter) -> None:
    """a[*A], b[*B], ... -> y[*broadcast(A, B, ...)]"""
    rank = len(c.out_dims(node))
    slots = [s for s, name in enumerate(node.inputs) if name]
    c.set(node, {axis: aligned(node, c, slots, axis, rank) for axis in range(rank)})


def aligned(node: Node, c: Interpreter, slots: list[int], axis: int, rank: int) -> Labels | None:
    """Tie the inputs' axes that line up with output axis `axis`; the common labels."""
    common: Labels | None = None
    met = False
    for slot in slots:
        dims = c.dims(node, slot)
        own = axis - (rank - len(dims))
        if own < 0 or dims[own] <= 1:
            continue
        labels = c.axis(node, slot, own)
        if met:
            c.tie(node, common, labels)
        common = (
            labels if common is None or (labels is not None and not (common > 0).all()) else common
        )
        met = True
    return common
