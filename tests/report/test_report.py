"""Numbers, tables, JSON and progress bars."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from onnxprune.errors import InvalidRecipeError
from onnxprune.report import renderer
from onnxprune.report.console import (
    GROUPS_SHOWN,
    bytes_text,
    cost_table,
    ratio,
    shape_text,
    show_inspection,
    stdout_console,
)
from onnxprune.report.json import dumps
from onnxprune.report.progress import Bars, progress
from onnxprune.result import Cost, GroupRow, Inspection


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.00 KB"),
        (2_345_678, "2.35 MB"),
        (3e9, "3.00 GB"),
    ],
)
def test_bytes_text(size: int, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("shape", "text"), [((64, 3, 7, 7), "64x3x7x7"), ((10,), "10"), ((), "scalar")]
)
def test_shape_text(shape: tuple[int, ...], text: str) -> None:
    assert shape_text(shape) == text


def test_ratio_of_nothing_is_left_out() -> None:
    assert (ratio(0, 0), ratio(4, 1)) == ("", "0.250")


def test_rows_without_measurements_are_left_out() -> None:
    console = stdout_console()
    table = cost_table(console, Cost(4, 8, 100), Cost(2, 4, 60, metrics={"mse": 0.5}))
    names = list(table.columns[0].cells)
    assert names == ["parameters", "MACs", "file size", "mse"]
    assert list(table.columns[1].cells)[-1] == "-"


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    group = GroupRow("[bold]w:smile:0", 4, 1, True, 1, 1, ("w",))
    show_inspection(stdout_console(), Inspection(Cost(1, 1, 1), (), (group,), (), 21, (), ()))
    shown = capsys.readouterr().out
    assert "| [bold]w:smile:0 |" in shown
    assert "frozen: nothing" in shown


def test_long_lists_of_groups_end_with_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    groups = tuple(
        GroupRow(f"group{index}", 4, 1, True, index, 0, ("w",)) for index in range(GROUPS_SHOWN + 5)
    )
    inspection = Inspection(Cost(1, 1, 1), (), groups, (), 21, (), ())
    show_inspection(stdout_console(), inspection)
    shown = capsys.readouterr().out
    assert "... and 5 more groups (--json lists all)" in shown
    assert "group24" in shown
    assert "group4 " not in shown


def test_nothing_to_prune_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    show_inspection(stdout_console(), Inspection(Cost(1, 1, 1), (), (), (), 21, (), ()))
    assert "groups: nothing can be pruned" in capsys.readouterr().out


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_on_terminals_only(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    console = stdout_console()
    console.print("fine", style="green")
    assert ("\x1b[32m" in stream.getvalue()) == (not no_color)


def test_json_takes_numpy_and_mends_nan() -> None:
    value = {
        "a": np.float32(0.5),
        "b": (np.int64(3), float("nan")),
        "c": np.arange(2),
        4: Path("p"),
    }
    assert json.loads(dumps(value)) == {"a": 0.5, "b": [3, None], "c": [0, 1], "4": "p"}
    with pytest.raises(TypeError, match="not JSON serializable"):
        dumps({"x": object()})


def test_report_format_goes_by_suffix() -> None:
    assert renderer("R.JSON") is renderer(Path("r.json"))
    with pytest.raises(InvalidRecipeError, match=r"report 'r\.doc': unknown format; .*\.json"):
        renderer("r.doc")


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_drawn_on_terminals_only(quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    with progress(quiet) as listener:
        listener.stage("fine-tune [a]", 2)
        listener.step(1, loss=0.25)
    assert ("fine-tune [a]" in stream.getvalue()) == (not quiet)


def test_progress_shows_numbers_and_closes_stages() -> None:
    stream = io.StringIO()
    bars = Bars(Progress(console=Console(file=stream)))
    bars.step(1)
    bars.stage("score")
    bars.stage("train", 10)
    bars.step(4, loss=0.123456, accuracy=0.5)
    score, train = bars._bars.tasks
    assert (score.completed, score.total) == (1, 1)
    assert (train.completed, train.total) == (4, 10)
    assert train.fields["info"] == "loss 0.1235  accuracy 0.5"
    bars.finish()
    assert train.finished
