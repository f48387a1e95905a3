"""Where productions of the grammar are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

from tests.properties.writer import Writer

Production = Callable[[Writer], None]
PRODUCTIONS: list[Production] = []


@overload
def production(function: Production) -> Production: ...
@overload
def production(*, weight: int) -> Callable[[Production], Production]: ...
def production(
    function: Production | None = None, *, weight: int = 1
) -> Production | Callable[[Production], Production]:
    """Register a production; `weight` times as likely as others."""

    def register(function: Production) -> Production:
        PRODUCTIONS.extend([function] * weight)
        return function

    return register if function is None else register(function)
