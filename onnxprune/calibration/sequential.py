"""Re-solve a pruned model site by site, in the order in which data flows.

Each site sees the input that the pruned and already repaired layers before it really give it, and
the original's answer as its target. Where a residual stream is added, the target is the sum: so
each branch also makes good the error that the stream carries by then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.calibration import weights
from onnxprune.calibration.editable import Editable
from onnxprune.calibration.gram import SECOND, affordable, measure
from onnxprune.calibration.inputs import relative_size
from onnxprune.calibration.sites import Site, affine, find_sites
from onnxprune.calibration.solve import Halves, Solver
from onnxprune.calibration.walk import Walk
from onnxprune.errors import OnnxPruneError
from onnxprune.progress import Progress, Silent
from onnxprune.rewriting import Rewriter

_log = logging.getLogger(__name__)
Array = NDArray[Any]
Feeds = Mapping[str, Array]
Inputs = Literal["pruned", "original"]
#: Inputs of a site above which its second moments are not gathered: they take D^2 numbers.
MAX_INPUTS = 8192
_ROWS_PER_INPUT, _MOST_ROWS = 16, 32768


@dataclass
class Repaired:
    """The model, how many sites were solved, and why others were not."""

    model: onnx.ModelProto
    solved: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class Repair:
    """One run over a pruned model.

    Args:
        model: the pruned model; `rewriter` knows what it is of the original.
        batches: calibration feeds of the original's inputs.
        inputs: "pruned": a site sees what the repaired layers before it give (sequential);
            "original": the original's tensor at the kept channels (parallel: no site waits for
            another).
        rows: rows of data for a site's moments, or 16 times its inputs where that is more
            (32,768 at most).
        sums: which moments the solver needs.
        may_grow: False adds no bias where none was: the number of weights stays.
        only: the outputs of the sites that are solved; None for all.
        original: a form of the original to learn from, such as one adapted to made-up inputs.
    """

    model: onnx.ModelProto
    rewriter: Rewriter
    batches: Sequence[Feeds]
    solver: Solver
    inputs: Inputs = "pruned"
    rows: int = 16384
    sums: Sequence[str] = SECOND
    may_grow: bool = True
    seed: int = 0
    threads: int | None = None
    only: frozenset[str] | None = None
    original: onnx.ModelProto | None = None

    def __post_init__(self) -> None:
        """Index both models."""
        self.student = Editable(self.model, may_grow=self.may_grow)
        self.teacher = Editable(self.original or self.rewriter.coupling.graph.whole())
        self.rng = np.random.default_rng(self.seed)
        self.affordable: dict[int, int] = {}

    def run(self, progress: Progress | None = None) -> Repaired:
        """Solve every site that can be; what fails is left as it was, with the reason."""
        result = Repaired(self.model)
        sites = [s for s in find_sites(self.student) if self._comparable(s)]
        listener = progress or Silent()
        listener.stage("repair", len(sites))
        wanted = {s.target for s in sites} | {s.x for s in sites if self._parallel or s.is_cell}
        self.affordable = self._affordable(sites)
        student = Walk(self.student, self.batches, threads=self.threads)
        teacher = Walk(self.teacher, self.batches, wanted, self.threads)
        for done, site in enumerate(sites):
            if not self._parallel:
                student.advance(site.node)
            teacher.advance(self.teacher.maker[site.target] + 1)
            try:
                self._solve(site, student, teacher)
                result.solved += 1
            except (OnnxPruneError, np.linalg.LinAlgError, _Unsolvable) as reason:
                result.skipped[self.student.nodes[site.node].output[0]] = str(reason)
                _log.info("repair: %s stays: %s", site.output, reason)
            later = sites[done + 1 :]
            teacher.release({site.target, site.x} - {n for s in later for n in (s.target, s.x)})
            listener.step(done + 1)
        result.model = self.student.model()
        return result

    def _affordable(self, sites: Sequence[Site]) -> dict[int, int]:
        """How many rows each site may see, by its node."""
        widths = [weights.matrices(self.student, s).shape[2] for s in sites]
        wished = [max(self.rows, min(_ROWS_PER_INPUT * d, _MOST_ROWS)) for d in widths]
        rows = [min(n, self._available(s)) for n, s in zip(wished, sites, strict=True)]
        fitting = affordable(rows, [d if d <= MAX_INPUTS else 0 for d in widths])
        if "A" not in self.sums:
            fitting = rows
        return {s.node: n for s, n in zip(sites, fitting, strict=True)}

    def _available(self, site: Site) -> int:
        """About how many rows the batches have, so that none are reserved that do not exist."""
        dims = self.rewriter.coupling.shapes.dims(site.target)
        if not dims or 0 in dims:
            return _MOST_ROWS
        positions = float(np.prod(dims)) / dims[1 if site.is_conv else -1]
        times = sum(relative_size(self.rewriter.coupling, batch) for batch in self.batches)
        return max(1, int(np.ceil(positions * times)))

    @property
    def _parallel(self) -> bool:
        return self.inputs == "original"

    def _comparable(self, site: Site) -> bool:
        """Whether it is asked for, the original has its tensors, and nothing is broadcast."""
        if self.only is not None and site.output not in self.only:
            return False
        shapes = self.rewriter.coupling.shapes
        known = site.target in self.teacher.maker and site.output in self.teacher.maker
        return known and shapes.dims(site.output) == shapes.dims(site.target)

    def _solve(self, site: Site, student: Walk, teacher: Walk) -> None:
        old = weights.intercept(self.student, site)
        start = weights.matrices(self.student, site)
        if old is None:
            raise _Unsolvable("its bias varies over positions")
        if start.shape[2] > MAX_INPUTS and "A" in self.sums:
            raise _Unsolvable(f"{start.shape[2]} inputs are more than {MAX_INPUTS}")
        halves = self._moments(site, student, teacher)
        scale = site.scale().reshape((*start.shape[:2], 1))
        shiftable = weights.can_shift(self.student, site)
        parts = [self.solver(halves, g, start[g] * scale[g], shiftable) for g in range(site.groups)]
        solved = np.stack([w for w, _ in parts])
        bias = np.concatenate([b for _, b in parts])
        if not (np.isfinite(solved).all() and np.isfinite(bias).all()):
            raise _Unsolvable("its solution is not finite")
        solved = np.divide(solved, scale, out=start.copy(), where=scale != 0)
        weights.write_matrices(self.student, site, solved)
        if shiftable:
            weights.shift(self.student, site, bias - old)
        self._record(site, halves, solved)

    def _moments(self, site: Site, student: Walk, teacher: Walk) -> Halves:
        node = self.student.nodes[site.node]
        weight = self.student.weight(node.input[site.slot])
        assert weight is not None
        gates = self._gates(site) if site.is_cell else None
        cuts = {} if gates else {"t": kept_indices(self.rewriter, site.target)}
        if self._parallel:
            cuts["x"] = kept_indices(self.rewriter, site.x)
        feeds: list[dict[str, Array]] = []
        for own, original in zip(student.held, teacher.held, strict=True):
            batch = {"x": (original if self._parallel else own)[site.x]}
            batch["t"] = gates(original[site.x]) if gates else original[site.target]
            if site.other:
                batch["o"] = self._other(site, own, original)
            feeds.append(batch)
        return measure(
            site,
            node,
            weight.shape,
            cuts,
            feeds,
            rows=self.affordable[site.node],
            rng=self.rng,
            names=self.sums,
            threads=self.threads,
        )

    def _gates(self, site: Site) -> Callable[[Array], Array]:
        """What the original's inputs add to the gates that were kept: x[*B, I] -> [*B, M]."""
        node = self.rewriter.coupling.graph.producer[site.output]
        weight = self.teacher.weight(node.inputs[site.slot])
        if weight is None:
            raise _Unsolvable("the original's weight is not stored")
        labels = self.rewriter.labels(node, site.slot, 1)
        rows = slice(None) if labels is None else np.flatnonzero(self.rewriter.mask(labels))
        matrix = weight[:, rows].reshape(-1, weight.shape[2]).T.astype(np.float32)
        both = (
            self.teacher.weight(node.input(site.bias_slot)) if node.input(site.bias_slot) else None
        )
        if both is None:
            both = np.zeros((weight.shape[0], weight.shape[1]))
        bias = both[:, : weight.shape[1]][:, rows].ravel().astype(np.float32)
        return lambda x: np.asarray(x.astype(np.float32) @ matrix + bias)

    def _other(self, site: Site, own: Mapping[str, Array], original: Mapping[str, Array]) -> Array:
        if not self._parallel:
            return own[site.other]
        value = original[site.other]
        for axis, kept in kept_indices(self.rewriter, site.other).items():
            value = np.take(value, kept, axis)
        return value

    def _record(self, site: Site, halves: Halves, solved: Array) -> None:
        """A BatchNormalization right behind the operator gets the statistics of its new input."""
        if not site.path or site.path[0].op_type != "BatchNormalization" or "A" not in self.sums:
            return
        if not all(self.student.can_write(site.path[0].node, slot) for slot in range(1, 5)):
            return
        count = halves[0].count + halves[1].count
        total = {n: sum(h.sums[n] for h in halves if h.count) / count for n in ("A", "p")}
        mean = np.einsum("gmd,gd->gm", solved, total["p"])
        square = np.einsum("gmd,gmd->gm", solved @ total["A"], solved)
        before = Site(**{**vars(site), "target": site.output, "path": []})
        step = affine(self.student, before, site.path[0].node)
        own = weights.own_bias(self.student, site)
        assert step is not None and own is not None
        var = np.maximum(square - mean**2, 0).ravel()
        weights.record_statistics(self.student, step, mean.ravel() + own, var)


class _Unsolvable(Exception):
    """A site stays as it is; the words say why."""


def kept_indices(rewriter: Rewriter, name: str) -> dict[int, Array]:
    """Per axis of one of the original's tensors what was kept, where something was removed."""
    found: dict[int, Array] = {}
    for block in rewriter.coupling.layouts.get(name, ()):
        if block.joint:
            settled = rewriter.coupling.settled.get(id(block))
            axes = dict(settled[1]) if settled else {}
        else:
            axes = {block.axes[0]: block.labels}
        for axis, labels in axes.items():
            mask = rewriter.mask(labels)
            if not mask.all():
                found[axis] = np.flatnonzero(mask)
    return found
