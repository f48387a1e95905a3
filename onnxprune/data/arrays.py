"""Arrays by input name, from .npz and .npy files or a mapping in memory."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from onnxprune.data.dataset import Array, Column, ColumnDataset, Rows
from onnxprune.data.inputs import Inputs
from onnxprune.errors import InvalidDataError


@dataclass(frozen=True)
class Member:
    """One array of an .npz file: shape and type are known at once, values are read on first use.

    A member that is stored uncompressed (`np.savez`) is memory-mapped, so a file larger than memory
    works.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    def __len__(self) -> int:
        """The number of samples."""
        return self.shape[0]

    def __getitem__(self, rows: Rows, /) -> Array:
        """The samples `rows`."""
        return self.values[rows]

    @cached_property
    def values(self) -> Array:
        """The whole array."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(self.name)
                if (
                    info.compress_type == zipfile.ZIP_STORED
                    and self.dtype.kind != "O"
                    and 0 not in self.shape
                ):
                    return self._mapped(info.header_offset)
                with archive.open(info) as file:
                    return np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise _unreadable(self.path, error) from error

    def _mapped(self, header_offset: int) -> Array:
        with self.path.open("rb") as file:
            file.seek(header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            file.seek(name_length + extra_length, 1)
            _header(file)
            offset = file.tell()
        layout: Literal["F", "C"] = "F" if self.fortran else "C"
        return np.memmap(self.path, self.dtype, "r", offset, self.shape, layout)


def open_npz(path: Path, inputs: Inputs) -> ColumnDataset:
    """The arrays of an .npz file: inputs by name, labels as `y`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            members = {name.removesuffix(".npy"): _member(archive, path, name) for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    for name, member in members.items():
        if member.dtype.kind == "O":
            raise InvalidDataError(
                f"{path}: array {name!r} holds Python objects; save it with a number or text type"
            )
    return open_arrays(members, inputs, str(path))


def open_npy(path: Path, inputs: Inputs) -> ColumnDataset:
    """The one array of an .npy file, for a model with one input; memory-mapped, without labels."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from error
    return open_arrays({"x": array}, inputs, str(path))


def open_arrays(arrays: Mapping[str, Member | Array], inputs: Inputs, where: str) -> ColumnDataset:
    """Whole arrays by input name, and `y`, checked against the model at once."""
    given = dict(arrays)
    label_name = inputs.label_name(list(given))
    labels = None if label_name is None else given.pop(label_name)
    if labels is not None and not labels.shape:
        raise InvalidDataError(f"{where}: labels {label_name!r} are one scalar; give one a sample")
    columns: dict[str, Column] = {}
    shared: dict[str, Array] = {}
    found = inputs.by_name(given, where)
    inputs = inputs.counting({name: array.shape for name, array in found.items()})
    for spec in inputs.specs:
        array = found[spec.name]
        spec.check_dtype(array.dtype, where)
        spec.target(array.shape, where)
        if spec.batched:
            columns[spec.name] = array
        else:
            shared[spec.name] = array.values if isinstance(array, Member) else array
    if not columns:
        raise InvalidDataError(
            f"{where}: no input of the model has a batch axis; give feeds from Python instead"
        )
    return ColumnDataset(inputs, columns, labels, where, shared)


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> Member:
    with archive.open(name) as file:
        shape, fortran, dtype = _header(file)
    return Member(path, name, shape, dtype, fortran)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return read(file)


def _unreadable(path: Path, error: Exception) -> InvalidDataError:
    return InvalidDataError(
        f"{path}: cannot be read as numpy data ({error}); it may be truncated, save it again"
    )
