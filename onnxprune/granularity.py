"""What counts as one removable piece: heads or channels in them, experts, words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune.errors import InvalidRecipeError

CHOICES = ("head", "head-dim", "expert", "vocab")


@dataclass(frozen=True)
class Vocabulary:
    """`kept` are the ids that stay, ascending; every other id is read as `unknown`, one of them."""

    kept: tuple[int, ...]
    unknown: int = 0


@dataclass(frozen=True)
class Granularity:
    """Which factor of a product axis is removed, and what else may go.

    `head_dims`: the same channels inside every head of an attention, instead of whole heads.
    `experts`: whole experts (blocks along a batch axis of a weight) as well as their width.
    `vocabulary`: rows of the embedding that the model's input looks up; None keeps all.
    """

    head_dims: bool = False
    experts: bool = False
    vocabulary: Vocabulary | None = None

    @property
    def names(self) -> str:
        """The choices, comma-separated, as `parse` reads them."""
        found = ["head-dim" if self.head_dims else "head"]
        found += ["expert"] * self.experts + ["vocab"] * (self.vocabulary is not None)
        return ",".join(found)

    def to_json(self) -> dict[str, Any]:
        """What a plan records."""
        vocabulary = self.vocabulary
        if vocabulary is None:
            return {"granularity": self.names}
        ids = {"kept": list(vocabulary.kept), "unknown": vocabulary.unknown}
        return {"granularity": self.names, "vocabulary": ids}

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> Granularity:
        """Read what `to_json` wrote.

        Raises:
            InvalidRecipeError: it is not such a value.
        """
        ids = options.get("vocabulary") or {}
        names = str(options.get("granularity", "head"))
        try:
            return parse(names, ids.get("kept"), int(ids.get("unknown", 0)))
        except (AttributeError, TypeError, ValueError) as error:
            raise InvalidRecipeError(f"the plan's vocabulary is malformed: {error}") from error


HEADS = Granularity()


def parse(
    names: str,
    vocab_keep: str | os.PathLike[str] | Iterable[int] | None = None,
    vocab_unknown: int = 0,
) -> Granularity:
    """The granularity that comma-separated `names` ask for; `vocab_keep`: ids, or a file of them.

    Raises:
        InvalidRecipeError: a name is unknown, two contradict, or the ids are missing or no ids.
    """
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in CHOICES:
            raise InvalidRecipeError(
                f"--granularity {name!r} is unknown: choose {', '.join(CHOICES)}"
            )
    if "head" in asked and "head-dim" in asked:
        raise InvalidRecipeError("--granularity head and head-dim exclude each other: choose one")
    if "vocab" not in asked:
        if vocab_keep is not None:
            raise InvalidRecipeError("--vocab-keep needs --granularity vocab")
        return Granularity("head-dim" in asked, "expert" in asked)
    if vocab_keep is None:
        raise InvalidRecipeError("--granularity vocab needs --vocab-keep: the ids that stay")
    vocabulary = _vocabulary(vocab_keep, vocab_unknown)
    return Granularity("head-dim" in asked, "expert" in asked, vocabulary)


def _vocabulary(source: str | os.PathLike[str] | Iterable[int], unknown: int) -> Vocabulary:
    ids = _read(Path(source)) if isinstance(source, (str, os.PathLike)) else list(source)
    try:
        kept = tuple(sorted({int(i) for i in ids}))
    except (TypeError, ValueError) as error:
        raise InvalidRecipeError(f"--vocab-keep must hold integers: {error}") from error
    if len(kept) < 2 or kept[0] < 0:
        raise InvalidRecipeError("--vocab-keep must name at least two ids, none of them negative")
    if unknown not in kept:
        raise InvalidRecipeError(
            f"--vocab-unknown {unknown} must be among the ids of --vocab-keep: "
            "the ids that go are read as it"
        )
    return Vocabulary(kept, unknown)


def _read(path: Path) -> Sequence[int]:
    """Ids from a JSON list, or from text with one id a line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecipeError(f"--vocab-keep '{path}' cannot be read as text") from error
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else text.split()
        return [int(i) for i in found]
    except (ValueError, TypeError) as error:
        raise InvalidRecipeError(
            f"--vocab-keep '{path}' must hold ids: one a line, or a JSON list of integers"
        ) from error
