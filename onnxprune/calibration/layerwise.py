"""What the closed-form repairs share: a solver for one layer, run through all of them in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from onnxprune.calibration.gram import SECOND
from onnxprune.calibration.sequential import Inputs, Repair, Repaired
from onnxprune.calibration.solve import Halves
from onnxprune.progress import Progress
from onnxprune.rewriting import Rewriter
from onnxprune.runtime import one_blas_thread

Array = NDArray[Any]


@dataclass(frozen=True)
class LayerwiseRepair:
    """A repair that solves every linear operator from moments of its input.

    A subclass sets `solver`, which takes the moments `sums`; see
    `onnxprune.calibration.sequential.Repair` for the options.
    """

    name: ClassVar[str]
    solver: ClassVar[staticmethod[[Halves, int, Array, bool], tuple[Array, Array]]]
    sums: ClassVar[Sequence[str]] = SECOND

    inputs: Inputs = "pruned"
    rows: int = 16384
    may_grow: bool = True
    seed: int = 0
    threads: int | None = None
    only: frozenset[str] | None = None

    def __call__(
        self,
        model: onnx.ModelProto,
        rewriter: Rewriter,
        batches: Sequence[Mapping[str, Array]],
        *,
        original: onnx.ModelProto | None = None,
        progress: Progress | None = None,
    ) -> Repaired:
        """A repaired copy of `model`, which `rewriter` made from the original.

        `original`: a form of that with other numbers in it, to learn from in its place.
        """
        repair = Repair(
            model,
            rewriter,
            batches,
            self.solver,
            self.inputs,
            self.rows,
            self.sums,
            self.may_grow,
            self.seed,
            self.threads,
            self.only,
            original,
        )
        with one_blas_thread():
            return repair.run(progress)
