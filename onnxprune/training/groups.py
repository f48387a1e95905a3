"""Learning rate and weight decay of each parameter, by patterns over names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onnxprune.errors import InvalidRecipeError
from onnxprune.training.parameters import Parameter


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose names match `pattern` (*, ?, [...]); the first group that matches counts.

    Attributes:
        pattern: of the names.
        rate: factor of the learning rate; 0 leaves the parameters as they are.
        decay: weight decay instead of the general one; None: the general one, on weights only.
    """

    pattern: str
    rate: float = 1.0
    decay: float | None = None

    def __post_init__(self) -> None:
        """Refuse negative numbers."""
        for option in ("rate", "decay"):
            value = getattr(self, option)
            if value is not None and not value >= 0:
                raise InvalidRecipeError(
                    f"parameter group {self.pattern!r}: {option}={value!r} is below 0"
                )


def rates_and_decays(
    parameters: Mapping[str, Parameter], weight_decay: float, groups: Sequence[ParameterGroup]
) -> tuple[dict[str, float], dict[str, float]]:
    """Factor of the learning rate where it is not 1, and weight decay where there is one.

    Raises:
        InvalidRecipeError: a group matches no parameter.
    """
    rates: dict[str, float] = {}
    decays: dict[str, float] = {}
    for group in groups:
        if not any(fnmatchcase(name, group.pattern) for name in parameters):
            raise InvalidRecipeError(
                f"parameter group {group.pattern!r} matches none of the {len(parameters)} trained "
                f"parameters ({', '.join(sorted(parameters)[:3])}, ...)"
            )
    for name, parameter in parameters.items():
        group = next((g for g in groups if fnmatchcase(name, g.pattern)), ParameterGroup("*"))
        decay = group.decay
        if decay is None:
            decay = weight_decay if parameter.decay else 0.0
        if decay:
            decays[name] = decay
        if group.rate != 1:
            rates[name] = group.rate
    return rates, decays
