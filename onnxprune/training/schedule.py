"""The learning rate of each step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def rate_at(
    step: int,
    total: int,
    peak: float,
    *,
    warmup: float = 0.05,
    floor: float = 0.0,
    schedule: Schedule = "cosine",
) -> float:
    """Linear warm-up over a share of the steps, then down to `floor` times the peak.

    The way down is a half cosine (Loshchilov and Hutter, 2017) or a line; "constant" stays at the
    peak. `step` counts from 0; the first step already moves.
    """
    rising = int(warmup * total)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    place = min(1.0, (step - rising) / max(1, total - rising))
    share = {
        "cosine": 0.5 * (1 + math.cos(math.pi * place)),
        "linear": 1 - place,
        "constant": 1.0,
    }[schedule]
    return peak * (floor + (1 - floor) * share)
