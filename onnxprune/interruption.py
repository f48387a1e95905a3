"""Ctrl-C, SIGTERM and SIGHUP end a run alike: what was begun is cleaned up, nothing is written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether a signal has come: native code may turn what it raised into another error."""

    def __init__(self) -> None:
        self.came = False

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        """Take note of the signal, and end what runs."""
        self.came = True
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """While this holds, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt.

    A signal that the caller ignores or handles stays as it is, as do all outside the main thread.
    """
    interruption = Interruption()
    replaced = {}
    if threading.current_thread() is threading.main_thread():
        known = [n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGHUP")]
        for number in known:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                replaced[number] = signal.signal(number, interruption.handle)
    try:
        yield interruption
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def forget_interrupt() -> None:
    """Let the exit code stand.

    Where an interrupt passed through `exec` of text, as it does while a dataclass is made, Python
    kills itself by SIGINT at its end, unless text is executed again.
    """
    exec("")
