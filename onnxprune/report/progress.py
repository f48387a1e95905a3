"""Progress bars on a terminal's standard error; nothing where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from onnxprune.progress import Progress as Listener
from onnxprune.progress import Silent


class Bars:
    """One bar for each stage, with the numbers of the latest step and the time that is left."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def stage(self, name: str, total: int | None = None) -> None:
        """Close the present stage's bar and open one for `name`."""
        self.finish()
        self._task = self._bars.add_task(name, total=total, info="")

    def step(self, done: int, **info: float) -> None:
        """Move the present stage's bar to `done` and show `info` beside it."""
        if self._task is not None:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in info.items())
            self._bars.update(self._task, completed=done, info=numbers)

    def finish(self) -> None:
        """Show the present stage as done, also where its number of steps was never known."""
        if self._task is not None:
            total = self._bars.tasks[-1].total or 1
            self._bars.update(self._task, total=total, completed=total)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Listener]:
    """A listener that draws bars on standard error, if that is a terminal and not `quiet`."""
    console = Console(file=sys.stderr, markup=False, emoji=False, highlight=False)
    if quiet or not console.is_terminal:
        yield Silent()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        listener = Bars(bars)
        yield listener
        listener.finish()
