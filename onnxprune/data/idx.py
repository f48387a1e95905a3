"""IDX files, the format of the MNIST family (LeCun, Cortes, Burges: yann.lecun.com/exdb/mnist).

Big-endian: two zero bytes, a type byte, the rank, one uint32 an axis, then the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxprune.data.dataset import Array, ColumnDataset, Rows
from onnxprune.data.inputs import Input, Inputs
from onnxprune.data.preprocess import Preprocess, read_preprocess
from onnxprune.errors import InvalidDataError

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PARTS = {"train": ("train",), "test": ("t10k", "test")}
_BAD = (OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Pixels:
    """uint8 images [N, H, W] that become floats in [0, 1] batch by batch."""

    values: Array
    preprocess: Preprocess

    def __len__(self) -> int:
        """The number of images."""
        return len(self.values)

    def __getitem__(self, rows: Rows, /) -> Array:
        """The images `rows`, float32."""
        return self.preprocess.scale(self.values[rows], channel_axis=None)


def is_idx(path: Path) -> bool:
    """Whether the file starts as IDX does."""
    try:
        head = _start(path)
    except _BAD:
        return False
    return len(head) == 4 and head[:2] == b"\0\0" and head[2] in _TYPES and 1 <= head[3] <= 8


def read_idx(path: Path) -> Array:
    """The array of an IDX file; a plain file is memory-mapped, a .gz file is read whole.

    Raises:
        InvalidDataError: the file is not IDX, or is truncated.
    """
    if not is_idx(path):
        raise InvalidDataError(
            f"{path}: is not an IDX file, or cannot be read; expected the MNIST family's format"
        )
    try:
        data = (
            gzip.decompress(path.read_bytes()) if _is_gzip(path) else np.memmap(path, np.uint8, "r")
        )
    except _BAD as error:
        raise InvalidDataError(f"{path}: cannot be read ({error}); fetch it again") from error
    rank = int(data[3])
    shape = tuple(int(n) for n in np.frombuffer(data[4 : 4 + 4 * rank], ">u4"))
    dtype, start = np.dtype(_TYPES[int(data[2])]), 4 + 4 * rank
    if len(shape) != rank or len(data) != start + math.prod(shape) * dtype.itemsize:
        raise InvalidDataError(
            f"{path}: is truncated or has a wrong length; {list(shape)} values of {dtype} were "
            "announced"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def idx_files(folder: Path, part: str) -> Path:
    """The images file of `part` (train or test) of a folder in MNIST's naming.

    Raises:
        InvalidDataError: no such file, or several.
    """
    if part not in _PARTS:
        raise InvalidDataError(
            f"{folder}:{part}: the parts of a folder of IDX files are 'train' and 'test'"
        )
    names = sorted(
        p for p in folder.iterdir() if "images" in p.name and any(w in p.name for w in _PARTS[part])
    )
    found = [p for p in names if is_idx(p)]
    plain = [p for p in found if p.suffix != ".gz"]
    found = [p for p in found if p.suffix != ".gz" or p.with_suffix("") not in plain]
    if len(found) != 1:
        told = ", ".join(p.name for p in found) or "none"
        raise InvalidDataError(
            f"{folder}: expected one IDX file of {part} images, named like "
            f"{_PARTS[part][0]}-images-idx3-ubyte; "
            f"found {told}"
        )
    return found[0]


def open_idx(path: Path, inputs: Inputs) -> ColumnDataset:
    """Images from an IDX file, with the labels of the file beside it that its name leads to.

    uint8 images become floats in [0, 1], by a preprocess.json beside them normalised, where the
    input is float.
    """
    spec = inputs.only
    if spec is None:
        raise InvalidDataError(
            f"{path}: IDX files feed one input; the model has {', '.join(inputs.names)}"
        )
    images = read_idx(path)
    if images.ndim < 2:
        raise InvalidDataError(f"{path}: holds labels, not images; give the file of the images")
    labels = next((read_idx(p) for p in _label_files(path) if p.exists()), None)
    return ColumnDataset(inputs, {spec.name: _column(images, spec, path)}, labels, str(path), {})


def _column(images: Array, spec: Input, path: Path) -> Array | Pixels:
    spec.target(images.shape, str(path))
    spec.check_dtype(images.dtype, str(path))
    if images.dtype == np.uint8 and spec.dtype.kind in "fV":
        return Pixels(images, read_preprocess(path.parent))
    return images


def _label_files(images: Path) -> list[Path]:
    name = images.name.replace("images", "labels")
    if name == images.name:
        return []
    name = name.replace("idx3", "idx1").replace("idx4", "idx1").removesuffix(".gz")
    return [images.with_name(name), images.with_name(name + ".gz")]


def _start(path: Path) -> bytes:
    if _is_gzip(path):
        with gzip.open(path) as file:
            return file.read(4)
    with path.open("rb") as file:
        return file.read(4)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"
