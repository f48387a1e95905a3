"""Re-solve the weights of a pruned model by ridge regression on the original's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from onnxprune.calibration.sequential import Inputs, Repair, Repaired
from onnxprune.calibration.solve import ridge
from onnxprune.progress import Progress
from onnxprune.rewriting import Rewriter

Array = NDArray[Any]


@dataclass(frozen=True)
class Reconstruct:
    """Weights and biases of every linear operator are solved anew, layer after layer.

    min |W p + b - z|^2 + ridge |W - W0|^2, with p the (unfolded) input that the pruned model gives,
    z the original's output at the kept channels, W0 the pruned weights (after He, Zhang and Sun,
    Channel Pruning for Accelerating Very Deep Neural Networks, 2017; Kurtic et al., ZipLM, 2023).
    """

    name: ClassVar[str] = "reconstruct"

    inputs: Inputs = "pruned"
    rows: int = 16384
    may_grow: bool = True
    seed: int = 0
    threads: int | None = None

    def __call__(
        self,
        model: onnx.ModelProto,
        rewriter: Rewriter,
        batches: Sequence[Mapping[str, Array]],
        *,
        progress: Progress | None = None,
    ) -> Repaired:
        """A repaired copy of `model`, which `rewriter` made from the original."""
        repair = Repair(
            model,
            rewriter,
            batches,
            ridge,
            self.inputs,
            self.rows,
            may_grow=self.may_grow,
            seed=self.seed,
            threads=self.threads,
        )
        return repair.run(progress)
