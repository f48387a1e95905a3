"""The caller's end of the training worker: start it, talk to it, and never leave it behind."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from onnxprune.errors import TrainingError
from onnxprune.training import wire
from onnxprune.training.home import Runtime

START_S = 120.0
CALL_S = 3600.0
TAIL_LINES = 12

PIPE_BYTES = 1 << 20

# The packages' own __init__ files are bypassed. Onnxprune's: the worker's Python may be older and
# lack their imports; onnxruntime's imports, of which training needs few, would take 13 MB.
_BOOTSTRAP = """
import importlib.util, sys, types
path, root = sys.argv[1:3]
sys.path[0:1] = [path] if path else []
for name, folder in (("onnxprune", root), ("onnxprune.training", root + "/training")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
found = importlib.util.find_spec("onnxruntime")
if found is not None:
    sys.modules["onnxruntime"] = types.ModuleType("onnxruntime")
    sys.modules["onnxruntime"].__path__ = list(found.submodule_search_locations)
from onnxprune.training import worker
worker.main()
"""


class Worker:
    """A running training worker; a context manager that ends the process whatever happens.

    Raises:
        TrainingError: from every call, when the worker answers with an error, dies, or exceeds
            its time. The message ends with the tail of its standard error.
    """

    def __init__(
        self, runtime: Runtime, *, timeout_s: float = CALL_S, start_s: float = START_S
    ) -> None:
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._expired = False
        command = [str(runtime.python), "-c", _BOOTSTRAP, str(runtime.path or ""), _package_root()]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(),
                **_own_group(),
            )
        except OSError as error:
            self._errors.close()
            raise TrainingError(
                f"cannot start the training worker with {runtime.python}: {error}"
            ) from error
        self._watch = Watch(self._expire)
        _widen(self._process.stdin)
        try:
            self.about = self.call("hello", timeout_s=start_s)[0]
            self._check_build(runtime)
        except BaseException:
            self.close()
            raise

    def _check_build(self, runtime: Runtime) -> None:
        if not self.about["training"]:
            place = runtime.path or runtime.python
            raise TrainingError(
                f"{place} ({runtime.source}) holds onnxruntime {self.about['onnxruntime']} "
                "without training; install onnxruntime-training-cpu there"
            )

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def call(
        self,
        op: str,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        *,
        timeout_s: float | None = None,
        **head: Any,
    ) -> tuple[wire.Header, wire.Arrays]:
        """Send one message and wait for the answer."""
        self.send(op, arrays, timeout_s=timeout_s, **head)
        return self.receive(timeout_s=timeout_s)

    def send(
        self,
        op: str,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        *,
        timeout_s: float | None = None,
        **head: Any,
    ) -> None:
        """Send one message; `receive` fetches its answer."""
        stream: Any = self._process.stdin
        with self._watched(timeout_s):
            try:
                wire.send(stream, {"op": op, **head}, arrays)
            except (OSError, ValueError) as error:
                raise self._death() from error

    def receive(self, *, timeout_s: float | None = None) -> tuple[wire.Header, wire.Arrays]:
        """The answer to the oldest message that has none yet."""
        stream: Any = self._process.stdout
        with self._watched(timeout_s):
            try:
                head, answer = wire.receive(stream)
            except (EOFError, OSError, ValueError) as error:
                raise self._death() from error
        if "error" in head:
            raise TrainingError(f"the training worker failed: {head['error']}")
        return head, answer

    @contextlib.contextmanager
    def _watched(self, timeout_s: float | None) -> Iterator[None]:
        """Kill the worker when the block takes too long, which ends the block's read or write."""
        self._watch.start(self._timeout_s if timeout_s is None else timeout_s)
        try:
            yield
        finally:
            self._watch.stop()

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()

    def _death(self) -> TrainingError:
        """Why there is no answer."""
        try:
            code = self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            reason = "answered with something that is no message, and was stopped"
        else:
            reason = f"ended (exit status {code})"
            if code == -9:
                reason += ", perhaps for want of memory: try a smaller batch size"
        if self._expired:
            reason = "did not answer in time and was stopped"
        tail = self._tail()
        return TrainingError(f"the training worker {reason}" + (f": {tail}" if tail else ""))

    def _tail(self) -> str:
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        return "\n".join(text.strip().splitlines()[-TAIL_LINES:])

    def close(self) -> None:
        """End the process and wait for it."""
        self._watch.close()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()


class Watch:
    """Calls `expire` once the time since `start` is over, unless `stop` came first.

    One thread that sleeps to the earliest end it knows: starting and stopping, which happens twice
    a step, need not wake it.
    """

    def __init__(self, expire: Callable[[], None]) -> None:
        self._expire = expire
        self._condition = threading.Condition()
        self._end: float | None = None
        self._wakes = math.inf
        self._closed = False
        threading.Thread(target=self._run, daemon=True).start()

    def start(self, seconds: float) -> None:
        """Let the time run."""
        with self._condition:
            self._end = time.monotonic() + seconds
            if self._end < self._wakes:
                self._condition.notify()

    def stop(self) -> None:
        """It is done."""
        with self._condition:
            self._end = None

    def close(self) -> None:
        """End the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _run(self) -> None:
        with self._condition:
            while not self._closed:
                now = time.monotonic()
                if self._end is not None and self._end <= now:
                    self._end = None
                    self._expire()
                self._wakes = math.inf if self._end is None else self._end
                self._condition.wait(None if self._end is None else self._end - now)


def _widen(pipe: Any) -> None:
    """Let a batch pass at once, where the system can do that."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _package_root() -> str:
    return str(Path(__file__).resolve().parent.parent)


def _environment() -> dict[str, str]:
    """The caller's environment.

    Less what would change the worker's modules or warn through them.
    """
    drop = {"PYTHONPATH", "PYTHONWARNINGS", "PYTHONSTARTUP", "COVERAGE_PROCESS_START"}
    return {name: value for name, value in os.environ.items() if name not in drop}


def _own_group() -> dict[str, Any]:
    """Keep the terminal's Ctrl-C from the worker: the caller ends it."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}
