"""What pyproject.toml promises about the package."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def project(root: Path) -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed(root: Path, project: dict[str, Any]) -> None:
    inits = (path.relative_to(root).parent for path in root.glob("onnxprune/**/__init__.py"))
    found = {".".join(folder.parts) for folder in inits} | {"onnxprune.passes"}
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(found)


def test_passes_are_a_link_to_the_top_level_folder(root: Path) -> None:
    assert (root / "onnxprune" / "passes").readlink() == Path("../passes")


def test_changelog_has_the_version(root: Path, project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert f"## {version}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
