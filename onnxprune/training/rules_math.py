"""Elementwise operators, reductions and contractions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxprune.training.draft import Builder, Draft, Undifferentiable, attributes, rule


@rule("HardSigmoid")
def hard_sigmoid(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> clip(alpha x + beta, 0, 1)"""
    options = attributes(node)
    b = Builder(draft, node)
    line = b.op(
        "Add", b.op("Mul", node.input[0], options.get("alpha", 0.2)), options.get("beta", 0.5)
    )
    b.op("Clip", line, 0.0, 1.0, output=node.output[0])
    return b.nodes


@rule("HardSwish")
def hard_swish(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> x clip(x / 6 + 1/2, 0, 1)"""
    b = Builder(draft, node)
    line = b.op("Add", b.op("Mul", node.input[0], 1 / 6), 0.5)
    b.op("Mul", node.input[0], b.op("Clip", line, 0.0, 1.0), output=node.output[0])
    return b.nodes


@rule("Gelu")
def gelu(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x -> x/2 (1 + tanh(k (x + c x^3))), which the builder differentiates like the exact one"""
    if attributes(node).get("approximate", "none") == "none":
        return None
    b = Builder(draft, node)
    x = node.input[0]
    cube = b.op("Mul", b.op("Mul", b.op("Mul", x, x), x), 0.044715)
    curve = b.op("Tanh", b.op("Mul", b.op("Add", x, cube), (2 / np.pi) ** 0.5))
    gate = b.op("Add", b.op("Mul", curve, 0.5), 0.5)
    b.op("Mul", x, gate, output=node.output[0])
    return b.nodes


@rule("Softplus")
def softplus(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> max(x, 0) + log(1 + exp(-|x|)), which neither overflows nor loses small values"""
    b = Builder(draft, node)
    small = b.op("Exp", b.op("Neg", b.op("Abs", node.input[0])))
    tail = b.op("Log", b.op("Add", small, 1.0))
    b.op("Add", b.op("Relu", node.input[0]), tail, output=node.output[0])
    return b.nodes


@rule("Mish")
def mish(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> x tanh(softplus(x))"""
    b = Builder(draft, node)
    b.op("Mul", node.input[0], b.op("Tanh", b.op("Softplus", node.input[0])), output=node.output[0])
    return b.nodes


@rule("Elu", "Selu", "Celu")
def elu(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> gamma (max(x, 0) + alpha (exp(min(x, 0) / d) - 1)); d is alpha for Celu"""
    options = attributes(node)
    alpha = options.get("alpha", 1.6732632 if node.op_type == "Selu" else 1.0)
    gamma = options.get("gamma", 1.0507009) if node.op_type == "Selu" else 1.0
    b = Builder(draft, node)
    low = b.op("Neg", b.op("Relu", b.op("Neg", node.input[0])))
    if node.op_type == "Celu" and alpha != 1.0:
        low = b.op("Mul", low, 1 / alpha)
    curve = b.op("Mul", b.op("Sub", b.op("Exp", low), 1.0), alpha * gamma)
    line = b.op("Relu", node.input[0])
    if gamma != 1.0:
        line = b.op("Mul", line, gamma)
    b.op("Add", line, curve, output=node.output[0])
    return b.nodes


@rule("Softsign")
def softsign(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> x / (1 + |x|)"""
    b = Builder(draft, node)
    b.op("Div", node.input[0], b.op("Add", b.op("Abs", node.input[0]), 1.0), output=node.output[0])
    return b.nodes


@rule("ThresholdedRelu")
def thresholded_relu(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> x where x > alpha, else 0"""
    b = Builder(draft, node)
    above = b.op("Greater", node.input[0], attributes(node).get("alpha", 1.0))
    b.op("Where", above, node.input[0], 0.0, output=node.output[0])
    return b.nodes


@rule("PRelu")
def prelu(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x, slope -> max(x, 0) - slope max(-x, 0)"""
    b = Builder(draft, node)
    below = b.op("Mul", b.op("Relu", b.op("Neg", node.input[0])), node.input[1])
    b.op("Sub", b.op("Relu", node.input[0]), below, output=node.output[0])
    return b.nodes


@rule("Sum", "Mean")
def add_all(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x1, ..., xn -> their sum or mean"""
    b = Builder(draft, node)
    total = node.input[0]
    for name in node.input[1:]:
        total = b.op("Add", total, name)
    if node.op_type == "Mean" and len(node.input) > 1:
        total = b.op("Mul", total, 1 / len(node.input))
    return b.done(total)


@rule("Max", "Min")
def extreme(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x1, ..., xn -> the elementwise extreme, two at a time"""
    if len(node.input) == 2:
        return None
    b = Builder(draft, node)
    best = node.input[0]
    for name in node.input[1:]:
        best = b.op(node.op_type, best, name)
    return b.done(best)


@rule("Pow")
def power(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x, e -> x ^ e, with a constant exponent"""
    exponent = draft.value(node, 1)
    assert exponent is not None
    if exponent.size == 1 and float(exponent.reshape(())) == 2.0:
        b = Builder(draft, node)
        b.op("Mul", node.input[0], node.input[0], output=node.output[0])
        return b.nodes
    return None


@rule("Clip")
def clip(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x, low, high -> clip(x): limits are constant"""
    low, high = draft.value(node, 1), draft.value(node, 2)
    if low is not None and high is not None:
        return None
    b = Builder(draft, node)
    big = np.finfo(np.float32).max
    lowest = np.asarray(-big if low is None else low, np.float32)
    highest = np.asarray(big if high is None else high, np.float32)
    b.op("Clip", node.input[0], lowest, highest, output=node.output[0])
    return b.nodes


@rule("ReduceMax", "ReduceMin")
def reduce_extreme(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> its extreme over axes: the first of TopK over the flattened axes, which come last"""
    rank = draft.rank(node, node.input[0])
    axes, keep = _axes(node, draft, rank), attributes(node).get("keepdims", 1)
    b = Builder(draft, node)
    if not axes:
        return b.done(node.input[0])
    kept = [a for a in range(rank) if a not in axes]
    moved = b.op("Transpose", node.input[0], perm=[*kept, *axes])
    flat = b.op("Reshape", moved, np.array([0] * len(kept) + [-1], np.int64))
    names = [draft.name("top"), draft.name("index")]
    largest = int(node.op_type == "ReduceMax")
    top = b.ops("TopK", flat, np.array([1]), outputs=names, axis=len(kept), largest=largest)[0]
    result = b.op("Squeeze", top, np.array([len(kept)]))
    if keep:
        result = b.op("Unsqueeze", result, np.array(sorted(axes)))
    return b.done(result)


@rule("ReduceL1", "ReduceSumSquare", "ReduceLogSum")
def reduce_composed(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> sum |x|, sum x^2 or log sum x over axes"""
    rank = draft.rank(node, node.input[0])
    axes, keep = _axes(node, draft, rank), attributes(node).get("keepdims", 1)
    b = Builder(draft, node)
    x = node.input[0]
    if node.op_type == "ReduceL1":
        x = b.op("Abs", x)
    if node.op_type == "ReduceSumSquare":
        x = b.op("Mul", x, x)
    total = b.op("ReduceSum", x, np.array(axes, np.int64), keepdims=keep, noop_with_empty_axes=1)
    return b.done(b.op("Log", total) if node.op_type == "ReduceLogSum" else total)


def _axes(node: onnx.NodeProto, draft: Draft, rank: int) -> list[int]:
    """The reduced axes, none for a reduction that does nothing."""
    value = draft.value(node, 1)
    if value is None or not value.size:
        return [] if attributes(node).get("noop_with_empty_axes") else list(range(rank))
    return sorted(int(a) % rank for a in value.reshape(-1))


@rule("Einsum")
def einsum(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """One or two operands -> contraction, by MatMul where each role has at most one letter.

    Else by products and sums.
    """
    equation = attributes(node)["equation"].replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) > 2 or any(len(set(t)) < len(t) for t in terms):
        raise Undifferentiable(f"Einsum: the equation {equation!r} is not covered")
    b = Builder(draft, node)
    operands = []
    for index, term in enumerate(terms):
        others = result + "".join(terms[:index] + terms[index + 1 :])
        operands.append(_summed(b, node.input[index], term, others))
    if len(operands) == 1:
        x, term = operands[0]
        return b.done(b.op("Transpose", x, perm=[term.index(c) for c in result]))
    return _contract(b, operands, result)


def _summed(b: Builder, x: str, term: str, needed: str) -> tuple[str, str]:
    """An operand without the letters that nothing else mentions."""
    gone = [i for i, letter in enumerate(term) if letter not in needed]
    if gone:
        x = b.op("ReduceSum", x, np.array(gone), keepdims=0)
    return x, "".join(letter for letter in term if letter in needed)


def _contract(b: Builder, operands: list[tuple[str, str]], result: str) -> list[onnx.NodeProto]:
    """Two operands."""
    (x, p), (y, q) = operands
    batch = [c for c in result if c in p and c in q]
    inner = [c for c in p if c in q and c not in result]
    rows = [c for c in result if c in p and c not in q]
    columns = [c for c in result if c in q and c not in p]
    if max(len(inner), len(rows), len(columns)) > 1:
        return _multiply_and_sum(b, operands, result, inner)
    x = _arranged(b, x, p, [*batch, *rows], inner, pad_at=len(batch) if not rows else None)
    y = _arranged(b, y, q, [*batch, *inner], columns, pad_at=len(batch) if not inner else None)
    z = b.op("MatMul", x, y)
    drop = [len(batch)] * (not rows) + [len(batch) + 1] * (not columns)
    if drop:
        z = b.op("Squeeze", z, np.array(drop))
    order = "".join([*batch, *rows, *columns])
    return b.done(b.op("Transpose", z, perm=[order.index(c) for c in result]))


def _arranged(b: Builder, x: str, term: str, first: list[str], last: list[str], pad_at: Any) -> str:
    """An operand as [batch..., row, column].

    A role without a letter becomes an axis of length 1.
    """
    order = [*first, *last]
    x = b.op("Transpose", x, perm=[term.index(c) for c in order])
    if pad_at is not None:
        x = b.op("Unsqueeze", x, np.array([pad_at]))
    if not last:
        x = b.op("Unsqueeze", x, np.array([-1]))
    return x


def _multiply_and_sum(
    b: Builder, operands: list[tuple[str, str]], result: str, inner: list[str]
) -> list[onnx.NodeProto]:
    """The definition itself: broadcast product over all letters, summed over the inner ones."""
    letters = [*result, *inner]
    spread = []
    for x, term in operands:
        order = [c for c in letters if c in term]
        x = b.op("Transpose", x, perm=[term.index(c) for c in order])
        missing = [i for i, c in enumerate(letters) if c not in term]
        spread.append(b.op("Unsqueeze", x, np.array(missing, np.int64)) if missing else x)
    product = b.op("Mul", *spread)
    if inner:
        axes = np.arange(len(result), len(letters))
        product = b.op("ReduceSum", product, axes, keepdims=0)
    return b.done(product)
