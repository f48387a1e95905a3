"""Results as JSON text: the `--report` file and the output of `inspect --json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune.result import Inspection, Report


def report_json(report: Report) -> str:
    """What `--report` writes."""
    return dumps(report.to_json())


def inspection_json(inspection: Inspection) -> str:
    """What `inspect --json` prints."""
    return dumps({"format": "onnxprune-inspection", "version": 1, **asdict(inspection)})


def dumps(value: object) -> str:
    """Indented JSON that any reader accepts: NaN and infinity become null."""
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


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
