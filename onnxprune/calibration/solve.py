"""Ridge regression towards given weights, from moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.calibration.gram import Moments

Array = NDArray[Any]
#: Ridges tried, relative to the mean square of the inputs.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Problem:
    """min over W, b of E |W p + b - z|^2 + ridge |W - W0|^2, for one group; W [M, D]."""

    gram: Array
    cross: Array
    p: Array
    z: Array
    zz: float
    intercept: bool

    @classmethod
    def of(cls, moments: Moments, group: int, *, intercept: bool) -> Problem:
        """Means and covariances; second moments as they are where no intercept can be added."""
        n = moments.count
        part = {name: value[group] / n for name, value in moments.sums.items()}
        gram, cross, p, z = part["A"], part["B"], part["p"], part["z"]
        zz = float(part["zz"].sum())
        if intercept:
            gram = gram - np.outer(p, p)
            cross = cross - np.outer(p, z)
            zz -= float(z @ z)
        return cls(gram, cross, p, z, zz, intercept)

    def error(self, weight: Array) -> float:
        """Mean squared error with these weights and the best intercept."""
        fit = np.einsum("md,de,me->", weight, self.gram, weight, optimize=True)
        return float(fit - 2 * np.einsum("md,dm->", weight, self.cross) + self.zz)

    def error_with(self, weight: Array, bias: Array) -> float:
        """Mean squared error with these weights and this intercept."""
        if not self.intercept:
            return self.error(weight)
        gap = weight @ self.p + bias - self.z
        return self.error(weight) + float(gap @ gap)

    def bias(self, weight: Array) -> Array:
        """The best intercept for these weights, [M]."""
        return self.z - weight @ self.p

    def solve(self, start: Array, ridge: float) -> Array:
        """Weights [M, D], shrunk towards `start`."""
        from scipy.linalg import cho_factor, cho_solve

        level = ridge * max(float(np.trace(self.gram)) / len(self.gram), 1e-12)
        matrix = self.gram + level * np.eye(len(self.gram))
        rest = self.cross - self.gram @ start.T
        return np.asarray(start + cho_solve(cho_factor(matrix, lower=True), rest).T)


def fit(
    halves: Sequence[Moments],
    group: int,
    start: Array,
    *,
    intercept: bool,
    ridges: Sequence[float] = RIDGES,
) -> tuple[Array, Array, float, float, float]:
    """Weights, intercept, and the mean squared error before (best intercept) and after.

    The ridge is the one that predicts each half of the data best from the other.
    """
    whole = Problem.of(halves[0] + halves[1], group, intercept=intercept)
    best = ridges[-1]
    if halves[1].count and len(ridges) > 1:
        one, two = (Problem.of(h, group, intercept=intercept) for h in halves)
        losses = []
        for ridge in ridges:
            loss = 0.0
            for train, test in ((one, two), (two, one)):
                weight = train.solve(start, ridge)
                loss += test.error_with(weight, train.bias(weight))
            losses.append(loss)
        base = sum(
            test.error_with(start, train.bias(start)) for train, test in ((one, two), (two, one))
        )
        if base <= min(losses):
            return start, whole.bias(start), whole.error(start), whole.error(start), ridges[-1]
        best = ridges[int(np.argmin(losses))]
    weight = whole.solve(start, best)
    return weight, whole.bias(weight), whole.error(start), whole.error(weight), best
