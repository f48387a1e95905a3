"""Put what removed channels contributed on average into the biases of the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from onnxprune.calibration.gram import FIRST
from onnxprune.calibration.sequential import Repair, Repaired
from onnxprune.calibration.solve import mean_only
from onnxprune.progress import Progress
from onnxprune.rewriting import Rewriter

Array = NDArray[Any]


@dataclass(frozen=True)
class CompensateBias:
    """Every layer's mean answer becomes the original's, channel by channel; weights stay.

    Means are taken over outputs, so that borders count, where a constant input meets zero padding
    (the idea of bias correction: Nagel et al., Data-Free Quantization, 2019).
    """

    name: ClassVar[str] = "compensate-bias"

    rows: int = 65536
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
            mean_only,
            rows=self.rows,
            sums=FIRST,
            may_grow=self.may_grow,
            seed=self.seed,
            threads=self.threads,
        )
        return repair.run(progress)
