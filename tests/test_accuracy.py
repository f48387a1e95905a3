"""The accuracy benchmark runs from data to its table, and reads languages out of a wheel."""

from __future__ import annotations

import dataclasses
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import subjects
from benchmarks.accuracy.languages import CODES, languages
from benchmarks.accuracy.results import Results, Unit
from benchmarks.accuracy.stages import Row
from benchmarks.accuracy.table import BEGIN, END, STAGES, insert, markdown, picture
from models import text
from models.graphs import fold
from onnxprune.data import Batch
from onnxprune.training.legalise import legalise
from tests.test_fashion import pictures  # noqa: F401


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the benchmark's command line."""
    monkeypatch.setattr(sys, "argv", ["accuracy", "--threads=1", *arguments])
    return command.main()


def test_end_to_end(
    pictures: Path,  # noqa: F811
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick = dataclasses.replace(subjects.SUBJECTS["mlp"], epochs=8)
    monkeypatch.setitem(subjects.SUBJECTS, "mlp", quick)
    options = [f"--data={pictures}", "--results=results", "--models=mlp", "--tools=onnxprune"]
    (workdir / "page.md").write_text(f"before\n{BEGIN}old\n{END}\nafter\n")
    assert run(monkeypatch, *options, "--macs", "0.5", "--readme=page.md") == 0
    assert "mlp 50% onnxprune fine-tuned: " in capsys.readouterr().out
    results = Results.load(workdir / "results")
    assert [row.stage for row in results.rows] == ["original", *STAGES]
    assert results.rows[0].accuracy > 0.9
    assert results.rows[-1].macs <= 0.5
    assert results.machine["threads"] == 1
    assert results.machine["onnxruntime"] == onnxruntime.__version__
    assert "mlp, 50% of the MACs" in (workdir / "results/accuracy.svg").read_text()
    assert (workdir / "page.md").read_text() == insert(
        f"before\n{BEGIN}{END}\nafter\n", results.rows
    )
    assert [path.name for path in (workdir / "out").iterdir()] == ["fashion_mlp_8_0.onnx"]
    assert run(monkeypatch, *options, "--macs", "0.5", "0.25", "--resume") == 0
    assert "mlp 50%" not in capsys.readouterr().out.split("\n")[0]
    rows = Results.load(workdir / "results").rows
    assert [row.budget for row in rows] == [1.0, *[0.5] * 4, *[0.25] * 4]
    assert rows[:5] == results.rows


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_was_interrupted_goes_on(
    resume: bool,
    pictures: Path,  # noqa: F811
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second unit of the first run stops; a fresh start measures the first unit again."""
    measured: list[Unit] = []

    def measure(network: command.Network, budget: float, tool: str) -> Iterator[Row]:
        measured.append((network.name, budget, tool))
        if len(measured) == 3:
            raise KeyboardInterrupt
        yield Row(tool, network.name, budget, budget, STAGES[-1] if tool else "original", 0.9, 0.0)

    monkeypatch.setattr(command.Network, "measure", measure)
    options = [f"--data={pictures}", "--models=mlp", "--tools=onnxprune", "--results=results"]
    assert run(monkeypatch, *options) == 130
    assert "--resume goes on from here" in capsys.readouterr().err
    assert run(monkeypatch, *options, *["--resume"] * resume) == 0
    again = measured[3:]
    assert (
        again
        == [("mlp", 1.0, ""), ("mlp", 0.5, "onnxprune"), ("mlp", 0.25, "onnxprune")][
            2 if resume else 0 :
        ]
    )


def test_missing_data_says_how_to_get_it(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"--data={workdir}", "--models", "mlp") == 2
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err


def test_missing_peers_are_named(
    pictures: Path,  # noqa: F811
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [f"--data={pictures}", "--models", "mlp", "--peers=nowhere"]
    assert run(monkeypatch, *options) == 2
    assert "no Python with Torch-Pruning at nowhere" in capsys.readouterr().err


def rows(*tools: str) -> list[Row]:
    """An original, and one stage of it by each tool at two budgets."""
    found = [Row("", "mlp", 1.0, 1.0, "original", 0.9, 0.0)]
    for budget in (0.5, 0.25):
        found += [Row(tool, "mlp", budget, budget, "pruned", budget + 0.12, 1.0) for tool in tools]
    return found


def test_what_is_measured_anew_takes_the_place_of_old_rows(workdir: Path) -> None:
    """The rows of another tool stay, and always have their original."""
    results = Results(workdir / "accuracy.json", rows("onnxprune", "torch-pruning"))
    again = [Row("", "mlp", 1.0, 1.0, "original", 0.95, 0.0)]
    results.replace(("mlp", 1.0, ""), again)
    kept = [row for row in rows("onnxprune", "torch-pruning") if row.tool]
    assert Results.load(workdir).rows == [*again, *kept]


def test_the_picture_has_a_bar_for_each_stage() -> None:
    assert picture(rows("onnxprune", "torch-pruning")).count("<rect x=") == 4


def test_the_table_has_a_line_for_each_network() -> None:
    head, _, line = markdown(rows("onnxprune")).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["MLP, 4 layers (90.0)", "62.0 / 37.0", *["-"] * (head.count("|") - 3)]


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="accuracy:begin"):
        insert("no table here", rows("onnxprune"))


def test_the_readme_has_the_measured_table(root: Path) -> None:
    page = (root / "README.md").read_text(encoding="utf-8")
    measured = Results.load(root / "benchmarks/results").rows
    assert insert(page, measured) == page


def catalog(messages: dict[str, str]) -> bytes:
    """A compiled message catalog (.mo)."""
    pairs = sorted([("", "Content-Type: text/plain; charset=UTF-8\n"), *messages.items()])
    sides = [[text.encode() for text in side] for side in zip(*pairs, strict=True)]
    start = 28 + 16 * len(pairs)
    tables, data = b"", b""
    for side in sides:
        for part in side:
            tables += struct.pack("<II", len(part), start + len(data))
            data += part + b"\0"
    middle = 28 + 8 * len(pairs)
    return struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, middle, 0, 0) + tables + data


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Sixty messages in each of the languages."""
    with zipfile.ZipFile(tmp_path / "django-1-py3-none-any.whl", "w") as archive:
        for code in CODES:
            messages = {
                f"message {i}": f"{code} {i:02} long enough for one {i:02} window"
                for i in range(60)
            }
            archive.writestr(f"django/conf/locale/{code}/LC_MESSAGES/django.mo", catalog(messages))
    return tmp_path


def test_languages(wheel: Path) -> None:
    parts = {part: languages(wheel, part) for part in ("train", "test")}
    for samples in parts.values():
        assert samples["token"].shape == (len(samples["y"]), text.LENGTH)
        assert samples["token"].max() < text.SYMBOLS
        assert set(samples["y"]) == set(range(len(CODES)))
    messages = {
        part: {bytes(row.astype(np.uint8)) for row in s["token"]} for part, s in parts.items()
    }
    assert not messages["train"] & messages["test"]


@pytest.mark.parametrize("build", [text.language_cnn, text.language_lstm])
def test_readers_train_wholly(build: subjects.graphs.Builder) -> None:
    assert not legalise(build()).frozen


def test_jitter_mirrors_and_moves(rng: np.random.Generator) -> None:
    images = np.zeros((64, 1, 28, 28), np.float32)
    images[:, 0, 14, 5] = 1
    found = {
        tuple(np.argwhere(i[0])[0])
        for i in subjects.jitter(Batch({"x": images}, None), rng).feeds["x"]
    }
    assert {abs(row - 14) for row, _ in found} == {0, 1, 2}
    assert {column for _, column in found} == {3, 4, 5, 6, 7, 20, 21, 22, 23, 24}


def test_folded_subjects_have_no_norm(tmp_path: Path) -> None:
    subject = subjects.SUBJECTS["resnet-folded"]
    onnx.save(subject.build(0), tmp_path / f"fashion_resnet_{subject.epochs}_0.onnx")
    model = subjects.trained("resnet-folded", tmp_path, dict, threads=1)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert fold(subject.build(0)).graph.name == model.graph.name
