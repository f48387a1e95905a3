"""Augmentations keep what they should, and change what they say."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.data import Batch
from onnxprune.errors import InvalidRecipeError
from onnxprune.passes.finetune import Finetune
from onnxprune.training.augment import augmentation, flip, mixup, shift


@pytest.fixture
def batch(rng: np.random.Generator) -> Batch:
    images = rng.random((64, 2, 8, 8)).astype(np.float32)
    return Batch({"x": images, "ids": np.arange(64)}, np.arange(64) % 10)


def test_flip(batch: Batch, rng: np.random.Generator) -> None:
    images, turned = batch.feeds["x"], flip(batch, rng).feeds["x"]
    same = (turned == images).all(axis=(1, 2, 3))
    mirrored = (turned == images[..., ::-1]).all(axis=(1, 2, 3))
    assert same.any() and mirrored.any() and (same ^ mirrored).all()


def test_shift(batch: Batch, rng: np.random.Generator) -> None:
    images, moved = batch.feeds["x"], shift(batch, rng).feeds["x"]
    assert moved.shape == images.shape and moved.dtype == images.dtype
    kept = 0
    for before, after in zip(images, moved, strict=True):
        places = [
            (i, j)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if np.array_equal(np.roll(before, (i, j), (1, 2))[:, 1:-1, 1:-1], after[:, 1:-1, 1:-1])
        ]
        assert len(places) == 1
        kept += places == [(0, 0)]
    assert 0 < kept < 32


def test_mixup(batch: Batch, rng: np.random.Generator) -> None:
    mixed = mixup(10)(batch, rng)
    assert mixed.labels is not None
    assert mixed.labels.shape == (64, 10)
    np.testing.assert_allclose(mixed.labels.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(mixed.feeds["ids"], batch.feeds["ids"])
    before, after = batch.feeds["x"], mixed.feeds["x"]
    np.testing.assert_allclose(after.mean(axis=0), before.mean(axis=0), atol=1e-5)
    assert not np.array_equal(after, before)
    unknown = mixup(None)(batch, rng).labels
    np.testing.assert_array_equal(unknown, batch.labels)


def test_several_apply_in_order(batch: Batch) -> None:
    both = augmentation(("flip", "mixup"), 10)
    assert both is not None
    rng, again = np.random.default_rng(1), np.random.default_rng(1)
    expected = mixup(10)(flip(batch, again), again)
    np.testing.assert_array_equal(both(batch, rng).feeds["x"], expected.feeds["x"])


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(InvalidRecipeError, match="'blur' is unknown: choose from flip, shift"):
        Finetune(augment=("blur",))
