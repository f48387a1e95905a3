"""What every test shares: paths, a seeded generator, a clean environment, and hypothesis profiles.

HYPOTHESIS_PROFILE picks a profile: `ci` (default; the same examples each time) or `full` (many).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
SLOW_DATA = [HealthCheck.too_slow]

settings.register_profile(
    "ci",
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=SLOW_DATA,
)
settings.register_profile("full", max_examples=2000, deadline=None, suppress_health_check=SLOW_DATA)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Variables that change what the command line prints.
DISPLAY = ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "ONNXPRUNE_DEBUG", "TTY_COMPATIBLE")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what would make outputs differ from machine to machine."""
    for name in DISPLAY:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that gives the same numbers in each test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The trained models that the repository holds."""
    return ROOT / "models"


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
