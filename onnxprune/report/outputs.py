"""The files that a run writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from onnxprune.errors import InvalidRecipeError
from onnxprune.report import renderer
from onnxprune.report.json import plan_json

if TYPE_CHECKING:
    from onnx import ModelProto

    from onnxprune.result import Result


class Outputs:
    """The files of a run: looked at before the work starts, written after it succeeded."""

    def __init__(self, model: Path, plan: Path | None = None, report: Path | None = None) -> None:
        """Refuse what could not be written, before hours of work are lost on it.

        Raises:
            InvalidRecipeError: a folder is missing or closed, or a name is taken.
        """
        self.model, self.plan, self.report = model, plan, report
        named = [path for path in (model, plan, report) if path is not None]
        for path in named:
            if path.is_dir():
                raise InvalidRecipeError(f"cannot write '{path}': it is a folder; name a file")
            if not path.parent.is_dir():
                raise InvalidRecipeError(f"cannot write '{path}': no folder '{path.parent}'")
            if not os.access(path.parent, os.W_OK):
                raise InvalidRecipeError(f"cannot write '{path}': no right to write there")
        if len({path.resolve() for path in named}) < len(named):
            raise InvalidRecipeError("model, plan and report need names that differ")
        if report is not None:
            renderer(report)

    @property
    def names(self) -> str:
        """The files, for people."""
        kinds = (("", self.model), ("plan ", self.plan), ("report ", self.report))
        return ", ".join(f"{kind}{path}" for kind, path in kinds if path is not None)

    def write(
        self, model: ModelProto, result: Result | None = None, *, plan: str | None = None
    ) -> None:
        """Write all of the files or none; `plan` is the plan's text where there is no result.

        Raises:
            OnnxPruneError: one cannot be written.
        """
        from onnxprune.files import flush, replacing
        from onnxprune.io import save

        with ExitStack() as stack:
            for path, text in (*self._texts(result), *self._given(plan)):
                [temporary] = stack.enter_context(replacing(path))
                with temporary.open("r+b") as stream:
                    stream.write(text.encode())
                    flush(stream)
            save(model, self.model)

    def _given(self, plan: str | None) -> Iterator[tuple[Path, str]]:
        if plan is not None and self.plan is not None:
            yield self.plan, plan

    def _texts(self, result: Result | None) -> Iterator[tuple[Path, str]]:
        """The plan's and the report's file and what goes into it, where they were asked for."""
        if result is not None and self.plan is not None:
            yield self.plan, plan_json(result.plan)
        if result is not None and self.report is not None:
            yield self.report, renderer(self.report)(result.report)
