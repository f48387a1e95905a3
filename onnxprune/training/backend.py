"""The gradient backend: a legalised graph with its loss, in a training worker."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import TrainingError
from onnxprune.training.blocked import block_of, probe_image, probe_model
from onnxprune.training.draft import to_model
from onnxprune.training.groups import ParameterGroup, rates_and_decays
from onnxprune.training.legalise import TrainingGraph
from onnxprune.training.polish import polish
from onnxprune.training.wire import Arrays, Header

PROBE_STEPS = (1e-3, 3e-4, 1e-4, 3e-5, 5e-3)
# some parameters alone move the loss less, and rounding hides what small steps do
PART_STEPS = (1e-2, 3e-3, 3e-2, 1e-3, 1e-1)
PART_NOISE = 0.25
TOLERANCE = 0.05
NOISE = 1e-6
LOSS_TOLERANCE = 2e-3
_log = logging.getLogger(__name__)


class Gradients(Protocol):
    """Where gradients come from: a worker process, or this one."""

    def call(
        self, op: str, arrays: Mapping[str, NDArray[Any]] | None = None, **head: Any
    ) -> tuple[Header, Arrays]:
        """Send one message and wait for the answer."""

    def send(self, op: str, arrays: Mapping[str, NDArray[Any]] | None = None, **head: Any) -> None:
        """Send one message."""

    def receive(self) -> tuple[Header, Arrays]:
        """The answer to the oldest message that has none yet."""

    def close(self) -> None:
        """Give back what it holds; it takes no message after that."""


class WorkerTrainer:
    """Trains through a worker; implements `Trainer`.

    The parameters live in the worker. `options` are the optimizer's: its name and constants.
    """

    def __init__(
        self,
        worker: Gradients,
        graph: TrainingGraph,
        *,
        optimizer: Mapping[str, Any],
        weight_decay: float = 0.0,
        clip: float = 0.0,
        threads: int = 1,
        masks: Mapping[str, NDArray[Any]] | None = None,
        groups: Sequence[ParameterGroup] = (),
        ema: float = 0.0,
    ) -> None:
        self.names = sorted(graph.parameters)
        self._worker = worker
        arrays: Arrays = {"gradient": self._gradient(graph)}
        arrays |= {"param:" + n: graph.parameters[n].value for n in self.names}
        arrays |= {"mask:" + n: m.astype(np.float32) for n, m in (masks or {}).items()}
        arrays |= {"buffer:" + n: a for n, a in graph.draft.buffers.items()}
        rates, decay = rates_and_decays(graph.parameters, weight_decay, groups)
        worker.call(
            "build",
            arrays,
            shapes={n: list(graph.parameters[n].value.shape) for n in self.names},
            decay=decay,
            rates=rates,
            ema=ema,
            masks=sorted(masks or {}),
            buffers=dict(graph.draft.updates),
            optimizer=dict(optimizer),
            clip=clip,
            threads=threads,
        )
        self._inputs = {i.name for i in graph.draft.inputs}

    def _gradient(self, graph: TrainingGraph) -> NDArray[np.uint8]:
        """The gradient graph, as bytes [B]."""
        model = np.frombuffer(to_model(graph.draft).SerializeToString(), np.uint8)
        _, arrays = self._worker.call("differentiate", {"model": model}, trained=self.names)
        gradient = polish(arrays["gradient"].tobytes(), self._block())
        return np.frombuffer(gradient, np.uint8)

    def _block(self) -> int:
        """Channels of a block of the runtime's convolutions; 0 where it has no such."""
        model = np.frombuffer(probe_model().SerializeToString(), np.uint8)
        try:
            _, arrays = self._worker.call("run", {"model": model, "x": probe_image()})
        except TrainingError as error:
            _log.debug("no blocked convolutions: %s", error)
            return 0
        return block_of(arrays["y"])

    def grads(self, batch: Mapping[str, NDArray[Any]]) -> tuple[float, dict[str, NDArray[Any]]]:
        """Loss of a batch, and the gradient of every trained parameter; nothing is updated."""
        head, arrays = self._worker.call("grads", self.feeds(batch))
        return float(head["loss"]), arrays

    def accumulate(self, batch: Mapping[str, NDArray[Any]]) -> float:
        """Add a part of a batch to the coming step; its share of the loss."""
        return float(self._worker.call("accumulate", self.feeds(batch))[0]["loss"])

    def start_step(self, batch: Mapping[str, NDArray[Any]], lr: float) -> None:
        """Begin a step on the last (or only) part of a batch; `finish_step` waits for it."""
        self._worker.send("step", self.feeds(batch), lr=lr)

    def finish_step(self) -> tuple[float, float]:
        """The loss of the batch part, and the norm of the gradient, of the step begun last."""
        head, _ = self._worker.receive()
        loss, norm = float(head["loss"]), float(head["norm"])
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise TrainingError(
                f"training diverged: the loss is {loss} and the gradient's norm {norm}; try a "
                f"lower learning rate"
            )
        return loss, norm

    def step(self, batch: Mapping[str, NDArray[Any]], lr: float) -> tuple[float, float]:
        """One step."""
        self.start_step(batch, lr)
        return self.finish_step()

    def values(self) -> dict[str, NDArray[Any]]:
        """The present parameters and running statistics."""
        arrays = self._worker.call("values")[1]
        return {n.removeprefix("buffer:"): a for n, a in arrays.items()}

    def state(self) -> tuple[Header, Arrays]:
        """Parameters and optimizer, for `restore`."""
        return self._worker.call("state")

    def restore(self, head: Header, arrays: Arrays) -> None:
        """Continue from a state."""
        self._worker.call("restore", arrays, **head)

    def check(
        self,
        batch: Mapping[str, NDArray[Any]],
        expected: float | None,
        *,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> str | None:
        """The self-check before training.

        The loss of the training graph must equal `expected`, which comes from inference (None: it
        is not compared). The gradient must agree with central differences of the loss along a
        random direction over all parameters; where the loss is too rough for any step to tell,
        along the gradient itself. With `names`, only along a random direction of those.

        Returns:
            None, or what could not be told where differences of every step contradict each other.

        Raises:
            TrainingError: one of the two does not hold.
        """
        feeds = self.feeds(batch)
        tried: list[tuple[float, float, float]] = []
        for direction in (seed, None) if names is None else (seed,):
            tried.clear()
            for size in PROBE_STEPS if names is None else PART_STEPS:
                facts, _ = self._worker.call("probe", feeds, size=size, seed=direction, names=names)
                loss = float(facts["loss"])
                if expected is not None:
                    _check_loss(loss, expected)
                slope, difference = float(facts["slope"]), float(facts["difference"])
                noise = NOISE * max(1.0, abs(loss)) / size
                largest = max(abs(difference), abs(slope))
                if names is not None and noise > PART_NOISE * largest:
                    continue
                if abs(difference - slope) <= TOLERANCE * largest + noise:
                    return None
                tried.append((size, slope, difference))
            if _agree(tried):
                raise TrainingError(
                    f"the gradient is wrong: in one direction it gives {tried[0][1]:.4g}, "
                    f"differences of the loss give {_shown(tried)}; please report this model"
                )
        if not tried:
            return None
        return (
            "the loss is too rough to check the gradient: in one direction it gives "
            f"{tried[0][1]:.4g}, differences of the loss give {_shown(tried)}"
        )

    def feeds(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The graph's inputs among the feeds, floats as float32."""
        missing = self._inputs - batch.keys()
        if missing:
            raise TrainingError(f"the batch lacks {', '.join(sorted(missing))}")
        return {n: _as_float32(batch[n]) for n in sorted(self._inputs)}


def _as_float32(array: NDArray[Any]) -> NDArray[Any]:
    is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return array.astype(np.float32, copy=False) if is_float else array


def _check_loss(loss: float, expected: float) -> None:
    if not abs(loss - expected) <= LOSS_TOLERANCE * max(1.0, abs(expected)):
        raise TrainingError(
            f"the training graph does not compute the model: its loss is {loss:.6g}, "
            f"that of the model's outputs {expected:.6g}; please report this model"
        )


def _shown(tried: list[tuple[float, float, float]]) -> str:
    return ", ".join(f"{difference:.4g} (step {size:g})" for size, _, difference in tried)


def _agree(tried: list[tuple[float, float, float]]) -> bool:
    """Whether differences of three neighbouring steps tell the same: the slope is at fault.

    Two do not suffice: kinks let the differences drift towards the slope as the step shrinks.
    """
    values = [difference for _, _, difference in sorted(tried)]
    windows = (values[i : i + 3] for i in range(len(values) - 2))
    return any(max(w) - min(w) <= TOLERANCE * max(map(abs, w)) for w in windows)
