"""How results are shown: `console` prints tables, `json` writes text for programs.

`renderer` picks the format of a report file by its suffix. A new format is one function from a
`onnxprune.result.Report` to text, entered in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onnxprune.errors import InvalidRecipeError
from onnxprune.report.json import report_json

if TYPE_CHECKING:
    from onnxprune.result import Report

__all__ = ["FORMATS", "renderer"]

FORMATS: dict[str, Callable[[Report], str]] = {".json": report_json}


def renderer(path: str | Path) -> Callable[[Report], str]:
    """The function that renders a report for `path`, by its suffix.

    Raises:
        InvalidRecipeError: no format has that suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise InvalidRecipeError(f"report '{path}': unknown format; end the name with {known}")
    return FORMATS[suffix]
