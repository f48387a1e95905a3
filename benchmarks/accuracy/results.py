"""The result file, which grows with every row, so that a run can be continued."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.accuracy.stages import Row
from benchmarks.accuracy.subjects import SUBJECTS
from benchmarks.accuracy.table import STAGES, insert, picture
from onnxprune import io
from onnxprune.training.home import VERSION

#: One network at one budget by one tool: what is measured, kept and left out as a whole.
Unit = tuple[str, float, str]
PACKAGES = ("onnxprune", "onnx", "onnxruntime", "numpy")


@dataclass
class Results:
    """The rows of a result file, and what they were measured with."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Results:
        """What `folder` has; nothing where there is no file yet."""
        path = folder / "accuracy.json"
        if not path.exists():
            return cls(path)
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, [Row(**row) for row in found["rows"]], found["machine"])

    @property
    def units(self) -> set[Unit]:
        """What has been measured to its end."""
        return {unit(row) for row in self.rows if row.stage in ("original", STAGES[-1])}

    def replace(self, measured: Unit, rows: Iterable[Row]) -> None:
        """Take the rows of one unit for what was known of it; write the file and the picture."""
        self.rows = [row for row in self.rows if unit(row) != measured] + list(rows)
        self.rows.sort(key=_order)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": self.machine, "rows": [asdict(row) for row in self.rows]}
        io.write_text(self.path, json.dumps(content, indent=1) + "\n")
        io.write_text(self.path.with_suffix(".svg"), picture(self.rows))

    def into(self, readme: Path) -> None:
        """Put the table in the place that a page marks for it."""
        io.write_text(readme, insert(readme.read_text(encoding="utf-8"), self.rows))


def unit(row: Row) -> Unit:
    """What a row belongs to; the original is a unit of its own."""
    return row.model, row.budget, row.tool


def machine(threads: int, peers: Mapping[str, str]) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **versions,
        "onnxruntime-training": VERSION,
        **peers,
    }


def _order(row: Row) -> tuple[int, float, str, int]:
    stages = ("original", *STAGES)
    return list(SUBJECTS).index(row.model), -row.budget, row.tool, stages.index(row.stage)
