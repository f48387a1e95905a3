"""What a recipe can be made of: each step takes a model to the next, and says what it did.

A package adds a step by an entry point of the group "onnxprune.passes": the step's name, and a
dataclass of its options whose instances are called with a model and a `Context` and return a model
and a record (what it did, as JSON values).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import onnx

from onnxprune.errors import InvalidRecipeError, VerificationError
from onnxprune.training.options import FinetuneOptions

if TYPE_CHECKING:
    from onnxprune.data import Dataset
    from onnxprune.joint import PruneJointly
    from onnxprune.passes.finetune import Finetune
    from onnxprune.passes.prune_layers import PruneLayers
    from onnxprune.progress import Progress

ENTRY_POINTS = "onnxprune.passes"
Record = dict[str, Any]


@dataclass
class Context:
    """What all steps of a run share. `original` is the model that the run began with."""

    original: onnx.ModelProto
    data: str | None
    val: str | None
    seed: int
    threads: int | None
    progress: Progress
    opened: dict[str, Dataset] = field(default_factory=dict)

    def dataset(self, step: str) -> Dataset:
        """The data to calibrate and train with.

        Raises:
            InvalidRecipeError: the recipe names none.
        """
        if self.data is None:
            raise InvalidRecipeError(f"step {step} needs data: give `data` in the recipe or --data")
        return self._open(self.data)

    def held_out(self) -> Dataset | None:
        """The data to measure with."""
        source = self.val or self.data
        return None if source is None else self._open(source)

    def tuning(self, options: FinetuneOptions) -> Finetune:
        """Fine-tuning with these options, and the run's seed and threads."""
        from onnxprune.passes.finetune import Finetune

        values = {f.name: getattr(options, f.name) for f in fields(FinetuneOptions)}
        return Finetune(**values, seed=self.seed, threads=self.threads)

    def _open(self, source: str) -> Dataset:
        if source not in self.opened:
            from onnxprune.data import open_data

            self.opened[source] = open_data(source, self.original)
        return self.opened[source]


@dataclass(frozen=True)
class LosslessStep:
    """Remove what provably does not matter."""

    def __call__(self, model: onnx.ModelProto, context: Context) -> tuple[onnx.ModelProto, Record]:
        from onnxprune.passes.lossless import Lossless

        batches = [] if context.data is None else context.dataset("lossless").batches(4)
        feeds = [batch.feeds for _, batch in zip(range(1), batches, strict=False)]
        found = Lossless(threads=context.threads)(model, feeds)
        record = {"channels": found.channels, "layers": found.layers, "max_error": found.max_error}
        return found.model, record


@dataclass(frozen=True)
class PruneStep:
    """Remove channels; the options of `prune`."""

    channels: float | None = None
    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    scope: Literal["exact", "all"] = "all"
    criterion: str | None = None
    ranking: Literal["global", "isomorphic", "uniform"] | None = None
    round_to: int = 1
    min_keep: float = 0.1
    keep: tuple[str, ...] = ()
    repair: str = "auto"
    finetune: int | FinetuneOptions = 0
    steps: int = 1

    def __call__(self, model: onnx.ModelProto, context: Context) -> tuple[onnx.ModelProto, Record]:
        from onnxprune import pipeline

        options: dict[str, Any] = {k: getattr(self, k) for k in self.__dataclass_fields__}
        if isinstance(self.finetune, FinetuneOptions):
            options["finetune"] = context.tuning(self.finetune)
        result = pipeline.prune(
            model,
            **options,
            data=context.data,
            val=context.val,
            lossless=False,
            seed=context.seed,
            threads=context.threads,
            progress=context.progress,
        )
        check = result.report.checks[0] if result.report.checks else None
        if check is not None and not check.passed:
            raise VerificationError("; ".join(check.problems))
        return result.model, {"plan": result.plan.to_json()}


@dataclass(frozen=True)
class LayersStep:
    """Drop residual branches and plain layers."""

    layers: int | None = None
    macs: float | None = None
    params: float | None = None
    max_drop: float | None = None
    kinds: Literal["auto", "branch", "plain", "all"] = "auto"
    replacement: Literal["none", "affine", "linear"] = "linear"
    ranking: Literal["output", "cosine"] = "output"
    samples: int = 1024
    repair: bool = True

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        self._pass(None, 0)

    def _pass(self, threads: int | None, seed: int) -> PruneLayers:
        from onnxprune.passes.prune_layers import PruneLayers

        options: dict[str, Any] = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return PruneLayers(**options, threads=threads, seed=seed)

    def __call__(self, model: onnx.ModelProto, context: Context) -> tuple[onnx.ModelProto, Record]:
        run = self._pass(context.threads, context.seed)
        data, held_out = context.dataset("prune-layers"), context.held_out()
        found = run(model, data, val=held_out, progress=context.progress)
        rows = [asdict(row) for row in found.dropped]
        return found.model, {
            "dropped": [{k: v for k, v in row.items() if k != "edit"} for row in rows],
            "max_error": found.max_error,
            "notes": list(found.notes),
        }


