"""Shapes of standard operators that work element by element, without asking onnx for each call."""

from __future__ import annotations

Dims = tuple[int, ...]
#: Their output is of their first input's shape and type, in every version of the operator set.
SAME = frozenset(
    (
        "Abs",
        "Ceil",
        "Clip",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "HardSigmoid",
        "LeakyRelu",
        "Log",
        "LogSoftmax",
        "Neg",
        "Reciprocal",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softmax",
        "Softplus",
        "Sqrt",
        "Tanh",
    )
)
#: Their output is of their inputs' common shape, and of their first input's type.
BROADCAST = frozenset(("Add", "Div", "Mul", "Sub"))


def broadcast(a: Dims, b: Dims) -> Dims | None:
    """The shape that both spread to, as numpy has it; None where they do not fit."""
    if a == b:
        return a
    long, short = (a, b) if len(a) >= len(b) else (b, a)
    found = list(long)
    for axis, n in enumerate(short, len(long) - len(short)):
        if n != 1 and n != found[axis]:
            if found[axis] != 1:
                return None
            found[axis] = n
    return tuple(found)
