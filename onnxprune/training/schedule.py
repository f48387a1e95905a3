"""The learning rate of each step."""

from __future__ import annotations

import math


def rate_at(
    step: int, total: int, peak: float, *, warmup: float = 0.05, floor: float = 0.0
) -> float:
    """Linear warm-up over a share of the steps, then a half cosine down to `floor` times the peak.

    `step` counts from 0; the first step already moves.
    """
    rising = int(warmup * total)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    place = (step - rising) / max(1, total - rising)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, place))))