@dataclass(frozen=True)
class JointStep:
    """Remove layers and channels under one budget; see `onnxprune.joint`."""

    macs: float | None = None
    params: float | None = None
    most_layers: int = 4
    kinds: Literal["branch", "plain", "all"] = "all"
    replacement: Literal["none", "affine", "linear"] = "linear"
    round_to: int = 1
    min_keep: float = 0.1
    keep: tuple[str, ...] = ()
    samples: int = 1024

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        self._pass(None, 0)

    def _pass(self, threads: int | None, seed: int) -> PruneJointly:
        from onnxprune.joint import PruneJointly

        options: dict[str, Any] = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return PruneJointly(**options, threads=threads, seed=seed)

    def __call__(self, model: onnx.ModelProto, context: Context) -> tuple[onnx.ModelProto, Record]:
        run = self._pass(context.threads, context.seed)
        found = run(model, context.dataset("prune-jointly"), progress=context.progress)
        rows = [asdict(row) for row in found.dropped]
        return found.model, {
            "dropped": [{k: v for k, v in row.items() if k != "edit"} for row in rows],
            "plan": None if found.plan is None else found.plan.to_json(),
            "trials": [asdict(trial) for trial in found.trials],
        }


@dataclass(frozen=True)
class WeightsStep:
    """Set single weights to zero."""

    sparsity: float = 0.5
    pattern: str = "unstructured"
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    allocation: Literal["layer", "global"] = "global"
    keep: tuple[str, ...] = ()
    samples: int = 1024
    damping: float | None = None

    def __call__(self, model: onnx.ModelProto, context: Context) -> tuple[onnx.ModelProto, Record]:
        from onnxprune.passes.prune_weights import PruneWeights

        options: dict[str, Any] = {k: getattr(self, k) for k in self.__dataclass_fields__}
        run = PruneWeights(**options, seed=context.seed, threads=context.threads)
        blind = self.method == "magnitude" and context.data is None
        data = None if blind else context.dataset("prune-weights")
        found = run(model, data, progress=context.progress)
        return found.model, {"layers": [asdict(row) for row in found.layers]}


@dataclass(frozen=True)
class BatchNormStep:
    """Measure the statistics of BatchNormalization anew."""

    samples: int = 1024
    batch_size: int = 64

    def __call__(self, model: onnx.ModelProto, context: Context) -> tuple[onnx.ModelProto, Record]:
        from onnxprune.passes.reestimate_batchnorm import ReestimateBatchNorm

        run = ReestimateBatchNorm(self.samples, self.batch_size, context.threads)
        data = context.dataset("reestimate-batchnorm")
        return run(model, data, progress=context.progress), {}


@dataclass(frozen=True)
class FinetuneStep(FinetuneOptions):
    """Train with the original as the teacher."""

    def __call__(self, model: onnx.ModelProto, context: Context) -> tuple[onnx.ModelProto, Record]:
        found = context.tuning(self)(
            model,
            teacher=context.original,
            data=context.dataset("finetune"),
            val=context.held_out(),
            progress=context.progress,
        )
        return found.model, {
            "best_epoch": found.best_epoch,
            "lr": found.lr,
            "notes": list(found.notes),
        }


@dataclass(frozen=True)
class SimplifyStep:
    """Fold BatchNormalization and constants, merge and drop layers, by onnxslim and own code."""

    def __call__(self, model: onnx.ModelProto, context: Context) -> tuple[onnx.ModelProto, Record]:
        from onnxprune.passes.simplify import Simplify, require_library

        require_library("step simplify")
        found = Simplify(threads=context.threads)(model)
        if found.problem:
            raise VerificationError(f"simplify: {found.problem}; leave the step out")
        return found.model, {
            "nodes_before": found.nodes_before,
            "nodes_after": found.nodes_after,
            "merged": found.merged,
            "max_error": found.max_error,
        }


BUILT_IN: Mapping[str, Callable[..., Any]] = {
    "lossless": LosslessStep,
    "prune": PruneStep,
    "prune-layers": LayersStep,
    "prune-jointly": JointStep,
    "prune-weights": WeightsStep,
    "reestimate-batchnorm": BatchNormStep,
    "finetune": FinetuneStep,
    "simplify": SimplifyStep,
}


def step_types() -> dict[str, Callable[..., Any]]:
    """All steps by name, those of other packages included; a built-in name cannot be taken."""
    from importlib.metadata import entry_points

    found: dict[str, Callable[..., Any]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        found[point.name] = point.load()
    return {**found, **BUILT_IN}
