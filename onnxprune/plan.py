"""The plan: what is removed from which weights, as data to write, review, diff and replay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx

from onnxprune.errors import InvalidRecipeError

FORMAT, VERSION = "onnxprune-plan", 1


@dataclass(frozen=True)
class Slice:
    """Initializer of the result: `source` of the input with only the indices `keep[axis]`."""

    source: str
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]
    keep: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PlannedGroup:
    """Pieces of a group that go: numbers in [0, units), `width` channels each."""

    name: str
    units: int
    width: int
    exact: bool
    removed: tuple[int, ...]


@dataclass(frozen=True)
class FrozenAxis:
    """A weight axis that could not be pruned."""

    tensor: str
    axis: int
    node: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What is removed. `model` identifies the input by its structure; weights may differ.

    `options` are those that the choice was made with.
    `lossless`: what does not matter goes first, and the rest is in terms of what that leaves.
    """

    model: Mapping[str, Any]
    initializers: Mapping[str, Slice]
    groups: tuple[PlannedGroup, ...]
    frozen: tuple[FrozenAxis, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    lossless: bool = False

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str) -> Plan:
        """Read a plan from `to_json`'s value or its text.

        Raises:
            InvalidRecipeError: it is not such a plan; says which field.
        """
        data = _parse(value)
        try:
            return cls(
                model=dict(data["model"]),
                initializers={
                    name: Slice(
                        source=str(item["source"]),
                        shape_before=tuple(map(int, item["shape_before"])),
                        shape_after=tuple(map(int, item["shape_after"])),
                        keep={str(int(a)): tuple(map(int, k)) for a, k in item["keep"].items()},
                    )
                    for name, item in data["initializers"].items()
                },
                groups=tuple(
                    PlannedGroup(
                        str(g["name"]),
                        int(g["units"]),
                        int(g["width"]),
                        bool(g["exact"]),
                        tuple(map(int, g["removed"])),
                    )
                    for g in data["groups"]
                ),
                frozen=tuple(
                    FrozenAxis(str(f["tensor"]), int(f["axis"]), str(f["node"]), str(f["reason"]))
                    for f in data["frozen"]
                ),
                options=dict(data.get("options", {})),
                lossless=bool(data.get("lossless", False)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise InvalidRecipeError(f"the plan is malformed: {what}") from error


def _parse(value: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InvalidRecipeError(f"the plan is not JSON: {error}") from error
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise InvalidRecipeError(f'this is no plan: "format" is not "{FORMAT}"')
    if value.get("version") != VERSION:
        raise InvalidRecipeError(
            f"the plan has version {value.get('version')!r}; this onnxprune reads version {VERSION}"
        )
    return value


def fingerprint(model: onnx.ModelProto) -> dict[str, Any]:
    """What identifies a model's structure: operators, connections, attributes but no weights."""
    digest = hashlib.sha256()
    for node in model.graph.node:
        digest.update("|".join((node.op_type, *node.input, "->", *node.output)).encode())
    shapes = sorted((t.name, tuple(t.dims), t.data_type) for t in model.graph.initializer)
    digest.update(repr(shapes).encode())
    return {
        "name": model.graph.name,
        "nodes": len(model.graph.node),
        "initializers": len(model.graph.initializer),
        "structure_sha256": digest.hexdigest(),
    }
