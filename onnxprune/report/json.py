"""Results as JSON text: the `--plan` and `--report` files, and the output of `inspect --json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune.plan import Plan
    from onnxprune.result import Inspection, Report


def report_json(report: Report) -> str:
    """What `--report` writes."""
    return dumps(report.to_json())


def plan_json(plan: Plan) -> str:
    """What `--plan` writes."""
    return dumps(plan.to_json())


def inspection_json(inspection: Inspection) -> str:
    """What `inspect --json` prints."""
    return dumps({"format": "onnxprune-inspection", "version": 1, **asdict(inspection)})


def dumps(value: object) -> str:
    """JSON that people and any reader can read: lists of numbers in a line, NaN becomes null."""
    return _text(_plain(value), "") + "\n"


def _text(value: Any, margin: str) -> str:
    """`value` with nested objects indented; what holds only scalars stays in one line."""
    items = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(items, list) or not any(isinstance(item, (dict, list)) for item in items):
        return json.dumps(value, allow_nan=False)
    inner = margin + "  "
    texts = [_text(item, inner) for item in items]
    if isinstance(value, dict):
        texts = [f"{json.dumps(key)}: {text}" for key, text in zip(value, texts, strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    body = f",\n{inner}".join(texts)
    return f"{opening}\n{inner}{body}\n{margin}{closing}"


def _plain(value: Any) -> Any:
    """`value` in JSON's own types.

    Raises:
        TypeError: JSON has no type for it.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, PathLike):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
