"""One entry for all data: look at the source, choose its reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx

from onnxprune.data.arrays import open_npy, open_npz
from onnxprune.data.dataset import Dataset
from onnxprune.data.feeds import open_python
from onnxprune.data.idx import idx_files, is_idx, open_idx
from onnxprune.data.images import open_images
from onnxprune.data.inputs import Inputs, model_inputs
from onnxprune.data.script import open_script
from onnxprune.errors import InvalidDataError

_KINDS = ".npz, .npy, IDX files, a folder of images by class, or FILE.py:FUNCTION"


def open_data(source: Any, model: onnx.ModelProto) -> Dataset:
    """The data of `source`, fitted to the inputs of `model`.

    Args:
        source: a path as a string or PathLike, or a Python object; see the package's docstring.
        model: tells the names, types and shapes that the data must have.

    Raises:
        InvalidDataError: the source cannot be read or does not fit. What only shows in later
            batches raises when they are reached.
    """
    if isinstance(source, Dataset):
        return source
    inputs = model_inputs(model)
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source), inputs)
    return open_python(source, inputs)


def _open_path(source: str, inputs: Inputs) -> Dataset:
    path, part = Path(source).expanduser(), ""
    if not path.exists() and ":" in source:
        head, part = source.rsplit(":", 1)
        path = Path(head).expanduser()
    if not path.exists():
        raise InvalidDataError(f"no file or folder {str(path)!r}; data is {_KINDS}")
    if path.suffix == ".py":
        return open_script(path, part, inputs)
    if path.is_dir():
        return _open_folder(path, part, inputs)
    if part:
        raise InvalidDataError(
            f"{path}: {':' + part!r} means something only after a .py file or a folder of IDX files"
        )
    return _open_file(path, inputs)


def _open_folder(path: Path, part: str, inputs: Inputs) -> Dataset:
    if part or any(is_idx(p) for p in path.iterdir() if p.is_file()):
        return open_idx(idx_files(path, part or "train"), inputs)
    return open_images(path, inputs)


def _open_file(path: Path, inputs: Inputs) -> Dataset:
    if path.suffix == ".npz":
        return open_npz(path, inputs)
    if path.suffix == ".npy":
        return open_npy(path, inputs)
    if is_idx(path):
        return open_idx(path, inputs)
    raise InvalidDataError(f"{path}: not a known kind of data; give {_KINDS}")
