"""The learning rate: how high, and at each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Schedule = Literal["cosine", "linear", "constant"]


#: AdamW moves a weight by about the rate a step: its peak, relative to the size of the weights.
RELATIVE_RATE = 0.015
SGD_RATE = 0.05


def peak_rate(weights: Iterable[NDArray[Any]]) -> float:
    """The peak rate of AdamW: 0.015 of the weights' typical size.

    That size is the geometric mean over matrices and kernels of the root mean square of what is not
    zero. Adam's steps do not follow the scale of the loss or of the gradient, so what they do to a
    layer depends on the size of its weights (You et al., 2020; Shazeer and Stern, 2018).
    """
    sizes = [float(np.mean(np.square(w[w != 0], dtype=np.float64))) for w in weights if w.any()]
    if not sizes:
        return 1e-3
    return RELATIVE_RATE * math.exp(0.5 * float(np.mean(np.log(sizes))))


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
