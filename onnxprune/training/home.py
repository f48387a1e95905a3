"""Where the training runtime is, and how it gets there.

The wheel onnxruntime-training-cpu brings an `onnxruntime` module of its own, older than the one
that onnxprune runs models with; in one environment they overwrite each other. So it lies in a
folder of its own, which only the worker process sees.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from onnxprune.errors import TrainingError
from onnxprune.progress import Progress, Silent

VERSION = "1.19.2"
REQUIREMENT = f"onnxruntime-training-cpu=={VERSION}"
PYTHON_VARIABLE = "ONNXPRUNE_TRAINING_PYTHON"
HOME_VARIABLE = "ONNXPRUNE_TRAINING_HOME"
NUMPY_FALLBACK = "numpy>=1.26,<2.3"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """A Python that can train.

    `python` started with `path` (if any) before everything else on its path.
    """

    python: Path
    path: Path | None
    source: str


def find_training() -> Runtime:
    """Where the training runtime is.

    First the Python (or folder of modules) that ONNXPRUNE_TRAINING_PYTHON names, then this
    environment if it holds the training build, then the managed folder.

    Raises:
        TrainingError: it is nowhere; the message says what to do.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        return _named(Path(named).expanduser())
    if _installed_here():
        return Runtime(Path(sys.executable), None, "this environment")
    folder = training_home()
    if _holds_wheel(folder):
        return Runtime(Path(sys.executable), folder, "managed folder")
    raise TrainingError(f"the training runtime is not installed: {_advice()}")


def ensure_training(progress: Progress | None = None) -> Runtime:
    """`find_training`, after `setup_training` where nothing was found."""
    try:
        return find_training()
    except TrainingError:
        if os.environ.get(PYTHON_VARIABLE):
            raise
    _log.info("installing the training runtime (%s) into %s", REQUIREMENT, training_home())
    setup_training(progress=progress or Silent())
    return find_training()


def setup_training(target: Path | None = None, *, progress: Progress | None = None) -> Path:
    """Install the training runtime into `target`, unless it is there already.

    Without `target`: into the managed folder.
    The folder appears whole or not at all: a failed download leaves things as they were.

    Raises:
        TrainingError: there is no wheel for this Python, or the installation failed (offline, no
            space).
    """
    folder = target or training_home()
    if _holds_wheel(folder):
        return folder
    _check_python()
    listener = progress or Silent()
    listener.stage("install the training runtime", 2)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".setup-") as scratch:
            fresh = Path(scratch) / "packages"
            _pip_install(fresh, REQUIREMENT)
            listener.step(1)
            _probe_numpy(fresh)
            _move(fresh, folder)
    except OSError as error:
        raise TrainingError(
            f"cannot install the training runtime into {folder}: {error}"
        ) from error
    listener.step(2)
    return folder


def training_home() -> Path:
    """The managed folder.

    $ONNXPRUNE_TRAINING_HOME, or one in the platform's cache for this Python and version.
    """
    override = os.environ.get(HOME_VARIABLE)
    if override:
        return Path(override).expanduser()
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return _cache_root() / "onnxprune" / f"training-{VERSION}-{tag}"


def _cache_root() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _advice() -> str:
    if _python_version() >= (3, 13):
        return _newer_python()
    return (
        f"run `onnxprune setup-training`, or set {PYTHON_VARIABLE} to a Python that has "
        f"{REQUIREMENT}"
    )


def _python_version() -> tuple[int, int]:
    return sys.version_info[:2]


def _newer_python() -> str:
    version = ".".join(map(str, _python_version()))
    return (
        f"{REQUIREMENT} has wheels for Python 3.9 to 3.12 and this is {version}; set "
        f"{PYTHON_VARIABLE} to a "
        f"Python 3.12 that has it, or run onnxprune with Python 3.11 or 3.12"
    )


def _check_python() -> None:
    if _python_version() >= (3, 13):
        raise TrainingError(f"cannot install the training runtime: {_newer_python()}")


def _named(place: Path) -> Runtime:
    """The runtime that the environment variable names.

    A Python, a folder of modules, or a virtual environment.
    """
    if place.is_file():
        return Runtime(place, None, PYTHON_VARIABLE)
    for python in (place / "bin" / "python", place / "Scripts" / "python.exe"):
        if python.is_file():
            return Runtime(python, None, PYTHON_VARIABLE)
    if (place / "onnxruntime").is_dir():
        return Runtime(Path(sys.executable), place, PYTHON_VARIABLE)
    raise TrainingError(
        f"{PYTHON_VARIABLE} is {str(place)!r}, which is neither a Python, a virtual environment, "
        f"nor a folder that holds "
        f"{REQUIREMENT}"
    )


def _installed_here() -> bool:
    for name in ("onnxruntime-training-cpu", "onnxruntime-training"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def _holds_wheel(folder: Path) -> bool:
    """Whether the folder holds this very version, wholly."""
    return (folder / f"onnxruntime_training_cpu-{VERSION}.dist-info" / "RECORD").is_file()


def _pip_install(folder: Path, requirement: str) -> None:
    command = [*_installer(), "--target", str(folder), "--no-deps", requirement]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.upper().startswith("ERROR")] or lines[-1:]
        raise TrainingError(
            f"cannot install {requirement}: {' '.join(errors)} (is the package index reachable? "
            f"nothing was changed; "
            f"the wheel can also be put there by hand: pip install --target {training_home()} "
            f"--no-deps {requirement})"
        )


def _installer() -> list[str]:
    """The command that installs for this Python: its own pip, or uv."""
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        uv = shutil.which("uv")
        if uv is None:
            raise TrainingError(
                "cannot install the training runtime: this environment has no pip, and uv was "
                "not found; "
                "run `python -m ensurepip` first"
            ) from None
        return [uv, "pip", "install", "--python", sys.executable, "--quiet"]
    return [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]


def _probe_numpy(folder: Path) -> None:
    """Start a worker on the fresh folder.

    Give it a numpy of its own if it cannot live with this environment's.
    """
    from onnxprune.training.client import Worker

    runtime = Runtime(Path(sys.executable), folder, "setup")
    try:
        Worker(runtime).close()
    except TrainingError as error:
        if "numpy" not in str(error).lower():
            raise
        _pip_install(folder, NUMPY_FALLBACK)
        Worker(runtime).close()


def _move(fresh: Path, folder: Path) -> None:
    """Put the finished folder in its place; another process may have been faster."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    try:
        os.replace(fresh, folder)
    except OSError as error:
        if not _holds_wheel(folder):
            raise TrainingError(
                f"cannot put the training runtime into {folder}: {error}; the folder must be "
                f"empty or not exist"
            ) from error
