"""Feeds from Python: mappings, iterables, calibration readers and data loaders, by duck typing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxprune.data.arrays import open_arrays
from onnxprune.data.dataset import Array, Batch, Dataset, StreamDataset, batch_length, fit_labels
from onnxprune.data.inputs import Inputs
from onnxprune.errors import InvalidDataError


def open_python(source: Any, inputs: Inputs, where: str = "data") -> Dataset:
    """A dataset from a Python object.

    A mapping or array holds all samples. What can be iterated again is streamed, so a data loader
    of any size works; an iterator, which cannot, is kept in memory. A callable is called for each
    pass over the data.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, Mapping):
        return open_arrays({k: to_array(v, where) for k, v in source.items()}, inputs, where)
    if isinstance(source, np.ndarray):
        return open_arrays({"x": source}, inputs, where)
    if callable(getattr(source, "get_next", None)):
        return _open_reader(source, inputs, where)
    if isinstance(source, Iterator):
        return _in_memory(source, inputs, where)
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return _in_memory(source, inputs, where)
    if isinstance(source, Iterable):
        return _stream(source.__iter__, inputs, where)
    if callable(source):
        return open_function(source, inputs, where)
    raise InvalidDataError(
        f"{where}: a {type(source).__name__} holds no feeds; give an iterable of dicts by input "
        "name, "
        "a CalibrationDataReader, a data loader, or a path"
    )


def open_function(function: Callable[[], Any], inputs: Inputs, where: str) -> Dataset:
    """What `function()` returns; an iterator is made anew for each pass over the data."""
    made = function()
    if not isinstance(made, Iterator):
        return open_python(made, inputs, where)
    first = [made]  # the iterator in hand serves the first pass

    def again() -> Iterator[Any]:
        return first.pop() if first else iter(function())

    return _stream(again, inputs, where)


def to_array(value: Any, where: str) -> Array:
    """A numpy array from an array, a tensor of any framework, or numbers.

    Raises:
        InvalidDataError: `value` is none of them, or is ragged.
    """
    if isinstance(value, np.ndarray):
        return value
    for name in ("detach", "cpu"):
        if callable(getattr(value, name, None)):
            value = getattr(value, name)()
    if callable(getattr(value, "numpy", None)):
        value = value.numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidDataError(f"{where}: {type(value).__name__} is no array ({error})") from error
    if array.dtype.kind == "O":
        raise InvalidDataError(f"{where}: a {type(value).__name__} is no array of numbers or text")
    return array


def to_batch(item: Any, inputs: Inputs, where: str) -> Batch:
    """One feed, with or without labels, fitted to the model.

    Accepted: a dict (labels under y, labels or label), an array, arrays in the order of the model's
    inputs, that list with the labels last, and a pair of any of these and the labels.
    """
    if isinstance(item, Batch):
        feeds, labels = dict(item.feeds), item.labels
    else:
        feeds, labels = _split(item, inputs, where)
    arrays = {name: to_array(a, where) for name, a in inputs.by_name(feeds, where).items()}
    batch = Batch(
        inputs.fit(arrays, where), None if labels is None else fit_labels(to_array(labels, where))
    )
    _check_labels(batch, inputs, where)
    if (
        inputs.batch is not None
        and not inputs.joinable
        and batch_length(batch, inputs) != inputs.batch
    ):
        raise InvalidDataError(
            f"{where}: the model's batch is fixed to {inputs.batch}; give feeds of that length"
        )
    return batch


def _split(item: Any, inputs: Inputs, where: str) -> tuple[dict[str, Any], Any]:
    if isinstance(item, Mapping) or hasattr(
        item, "keys"
    ):  # HF's BatchEncoding has keys but is no Mapping
        feeds = {name: item[name] for name in item.keys()}  # noqa: SIM118
        label_name = inputs.label_name(list(feeds))
        return feeds, None if label_name is None else feeds.pop(label_name)
    if not isinstance(item, tuple | list):
        item = (item,)
    if len(item) == 2 and (isinstance(item[0], Mapping | tuple | list) or hasattr(item[0], "keys")):
        feeds, labels = _split(item[0], inputs, where)
        return feeds, item[1] if labels is None else labels
    count = len(inputs.names)
    if len(item) not in (count, count + 1):
        raise InvalidDataError(
            f"{where}: a feed of {len(item)} arrays, but the model has {count} inputs "
            f"({', '.join(inputs.names)}); "
            "give them in that order, labels last, or a dict by name"
        )
    return dict(zip(inputs.names, item, strict=False)), item[count] if len(item) > count else None


def _check_labels(batch: Batch, inputs: Inputs, where: str) -> None:
    if batch.labels is None or not inputs.joinable:
        return
    count, given = batch_length(batch, inputs), batch.labels.shape
    if not given or given[0] != count:
        raise InvalidDataError(
            f"{where}: labels {list(given)} for {count} samples; give one a sample"
        )


def _batches(items: Iterable[Any], inputs: Inputs, where: str) -> Iterator[Batch]:
    for number, item in enumerate(items):
        yield to_batch(item, inputs, f"{where}, feed {number}")


def _in_memory(items: Iterable[Any], inputs: Inputs, where: str) -> StreamDataset:
    return StreamDataset(inputs, None, list(_batches(items, inputs, where)), where)


def _stream(make: Callable[[], Iterator[Any]], inputs: Inputs, where: str) -> StreamDataset:
    return StreamDataset(inputs, lambda: _batches(make(), inputs, where), None, where)


def _open_reader(reader: Any, inputs: Inputs, where: str) -> StreamDataset:
    """A CalibrationDataReader: get_next() gives feeds until None; rewind(), if any, restarts."""

    def feeds() -> Iterator[Any]:
        if rewindable:
            reader.rewind()
        while (feed := reader.get_next()) is not None:
            yield feed

    rewindable = callable(getattr(reader, "rewind", None))
    return _stream(feeds, inputs, where) if rewindable else _in_memory(feeds(), inputs, where)
