"""What every data source becomes: a `Dataset` that cuts itself into batches of feeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import InvalidDataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from onnxprune.data.inputs import Inputs

Array: TypeAlias = NDArray[Any]
Rows: TypeAlias = "slice | NDArray[np.int64]"


@dataclass(frozen=True)
class Batch:
    """Feeds by input name, each [N, ...], and labels [N, ...] or None where the data has none."""

    feeds: Mapping[str, Array]
    labels: Array | None = None


@runtime_checkable
class Dataset(Protocol):
    """Data that fits one model. Iterating twice without `rng` gives the same batches."""

    def batches(self, size: int, *, rng: np.random.Generator | None = None) -> Iterator[Batch]:
        """Batches of `size` samples, in order, or shuffled by `rng` alone.

        Where the model's batch axis is dynamic, the last batch may be smaller. Where it is fixed,
        every batch has that length whatever `size` says, and samples that do not fill a last batch
        are dropped: a repeated sample would count twice in a metric.
        """

    def __len__(self) -> int:
        """The number of samples that `batches` yields; TypeError where only iterating tells."""


class Column(Protocol):
    """One array's samples, read where they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Rows, /) -> Array: ...


@dataclass(frozen=True)
class ColumnDataset:
    """Columns that can be read at any row: .npz files, IDX files, folders of images.

    `columns` holds one column an input; `shared` holds the inputs without a batch axis, fed whole
    each time.
    """

    inputs: Inputs
    columns: Mapping[str, Column]
    labels: Column | None
    where: str
    shared: Mapping[str, Array]

    def __post_init__(self) -> None:
        """Check that the columns are equally long and fill a batch."""
        lengths = {name: len(column) for name, column in self.columns.items()}
        if self.labels is not None:
            lengths["labels"] = len(self.labels)
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InvalidDataError(
                f"{self.where}: numbers of samples differ ({told}); give each input and the "
                "labels equally many"
            )
        require_samples(next(iter(lengths.values()), 0), self.inputs.batch, self.where)

    def __len__(self) -> int:
        """The number of samples, without those that a fixed batch leaves over."""
        count = len(next(iter(self.columns.values())))
        return count - count % (self.inputs.batch or 1)

    def batches(self, size: int, *, rng: np.random.Generator | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`; a full permutation when shuffled."""
        step = self.inputs.batch or positive(size)
        count = len(next(iter(self.columns.values())))
        order = None if rng is None else rng.permutation(count)
        for start in range(0, len(self), step):
            rows: Rows = slice(start, min(start + step, count))
            yield self._take(rows if order is None else order[rows])

    def _take(self, rows: Rows) -> Batch:
        feeds = {name: column[rows] for name, column in self.columns.items()}
        fitted = self.inputs.fit({**feeds, **self.shared}, self.where)
        return Batch(fitted, None if self.labels is None else fit_labels(self.labels[rows]))


@dataclass(frozen=True)
class StreamDataset:
    """Batches that come one after another, of any size, made again by each call of `source`.

    Neighbours are joined and cut to the wanted size. Shuffled, the order of `items` (those held in
    memory) is permuted, then the samples within runs of `_RUN` batches.
    """

    inputs: Inputs
    source: Callable[[], Iterator[Batch]] | None
    items: Sequence[Batch] | None
    where: str

    def __len__(self) -> int:
        """The number of samples of items in memory. Raises TypeError for a stream."""
        if self.items is None:
            raise TypeError(f"{self.where}: the number of samples is known only after iterating")
        if not self.inputs.joinable:
            return sum(batch_length(batch, self.inputs) for batch in self.items)
        if self.inputs.batch is None:
            return sum(map(_rows, self.items))
        return self.inputs.batch * sum(1 for _ in self._cut(self.items, 1))

    def __bool__(self) -> bool:
        """True: `data or other` must not ask a stream for its length."""
        return True

    def batches(self, size: int, *, rng: np.random.Generator | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`."""
        step = self.inputs.batch or positive(size)
        stream = self._iterate(rng)
        if rng is not None and self.inputs.joinable:
            run = step * _RUN
            whole = (_permuted(b, rng) if _rows(b) > run else b for b in stream)
            stream = (_permuted(b, rng) for b in joined(whole, run, keep_rest=True))
        count = 0
        for batch in self._cut(stream, step):
            count += 1
            yield batch
        if not count:
            require_samples(0, self.inputs.batch, self.where)

    def _iterate(self, rng: np.random.Generator | None) -> Iterator[Batch]:
        if self.items is None:
            assert self.source is not None
            return self.source()
        order = range(len(self.items)) if rng is None else rng.permutation(len(self.items))
        items = self.items
        return (items[i] for i in order)

    def _cut(self, stream: Iterator[Batch] | Sequence[Batch], step: int) -> Iterator[Batch]:
        if not self.inputs.joinable:
            return iter(stream)
        return joined(stream, self.inputs.batch or step, keep_rest=self.inputs.batch is None)


_RUN = 16


def positive(size: int) -> int:
    """The batch size itself; anything below 1 is the caller's mistake."""
    if size < 1:
        raise ValueError(f"a batch has at least one sample, not {size}")
    return size


def require_samples(count: int, batch: int | None, where: str) -> None:
    """Raise InvalidDataError unless `count` samples make at least one batch."""
    if batch is not None and count < batch:
        raise InvalidDataError(
            f"{where}: has fewer samples than the model's fixed batch of {batch}; "
            "give more data, or export the model with a dynamic batch axis"
        )
    if count == 0:
        raise InvalidDataError(f"{where}: no samples; a data source has at least one")


def batch_length(batch: Batch, inputs: Inputs) -> int:
    """The number of samples in a batch."""
    name = next((spec.name for spec in inputs.specs if spec.batched), None)
    return 1 if name is None else len(batch.feeds[name])


def fit_labels(labels: Array) -> Array:
    """Class indices written as a column [N, 1] become [N]; everything else stays."""
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.dtype.kind in "iu":
        return labels[:, 0]
    return labels


def joined(
    stream: Iterator[Batch] | Sequence[Batch], size: int, *, keep_rest: bool
) -> Iterator[Batch]:
    """Neighbouring batches joined and cut to `size` samples.

    Batches whose other axes differ (sequence lengths) are not joined; what is left before such a
    change and at the end is yielded as a smaller batch if `keep_rest`, else dropped.
    """
    held: list[Batch] = []
    count = 0
    for batch in stream:
        if held and _signature(held[0]) != _signature(batch):
            if keep_rest:
                yield _join(held)
            held, count = [], 0
        held.append(batch)
        count += _rows(batch)
        if count >= size:
            whole = _join(held)
            full = count - count % size
            for start in range(0, full, size):
                yield _take(whole, slice(start, start + size))
            held, count = (
                ([_take(whole, slice(full, count))], count - full) if count > full else ([], 0)
            )
    if held and keep_rest:
        yield _join(held)


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.feeds.values())))


def _signature(batch: Batch) -> tuple[Any, ...]:
    labels = None if batch.labels is None else batch.labels.shape[1:]
    return (*((name, a.shape[1:]) for name, a in sorted(batch.feeds.items())), labels)


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    feeds = {name: np.concatenate([b.feeds[name] for b in batches]) for name in batches[0].feeds}
    labels = [b.labels for b in batches if b.labels is not None]
    return Batch(feeds, np.concatenate(labels) if labels else None)


def _take(batch: Batch, rows: Rows) -> Batch:
    feeds = {name: array[rows] for name, array in batch.feeds.items()}
    return Batch(feeds, None if batch.labels is None else batch.labels[rows])


def _permuted(batch: Batch, rng: np.random.Generator) -> Batch:
    return _take(batch, rng.permutation(_rows(batch)))
