"""Save the state of a training run, and continue it bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import TrainingError

FORMAT = "onnxprune-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """State at the end of an epoch: `facts` are plain JSON values, `arrays` tensors by name."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the file appears whole or stays as it was."""
    header = json.dumps({"format": FORMAT, "version": VERSION, **checkpoint.facts})
    scratch = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            scratch = file.name
            arrays: dict[str, Any] = {f"a:{n}": a for n, a in checkpoint.arrays.items()}
            np.savez(file, header=np.array(header), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        scratch = None
    except OSError as error:
        raise TrainingError(f"cannot write the checkpoint {path}: {error}") from error
    finally:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TrainingError: it is none, or cannot be read.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            facts = json.loads(str(stored["header"]))
            arrays = {n[2:]: stored[n] for n in stored.files if n.startswith("a:")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TrainingError(f"cannot read the checkpoint {path}: {error}") from error
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise TrainingError(f"{path} is not an onnxprune checkpoint of version {VERSION}")
    return Checkpoint(facts, arrays)


def fingerprint(parameters: Mapping[str, NDArray[Any]], options: Mapping[str, Any]) -> str:
    """What a run must share with the one it continues: start values and options."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    for name in sorted(parameters):
        array = np.ascontiguousarray(parameters[name])
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(array.data)
    return digest.hexdigest()
