"""Batches that are cut into pieces train like whole ones."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.data import Batch
from onnxprune.passes.finetune import Finetune
from onnxprune.training import pieces
from onnxprune.training.legalise import legalise
from onnxprune.training.loss import Objective, Term
from onnxprune.training.pieces import cut, piece_rows, separable
from tests.passes.test_finetune import STUDENT, TRAIN
from tests.training.test_gradients import build

LABEL = Term("label", "y", "soft", "none", 1, 1.0, 1.0, False, 2, 3)
LIKENESS = Term("feature0", "h", "likeness", "none", 0, 1.0, 1.0, True)
OBJECTIVE = Objective((LABEL,))


def batch(labels: list[int]) -> Batch:
    rows = len(labels)
    return Batch({"x": np.arange(2 * rows).reshape(rows, 2)}, np.array(labels))


def test_pieces_are_of_like_size_and_make_up_the_batch() -> None:
    found = cut(batch([0, 1, 2, 0, 1, 2, 0]), 3, OBJECTIVE)
    assert [len(piece.feeds["x"]) for piece, _ in found] == [3, 3, 1]
    assert [share for _, share in found] == [3 / 7, 3 / 7, 1 / 7]
    joined = np.concatenate([piece.feeds["x"] for piece, _ in found])
    np.testing.assert_array_equal(joined, batch([0] * 7).feeds["x"])


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 1, 2, -1, 0], [0, 1, 2, 3, 0]])
def test_a_small_batch_and_one_with_labels_to_ignore_stay_whole(labels: list[int]) -> None:
    (whole,) = cut(batch(labels), 3, OBJECTIVE)
    assert whole[1] == 1
    assert len(whole[0].feeds["x"]) == len(labels)


def test_feeds_without_a_common_batch_axis_stay_whole() -> None:
    odd = Batch({"x": np.zeros((6, 2)), "scale": np.zeros(1)}, None)
    assert cut(odd, 3, OBJECTIVE) == [(odd, 1.0)]


def test_a_loss_that_compares_samples_is_not_separable() -> None:
    assert separable(OBJECTIVE)
    assert not separable(Objective((LABEL, LIKENESS)))


def test_large_tensors_make_small_pieces() -> None:
    small = legalise(build(17, "float[N,5] x, float[5,3] w", "y = MatMul(x, w)")).draft
    assert piece_rows(small) == pieces.BUDGET_BYTES // (3 * pieces.ITEM_BYTES)
    large = legalise(build(17, "float[N,5] x, float[5,2000000] w", "y = MatMul(x, w)")).draft
    assert piece_rows(large) == pieces.SMALLEST


def test_training_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tune = Finetune(
        epochs=1, batch_size=32, threads=1, backend="builtin", clip=0.1, optimizer="sgd"
    )
    whole = tune(STUDENT, teacher=STUDENT, data=TRAIN)
    monkeypatch.setattr(pieces, "SMALLEST", 5)
    monkeypatch.setattr(pieces, "BUDGET_BYTES", 1)
    parts = tune(STUDENT, teacher=STUDENT, data=TRAIN)
    assert whole.steps == parts.steps
    assert whole.history[1].loss == pytest.approx(parts.history[1].loss, rel=1e-4)
    for a, b in zip(whole.model.graph.initializer, parts.model.graph.initializer, strict=True):
        one, other = (np.frombuffer(t.raw_data, np.uint8) for t in (a, b))
        if a.data_type == 1:
            np.testing.assert_allclose(one.view("f4"), other.view("f4"), rtol=1e-3, atol=1e-5)
