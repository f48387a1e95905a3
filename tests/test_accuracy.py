"""The accuracy benchmark runs from data to its table, and reads languages out of a wheel."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import subjects
from benchmarks.accuracy.languages import CODES, languages
from benchmarks.accuracy.stages import Row
from benchmarks.accuracy.table import STAGES, picture
from models import text
from models.graphs import fold
from onnxprune.data import Batch
from onnxprune.training.legalise import legalise
from tests.test_fashion import pictures  # noqa: F401


def test_end_to_end(
    pictures: Path,  # noqa: F811
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick = dataclasses.replace(subjects.SUBJECTS["mlp"], epochs=8)
    monkeypatch.setitem(subjects.SUBJECTS, "mlp", quick)
    options = [f"--data={pictures}", "--threads=1", "--results=results", "--models", "mlp"]
    monkeypatch.setattr(sys, "argv", ["accuracy", *options, "--macs", "0.5"])
    assert command.main() == 0
    shown = capsys.readouterr().out
    assert "mlp 50% onnxprune fine-tuned: " in shown
    rows = [Row(**row) for row in json.loads((workdir / "results/accuracy.json").read_text())]
    assert [row.stage for row in rows] == ["original", *STAGES]
    assert rows[0].accuracy > 0.9
    assert rows[-1].macs <= 0.5
    assert "mlp, 50% of the MACs" in (workdir / "results/accuracy.svg").read_text()
    monkeypatch.setattr(sys, "argv", ["accuracy", *options, "--macs", "0.25"])
    assert command.main() == 0
    rows = [Row(**row) for row in json.loads((workdir / "results/accuracy.json").read_text())]
    assert sorted({row.budget for row in rows}) == [0.25, 0.5, 1.0]
    assert sum(row.stage == "original" for row in rows) == 1


def test_missing_data_says_how_to_get_it(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", f"--data={workdir}", "--models", "mlp"])
    assert command.main() == 2
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err


def test_the_picture_has_a_bar_for_each_stage() -> None:
    rows = [Row("", "mlp", 1.0, 1.0, "original", 0.9, 0.0)]
    rows += [
        Row(tool, "mlp", 0.5, 0.5, "pruned", 0.5, 1.0) for tool in ("onnxprune", "torch-pruning")
    ]
    assert picture(rows).count("<rect") == 2


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


def test_flip_mirrors_some_images(rng: np.random.Generator) -> None:
    images = rng.random((64, 1, 3, 4)).astype(np.float32)
    turned = subjects.flip(Batch({"x": images}, None), rng).feeds["x"]
    mirrored = np.array(
        [np.array_equal(a, b[..., ::-1]) for a, b in zip(turned, images, strict=True)]
    )
    same = np.array([np.array_equal(a, b) for a, b in zip(turned, images, strict=True)])
    assert mirrored.any() and same.any() and (mirrored ^ same).all()


def test_folded_subjects_have_no_norm(tmp_path: Path) -> None:
    subject = subjects.SUBJECTS["resnet-folded"]
    onnx.save(subject.build(0), tmp_path / f"fashion_resnet_{subject.epochs}_0.onnx")
    model = subjects.trained("resnet-folded", tmp_path, dict, threads=1)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert fold(subject.build(0)).graph.name == model.graph.name
