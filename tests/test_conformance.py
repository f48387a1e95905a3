"""Real exports, pruned to half in both scopes, equal their masked twins."""

from __future__ import annotations

import pytest

from benchmarks import conformance
from models import zoo

FAST = (
    *(n for n in zoo.names() if n.startswith(("misc-", "hf-"))),
    "timm-mobilenetv3_small_050-ts",
    "timm-regnety_002-ts",
    "tv-shufflenet_v2_x1_0-dyn",
    "tv-squeezenet1_0-ts",
    "yolo-yolo11n-ts",
)


@pytest.mark.parametrize("name", FAST)
def test_equals_its_twin(name: str) -> None:
    row = conformance.measure(name)
    assert not row.problem
    assert row.exact_left < 0.9
    assert row.all_left <= row.exact_left


def test_the_set_is_complete() -> None:
    assert len(zoo.names()) == 109
