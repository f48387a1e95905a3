"""What is known of every activation before it runs: a value, or bounds, channel by channel.

A forward abstract interpretation over intervals (Cousot and Cousot, 1977). A fact holds a lower and
an upper bound for the elements of a tensor; an axis of length 1 where the tensor's is longer means
that the bounds hold for all its indices. Inputs of the model may be any finite number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph import FLOATS, Graph, Node
from onnxprune.operator_shapes import Dims
from onnxprune.shapes import Shapes

Array = NDArray[Any]
#: Facts with more elements than this are float32_copy to one bound for the whole tensor.
LIMIT = 1 << 22


@dataclass(frozen=True, eq=False)
class Fact:
    """low <= x <= high for every element x of a tensor; both have the tensor's rank."""

    low: Array
    high: Array

    @property
    def rank(self) -> int:
        """The tensor's rank."""
        return int(self.low.ndim)

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Where the value is known."""
        return np.asarray((self.low == self.high) & np.isfinite(self.low))

    @property
    def nonzero(self) -> NDArray[np.bool_]:
        """Where the value may differ from zero."""
        return np.asarray((self.low != 0) | (self.high != 0))

    def over(self, axes: Sequence[int]) -> Fact:
        """One bound for all indices of `axes`."""
        where = tuple(a for a in axes if self.low.shape[a] > 1)
        if not where:
            return self
        return Fact(
            self.low.min(axis=where, keepdims=True), self.high.max(axis=where, keepdims=True)
        )

    def full(self, axis: int, length: int) -> Fact:
        """With `axis` written out at its length."""
        if self.low.shape[axis] == length:
            return self
        shape = (*self.low.shape[:axis], length, *self.low.shape[axis + 1 :])
        return self.map(lambda v: np.broadcast_to(v, shape))

    def map(self, move: Callable[[Array], Array]) -> Fact:
        """Both bounds moved alike."""
        return Fact(move(self.low), move(self.high))

    def hull(self, value: float) -> Fact:
        """The bounds, float32_copy to hold `value`."""
        return Fact(np.minimum(self.low, value), np.maximum(self.high, value))


def unknown(rank: int) -> Fact:
    """Any number."""
    shape = (1,) * rank
    return Fact(np.full(shape, -np.inf), np.full(shape, np.inf))


def exactly(value: Array) -> Fact:
    """Known values."""
    return Fact(value, value)


def union(facts: Sequence[Fact]) -> Fact:
    """What holds whichever of the facts applies; ranks are equal."""
    low, high = facts[0].low, facts[0].high
    for fact in facts[1:]:
        low, high = np.minimum(low, fact.low), np.maximum(high, fact.high)
    return Fact(low, high)


FactRule = Callable[[Node, "Facts"], "Sequence[Fact | None] | Fact | None"]
FACT_RULES: dict[str, FactRule] = {}


def fact_rule(*op_types: str) -> Callable[[FactRule], FactRule]:
    """Register how these standard operators carry facts; without a rule nothing is known."""

    def register(function: FactRule) -> FactRule:
        for op_type in op_types:
            FACT_RULES[op_type] = function
        return function

    return register


@dataclass
class Facts:
    """The facts of every float tensor of `graph`."""

    graph: Graph
    shapes: Shapes
    known: dict[str, Fact] = field(default_factory=dict)

    def of(self, name: str) -> Fact:
        """The fact of a tensor."""
        fact = self.known.get(name)
        if fact is None:
            constant = self.graph.constants.get(name)
            if constant is not None and constant.is_float:
                value = constant.array()
                small = value.dtype not in (np.float32, np.float64)
                fact = self.known[name] = exactly(value.astype(np.float32) if small else value)
            else:
                fact = unknown(len(self.shapes.dims(name) or ()))
        return fact

    def input(self, node: Node, slot: int) -> Fact:
        """The fact of input `slot`."""
        return self.of(node.input(slot))

    def dims(self, node: Node, slot: int) -> Dims:
        """The shape of input `slot`."""
        return self.shapes.dims(node.input(slot)) or ()

    def out_dims(self, node: Node, index: int = 0) -> Dims:
        """The shape of output `index`."""
        return self.shapes.dims(node.outputs[index]) or ()

    def value(self, node: Node, slot: int) -> Array | None:
        """The integers of a shape operand where they are the same for every input."""
        name = node.input(slot)
        return self.shapes.value(name) if name and self.shapes.is_fixed_value(name) else None

    def is_fixed(self, node: Node, slot: int, axis: int) -> bool:
        """Whether an axis of input `slot` has one length whatever the model's input."""
        return self.shapes.is_fixed(node.input(slot), axis)


def find_facts(graph: Graph, shapes: Shapes) -> Facts:
    """Interpret `graph` once, forwards."""
    from onnxprune import fact_rules

    assert fact_rules
    facts = Facts(graph, shapes)
    for node in graph.nodes:
        rule = FACT_RULES.get(node.op_type) if node.domain == "" else None
        names = [*node.inputs, *node.outputs]
        if rule is None or any(n and shapes.dims(n) is None for n in names):
            continue
        try:
            with np.errstate(all="ignore"):
                found = rule(node, facts)
        except (ValueError, IndexError):  # shapes that do not agree: a runtime would refuse them
            continue
        several = [found] if found is None or isinstance(found, Fact) else found
        for name, fact in zip(node.outputs, several, strict=False):
            if name and fact is not None and shapes.types.get(name) in FLOATS:
                _record(facts, name, fact)
    return facts


def _record(facts: Facts, name: str, fact: Fact) -> None:
    """Keep a fact that says something; what is no number is unknown."""
    low = np.where(np.isnan(fact.low), -np.inf, fact.low)
    high = np.where(np.isnan(fact.high), np.inf, fact.high)
    dims = facts.shapes.dims(name) or ()
    fits = len(dims) == low.ndim and all(
        n in (1, m) for shape in (low.shape, high.shape) for n, m in zip(shape, dims, strict=True)
    )
    if not fits:
        return
    if low.size > LIMIT:
        whole = Fact(low, high).over(range(low.ndim))
        low, high = whole.low, whole.high
    if (np.isfinite(low) | np.isfinite(high)).any():
        facts.known[name] = Fact(low, high)
