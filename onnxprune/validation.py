"""Instances of dataclasses from plain values, with errors in words a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from onnxprune.errors import InvalidRecipeError


class FieldError(InvalidRecipeError):
    """A value that does not fit; `path` leads to it from the mapping that was validated."""

    def __init__(self, path: tuple[Any, ...], words: str) -> None:
        super().__init__(words)
        self.path = path


def validated(kind: Any, values: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `kind`, its fields converted where that loses nothing.

    Raises:
        FieldError: there is no such field, a value has the wrong type, or is out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    names = [f.name for f in fields(kind) if f.init]
    for key in values:
        if key not in names:
            words = f"{key}: no such option; choose {', '.join(names) or 'none'}"
            raise FieldError((key,), words)
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        found = [e for e in error.errors() if e["loc"][:1] == error.errors()[0]["loc"][:1]]
        path = _real(found[0]["loc"], values)
        reasons = " or ".join(dict.fromkeys(e["msg"].lower() for e in found))
        given = found[0]["input"]
        place = ".".join(str(part) for part in path)
        raise FieldError(path, f"{place}: {reasons}, not {given!r}") from error
    except InvalidRecipeError as error:
        raise FieldError((), str(error)) from error


def _real(location: tuple[Any, ...], values: Any) -> tuple[Any, ...]:
    """The part of pydantic's location that is in the values: it names forms of a type as well."""
    path: list[Any] = []
    for part in location:
        inside = isinstance(values, Mapping) and part in values
        inside |= isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        if not inside:
            break
        path.append(part)
        values = values[part]
    return tuple(path) or location[:1]
