"""How long work tells its caller where it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener for long work. Implementations must be cheap: `step` is called often."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; `total` is its number of steps where that is known."""

    def step(self, done: int, **info: float) -> None:
        """`done` steps of this stage are finished; `info` has numbers to show (loss, accuracy)."""


class Silent:
    """The listener that shows nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Ignore the stage."""

    def step(self, done: int, **info: float) -> None:
        """Ignore the step."""
