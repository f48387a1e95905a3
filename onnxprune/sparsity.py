"""Which single weights go, and what the others become: masks and their patterns, and OBS."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import InvalidRecipeError

Array = NDArray[Any]
Mask = NDArray[np.bool_]
BLOCK = 128
#: Rounds of exchanges in a row.
EXCHANGES = 5


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be: anywhere; `kept` of every `of` inputs; or in blocks of rows x columns."""

    kept: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """ "unstructured", "2:4" (kept of every four inputs), "4x1" (outputs x inputs of a block).

        Raises:
            InvalidRecipeError: it is none of these.
        """
        if text == "unstructured":
            return cls()
        two = re.fullmatch(r"(\d+)([:x])(\d+)", text)
        if two is not None:
            a, b = int(two[1]), int(two[3])
            if two[2] == ":" and 0 < a < b:
                return cls(kept=a, of=b)
            if two[2] == "x" and a > 0 and b > 0:
                return cls(rows=a, columns=b)
        raise InvalidRecipeError(
            f"pattern {text!r}: give unstructured, N:M as in 2:4, or RxC as in 4x1"
        )

    @property
    def fixed(self) -> bool:
        """Whether the pattern itself says how many weights stay."""
        return self.of > 0

    @property
    def sparsity(self) -> float:
        """The share of zeros that the pattern makes, where it says so."""
        return 1 - self.kept / self.of if self.fixed else 0.0

    def holds(self, weight: Array) -> bool:
        """Whether weights [G, M, K] follow an N:M pattern: at most `kept` of `of` neighbours."""
        if not self.fixed:
            return True
        groups = weight.reshape(*weight.shape[:2], -1, self.of)
        return bool((np.count_nonzero(groups, axis=3) <= self.kept).all())

    def fits(self, shape: tuple[int, ...], period: int) -> bool:
        """Whether weights [G, M, K], of which `period` neighbours are channels, can follow it."""
        if self.fixed:
            return period % self.of == 0
        return shape[1] % self.rows == 0 and period % self.columns == 0


