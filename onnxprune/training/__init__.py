"""Fine-tuning without a framework: gradients from onnxruntime-training, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from onnxprune.training.home import Runtime, ensure_training, find_training, setup_training

__all__ = ["Runtime", "Trainer", "ensure_training", "find_training", "setup_training"]


class Trainer(Protocol):
    """A source of gradients of one graph's loss.

    The optimizer may live with it, so that parameters need not travel.
    """

    def grads(self, batch: Mapping[str, NDArray[Any]]) -> tuple[float, dict[str, NDArray[Any]]]:
        """Loss of a batch, and the gradient of every trained parameter by name."""

    def step(self, batch: Mapping[str, NDArray[Any]], lr: float) -> tuple[float, float]:
        """Take one optimizer step: loss of the batch, norm of its gradient."""

    def values(self) -> dict[str, NDArray[Any]]:
        """The present parameters by name."""
