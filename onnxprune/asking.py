"""What `prune` may be asked for: options that are out of range are refused in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from onnxprune.errors import InvalidRecipeError
from onnxprune.rebuild import REPAIRS

if TYPE_CHECKING:
    from onnxprune.passes.finetune import Finetune
    from onnxprune.passes.select import Budget, BudgetKind, Ranking


def budget_of(
    lossless: bool | None, max_drop: float | None, asked: Mapping[str, float | None]
) -> Budget:
    """The one budget that was asked for."""
    from onnxprune.passes.select import Budget

    given = {k: v for k, v in asked.items() if v is not None}
    if lossless and not given:
        return Budget("lossless", 1.0)
    if max_drop is not None and not given:
        return Budget("macs", 0.0)
    if len(given) != 1:
        names = ", ".join(asked)
        raise InvalidRecipeError(f"give exactly one budget of {names}; got {len(given)}")
    kind, value = next(iter(given.items()))
    if kind == "size-mb":
        if not value > 0:
            raise InvalidRecipeError(f"--size-mb {value:g} is not a size: it must be above 0")
    elif not 0 < value <= 1:
        raise InvalidRecipeError(f"--{kind} {value:g} is out of range: a share must be in (0, 1]")
    return Budget(cast("BudgetKind", kind), float(value))


def check_promise(max_drop: float | None, data: Any) -> None:
    """What `--max-drop` takes, and that there is data to measure it with."""
    if max_drop is None:
        return
    if not 0 <= max_drop <= 100:
        raise InvalidRecipeError(f"--max-drop {max_drop:g}: must be in [0, 100] points")
    if data is None:
        raise InvalidRecipeError("--max-drop needs data to measure with: add --val SRC")


def check_ranges(min_keep: float, round_to: int, scope: str, seed: int = 0) -> None:
    """What limits the choice of channels, and what it is drawn with."""
    if seed < 0:
        raise InvalidRecipeError(f"--seed {seed} is out of range: it must not be negative")
    if not 0 <= min_keep <= 1:
        raise InvalidRecipeError(
            f"--min-keep {min_keep:g} is out of range: a share must be in [0, 1]"
        )
    if round_to < 1:
        raise InvalidRecipeError(f"--round-to {round_to} is out of range: it must be at least 1")
    if scope not in ("exact", "all"):
        raise InvalidRecipeError(f"--scope {scope!r} is unknown: choose exact or all")


def tuning(finetune: int | Finetune, data: Any, seed: int, threads: int | None) -> Finetune | None:
    """How the pruned model is fine-tuned; None: not at all."""
    if isinstance(finetune, int):
        if finetune < 0:
            raise InvalidRecipeError(f"--finetune {finetune} is out of range: it counts epochs")
        if finetune == 0:
            return None
    if data is None:
        raise InvalidRecipeError("--finetune needs --data to train on")
    from onnxprune.passes.finetune import Finetune

    if isinstance(finetune, int):
        return Finetune(epochs=finetune, seed=seed, threads=threads)
    return finetune if finetune.threads else replace(finetune, threads=threads)


def ranking_of(name: str | None) -> Ranking | None:
    """The ranking of this name."""
    from onnxprune.passes.select import RANKINGS

    known = {str(ranking): ranking for ranking in RANKINGS}
    if name is not None and name not in known:
        raise InvalidRecipeError(f"--ranking {name!r} is unknown: choose {', '.join(known)}")
    return None if name is None else known[name]


def check_repair(repair: str, data: Any) -> None:
    """What `--repair` takes."""
    if repair not in ("auto", "none", *REPAIRS):
        known = ", ".join(("auto", "none", *REPAIRS))
        raise InvalidRecipeError(f"--repair {repair!r} is unknown: choose {known}")
    if repair == "bn" and data is None:
        raise InvalidRecipeError("--repair bn measures statistics: add --data")


def check_steps(steps: int, granularity: str) -> int:
    """In how many parts the channels go."""
    if steps < 1:
        raise InvalidRecipeError(f"--steps {steps} is out of range: it must be at least 1")
    if steps > 1 and "vocab" in granularity:
        raise InvalidRecipeError("--steps does not go with --granularity vocab: drop one of them")
    return steps
