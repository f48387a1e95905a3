"""Where the training runtime is looked for, and how it is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from onnxprune.errors import TrainingError
from onnxprune.training import Runtime, home


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty managed folder, and no way to the package index."""
    folder = tmp_path / "managed"
    monkeypatch.delenv(home.PYTHON_VARIABLE, raising=False)
    monkeypatch.setenv(home.HOME_VARIABLE, str(folder))
    monkeypatch.setattr(home, "_installed_here", lambda: False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return folder


def pretend_installed(folder: Path) -> None:
    info = folder / f"onnxruntime_training_cpu-{home.VERSION}.dist-info"
    info.mkdir(parents=True)
    (info / "RECORD").touch()


def test_what_is_missing_says_what_to_do(nowhere: Path) -> None:
    with pytest.raises(TrainingError, match="run `onnxprune setup-training`"):
        home.find_training()


def test_offline_leaves_nothing_behind(nowhere: Path) -> None:
    with pytest.raises(TrainingError, match=r"cannot install .*is the package index reachable"):
        home.setup_training()
    assert list(nowhere.parent.iterdir()) == []


def test_a_newer_python_is_told_which_would_do(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "_python_version", lambda: (3, 13))
    for attempt in (home.find_training, home.setup_training):
        with pytest.raises(TrainingError, match=r"3\.9 to 3\.12 and this is 3\.13"):
            attempt()


def test_the_managed_folder_is_found(nowhere: Path) -> None:
    pretend_installed(nowhere)
    assert home.find_training() == Runtime(Path(sys.executable), nowhere, "managed folder")
    assert home.setup_training() == nowhere


def test_a_half_made_folder_does_not_count(nowhere: Path) -> None:
    (nowhere / "onnxruntime").mkdir(parents=True)
    with pytest.raises(TrainingError, match="not installed"):
        home.find_training()


def test_the_variable_names_a_python_or_a_folder(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "modules" / "onnxruntime").mkdir(parents=True)
    expected = {
        python: Runtime(python, None, home.PYTHON_VARIABLE),
        tmp_path / "venv": Runtime(python, None, home.PYTHON_VARIABLE),
        tmp_path / "modules": Runtime(
            Path(sys.executable), tmp_path / "modules", home.PYTHON_VARIABLE
        ),
    }
    for place, runtime in expected.items():
        monkeypatch.setenv(home.PYTHON_VARIABLE, str(place))
        assert home.find_training() == runtime


def test_the_order_of_discovery(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable, this environment, the managed folder: each is taken away in turn."""
    (tmp_path / "modules" / "onnxruntime").mkdir(parents=True)
    monkeypatch.setenv(home.PYTHON_VARIABLE, str(tmp_path / "modules"))
    monkeypatch.setattr(home, "_installed_here", lambda: True)
    pretend_installed(nowhere)
    assert home.find_training().source == home.PYTHON_VARIABLE
    monkeypatch.delenv(home.PYTHON_VARIABLE)
    assert home.find_training() == Runtime(Path(sys.executable), None, "this environment")
    monkeypatch.setattr(home, "_installed_here", lambda: False)
    assert home.find_training().source == "managed folder"


def test_installing_twice_downloads_once(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []

    def install(folder: Path, what: str) -> None:
        installed.append(what)
        pretend_installed(folder)

    monkeypatch.setattr(home, "_pip_install", install)
    monkeypatch.setattr(home, "_probe_numpy", lambda _: None)
    assert home.ensure_training().source == "managed folder"
    assert home.setup_training() == nowhere
    assert home.ensure_training().path == nowhere
    assert installed == [home.REQUIREMENT]
    assert list(nowhere.parent.iterdir()) == [nowhere]


def test_a_folder_in_use_is_not_overwritten(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere.mkdir()
    (nowhere / "precious.txt").write_text("mine")
    monkeypatch.setattr(home, "_pip_install", lambda folder, _: pretend_installed(folder))
    monkeypatch.setattr(home, "_probe_numpy", lambda _: None)
    with pytest.raises(TrainingError, match="the folder must be empty or not exist"):
        home.setup_training()
    assert (nowhere / "precious.txt").read_text() == "mine"
    assert list(nowhere.parent.iterdir()) == [nowhere]


def test_a_variable_that_names_nothing_is_an_error(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(home.PYTHON_VARIABLE, "/no/such/python")
    for attempt in (home.find_training, home.ensure_training):
        with pytest.raises(TrainingError, match="neither a Python, a virtual environment, nor"):
            attempt()


def test_an_incompatible_numpy_gets_company(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []
    started: list[Runtime] = []

    class Picky:
        def __init__(self, runtime: Runtime) -> None:
            started.append(runtime)
            if not installed:
                raise TrainingError("ImportError: numpy.core.multiarray failed to import")

        def close(self) -> None:
            pass

    monkeypatch.setattr("onnxprune.training.client.Worker", Picky)
    monkeypatch.setattr(home, "_pip_install", lambda _, what: installed.append(what))
    home._probe_numpy(Path("folder"))
    assert installed == [home.NUMPY_FALLBACK]
    assert len(started) == 2


def test_an_environment_without_pip_or_uv(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home.shutil, "which", lambda _: None)

    def missing(name: str) -> None:
        raise home.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(home.importlib.metadata, "distribution", missing)
    with pytest.raises(TrainingError, match="has no pip, and uv was not found"):
        home.setup_training()


@pytest.mark.parametrize(
    ("platform", "variable", "tail"),
    [
        ("linux", "XDG_CACHE_HOME", "caches/onnxprune"),
        ("win32", "LOCALAPPDATA", "caches/onnxprune"),
        ("darwin", "HOME", "caches/Library/Caches/onnxprune"),
    ],
)
def test_the_cache_is_the_platforms(
    platform: str, variable: str, tail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(home.HOME_VARIABLE, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "caches"))
    monkeypatch.setattr(sys, "platform", platform)
    assert home.training_home().parent == tmp_path / tail
