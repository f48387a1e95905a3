"""Rules for operators of other packages, by entry points."""

from __future__ import annotations

from importlib import metadata

import pytest

from onnxprune import ops
from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.ops.registry import RULES, rule


def test_modules_named_by_entry_points_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("mine", f"{__name__}:register", ops.ENTRY_POINTS)
    monkeypatch.setattr(ops, "entry_points", lambda group: [point])
    loaded = []
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: loaded.append(self.value))
    ops.load_others()
    assert loaded == [f"{__name__}:register"]


def test_a_rule_of_another_domain_is_found() -> None:
    @rule("Twice", domain="mine")
    def twice(node: Node, c: Interpreter) -> None:
        """x[*D] -> y[*D]"""
        c.set_layout(node, c.settle_all(c.layout(node, 0), node))

    try:
        assert RULES["mine", "Twice"][0].rule is twice
    finally:
        del RULES["mine", "Twice"]
