"""Changes of training batches of images [N, C, H, W]: mirrored, shifted, mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxprune.data import Batch
from onnxprune.errors import InvalidRecipeError

Augment = Callable[[Batch, np.random.Generator], Batch]
NAMES = ("flip", "shift", "mixup")
SHIFT_SHARE = 1 / 8
MIXUP_ALPHA = 0.2


def augmentation(
    wanted: Augment | Sequence[str] | str | None, classes: int | None = None
) -> Augment | None:
    """One function that applies all that is wanted, in that order.

    Args:
        wanted: a function of a batch and a generator, or names out of `NAMES`; a text has commas
            between them.
        classes: how many classes integer labels tell apart, which mixup has to know.

    Raises:
        InvalidRecipeError: a name is unknown.
    """
    if wanted is None or callable(wanted):
        return wanted
    if isinstance(wanted, str):
        wanted = [name.strip() for name in wanted.split(",")]
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise InvalidRecipeError(
            f"augmentation {unknown[0]!r} is unknown: choose from {', '.join(NAMES)}"
        )
    parts = [{"flip": flip, "shift": shift, "mixup": mixup(classes)}[name] for name in wanted]

    def apply(batch: Batch, rng: np.random.Generator) -> Batch:
        for part in parts:
            batch = part(batch, rng)
        return batch

    return apply


def flip(batch: Batch, rng: np.random.Generator) -> Batch:
    """Each image mirrored left to right with a chance of one half."""
    feeds = dict(batch.feeds)
    for name, images in _images(batch):
        chosen = rng.random(len(images)) < 0.5
        feeds[name] = np.where(chosen[:, None, None, None], images[..., ::-1], images)
    return Batch(feeds, batch.labels)


def shift(batch: Batch, rng: np.random.Generator, share: float = SHIFT_SHARE) -> Batch:
    """Each image moved by up to `share` of its size; what comes in is its edge, repeated."""
    feeds = dict(batch.feeds)
    for name, images in _images(batch):
        height, width = images.shape[2:]
        reach = [max(1, round(size * share)) for size in (height, width)]
        pads = [(0, 0), (0, 0), (reach[0], reach[0]), (reach[1], reach[1])]
        wide = np.pad(images, pads, mode="edge")
        moved = np.empty_like(images)
        tops = rng.integers(0, 2 * reach[0] + 1, len(images))
        lefts = rng.integers(0, 2 * reach[1] + 1, len(images))
        for i, (top, left) in enumerate(zip(tops, lefts, strict=True)):
            moved[i] = wide[i, :, top : top + height, left : left + width]
        feeds[name] = moved
    return Batch(feeds, batch.labels)


def mixup(classes: int | None, alpha: float = MIXUP_ALPHA) -> Augment:
    """Each sample mixed with another of the batch, and its label likewise (Zhang et al., 2018).

    Labels that are no class numbers, one a sample, are dropped: then the teacher tells the target.
    """

    def mix(batch: Batch, rng: np.random.Generator) -> Batch:
        images = _images(batch)
        if not images:
            return batch
        count = len(images[0][1])
        share = float(rng.beta(alpha, alpha))
        order = rng.permutation(count)
        feeds = dict(batch.feeds)
        for name, array in images:
            feeds[name] = (share * array + (1 - share) * array[order]).astype(array.dtype)
        soft = _one_hot(batch.labels, classes)
        labels = batch.labels if soft is None else share * soft + (1 - share) * soft[order]
        return Batch(feeds, labels)

    return mix


def _one_hot(labels: NDArray[np.generic] | None, classes: int | None) -> NDArray[np.float32] | None:
    if labels is None or classes is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return None
    return np.eye(classes, dtype=np.float32)[labels.astype(np.int64)]


def _images(batch: Batch) -> list[tuple[str, NDArray[np.floating]]]:
    """The feeds that are float images."""
    return [(n, a) for n, a in batch.feeds.items() if a.ndim == 4 and a.dtype.kind == "f"]
