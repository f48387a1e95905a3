"""Which of 16 languages a piece of text is in: the translations that come with Django.

Django (BSD licence) ships its messages in a hundred languages. Of each message longer than
MINIMUM characters, windows of LENGTH characters are samples. Training and test never share a
message: the test has every eighth.
"""

from __future__ import annotations

import gettext
import io
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.text import LENGTH, SYMBOLS
from onnxprune.errors import InvalidDataError

PACKAGE = "Django==5.2.8"
CODES = "es pt gl ca it fr ro de nl da nb sv cs sk pl sl".split()
MINIMUM, STRIDE, TEST_SHARE = 16, 12, 8
Samples = dict[str, NDArray[Any]]


def languages(cache: Path, part: str) -> Samples:
    """Samples `token` [N, LENGTH] and labels `y` [N] of "train" or "test"."""
    tokens, labels = [], []
    for label, code in enumerate(CODES):
        for message, text in _messages(_wheel(cache), code):
            held_out = zlib.crc32(message.encode()) % TEST_SHARE == 0
            if held_out == (part == "test"):
                windows = _windows(text)
                tokens += windows
                labels += [label] * len(windows)
    order = np.random.default_rng(0).permutation(len(tokens))
    return {"token": np.array(tokens, np.int64)[order], "y": np.array(labels, np.int64)[order]}


def _wheel(cache: Path) -> Path:
    """The wheel, downloaded once."""
    found = sorted(cache.glob("[dD]jango-*.whl"))
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    command += ["--dest", str(cache)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise InvalidDataError(f"cannot download {PACKAGE}: {error.stderr.strip()}") from error
    return sorted(cache.glob("[dD]jango-*.whl"))[0]


def _messages(wheel: Path, code: str) -> list[tuple[str, str]]:
    """Original and translation of every long message, in a fixed order."""
    found: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(f"/locale/{code}/LC_MESSAGES/django.mo"):
                catalog: Any = gettext.GNUTranslations(io.BytesIO(archive.read(name)))
                for message, text in catalog._catalog.items():
                    if isinstance(message, str) and message and len(text) >= MINIMUM:
                        found.setdefault(message, text)
    return sorted(found.items())


def _windows(text: str) -> list[list[int]]:
    """Windows of a text, its characters as numbers; 0 fills up the last one."""
    codes = [_symbol(c) for c in text.lower()]
    starts = range(0, max(1, len(codes) - MINIMUM + 1), STRIDE)
    return [(codes[s : s + LENGTH] + [0] * LENGTH)[:LENGTH] for s in starts]


def _symbol(character: str) -> int:
    """Characters beyond ASCII share the numbers that it leaves."""
    number = ord(character)
    return number if number < SYMBOLS else 1 + number % 31
