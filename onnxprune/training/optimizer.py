"""Optimizers over one flat float32 vector.

Runs in the worker, with numpy alone (Python 3.9 or newer).

All parameters lie in one vector, so a step is a few passes over memory; they go in pieces that stay
in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PIECE = 16384


class Sgd:
    """Stochastic gradient descent with momentum: u <- mu u + g,  w <- w - lr (u + decay w)."""

    slots = ("velocity",)

    def __init__(self, size: int, momentum: float = 0.9) -> None:
        self.momentum = np.float32(momentum)
        self.step_count = 0
        self.velocity: Any = np.zeros(size, np.float32)
        self._work: Any = np.empty(PIECE, np.float32)

    def step(self, params: Any, grads: Any, decay: Any, lr: float, factor: Any = None) -> None:
        """Update `params` in place.

        All arguments are vectors [P]; `decay` is the rate of each weight, `factor` what its
        learning rate is multiplied with (None: 1).
        """
        self.step_count += 1
        rate = np.float32(lr)
        for begin in range(0, params.size, PIECE):
            s = slice(begin, begin + PIECE)
            w, u = params[s], self.velocity[s]
            t = self._work[: w.size]
            u *= self.momentum
            u += grads[s]
            np.multiply(w, decay[s], out=t)
            t += u
            t *= rate
            if factor is not None:
                t *= factor[s]
            w -= t


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    Eps outside the bias correction.
    """

    slots = ("first", "second")

    def __init__(
        self, size: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
    ) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, np.float32(eps)
        self.step_count = 0
        self.first: Any = np.zeros(size, np.float32)
        self.second: Any = np.zeros(size, np.float32)
        self._work: Any = np.empty((2, PIECE), np.float32)

    def step(self, params: Any, grads: Any, decay: Any, lr: float, factor: Any = None) -> None:
        """Update `params` in place.

        All arguments are vectors [P]; `decay` is the rate of each weight, `factor` what its
        learning rate is multiplied with (None: 1).
        """
        self.step_count += 1
        b1, b2 = np.float32(self.beta1), np.float32(self.beta2)
        root = np.float32(1 / np.sqrt(1 - self.beta2**self.step_count))
        scale = np.float32(lr / (1 - self.beta1**self.step_count))
        rate = np.float32(lr)
        for begin in range(0, params.size, PIECE):
            s = slice(begin, begin + PIECE)
            w, g, m, v = params[s], grads[s], self.first[s], self.second[s]
            t, r = self._work[0, : w.size], self._work[1, : w.size]
            m *= b1
            np.multiply(g, np.float32(1) - b1, out=t)
            m += t
            v *= b2
            np.multiply(g, g, out=t)
            t *= np.float32(1) - b2
            v += t
            np.sqrt(v, out=r)
            r *= root
            r += self.eps
            np.divide(m, r, out=t)
            t *= scale
            np.multiply(w, decay[s], out=r)
            r *= rate
            if factor is not None:
                r *= factor[s]
                t *= factor[s]
            w -= r
            w -= t


def average_into(average: Any, params: Any, decay: float, step: int) -> None:
    """Exponential moving average, in place: a <- d a + (1 - d) w.

    With d = min(decay, (1 + step) / (10 + step)), so that the start values are soon forgotten. All
    vectors are [P].
    """
    share = np.float32(1 - min(decay, (1 + step) / (10 + step)))
    work: Any = np.empty(PIECE, np.float32)
    for begin in range(0, params.size, PIECE):
        a, w = average[begin : begin + PIECE], params[begin : begin + PIECE]
        t = work[: w.size]
        np.subtract(w, a, out=t)
        t *= share
        a += t


def clip_by_norm(grads: Any, limit: float) -> float:
    """Scale `grads` [P] in place so that its L2 norm is at most `limit`.

    The norm before that is returned.
    """
    norm = float(np.sqrt(np.dot(grads, grads)))
    if limit and norm > limit:
        grads *= np.float32(limit / norm)
    return norm
