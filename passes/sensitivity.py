"""How much the outputs change when one layer alone is pruned: which layers can spare channels.

Needs no labels: the original's own outputs are the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.coupling import Coupling
from onnxprune.errors import InvalidRecipeError
from onnxprune.groups import Group
from onnxprune.passes.apply import apply_keep
from onnxprune.passes.score import Scores, score
from onnxprune.result import SensitivityRow
from onnxprune.verify import FAILURES

Array = NDArray[Any]
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Sensitivity:
    """Remove the least important `share` of each group in turn, and compare the outputs."""

    name: ClassVar[str] = "sensitivity"

    share: float = 0.5
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        if not 0 < self.share < 1:
            raise InvalidRecipeError(f"sensitivity: share {self.share:g} must be in (0, 1)")

    def __call__(
        self,
        coupling: Coupling,
        groups: Sequence[Group],
        batches: Sequence[Feeds],
        scores: Scores | None = None,
    ) -> tuple[SensitivityRow, ...]:
        """One row for each group, the most sensitive first; the model is only read."""
        if scores is None:
            scores = score(coupling, "l2")
        wanted = self._outputs(coupling.graph.model, batches)
        spread = sum(float(np.var(a) * a.size) for part in wanted for a in part)
        rows = []
        for group in groups:
            count = min(round(group.size * self.share), group.size - 1)
            gone = group.units[np.argsort(scores[group.units], kind="stable")[:count]]
            change = self._change(coupling, gone, batches, wanted) if count else 0.0
            relative = None if change is None else change / max(spread, 1e-30)
            rows.append(SensitivityRow(group.name, group.size, count, relative))
        return tuple(sorted(rows, key=lambda r: -(np.inf if r.change is None else r.change)))

    def _change(
        self,
        coupling: Coupling,
        gone: Array,
        batches: Sequence[Feeds],
        wanted: Sequence[Sequence[Array]],
    ) -> float | None:
        keep = np.ones(coupling.solution.units, bool)
        keep[gone] = False
        try:
            got = self._outputs(apply_keep(coupling, keep).model, batches)
        except FAILURES:
            return None
        pairs = (
            (a, b) for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True)
        )
        return sum(float(((a - b) ** 2).sum()) for a, b in pairs)

    def _outputs(self, model: onnx.ModelProto, batches: Sequence[Feeds]) -> list[list[Array]]:
        """Float outputs in float64, by batch."""
        session = runtime.session(model, threads=self.threads)
        return [
            [
                value.astype(np.float64)
                for value in runtime.run(session, feeds).values()
                if isinstance(value, np.ndarray) and value.dtype.kind == "f"
            ]
            for feeds in batches
        ]
