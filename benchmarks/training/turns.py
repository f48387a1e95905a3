"""Let several trainings take turns, so that whatever else the machine does hits all of them.

A line on the standard input starts a turn; the line on the standard output that ends it says what
the process and its children used.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path


class Turns:
    """Counts steps, and waits after every `steps_per_turn` of them."""

    def __init__(self, steps_per_turn: int) -> None:
        self._size, self._done = steps_per_turn, 0
        self._wait()

    def step(self) -> None:
        """One step is done."""
        self._done += 1
        if self._done % self._size == 0:
            self._wait()

    def end(self) -> None:
        """The training is over."""
        self._say()

    def _wait(self) -> None:
        self._say()
        sys.stdin.readline()

    def _say(self) -> None:
        print(json.dumps({"cpu_s": cpu_s(), "peak_mb": peak_mb()}), flush=True)


def processes() -> list[int]:
    """This process and its children."""
    own = os.getpid()
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            parents[int(path.parent.name)] = int(_stat(path)[1])
    return [own, *(pid for pid, parent in parents.items() if parent == own)]


def cpu_s() -> float:
    """CPU seconds so far, children included."""
    ticks = 0
    for pid in processes():
        fields = _stat(Path(f"/proc/{pid}/stat"))
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(path: Path) -> list[str]:
    """The fields after the command's name: state, parent, and so on."""
    return path.read_text().rpartition(")")[2].split()


def peak_mb() -> float:
    """The most memory that was resident, summed over the processes."""
    total = 0
    for pid in processes():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return total / 1024
