"""Make trained ONNX models smaller and faster after export: structured pruning and checks.

import onnxprune

result = onnxprune.prune("model.onnx", channels=0.5, data="calibration.npz")
onnx.save(result.model, "small.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune.passes.finetune import Finetune
    from onnxprune.pipeline import apply, check, inspect, prune
    from onnxprune.plan import Plan
    from onnxprune.result import CheckReport, Inspection, Report, Result

__all__ = [
    "CheckReport",
    "Finetune",
    "Inspection",
    "Plan",
    "Report",
    "Result",
    "apply",
    "check",
    "inspect",
    "prune",
]

_HOMES = {
    "prune": "pipeline",
    "inspect": "pipeline",
    "apply": "pipeline",
    "check": "pipeline",
    "Finetune": "passes.finetune",
    "Plan": "plan",
    "CheckReport": "result",
    "Inspection": "result",
    "Report": "result",
    "Result": "result",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `onnxprune --help` needs none of them."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'onnxprune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"onnxprune.{home}"), name)
