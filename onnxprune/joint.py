"""Layers and channels under one budget.

0, 1, 2, ... layers go, each time the one that costs the outputs least for what it saves; channels
make up for the rest of the budget, and are repaired. The model whose outputs are nearest to the
original's on calibration data is the result: where layers cost more than channels, none goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import onnx

from onnxprune.analysis import analyse
from onnxprune.errors import BudgetError, InvalidRecipeError, VerificationError
from onnxprune.layer_candidates import Kinds, Replacement
from onnxprune.passes.prune_layers import Dropped, LayersResult, PruneLayers
from onnxprune.verify import deviation

if TYPE_CHECKING:
    from onnxprune.data import Dataset
    from onnxprune.plan import Plan
    from onnxprune.progress import Progress

#: Samples on which the models are compared.
COMPARED = 512
#: Worse models in a row after which no more layers are tried.
PATIENCE = 2


@dataclass(frozen=True)
class Trial:
    """`layers` went and then channels; `error` is the squared one of the outputs, None if not."""

    layers: int
    share: float
    error: float | None


@dataclass(frozen=True)
class JointResult:
    """`plan` says which channels went, of the model without the layers; None where none did."""

    model: onnx.ModelProto
    dropped: tuple[Dropped, ...]
    plan: Plan | None
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class PruneJointly:
    """Remove layers and channels until a share of the multiply-adds or parameters is left."""

    macs: float | None = None
    params: float | None = None
    most_layers: int = 4
    kinds: Kinds = "all"
    replacement: Replacement = "linear"
    round_to: int = 1
    min_keep: float = 0.1
    keep: tuple[str, ...] = ()
    samples: int = 1024
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        if (self.macs is None) == (self.params is None):
            raise InvalidRecipeError("give one of macs, params")
        if self.most_layers < 1:
            raise InvalidRecipeError(f"most_layers {self.most_layers}: must be at least 1")
        self._layers()

    def _layers(self) -> PruneLayers:
        return PruneLayers(
            macs=self.macs,
            params=self.params,
            kinds=self.kinds,
            replacement=self.replacement,
            samples=self.samples,
            threads=self.threads,
            seed=self.seed,
        )

    def __call__(
        self, model: onnx.ModelProto, data: Dataset, *, progress: Progress | None = None
    ) -> JointResult:
        """The best model found.

        Raises:
            BudgetError: neither channels alone nor with layers reach the budget.
        """
        path = self._layers().path(model, data, self.most_layers, progress=progress)
        few = [b.feeds for b in islice(data.batches(64), COMPARED // 64)]
        wanted = self._outputs(model, few)
        trials: list[Trial] = []
        best: tuple[float, JointResult] | None = None
        worse = 0
        failure: BudgetError | None = None
        for start in (LayersResult(model, (), 0), *path):
            share = self._share(model, start.model)
            try:
                pruned, plan = self._without_channels(start.model, share, data, progress)
            except BudgetError as reason:
                failure = reason
                trials.append(Trial(len(start.dropped), share, None))
                continue
            error = deviation(self._outputs(pruned, few), wanted)
            trials.append(Trial(len(start.dropped), share, error))
            if best is None or error < best[0]:
                best, worse = (error, JointResult(pruned, start.dropped, plan, ())), 0
            elif (worse := worse + 1) == PATIENCE:
                break
        if best is None:
            raise failure or BudgetError("nothing can go")
        found = best[1]
        return JointResult(found.model, found.dropped, found.plan, tuple(trials))

    def _share(self, model: onnx.ModelProto, start: onnx.ModelProto) -> float:
        """The share of `start` that the budget leaves."""
        kind, value = ("params", self.params) if self.macs is None else ("macs", self.macs)
        analyses = [analyse(m) for m in (model, start)]
        costs = [getattr(a.cost, kind)(a.everything) for a in analyses]
        return float((value or 0) * costs[0] / max(costs[1], 1.0))

    def _without_channels(
        self, start: onnx.ModelProto, share: float, data: Dataset, progress: Progress | None
    ) -> tuple[onnx.ModelProto, Plan | None]:
        from onnxprune import pipeline

        if share >= 1:
            return start, None
        result = pipeline.prune(
            start,
            **{"params" if self.macs is None else "macs": share},  # type: ignore[arg-type]
            round_to=self.round_to,
            min_keep=self.min_keep,
            keep=self.keep,
            data=data,
            lossless=False,
            seed=self.seed,
            threads=self.threads,
            progress=progress,
        )
        problems = [p for check in result.report.checks for p in check.problems]
        if problems:
            raise VerificationError("; ".join(problems))
        return result.model, result.plan

    def _outputs(
        self, model: onnx.ModelProto, batches: Sequence[Mapping[str, Any]]
    ) -> list[list[Any]]:
        from onnxprune import runtime

        session = runtime.session(model, threads=self.threads)
        return [list(runtime.run(session, feeds).values()) for feeds in batches]
