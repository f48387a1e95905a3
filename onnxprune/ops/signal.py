"""Transforms over time or frequency, grids and determinants: what they mix stays."""

from __future__ import annotations

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.ops.registry import rule


def _pass_except(node: Node, c: Interpreter, own: set[int], words: str) -> None:
    rank = len(c.dims(node, 0))
    for axis in own:
        c.freeze(node, c.axis(node, 0, axis), words)
    c.set(node, {a: c.axis(node, 0, a) for a in range(rank) if a not in own})


@rule("DFT")
def dft(node: Node, c: Interpreter) -> None:
    """x[*D, 1 or 2], length, axis -> y[*D', 1 or 2]; transforms one axis"""
    rank = len(c.dims(node, 0))
    axis = node.attr("axis", 1)
    if c.graph.opset >= 20:
        value = c.value(node, 2)
        axis = -2 if not node.input(2) else None if value is None else int(value)
    own = set(range(rank)) if axis is None else {axis % rank, rank - 1}
    _pass_except(node, c, own, f"{node.title} transforms it")


@rule("STFT", "AffineGrid", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix")
def whole(node: Node, c: Interpreter) -> None:
    """every index is mixed with every other"""
    for slot in range(len(node.inputs)):
        c.freeze_input(node, slot, f"{node.title} mixes its positions")


@rule("Det")
def det(node: Node, c: Interpreter) -> None:
    """x[*B, M, M] -> y[*B]"""
    rank = len(c.dims(node, 0))
    _pass_except(node, c, {rank - 2, rank - 1}, f"{node.title} needs a square matrix")


@rule("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")
def class_loss(node: Node, c: Interpreter) -> None:
    """scores[N, classes, *S], target[N, *S] -> loss: classes are numbered"""
    for slot in range(len(node.inputs)):
        c.freeze_input(node, slot, f"{node.title} numbers its classes")
