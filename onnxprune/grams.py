"""Second moments of what a layer reads, from calibration data: the Hessian of its squared error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.errors import InvalidDataError
from onnxprune.graph import Node
from onnxprune.noops import remove_dead

Array = NDArray[Any]
Feeds = Mapping[str, Array]
#: Rows used of a layer's input: this many times its width, and some more.
ROWS_PER_COLUMN = 16
ROWS_AT_LEAST = 32768


@dataclass
class Moments:
    """Sums over rows of a layer's input x[K], and of what is to be imitated, t[M].

    `square` of x x^T, [G, K, K], and `cross` of t x^T, [G, M, K]; `total` of x, [G, K], and `goal`
    of t, [G, M].
    """

    square: Array
    cross: Array
    total: Array
    goal: Array
    rows: int = 0

    @classmethod
    def zero(cls, groups: int, width: int) -> Moments:
        """No rows yet."""
        two, one = (groups, width, width), (groups, width)
        return cls(np.zeros(two), np.zeros(two), np.zeros(one), np.zeros(one))

    @classmethod
    def of(cls, x: Array, t: Array) -> Moments:
        """No rows yet, for rows such as x[G, R, K] and t[G, R, M]."""
        g, k, m = x.shape[0], x.shape[2], t.shape[2]
        return cls(np.zeros((g, k, k)), np.zeros((g, m, k)), np.zeros((g, k)), np.zeros((g, m)))

    def add(self, x: Array, t: Array) -> None:
        """Add rows x[G, R, K] and t[G, R, M]."""
        x = np.ascontiguousarray(x, np.float32)
        square = np.matmul(x.swapaxes(1, 2), x)
        self.square += square
        self.cross += square if t is x else np.matmul(t.astype(np.float32).swapaxes(1, 2), x)
        self.total += x.sum(axis=1, dtype=np.float64)
        self.goal += t.sum(axis=1, dtype=np.float64)
        self.rows += x.shape[1]

    def join(self, other: Moments) -> None:
        """Add the rows of another place where the same is multiplied."""
        self.square += other.square
        self.cross += other.cross
        self.total += other.total
        self.goal += other.goal
        self.rows += other.rows

    def means(self, centred: bool) -> tuple[Array, Array]:
        """The means of x x^T and t x^T, less their own means where `centred`."""
        n = max(self.rows, 1)
        square, cross = self.square / n, self.cross / n
        if centred:
            x, t = self.total / n, self.goal / n
            square = square - x[:, :, None] * x[:, None, :]
            cross = cross - t[:, :, None] * x[:, None, :]
        return square, cross

    def shift(self, old: Array, new: Array) -> Array:
        """What a bias must add so that new[G, M, K] gives the mean that `old` gave, [G * M]."""
        n = max(self.rows, 1)
        wanted, given = self.goal / n, self.total / n
        gap = np.einsum("gmk,gk->gm", old, wanted) - np.einsum("gmk,gk->gm", new, given)
        return np.asarray(gap.ravel())


@dataclass
class Taps:
    """Inner tensors of a model on calibration batches; the last one asked for is remembered."""

    batches: Sequence[Feeds]
    threads: int | None = None
    _last: dict[str, list[Array]] = field(default_factory=dict)

    def read(self, model: onnx.ModelProto, name: str) -> list[Array]:
        """The value of tensor `name`, batch by batch."""
        if name not in self._last:
            self._last = {name: list(self._run(model, name))}
        return self._last[name]

    def _run(self, model: onnx.ModelProto, name: str) -> Iterable[Array]:
        if name in self.batches[0]:
            return [np.asarray(feeds[name]) for feeds in self.batches]
        piece = onnx.ModelProto()
        piece.CopyFrom(model)
        del piece.graph.output[:]
        piece.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        remove_dead(piece)
        session = runtime.session(piece, threads=self.threads)
        wanted = {i.name for i in session.get_inputs()}
        return [
            runtime.run(session, {k: v for k, v in feeds.items() if k in wanted}, [name])[name]
            for feeds in self.batches
        ]


def calibration_batches(data: Any, samples: int, size: int = 64) -> list[Feeds]:
    """The first `samples` samples of a dataset, in batches.

    Raises:
        InvalidDataError: there are none.
    """
    batches: list[Feeds] = []
    count = 0
    for batch in data.batches(min(size, samples)):
        batches.append(batch.feeds)
        count += max((len(v) for v in batch.feeds.values() if np.ndim(v)), default=1)
        if count >= samples:
            break
    if not batches:
        raise InvalidDataError("no data to calibrate on: give one batch")
    return batches


def patches(
    x: Array, node: Node, kernel: Sequence[int], positions: int, rng: np.random.Generator
) -> Array:
    """What a Conv multiplies at up to `positions` places: x[N, C, *S] -> [N, P, C, taps]."""
    rank = len(kernel)
    strides = node.attr("strides") or [1] * rank
    dilations = node.attr("dilations") or [1] * rank
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(node, x.shape[2:], reach, strides)
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    axes = tuple(range(2, 2 + rank))
    windows: Any = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
    steps = [1, 1, *strides, *dilations]
    windows = windows[tuple(slice(None, None, step) for step in steps)]
    places = windows.shape[2 : 2 + rank]
    total = int(np.prod(places))
    picked = np.arange(total)
    if positions < total:
        picked = np.sort(rng.choice(total, positions, replace=False))
    index = np.unravel_index(picked, places)
    found = windows[(slice(None), slice(None), *index)]
    return np.moveaxis(found.reshape(*found.shape[:3], -1), 1, 2)


def _pads(
    node: Node, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    rank = len(sizes)
    auto = node.attr("auto_pad", b"NOTSET")
    if auto not in (b"SAME_UPPER", b"SAME_LOWER"):
        pads = node.attr("pads") or [0] * (2 * rank)
        return [(int(pads[i]), int(pads[i + rank])) for i in range(rank)]
    found = []
    for n, k, s in zip(sizes, reach, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto == b"SAME_UPPER" else (large, small))
    return found
