"""Ways to break a rule or a rewrite on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.registry import Rewrite, Rule
from onnxprune.rewriting import Rewriter

MutateRule = Callable[[Rule], Rule]
MutateRewrite = Callable[[Rewrite], Rewrite]


class Broken:
    """An interpreter or rewriter of which some methods do something else."""

    def __init__(self, inner: Any, **overrides: Callable[..., object]) -> None:
        self._inner, self._overrides = inner, overrides

    def __getattr__(self, name: str) -> object:
        return self._overrides.get(name) or getattr(self._inner, name)


def _nothing(*_: object) -> None:
    return None


def _with(**methods: Callable[[Any], Callable[..., object]]) -> MutateRule:
    """Rules that see other methods, made from the interpreter."""

    def mutate(rule: Rule) -> Rule:
        def broken(node: Node, c: Interpreter) -> None:
            overrides = {name: make(c) for name, make in methods.items()}
            rule(node, Broken(c, **overrides))  # type: ignore[arg-type]

        return broken

    return mutate


without_ties = _with(tie=lambda c: _nothing)
#: The input's zeros are not looked at: labels come from `axis` alone.
without_contraction = _with(
    contract=lambda c: lambda node, slot, axis, *_: c.axis(node, slot, axis)
)
exact_everything = _with(inexact=lambda c: _nothing)
without_factors = _with(factor=lambda c: _nothing)
without_freezing = _with(freeze=lambda c: _nothing)


def forgets_input(slot: int) -> MutateRule:
    """A rule that labels one input for itself alone: what it ties to it goes nowhere."""

    def axis(c: Interpreter) -> Callable[..., object]:
        def fresh(node: Node, own: int, place: int) -> Labels | None:
            labels = c.axis(node, own, place)
            return labels if own != slot or labels is None else c.system.fresh(labels.size)

        return fresh

    return _with(axis=axis)


def permutes_ties(rule: Rule) -> Rule:
    """Ties come out in another order."""

    def tie(c: Interpreter) -> Callable[..., object]:
        def rolled(node: Node, a: Labels | None, b: Labels | None) -> None:
            c.tie(node, a, None if b is None else np.roll(b, 1))

        return rolled

    return _with(tie=tie)(rule)


def contracts_next_axis(rule: Rule) -> Rule:
    """Zeros are put into another axis than the one that is summed."""

    def contract(c: Interpreter) -> Callable[..., object]:
        def wrong(node: Node, slot: int, axis: int, *zero: int) -> Labels | None:
            rank = len(c.dims(node, slot))
            c.contract(node, slot, (axis + 1) % rank, *zero)
            return c.axis(node, slot, axis)

        return wrong

    return _with(contract=contract)(rule)


def _outputs(change: Callable[[Labels], Labels]) -> MutateRule:
    def mutate(rule: Rule) -> Rule:
        def broken(node: Node, c: Interpreter) -> None:
            rule(node, c)
            for name in node.outputs:
                layout = c.layouts.get(name, ())
                if layout:
                    c.layouts[name] = tuple(replace(b, labels=change(b.labels)) for b in layout)

        return broken

    return mutate


reversed_outputs = _outputs(lambda labels: labels[::-1])
shifted_outputs = _outputs(lambda labels: np.roll(labels, 1))
doubled_outputs = _outputs(lambda labels: np.repeat(labels[::2], 2)[: labels.size])


def forgotten(rewrite: Rewrite) -> Rewrite:
    """Nothing is rewritten."""
    return _nothing


def off_by(step: int) -> MutateRewrite:
    """Integer attributes and operands come out larger by `step`."""

    def mutate(rewrite: Rewrite) -> Rewrite:
        def broken(node: Node, r: Rewriter) -> None:
            def attribute(node: Node, name: str, value: Any) -> None:
                wrong = [v + step for v in value] if isinstance(value, list) else value + step
                r.set_attribute(node, name, wrong)

            def operand(node: Node, slot: int, value: Any) -> None:
                r.set_operand(node, slot, value + np.asarray(step, value.dtype))

            rewrite(node, Broken(r, set_attribute=attribute, set_operand=operand))  # type: ignore[arg-type]

        return broken

    return mutate


def reversed_operand(rewrite: Rewrite) -> Rewrite:
    """Lists of numbers come out backwards."""

    def broken(node: Node, r: Rewriter) -> None:
        def operand(node: Node, slot: int, value: Any) -> None:
            r.set_operand(node, slot, value[::-1])

        rewrite(node, Broken(r, set_operand=operand))  # type: ignore[arg-type]

    return broken
