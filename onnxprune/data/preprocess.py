"""How images become numbers: the preprocess.json that may lie beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.data.dataset import Array
from onnxprune.errors import InvalidDataError

NAME = "preprocess.json"


@dataclass(frozen=True)
class Preprocess:
    """Pixels become (pixel / 255 - mean) / std, by channel or for all.

    `size`: height and width to crop to, for a model whose input leaves them open. `resize`: the
    length of the shorter side before the crop; None means as short as the crop allows.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    resize: int | None = None

    def scale(self, pixels: Array, channel_axis: int | None) -> Array:
        """uint8 pixels as float32; `channel_axis` is None where images have no channel axis."""
        shape = [1] * pixels.ndim
        if channel_axis is not None:
            shape[channel_axis] = -1
        # (p / 255 - mean) / std in one pass over the float copy
        factor = np.divide(1.0, 255.0 * np.asarray(self.std)).astype(np.float32).reshape(shape)
        out: Array = pixels * factor
        if any(self.mean):
            out -= (np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32).reshape(shape)
        return out

    def check_channels(self, channels: int, where: str) -> None:
        """Raise InvalidDataError unless mean and std have one value, or one a channel."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise InvalidDataError(
                    f"{where}: {name!r} has {len(values)} values, the images have {channels} "
                    "channels; "
                    "give one value, or one a channel"
                )


def read_preprocess(folder: Path) -> Preprocess:
    """The folder's preprocess.json, or the default: numbers in [0, 1].

    Raises:
        InvalidDataError: the file is malformed.
    """
    path = folder / NAME
    if not path.exists():
        return Preprocess()
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidDataError(f"{path}: cannot be read as JSON ({error})") from error
    known = ("mean", "std", "size", "resize")
    if not isinstance(read, dict) or not set(read) <= set(known):
        raise InvalidDataError(f"{path}: expected an object with keys among {', '.join(known)}")
    try:
        return _preprocess(read)
    except (TypeError, ValueError) as error:
        raise InvalidDataError(
            f"{path}: {error}; write numbers such as "
            '{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "size": [224, 224]}'
        ) from error


def _preprocess(read: dict[str, Any]) -> Preprocess:
    mean, std = _floats(read.get("mean", 0.0)), _floats(read.get("std", 1.0))
    if not mean or not std or min(std) <= 0:
        raise ValueError("'mean' and 'std' need values, and 'std' above 0")
    size, resize = read.get("size"), read.get("resize")
    if isinstance(size, int):
        size = (size, size)
    if size is not None and (len(size) != 2 or min(map(int, size)) < 1):
        raise ValueError("'size' is [height, width]")
    return Preprocess(
        mean,
        std,
        None if size is None else (int(size[0]), int(size[1])),
        None if resize is None else int(resize),
    )


def _floats(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list) else (float(value),)
