"""Inputs made up for a repair without data."""

from __future__ import annotations

import numpy as np

from models import text
from onnxprune.calibration.inputs import made_up, repetitive


def test_made_up_tokens_repeat_as_words_do() -> None:
    (tokens, *_) = (batch["token"] for batch in made_up(text.language_lstm()).batches)
    assert tokens.dtype == np.int64
    assert tokens.min() >= 0 and tokens.max() < text.SYMBOLS
    distinct = [len(set(row)) for row in tokens.tolist()]
    assert np.mean(distinct) < text.LENGTH / 2
    assert len(set(tokens[:, 0].tolist())) > len(tokens) / 4


def test_what_is_no_row_of_integers_stays(rng: np.random.Generator) -> None:
    feeds = {
        "image": rng.random((2, 3)).astype(np.float32),
        "length": np.arange(4),
        "mask": np.ones((2, 4), np.int64),
        "empty": np.zeros((2, 0), np.int64),
    }
    found = repetitive(feeds, rng)
    assert all(np.array_equal(found[name], array) for name, array in feeds.items())
