"""Where operator rules are registered, and how a node finds its own.

A rule is one function for an operator: it reads input labels, ties or freezes them with a reason,
and names the labels of the outputs. An optional rewrite changes attributes and shape operands once
the kept indices are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxprune.graph import Node

if TYPE_CHECKING:
    from onnxprune.coupling import Interpreter
    from onnxprune.rewriting import Rewriter

Rule = Callable[[Node, "Interpreter"], None]
Rewrite = Callable[[Node, "Rewriter"], None]


@dataclass(frozen=True)
class Entry:
    """A registered rule from operator version `since` on."""

    since: int
    rule: Rule
    partial: bool


RULES: dict[tuple[str, str], list[Entry]] = {}
REWRITES: dict[tuple[str, str], Rewrite] = {}


def rule(
    *op_types: str,
    domain: str = "",
    since: int = 1,
    partial: bool = False,
) -> Callable[[Rule], Rule]:
    """Register the rule of these operators.

    `partial`: it copes with shapes that are unknown.
    """

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            entries = RULES.setdefault((domain, op_type), [])
            entries.append(Entry(since, function, partial))
            entries.sort(key=lambda e: -e.since)
        return function

    return register


def rewrite(*op_types: str, domain: str = "") -> Callable[[Rewrite], Rewrite]:
    """Register what changes in these operators' attributes and shape operands after pruning."""

    def register(function: Rewrite) -> Rewrite:
        for op_type in op_types:
            REWRITES[domain, op_type] = function
        return function

    return register


def find(node: Node, version: int) -> Entry | None:
    """The rule of `node` in operator set version `version`."""
    for entry in RULES.get((node.domain, node.op_type), ()):
        if entry.since <= version:
            return entry
    return None
