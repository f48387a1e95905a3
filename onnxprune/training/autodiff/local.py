"""A worker without a process: gradients by `gradient_model`, run by the caller's ONNX Runtime."""

from __future__ import annotations

import io
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.errors import TrainingError
from onnxprune.training import wire
from onnxprune.training.autodiff.tape import gradient_model
from onnxprune.training.worker import Server


class LocalWorker:
    """Answers what `client.Worker` answers."""

    def __init__(self) -> None:
        self._server = Server(io.BytesIO(), io.BytesIO())
        self._answers: list[tuple[wire.Header, wire.Arrays]] = []

    def call(
        self, op: str, arrays: Mapping[str, NDArray[Any]] | None = None, **head: Any
    ) -> tuple[wire.Header, wire.Arrays]:
        """Do what one message asks."""
        self.send(op, arrays, **head)
        return self.receive()

    def send(self, op: str, arrays: Mapping[str, NDArray[Any]] | None = None, **head: Any) -> None:
        """Do it now; `receive` tells the answer.

        Raises:
            TrainingError: it failed.
        """
        given = {name: np.ascontiguousarray(a) for name, a in (arrays or {}).items()}
        try:
            if op == "differentiate":
                self._answers.append(({}, {"gradient": _gradient(given["model"], head["trained"])}))
            else:
                reply, answer = self._server.answer({"op": op, **head}, given)
                # the next step changes what it lives in
                self._answers.append((reply, {n: a.copy() for n, a in answer.items()}))
        except Exception as error:  # the runtime's own errors have no common type
            raise TrainingError(
                f"the training graph failed: {type(error).__name__}: {error}"
            ) from error

    def receive(self) -> tuple[wire.Header, wire.Arrays]:
        """The answer to the oldest message that has none yet."""
        return self._answers.pop(0)

    def close(self) -> None:
        """Forget the parameters, and answers that nobody read."""
        self._answers.clear()
        self._server.engine = None

    def __enter__(self) -> LocalWorker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _gradient(model: NDArray[Any], trained: list[str]) -> NDArray[np.uint8]:
    parsed = onnx.load_from_string(model.tobytes())
    return np.frombuffer(gradient_model(parsed, trained).SerializeToString(), np.uint8)
