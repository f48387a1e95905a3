"""Images for models that remember nothing of their data: each in a style of its own.

A classifier tells which of them are worth something: it was trained to be sure, and of all classes
in turn. Of many images those are kept that are the surest examples of some class, then crossed with
each other, and again (an evolution of inputs; the aim is that of Chen et al., DAFL, 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.calibration.textures import KINDS, texture

Array = NDArray[Any]
Feeds = dict[str, Array]
Axes = Mapping[str, tuple[int, int]]
#: Brightness, and the range of strengths (on a logarithmic scale).
OFFSETS, SCALES = (0.0, 0.7), (0.1, 1.0)
#: Images drawn for each that is kept, and children of each round of crossing.
DRAWN, CHILDREN, ROUNDS = 3.0, 1.5, 2
#: Images tried for each that is kept, in all.
TRIES = DRAWN + ROUNDS * CHILDREN


def chosen_by_class(
    model: onnx.ModelProto,
    axes: Axes,
    samples: int,
    tries: int,
    rows: int,
    rng: np.random.Generator,
    *,
    seed: int = 0,
    threads: int | None = None,
) -> Feeds:
    """About `samples` images; to choose them the model is run on up to `tries`, in `rows`."""
    size = -(-samples // rows) * rows
    drawn = int(min(DRAWN * size, tries / TRIES * DRAWN)) // rows * rows
    pool = draw(model, axes, max(size, drawn), seed, rng, batch=rows)
    if drawn > size and all(a.ndim and len(a) == drawn for a in pool.values()):
        return _evolved(model, axes, pool, size, rows, rng, threads)
    return pool


def batched(
    pool: Feeds, axes: Axes, rows: int, rng: np.random.Generator | None = None
) -> list[Feeds]:
    """Batches of `rows` samples, in random order with `rng`; other inputs may lack samples."""
    total = rows_of(pool, axes)
    order = np.arange(total) if rng is None else rng.permutation(total)
    parts = [order[i : i + rows] for i in range(0, total, rows)]
    return [
        {n: a[at] if a.ndim and len(a) == total else a for n, a in pool.items()} for at in parts
    ]


def _evolved(
    model: onnx.ModelProto,
    axes: Axes,
    pool: Feeds,
    size: int,
    rows: int,
    rng: np.random.Generator,
    threads: int | None,
) -> Feeds:
    """The `size` best of the pool and its children."""
    session = runtime.session(model, threads=threads)
    sure = _sureness(session, pool, rows)
    if sure is None:
        return {n: a[:size] for n, a in pool.items()}
    count = int(len(sure) / DRAWN * CHILDREN) // rows * rows
    for remaining in reversed(range(ROUNDS + 1)):
        best = surest(sure, size)
        pool, sure = {n: a[best] for n, a in pool.items()}, sure[best]
        if remaining and count:
            children = crossed(pool, axes, count, rng)
            more = _sureness(session, children, rows)
            if more is not None:
                pool = {n: np.concatenate([a, children[n]]) for n, a in pool.items()}
                sure = np.concatenate([sure, more])
    return pool


def surest(sure: Array, count: int) -> NDArray[np.int64]:
    """The `count` best examples of classes, taken from all in turn, by probabilities [N, K]."""
    rank = np.empty(sure.shape, np.int64)
    order = np.argsort(-sure, axis=0, kind="stable")
    np.put_along_axis(rank, order, np.arange(len(sure))[:, None], axis=0)
    return np.lexsort((-sure.max(axis=1), rank.min(axis=1)))[:count]


def _sureness(session: Any, feeds: Feeds, rows: int) -> Array | None:
    """Probabilities [N, K] of the first output; None where it is no row of class scores."""
    total = len(next(iter(feeds.values())))
    parts = []
    for start in range(0, total, rows):
        batch = {n: a[start : start + rows] for n, a in feeds.items()}
        scores = np.asarray(next(iter(runtime.run(session, batch).values())))
        if scores.dtype.kind != "f" or scores.ndim != 2:
            return None
        parts.append(scores.astype(np.float64))
    scores = np.concatenate(parts)
    if len(scores) != total or scores.shape[1] < 2 or not np.isfinite(scores).all():
        return None
    if (scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def crossed(feeds: Feeds, axes: Axes, count: int, rng: np.random.Generator) -> Feeds:
    """Children of random pairs: one image in smooth regions of the other, or one with texture."""
    first, second = rng.integers(0, rows_of(feeds, axes), (2, count))
    children = {n: a[first] for n, a in feeds.items()}
    for name, where in axes.items():
        one = np.moveaxis(feeds[name][first], where, (-2, -1))
        other = np.moveaxis(feeds[name][second], where, (-2, -1))
        height, width = one.shape[-2:]
        mask = 1 / (1 + np.exp(-4 * texture(rng, (count, 1, height, width), 2.0)))
        spread = one.std(axis=(1, 2, 3), keepdims=True)
        rough = one + spread * (
            0.4 * texture(rng, one.shape, 2.0) + 0.15 * texture(rng, one.shape, 1.0)
        )
        pairs = rng.random((count, 1, 1, 1)) < 0.5
        child = np.where(pairs, mask * one + (1 - mask) * other, rough)
        children[name] = np.moveaxis(child, (-2, -1), where).astype(feeds[name].dtype)
    return children


def draw(
    model: onnx.ModelProto,
    axes: Axes,
    count: int,
    seed: int,
    rng: np.random.Generator,
    *,
    batch: int = 64,
) -> Feeds:
    """About `count` images, each of a random kind, brightness and strength."""
    parts: list[Feeds] = []
    while sum(rows_of(p, axes) for p in parts) < count:
        feeds = dict(runtime.random_feeds(model, seed=seed + len(parts), batch=batch))
        for name, where in axes.items():
            feeds[name] = _painted(feeds[name], where, rng)
        parts.append(feeds)
    rows = rows_of(parts[0], axes)
    apart = {n for n, a in parts[0].items() if a.ndim and len(a) == rows}
    return {
        n: np.concatenate([p[n] for p in parts]) if n in apart else a for n, a in parts[0].items()
    }


def _painted(base: Array, where: tuple[int, int], rng: np.random.Generator) -> Array:
    shape = np.moveaxis(base, where, (-2, -1)).shape
    kind = rng.integers(0, len(KINDS), shape[0])
    image = np.zeros(shape)
    for number, make in enumerate(KINDS.values()):
        members = kind == number
        if members.any():
            image[members] = make(rng, (int(members.sum()), *shape[1:]))
    sizes = (shape[0], 1, 1, 1)
    scale = np.exp(rng.uniform(np.log(SCALES[0]), np.log(SCALES[1]), sizes))
    image = rng.uniform(OFFSETS[0], OFFSETS[1], sizes) + scale * image
    return np.asarray(np.moveaxis(image, (-2, -1), where).astype(base.dtype))


def rows_of(feeds: Mapping[str, Array], axes: Axes) -> int:
    return int(feeds[next(iter(axes))].shape[0])
