"""The small vision transformer runs, trains wholly, and is pruned to half and a quarter."""

from __future__ import annotations

import numpy as np
import pytest

import onnxprune
from models.transformer import fashion_vit
from onnxprune.runtime import random_feeds, run, session
from onnxprune.training.legalise import legalise


def test_every_weight_can_be_trained() -> None:
    graph = legalise(fashion_vit())
    assert not graph.frozen
    assert "patches.position" in graph.parameters
    assert not graph.parameters["layer1.norm1.weight"].decay
    assert graph.parameters["layer1.attention.query.weight"].decay


def test_a_seed_makes_the_same_network() -> None:
    assert fashion_vit(1).SerializeToString() == fashion_vit(1).SerializeToString()
    assert fashion_vit(1).SerializeToString() != fashion_vit(2).SerializeToString()


@pytest.mark.parametrize("scope", ["exact", "all"])
@pytest.mark.parametrize("macs", [0.5, 0.25])
def test_pruning(scope: str, macs: float) -> None:
    model = fashion_vit()
    result = onnxprune.prune(model, macs=macs, scope=scope, threads=1)
    assert result.report.after.macs <= macs * result.report.before.macs
    feeds = random_feeds(result.model, batch=3)
    (scores,) = run(session(result.model, threads=1), feeds).values()
    assert scores.shape == (3, 10)
    assert np.isfinite(scores).all()