def choose(scores: Array, share: float, pattern: Pattern, *, per_row: bool = False) -> Mask:
    """keep[G, M, K]: of scores[G, M, K] the largest, so that about `share` of them go."""
    g, m, k = scores.shape
    if pattern.fixed:
        parts = scores.reshape(g, m, -1, pattern.of)
        order = np.argsort(np.argsort(-parts, axis=-1, kind="stable"), axis=-1, kind="stable")
        return np.asarray((order < pattern.kept).reshape(scores.shape))
    r, c = pattern.rows, pattern.columns
    blocks = scores.reshape(g, m // r, r, k // c, c).sum(axis=(2, 4))
    lines = blocks.reshape(g * (m // r), -1) if per_row else blocks.reshape(1, -1)
    gone = round(share * lines.shape[1])
    keep = np.ones(lines.shape, bool)
    if gone:
        np.put_along_axis(keep, np.argsort(lines, axis=1, kind="stable")[:, :gone], False, axis=1)
    keep = keep.reshape(blocks.shape)
    return np.repeat(np.repeat(keep, r, axis=1), c, axis=2)


def inverse_factor(hessian: Array, damping: float) -> Array:
    """The upper Cholesky factor of the inverse of a damped Hessian [K, K]."""
    from scipy.linalg import cho_factor, cho_solve, cholesky

    level = damping * float(np.mean(np.diag(hessian))) + 1e-12
    damped = hessian + level * np.eye(len(hessian))
    inverse = cho_solve(cho_factor(damped, lower=True), np.eye(len(damped)))
    return np.asarray(cholesky((inverse + inverse.T) / 2, lower=False))


def obs(weight: Array, hessian: Array, share: float, pattern: Pattern, damping: float) -> Array:
    """Weights [M, K] with zeros, the rest adjusted column by column to make up for them.

    SparseGPT (Frantar and Alistarh, 2023), the Optimal Brain Surgeon (Hassibi and Stork, 1993) with
    one order of columns for all rows. N:M patterns are chosen among updated weights.
    """
    w = weight.astype(np.float64).copy()
    factor = inverse_factor(hessian, damping)
    diagonal = np.diag(factor)
    keep = np.ones(w.shape, bool)
    if not pattern.fixed:
        keep = choose(((w / diagonal) ** 2)[None], share, pattern)[0]
    k = w.shape[1]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = np.zeros((len(w), stop - start))
        for i in range(start, stop):
            if pattern.fixed and i % pattern.of == 0:
                part = slice(i, i + pattern.of)
                keep[:, part] = choose(((w[:, part] / diagonal[part]) ** 2)[None], share, pattern)[
                    0
                ]
            errors[:, i - start] = np.where(keep[:, i], 0.0, w[:, i]) / diagonal[i]
            w[:, i:stop] -= errors[:, i - start, None] * factor[i, i:stop]
            w[:, i] = np.where(keep[:, i], w[:, i], 0.0)
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return w


def resolve(weight: Array, keep: Mask, hessian: Array, cross: Array, damping: float) -> Array:
    """The best weights [M, K] where `keep`, for the outputs that `weight` has on its own inputs.

    min over w of E |w x - weight t|^2 + level |w - weight|^2, row by row, with the means of x x^T
    in `hessian` and of t x^T in `cross`.
    """
    level = damping * float(np.mean(np.diag(hessian))) + 1e-12
    damped = hessian + level * np.eye(len(hessian))
    goal = weight.astype(np.float64) @ (cross + level * np.eye(len(cross)))
    found = np.zeros(keep.shape)
    for row, kept in enumerate(map(np.flatnonzero, keep)):
        if kept.size:
            found[row, kept] = np.linalg.solve(damped[np.ix_(kept, kept)], goal[row, kept])
    return found


def exchange(
    weight: Array, new: Array, hessian: Array, cross: Array, pattern: Pattern, damping: float
) -> Array:
    """Better places for the weights of an N:M pattern: of each group one goes where it helps.

    What weight i costs is w_i^2 / [H_SS^-1]_ii, what weight j would bring is r_j^2 over what is
    left of H_jj without the weights S that stay (the Optimal Brain Surgeon in both directions).
    Half of the promising exchanges of a row are made at once; the row stays as it was where its
    error has not fallen, and fewer are tried.
    """
    level = damping * float(np.mean(np.diag(hessian))) + 1e-12
    damped = hessian + level * np.eye(len(hessian))
    goal = weight.astype(np.float64) @ (cross + level * np.eye(len(cross)))
    found = new.copy()
    for row in range(len(new)):
        state = _solved(damped, goal[row], new[row] != 0)
        part = 0.5
        for _ in range(EXCHANGES):
            keep = _exchanged(*state[:3], pattern.of, part)
            if keep is None:
                break
            trial = _solved(damped, goal[row], keep)
            if trial[3] < state[3]:
                state = trial
            else:
                part /= 3
        found[row] = state[1]
    return found


def _solved(damped: Array, goal: Array, keep: Mask) -> tuple[Mask, Array, Array, float]:
    """The mask, the weights [K], what each costs or would bring (minus), and twice the error."""
    on, off = np.flatnonzero(keep), np.flatnonzero(~keep)
    inverse = np.linalg.inv(damped[np.ix_(on, on)])
    value, worth = np.zeros(len(keep)), np.zeros(len(keep))
    value[on] = inverse @ goal[on]
    worth[on] = value[on] ** 2 / np.diag(inverse)
    between = damped[np.ix_(on, off)]
    rest = np.diag(damped)[off] - np.einsum("ij,ij->j", between, inverse @ between)
    worth[off] = -((goal[off] - between.T @ value[on]) ** 2) / np.maximum(rest, 1e-12)
    return keep, value, worth, -float(value @ goal)


def _exchanged(keep: Mask, value: Array, worth: Array, of: int, part: float) -> Mask | None:
    """The mask after the best exchanges; None where none helps."""
    grid = worth.reshape(-1, of)
    mask = keep.reshape(-1, of).copy()
    goes = np.where(mask, grid, np.inf).argmin(axis=1)
    comes = np.where(mask, np.inf, grid).argmin(axis=1)
    groups = np.arange(len(grid))
    gain = -grid[groups, comes] - grid[groups, goes]
    order = np.argsort(-gain, kind="stable")
    good = order[: max(1, int(np.ceil(part * (gain > 0).sum())))]
    good = good[gain[good] > 0]
    if not good.size:
        return None
    mask[good, goes[good]], mask[good, comes[good]] = False, True
    return np.asarray(mask.ravel())


def relative_error(old: Array, new: Array, hessian: Array) -> float:
    """The squared error of a layer's outputs, relative to their square; all are [G, ...]."""
    gap = new - old
    parts = [np.einsum("gmk,gkl,gml->", w, hessian, w, optimize=True) for w in (gap, old)]
    return float(parts[0]) / max(float(parts[1]), 1e-30)
