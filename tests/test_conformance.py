"""Real exports, pruned to half in both scopes, equal their masked twins."""

from __future__ import annotations

import hashlib

import pytest

from benchmarks import conformance
from models import zoo

#: The small ones, and some larger ones of other families; `make conformance` runs all.
FAST = (
    *(r["name"] for r in zoo.manifest() if r["parameters"] <= 3e5 and r["nodes"] <= 620),
    "timm-mobilenetv3_small_050-ts",
    "timm-mobilevit_xxs-ts",
    "timm-regnety_002-ts",
    "tv-shufflenet_v2_x1_0-dyn",
    "tv-squeezenet1_0-ts",
    "yolo-yolo11n-ts",
)


@pytest.mark.parametrize("name", FAST)
def test_equals_its_twin(name: str) -> None:
    row = conformance.measure(name)
    assert not row.problem
    assert row.all_left <= row.exact_left
    assert row.all_left < 0.95


def test_the_manifest_tells_what_the_archive_holds() -> None:
    rows = zoo.manifest()
    assert tuple(row["name"] for row in rows) == zoo.names()
    for row in rows:
        assert hashlib.sha256(zoo.skeleton(row["name"])).hexdigest() == row["sha256"]
