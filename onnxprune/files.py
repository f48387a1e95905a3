"""Write files all or nothing: temporary files beside the targets, then renamed over them."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from onnxprune.errors import OnnxPruneError


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Empty temporary files, one a target, that replace the targets when the body succeeds.

    On any failure, Ctrl-C included, the targets stay as they were and no temporary file remains.

    Raises:
        OnnxPruneError: A target cannot be written or the disk is full.
    """
    token = secrets.token_hex(4)
    temporaries = [_beside(target, token, "new") for target in targets]
    try:
        for target, temporary in zip(targets, temporaries, strict=True):
            _create(target, temporary)
        yield temporaries
        _commit(targets, temporaries, token)
    except OSError as error:
        raise OnnxPruneError(_explain(error, targets[-1])) from error
    finally:
        _discard(temporaries)


def flush(stream: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def _beside(target: Path, token: str, role: str) -> Path:
    """A hidden name in the target's folder; rename works only within one file system."""
    return target.with_name(f".{target.name[:100]}.{token}.{role}.tmp")


def _create(target: Path, temporary: Path) -> None:
    """An empty temporary file with the permissions the target has or would get."""
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise OnnxPruneError(f"cannot write {target}: it is {kind}; give the path of a file")
    temporary.touch(exist_ok=False)
    if target.exists():
        temporary.chmod(target.stat().st_mode & 0o7777)


def _commit(targets: Sequence[Path], temporaries: Sequence[Path], token: str) -> None:
    """Rename every temporary over its target; where one fails, put back what was there."""
    if len(targets) == 1:
        os.replace(temporaries[0], targets[0])
    else:
        _commit_together(targets, temporaries, token)
    _sync_folder(targets[0].parent)


def _commit_together(targets: Sequence[Path], temporaries: Sequence[Path], token: str) -> None:
    """Two renames are not one step: keep the old files under a second name until all are done."""
    backups = [_beside(target, token, "old") for target in targets]
    started: list[tuple[Path, Path]] = []
    try:
        for target, backup in zip(targets, backups, strict=True):
            _keep(target, backup)
        for target, temporary, backup in zip(targets, temporaries, backups, strict=True):
            started.append((target, backup))
            os.replace(temporary, target)
    except BaseException:
        for target, backup in started:
            _put_back(target, backup)
        raise
    finally:
        _discard(backups)


def _keep(target: Path, backup: Path) -> None:
    """A second name for the target's content, so that it outlives being replaced."""
    if not target.exists():
        return
    try:
        os.link(target, backup)
    except OSError:  # a file system without hard links
        shutil.copy2(target, backup)


def _put_back(target: Path, backup: Path) -> None:
    """Undo a rename: the old content again, or no file where there was none."""
    if backup.exists():
        os.replace(backup, target)
    else:
        target.unlink(missing_ok=True)


def _discard(files: Sequence[Path]) -> None:
    """Remove what is still there of these."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the renames durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _explain(error: OSError, target: Path) -> str:
    """What went wrong while writing, where, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left while writing {target}: free some or write to another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write {target}: no permission; write to another folder"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"cannot write {target}: there is no folder {target.parent}; create it first"
    return f"cannot write {target}: {error.strerror or error}; try another path"
