"""What a run was asked for, and what its first stages hand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxprune.granularity import Granularity
from onnxprune.result import CheckReport
from onnxprune.rewriting import Mask

if TYPE_CHECKING:
    from onnxprune.passes.apply import Applied
    from onnxprune.passes.finetune import Finetune


@dataclass(frozen=True)
class Options:
    """What `prune` was asked for; `as_float32`: the model only runs as a float32 copy."""

    budget: Any
    limits: Any
    criterion: str
    keep: tuple[str, ...]
    granularity: Granularity
    finetune: Finetune | None
    max_drop: float | None
    check: bool
    seed: int
    threads: int | None
    as_float32: bool = False
    repair: str = "auto"
    steps: int = 1
    simplify: bool = False


@dataclass(frozen=True)
class Verified:
    """A pruned model that passed the first two levels, and what was learned on the way."""

    keep: Mask
    applied: Applied
    report: CheckReport | None
    notes: tuple[str, ...]
