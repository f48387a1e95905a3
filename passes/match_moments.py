"""Give every channel the mean and variance that it had, where BatchNormalization was folded away.

Exporters fold BatchNormalization into the weights before it. After pruning nothing is left that
could be re-estimated: so the weights are scaled and the biases moved instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from onnxprune.calibration.sequential import Repair, Repaired
from onnxprune.calibration.solve import matched
from onnxprune.progress import Progress
from onnxprune.rewriting import Rewriter

Array = NDArray[Any]


@dataclass(frozen=True)
class MatchMoments:
    """Each output channel of every linear operator gets the original's mean and variance.

    With a = sqrt(var_original / var_pruned):  W <- a W,  b so that the mean is the original's.
    """

    name: ClassVar[str] = "match-moments"

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
            matched,
            rows=self.rows,
            may_grow=self.may_grow,
            seed=self.seed,
            threads=self.threads,
        )
        return repair.run(progress)
