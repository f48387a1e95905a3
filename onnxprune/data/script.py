"""`FILE.py:FUNCTION`: the user's own code makes the feeds."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from onnxprune.data.dataset import Batch, Dataset
from onnxprune.data.feeds import open_function
from onnxprune.data.inputs import Inputs
from onnxprune.errors import InvalidDataError, OnnxPruneError


@dataclass(frozen=True)
class ScriptDataset:
    """A dataset whose batches are made by a script; the script's own errors become one line."""

    data: Dataset
    path: Path

    def __len__(self) -> int:
        """The number of samples. Raises TypeError where the script yields them one by one."""
        return len(self.data)

    def __bool__(self) -> bool:
        """True: `data or other` must not ask a stream for its length."""
        return True

    def batches(self, size: int, *, rng: np.random.Generator | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`."""
        stream = self.data.batches(size, rng=rng)
        while (batch := _guarded(lambda: next(stream, None), self.path)) is not None:
            yield batch


def open_script(path: Path, name: str, inputs: Inputs) -> Dataset:
    """The feeds that function `name` of the Python file `path` returns or yields.

    Raises:
        InvalidDataError: the file or function is missing, or its code fails.
    """
    if not name:
        raise InvalidDataError(
            f"{path}: name the function that yields the feeds, as in {path}:FUNCTION"
        )
    module = _guarded(lambda: _load(path), path)
    function = getattr(module, name, None)
    if not callable(function):
        have = ", ".join(
            n for n, v in vars(module).items() if callable(v) and not n.startswith("_")
        )
        raise InvalidDataError(f"{path}: has no function {name!r}; it has {have or 'none'}")
    made: Dataset = _guarded(lambda: open_function(function, inputs, f"{path}:{name}"), path)
    return ScriptDataset(made, path)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_onnxprune_data_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InvalidDataError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _guarded(work: Callable[[], Any], path: Path) -> Any:
    """`work()`; any exception that is not ours is the script's, and is told with its line."""
    try:
        return work()
    except OnnxPruneError:
        raise
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        at = f", line {lines[-1]}" if lines else ""
        raise InvalidDataError(f"{path}{at}: {type(error).__name__}: {error}") from error
