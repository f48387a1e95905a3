"""Re-solve the weights that read pruned channels, so that each layer answers as before."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.calibration import weights
from onnxprune.calibration.editable import Editable
from onnxprune.calibration.gram import Moments, Probe
from onnxprune.calibration.sites import Site, find_sites
from onnxprune.calibration.solve import RIDGES, fit
from onnxprune.calibration.walk import Walk
from onnxprune.progress import Progress, Silent
from onnxprune.rewriting import Rewriter

_log = logging.getLogger(__name__)
Array = NDArray[Any]


@dataclass(frozen=True)
class Reconstruct:
    """Ridge."""

    name: ClassVar[str] = "reconstruct"

    rows: int = 32768
    seed: int = 0
    threads: int | None = None
    rectify: int = 0
    ridges: tuple[float, ...] = RIDGES

    def __call__(
        self,
        model: onnx.ModelProto,
        rewriter: Rewriter,
        batches: Sequence[Mapping[str, Array]],
        *,
        progress: Progress | None = None,
    ) -> onnx.ModelProto:
        student, teacher = Editable(model), Editable(rewriter.coupling.graph.model)
        sites = [s for s in find_sites(student) if s.target in teacher.maker]
        listener = progress or Silent()
        listener.stage("reconstruct", len(sites))
        rng = np.random.default_rng(self.seed)
        walk = Walk(student, batches, threads=self.threads)
        original = Walk(teacher, batches, {s.target for s in sites}, self.threads)
        for done, site in enumerate(sites):
            walk.advance(site.node)
            original.advance(teacher.maker[site.target] + 1)
            feeds = [
                {"x": held[site.x], "t": of[site.target]} | ({"o": held[site.other]} if site.other else {})
                for held, of in zip(walk.held, original.held, strict=True)
            ]
            self._solve(student, rewriter, site, feeds, rng)
            original.release({site.target} - {s.target for s in sites[done + 1 :]})
            listener.step(done + 1)
        return student.model()

    def _solve(
        self,
        student: Editable,
        rewriter: Rewriter,
        site: Site,
        feeds: Sequence[Mapping[str, Array]],
        rng: np.random.Generator,
    ) -> None:
        node = student.nodes[site.node]
        old = weights.intercept(student, site)
        if old is None:
            return
        shape = student.weight(node.input[site.slot]).shape
        cuts = _cuts(rewriter, site.target)
        probe = Probe(site, node, shape, cuts, feeds, self.rows, rng, self.threads)
        halves = probe.moments()
        start = weights.matrices(student, site)
        groups, each, _ = start.shape
        scale = site.scale().reshape(groups, each)
        shiftable = weights.can_shift(student, site)
        solved, fresh = np.empty_like(start), np.empty((groups, each))
        z_w, used = np.empty_like(start), []
        for g in range(groups):
            w0 = start[g] * scale[g][:, None]
            z_w[g], fresh[g], before, after, ridge = fit(halves, g, w0, intercept=shiftable, ridges=self.ridges)
            used.append(ridge)
        if self.rectify and shiftable and _is_rectified(student, site):
            self._rectify(probe, halves, start * scale[..., None], z_w, fresh, used)
        for g in range(groups):
            solved[g] = np.divide(z_w[g], scale[g][:, None], out=start[g].copy(), where=scale[g][:, None] != 0)
        weights.write_matrices(student, site, solved)
        if shiftable:
            change = fresh.ravel() - old
            weights.shift(student, site, change)
        if site.path and site.path[0].op_type == "BatchNormalization":
            self._refresh(student, site, halves, solved)

    def _rectify(self, probe, halves, w0, w, b, ridges) -> None:
        from scipy.linalg import cho_factor, cho_solve
        total = halves[0] + halves[1]
        n = total.count
        factors = []
        for g in range(len(w)):
            A, p = total.sums["A"][g] / n, total.sums["p"][g] / n
            H = A - np.outer(p, p)
            level = ridges[g] * max(np.trace(H) / len(H), 1e-12)
            factors.append((cho_factor(H + level * np.eye(len(H)), lower=True), p, level))
        first = last = None
        vw, vb = w.copy(), b.copy()
        t = 1.0
        for it in range(self.rectify):
            one, two = probe.rectified(vw, vb)
            both = one + two
            err = both.sums["e"].sum() / n
            first = first or err
            last = err
            pw, pb = w.copy(), b.copy()
            for g, (factor, p, level) in enumerate(factors):
                B, z = both.sums["B"][g] / n, both.sums["z"][g] / n
                cross = B - np.outer(p, z) + level * w0[g].T
                w[g] = cho_solve(factor, cross).T
                b[g] = z - w[g] @ p
            t2 = (1 + np.sqrt(1 + 4 * t * t)) / 2
            vw, vb = w + (t - 1) / t2 * (w - pw), b + (t - 1) / t2 * (b - pb)
            t = t2
        _log.info("rectified: %.4g -> %.4g", first, last)

    def _refresh(self, student: Editable, site: Site, halves, solved: Array) -> None:
        from onnxprune.calibration.sites import _batchnorm
        total = halves[0] + halves[1]
        n = total.count
        p, A = total.sums["p"] / n, total.sums["A"] / n
        mean = np.einsum("gmd,gd->gm", solved, p)
        square = np.einsum("gmd,gde,gme->gm", solved, A, solved, optimize=True)
        var = np.maximum(square - mean**2, 0).ravel()
        own = weights.bias(student, site)
        step = _batchnorm(student, site.path[0].node, student.nodes[site.path[0].node])
        weights.refresh_norm(student, step, mean.ravel() + own, var)


def _cuts(rewriter: Rewriter, name: str) -> dict[int, Array]:
    """Per axis of a tensor what is kept, where something is removed."""
    found = {}
    for block in rewriter.coupling.layouts.get(name, ()):
        settled = rewriter.coupling.settled.get(id(block)) if block.joint else None
        axes = settled[1].items() if settled else [(block.axes[0], block.labels)] if not block.joint else []
        for axis, labels in axes:
            mask = rewriter.mask(labels)
            if not mask.all():
                found[axis] = np.flatnonzero(mask)
    return found


def _is_rectified(model: Editable, site: Site) -> bool:
    readers = model.readers.get(site.target, [])
    return bool(readers) and site.target not in model.outputs and all(
        model.nodes[i].op_type == "Relu" for i in readers
    )
