"""Every model of the backend suites survives pruning: what cannot be pruned stays as it was."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import pytest
from onnx.backend.test.loader import load_model_tests

from benchmarks.conformance import prune
from onnxprune import runtime, verify

SUITES = ("node", "simple", "pytorch-converted", "pytorch-operator")


@pytest.mark.parametrize("suite", SUITES)
def test_every_model_is_analysed_and_applied(suite: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suites overflow on purpose
        cases = load_model_tests(kind=suite)
    assert cases
    for case in cases:
        model = case.model
        if case.model_dir is not None:
            model = onnx.load(Path(case.model_dir) / "model.onnx")
        analysis, keep, applied = prune(model, "all")
        if keep.all():
            assert applied.model.graph.node == model.graph.node, case.name
            assert applied.model.graph.initializer == model.graph.initializer, case.name
        else:
            feeds = [runtime.random_feeds(model)]
            error = verify.twin_error(analysis.coupling, keep, applied.model, feeds)
            assert error <= 1e-4, case.name
