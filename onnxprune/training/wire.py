"""The messages between onnxprune and its training worker.

A frame is: length of the header (4 bytes, little endian), the header (JSON), then the raw bytes of
the arrays that the header lists, in its order. Nothing is pickled, so a frame can only ever be
numbers and text. This module also runs in the worker's Python (3.9 or newer), which may have
nothing but numpy.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

Header = dict[str, Any]
Arrays = dict[str, Any]

_LENGTH = struct.Struct("<I")


def send(
    stream: BinaryIO, header: Mapping[str, Any], arrays: Mapping[str, Any] | None = None
) -> None:
    """Write one frame and flush."""
    tensors = {name: np.asarray(a, order="C") for name, a in (arrays or {}).items()}
    table = [[name, a.dtype.str, list(a.shape)] for name, a in tensors.items()]
    head = json.dumps({**header, "arrays": table}).encode()
    stream.write(_LENGTH.pack(len(head)) + head)
    for array in tensors.values():
        stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[Header, Arrays]:
    """Read one frame.

    Raises:
        EOFError: the other side closed the stream, at or within a frame.
    """
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    header: Header = json.loads(bytes(_exactly(stream, length)))
    arrays: Arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        arrays[name] = _exactly(stream, size).view(kind).reshape(shape)
    return header, arrays


def _exactly(stream: BinaryIO, size: int) -> Any:
    """`size` bytes as a uint8 array."""
    buffer: Any = np.empty(size, np.uint8)
    view = memoryview(buffer)
    done = 0
    while done < size:
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the stream ended within a frame")
        done += count
    return buffer
