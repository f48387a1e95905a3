"""Images made up for models that come without data.

Each is in a random style of its own. Which of them are used is chosen by what the model remembers
of its training data: the means and variances that its BatchNormalization recorded (the aim of Cai
et al., ZeroQ, 2020, by choice in place of gradients), or else by the classes that it sees in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.calibration.editable import Editable
from onnxprune.calibration.varied import batched, chosen_by_class, draw, rows_of

Array = NDArray[Any]
Feeds = dict[str, Array]
#: How many BatchNormalizations the choice looks at.
NORMS = 6
#: Images drawn for each that is chosen, and their size in all.
DRAWN, POOL_BYTES = 4, 400_000_000
BATCH = 64
_SMALLEST_IMAGE = 8


@dataclass(frozen=True)
class Recorded:
    """What a BatchNormalization remembers of the tensor `name`: mean[C] and variance[C]."""

    name: str
    mean: Array
    var: Array


def synthesize(
    model: onnx.ModelProto,
    samples: int,
    *,
    tries: int = 0,
    seed: int = 0,
    threads: int | None = None,
) -> list[Feeds] | None:
    """Batches that together hold about `samples`; None where no input is an image.

    `tries`: on how many images the model may be run to find good ones.
    """
    editable = Editable(model)
    norms, axes = recorded(editable)[:NORMS], image_axes(model)
    if not axes:
        return None
    rng = np.random.default_rng(seed)
    one = draw(model, axes, 1, seed, rng, batch=min(BATCH, samples))
    rows = rows_of(one, axes)
    each = sum(one[name].nbytes for name in axes) // rows
    tries = min(tries, max(samples, POOL_BYTES // each))
    if not norms:
        pool = chosen_by_class(model, axes, samples, tries, rows, rng, seed=seed, threads=threads)
        return batched(pool, axes, rows, rng)
    size = -(-samples // rows) * rows
    pool = draw(model, axes, max(size, min(DRAWN * size, tries)), seed, rng, batch=rows)
    found = deviations(editable, norms, batched(pool, axes, rows), threads=threads)
    if found is not None and len(found) > size:
        with runtime.one_blas_thread():
            best = herded(found, size)
        pool = {n: a[best] for n, a in pool.items()}
    return batched(pool, axes, rows, rng)


def image_axes(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """The height and width axes of each input that is an image: [N, C, H, W] or [N, H, W, C]."""
    found = {}
    for name, array in runtime.random_feeds(model).items():
        if array.ndim == 4 and array.dtype.kind == "f":
            axes = (1, 2) if array.shape[3] <= 4 < array.shape[1] else (2, 3)
            if min(array.shape[a] for a in axes) >= _SMALLEST_IMAGE:
                found[name] = axes
    return found


def recorded(model: Editable) -> list[Recorded]:
    """The statistics in the file, in the order in which data meets them."""
    found = []
    for node in model.nodes:
        if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx"):
            mean, var = (model.weight(name) for name in node.input[3:5])
            if mean is not None and var is not None:
                found.append(Recorded(node.input[0], mean, var))
    return found


def deviations(
    model: Editable,
    norms: Sequence[Recorded],
    batches: Sequence[Feeds],
    *,
    threads: int | None = None,
) -> Array | None:
    """[N, F]: by how much each sample's means and mean squares miss the recorded ones.

    None where samples do not stay apart.
    """
    last = max(model.maker.get(n.name, -1) for n in norms)
    names = [n.name for n in norms if n.name in model.maker]
    if not names:
        return None
    session = runtime.session(model.part(model.nodes[: last + 1], batches, names), threads=threads)
    found = []
    for feeds in batches:
        tensors = runtime.run(session, feeds)
        rows = max(len(a) for a in feeds.values() if a.ndim)
        parts = [_deviation(tensors[n.name], n) for n in norms if n.name in names]
        if any(len(p) != rows for p in parts):
            return None
        found.append(np.concatenate(parts, axis=1))
    return np.concatenate(found)


def _deviation(tensor: Array, norm: Recorded) -> Array:
    """Of one layer, [N, 2 C]; every layer counts alike."""
    value = tensor.astype(np.float64)
    axes = tuple(range(2, value.ndim))
    var = np.maximum(norm.var, 1e-6 * float(norm.var.max()) + 1e-12)
    square = norm.mean**2 + var
    first = (value.mean(axes) - norm.mean) / np.sqrt(var)
    second = ((value**2).mean(axes) - square) / square
    return np.asarray(np.concatenate([first, second], axis=1) / np.sqrt(norm.mean.size))


def herded(found: Array, count: int) -> NDArray[np.int64]:
    """`count` rows of [N, F] whose sum stays near zero (Welling, Herding, 2009)."""
    found = found.astype(np.float32)
    total, size = np.zeros(found.shape[1], np.float32), (found**2).sum(axis=1)
    picked = np.empty(count, np.int64)
    for place in range(count):
        picked[place] = int(np.argmin(2 * found @ total + size))
        total += found[picked[place]]
        size[picked[place]] = np.inf
    return picked
