"""Weights from moments: ridge regression, matched moments, or only the mean.

A solver gets the moments of two halves of the data, and the present weights, and returns weights
[M, D] and intercept [M] of one group: z = W p + b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxprune.calibration.gram import Moments

Array = NDArray[Any]
Halves = tuple[Moments, Moments]
#: (halves, group, present weights [M, D], whether an intercept can be set) -> weights, intercept.
Solver: TypeAlias = Callable[[Halves, int, Array, bool], tuple[Array, Array]]
#: Ridges tried, relative to the mean square of the inputs.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: Inputs above which no ridge is chosen by cross-validation: each costs D^3.
MAX_VALIDATED = 1536
_DEFAULT_RIDGE = 1e-2
_ATTEMPTS = 5


@dataclass(frozen=True)
class Problem:
    """min over W, b of E |W p + b - z|^2 + ridge |W - W0|^2, for one group.

    `gram`[D, D], `cross`[D, M] are covariances, or plain second moments without an intercept.
    """

    gram: Array
    cross: Array
    p: Array
    z: Array
    zz: float
    intercept: bool

    @classmethod
    def of(cls, moments: Moments, group: int, *, intercept: bool) -> Problem:
        """The problem that these moments pose."""
        gram, cross, p, z, zz = (moments.mean(n, group) for n in ("A", "B", "p", "z", "zz"))
        if intercept:
            gram, cross, zz = gram - np.outer(p, p), cross - np.outer(p, z), zz - z * z
        return cls(gram, cross, p, z, float(zz.sum()), intercept)

    def error(self, weight: Array, bias: Array) -> float:
        """Mean squared error, summed over the outputs."""
        fit = float(np.vdot(weight @ self.gram, weight)) - 2 * float(np.vdot(weight.T, self.cross))
        gap = weight @ self.p + bias - self.z if self.intercept else np.zeros(1)
        return fit + self.zz + float(gap @ gap)

    def bias(self, weight: Array) -> Array:
        """The best intercept for these weights, [M]."""
        return self.z - weight @ self.p if self.intercept else np.zeros_like(self.z)

    def solve(self, start: Array, ridge: float) -> Array:
        """Weights [M, D], shrunk towards `start`.

        Raises:
            LinAlgError: the moments are not finite.
        """
        from scipy.linalg import cho_solve

        level = ridge * max(float(np.trace(self.gram)) / len(self.gram), 1e-12)
        rest = self.cross - self.gram @ start.T
        return np.asarray(start + cho_solve(_factor(self.gram, level), rest, check_finite=False).T)


def _factor(gram: Array, level: float) -> Any:
    """Cholesky factor of gram + level * I; more, where rounding left it indefinite."""
    from scipy.linalg import LinAlgError, cho_factor

    for _ in range(_ATTEMPTS):
        matrix = gram.copy()
        matrix[np.diag_indices_from(matrix)] += level
        try:
            return cho_factor(matrix, lower=True, overwrite_a=True)
        except (LinAlgError, ValueError):
            level *= 10
    raise np.linalg.LinAlgError("its inputs' moments cannot be inverted")


def ridge(halves: Halves, group: int, start: Array, intercept: bool) -> tuple[Array, Array]:
    """Least squares, shrunk towards the present weights (Hoerl and Kennard, 1970).

    The ridge is the one with which each half of the data predicts the other best; where none
    predicts better than the present weights do, these stay.
    """
    whole = Problem.of(joined(halves), group, intercept=intercept)
    level: float | None = _DEFAULT_RIDGE
    if halves[1].count and start.shape[1] <= MAX_VALIDATED:
        level = _best_ridge([Problem.of(h, group, intercept=intercept) for h in halves], start)
    weight = start if level is None else whole.solve(start, level)
    return weight, whole.bias(weight)


def _best_ridge(parts: Sequence[Problem], start: Array) -> float | None:
    """None where the present weights do best."""
    pairs = ((parts[0], parts[1]), (parts[1], parts[0]))
    losses = []
    for level in RIDGES:
        weights = [train.solve(start, level) for train, _ in pairs]
        losses.append(sum(b.error(w, a.bias(w)) for (a, b), w in zip(pairs, weights, strict=True)))
    present = sum(test.error(start, train.bias(start)) for train, test in pairs)
    return None if present <= min(losses) else RIDGES[int(np.argmin(losses))]


def mean_only(halves: Halves, group: int, start: Array, intercept: bool) -> tuple[Array, Array]:
    """The weights stay; the intercept makes the mean right."""
    whole = joined(halves)
    bias = whole.mean("z", group) - start @ whole.mean("p", group)
    return start, bias if intercept else np.zeros_like(bias)


def matched(halves: Halves, group: int, start: Array, intercept: bool) -> tuple[Array, Array]:
    """Each output's weights are scaled, so that its mean and variance are the target's."""
    whole = Problem.of(joined(halves), group, intercept=True)
    have = np.einsum("md,md->m", start @ whole.gram, start)
    moments = joined(halves)
    want = np.maximum(moments.mean("zz", group) - whole.z**2, 0)
    usable = (have > 1e-12) & (want > 1e-12)
    factor = np.sqrt(np.divide(want, have, out=np.ones_like(have), where=usable))
    weight = start * np.clip(factor, 1 / _MAX_FACTOR, _MAX_FACTOR)[:, None]
    return weight, whole.bias(weight) if intercept else np.zeros_like(whole.z)


#: How far matching may scale an output: beyond, its variance says nothing any more.
_MAX_FACTOR = 8.0


def joined(halves: Halves) -> Moments:
    """Both halves together."""
    total = Moments(halves[0].count, dict(halves[0].sums))
    if halves[1].count:
        total.add(halves[1].count, halves[1].sums)
    return total
