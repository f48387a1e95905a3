"""Importance of each unit from activations: what removing it costs the layers that read it.

All criteria look at the readers: with inputs p (unfolded patches for convolutions) of covariance H
and weights W, a layer's output varies by tr(W H W^T). Costs are shares of that, so that layers
compare; a unit's cost is the sum over its readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.calibration.editable import Editable
from onnxprune.calibration.gram import affordable, measure
from onnxprune.calibration.sites import Site, follow, linear
from onnxprune.calibration.solve import joined
from onnxprune.calibration.walk import Walk
from onnxprune.coupling import Coupling
from onnxprune.groups import Group
from onnxprune.labels import Labels
from onnxprune.passes.score import Scores, score
from onnxprune.runtime import one_blas_thread

Array = NDArray[Any]
#: Inputs above which a convolution's channels are compared by one tap instead of whole patches.
MAX_INPUTS = 2304
#: Sum of inputs cubed over all layers, above which that happens to narrower ones too.
OPERATIONS = 3e10
#: Damping of H, relative to its mean diagonal.
DAMP = 1e-3
#: Units that go in one step: a group's size over this.
STEPS = 64


@dataclass
class Reader:
    """A layer's input covariance `gram`[D, D], mean square `energy`[D] and weights [M, D].

    `unit`[D] says which unit each input belongs to; with `norms` the weights are only their sizes.
    """

    gram: Array
    energy: Array
    weight: Array
    unit: Labels
    norms: bool = False

    @property
    def variance(self) -> float:
        """How much the output varies."""
        if self.norms:
            return max(float(np.diag(self.gram) @ self.weight[0] ** 2), 1e-30)
        return max(float(np.vdot(self.weight @ self.gram, self.weight)), 1e-30)


def measured(
    coupling: Coupling,
    groups: Sequence[Group],
    name: str,
    batches: Sequence[Mapping[str, Array]],
    *,
    original: onnx.ModelProto | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Scores:
    """Importance of every unit, [units], by one of `MEASURED`; unit 0 (frozen) gets infinity.

    Groups that no measured layer reads are ranked by the size of their weights. `original`: a form
    of the model with other numbers in it, to measure in its place.
    """
    if name == "taylor":
        from onnxprune.passes.taylor import taylor

        return taylor(coupling, groups, batches, seed=seed, threads=threads)
    model = Editable(original or coupling.graph.model)
    total = score(coupling, "l2", seed=seed)
    with one_blas_thread():
        readers = measure_readers(coupling, model, batches, seed=seed, threads=threads)
        for group in groups:
            own = [r for r in readers if np.isin(r.unit, group.units).any()]
            if own:
                total[group.units] = _BY_NAME[name](group.units, own)
            else:
                total[group.units] /= max(float(total[group.units].sum()), 1e-30)
    total[0] = np.inf
    return total


def measure_readers(
    coupling: Coupling,
    model: Editable,
    batches: Sequence[Mapping[str, Array]],
    *,
    rows: int = 16384,
    seed: int = 0,
    threads: int | None = None,
) -> list[Reader]:
    """The statistics of every linear operator that contracts prunable channels."""
    sites = [s for i in range(len(model.nodes)) if (s := linear(model, i)) is not None]
    sites = [s for s in sites if s.groups == 1 and _units(coupling, s) is not None]
    limit = _limit([_inputs(model, s) for s in sites])
    allowed = affordable([rows] * len(sites), [_width(model, s, limit) for s in sites])
    walk, rng = Walk(model, batches, threads=threads), np.random.default_rng(seed)
    found = []
    for site, count in zip(sites, allowed, strict=True):
        walk.wanted = {site.x, site.output}
        walk.advance(site.node + 1)
        shaped_as = site.x if site.is_cell else site.output
        if not site.is_cell:
            follow(model, site)
        feeds = [{"x": held[site.x], "t": held[shaped_as]} for held in walk.held]
        found.append(_reader(coupling, model, site, feeds, count, limit, rng, threads))
    return [r for r in found if r is not None]


def _limit(widths: Sequence[int]) -> int:
    """The most inputs that are inverted: of layers too wide in all, the widest are not."""
    known, counts = np.unique([0, *widths], return_counts=True)
    fits = (counts * known.astype(float) ** 3).cumsum() <= OPERATIONS
    return min(MAX_INPUTS, int(known[fits][-1]))


def _inputs(model: Editable, site: Site) -> int:
    """Channels times taps that a site reads."""
    tensor = model.tensor(model.nodes[site.node].input[site.slot])
    assert tensor is not None
    return int(np.prod(tensor.dims)) // site.channels


def _width(model: Editable, site: Site, limit: int) -> int:
    """Over how many inputs a site's moments are taken."""
    tensor = model.tensor(model.nodes[site.node].input[site.slot])
    assert tensor is not None
    width = _inputs(model, site)
    return width if width <= limit or not site.is_conv else tensor.dims[1]


def _units(coupling: Coupling, site: Site) -> Labels | None:
    """The unit of each channel of a site's input; None where nothing can be removed."""
    rank = len(coupling.shapes.dims(site.x) or ())
    axis = 1 if site.is_conv else rank - 1
    for block in coupling.layouts.get(site.x, ()):
        if not block.joint and block.axes[0] == axis:
            unit = coupling.solution.unit[np.maximum(block.labels, 0)]
            return unit if unit.any() else None
    return None


def _reader(
    coupling: Coupling,
    model: Editable,
    site: Site,
    feeds: Sequence[Mapping[str, Array]],
    rows: int,
    limit: int,
    rng: np.random.Generator,
    threads: int | None,
) -> Reader | None:
    from onnxprune.calibration.weights import matrices

    weight = matrices(model, site)[0] * site.scale()[:, None]
    unit = _units(coupling, site)
    node, shape = model.nodes[site.node], model.weight(model.nodes[site.node].input[1])
    assert unit is not None and shape is not None
    dims, norms = shape.shape, False
    if weight.shape[1] > (limit if site.is_conv else MAX_INPUTS):
        if not site.is_conv:
            return None
        weight = np.sqrt((weight.reshape(len(weight), unit.size, -1) ** 2).sum((0, 2)))[None]
        node, dims, norms = onnx.NodeProto(op_type="Conv"), (1, 1, *[1] * (shape.ndim - 2)), True
        site = Site(**{**vars(site), "op_type": "Conv"})
        feeds = [{"x": f["x"], "t": f["x"]} for f in feeds]
    halves = measure(
        site, node, dims, {}, feeds, rows=rows, rng=rng, names=("A", "p"), threads=threads
    )
    whole = joined(halves)
    square, mean = whole.mean("A", 0), whole.mean("p", 0)
    taps = weight.shape[1] // unit.size
    gram = square - np.outer(mean, mean)
    return Reader(gram, np.diag(square).copy(), weight, np.repeat(unit, taps), norms)


def _energy(units: Labels, readers: Sequence[Reader], centred: bool) -> Scores:
    total = np.zeros(units.size)
    for reader in readers:
        moment = np.diag(reader.gram) if centred else reader.energy
        each = (reader.weight**2).sum(axis=0) * moment
        sums = np.bincount(reader.unit, each, int(units.max()) + 1)
        total += sums[units] / max(float(each.sum()), 1e-30)
    return total


def wanda(units: Labels, readers: Sequence[Reader]) -> Scores:
    """|W|^2 E[x^2], by unit (Sun et al., Wanda, 2024, for structures)."""
    return _energy(units, readers, centred=False)


def flap(units: Labels, readers: Sequence[Reader]) -> Scores:
    """|W|^2 Var[x], by unit: a constant channel is only a bias (An et al., FLAP, 2024)."""
    return _energy(units, readers, centred=True)


def reconstruction(units: Labels, readers: Sequence[Reader]) -> Scores:
    """The error that remains when the readers' other weights are re-solved, unit after unit.

    Removing inputs q costs tr(W_q [(H^-1)_qq]^-1 W_q^T); the cheapest unit goes, weights and H^-1
    follow, and so on (Hassibi and Stork, Optimal Brain Surgeon, 1993; Kurtic et al., ZipLM, 2023).
    """
    states = [s for r in readers if (s := _Elimination.of(r, units)) is not None]
    result = np.zeros(units.size)
    alive = np.arange(units.size)
    step, last = max(1, units.size // STEPS), 0.0
    place = 0
    while alive.size:
        losses = sum((s.losses(alive) for s in states), np.zeros(alive.size))
        order = np.argsort(losses, kind="stable")[:step]
        for i in order:
            last = max(last * (1 + 1e-9), float(losses[i]), 1e-30)
            result[alive[i]] = last
            place += 1
        for state in states:
            state.remove(alive[order])
        alive = np.delete(alive, order)
    return result


@dataclass
class _Elimination:
    """One reader while units are removed: H^-1, the weights, and the inputs [units, k] of each."""

    inverse: Array
    weight: Array
    places: Array
    variance: float
    norms: bool

    @classmethod
    def of(cls, reader: Reader, units: Labels) -> _Elimination | None:
        """None where the units do not have equally many inputs here."""
        level = DAMP * max(float(np.trace(reader.gram)) / len(reader.gram), 1e-12)
        inverse = np.linalg.inv(reader.gram + level * np.eye(len(reader.gram)))
        places = [np.flatnonzero(reader.unit == u) for u in units]
        if len({p.size for p in places}) > 1 or not places[0].size:
            return None
        variance, weight = reader.variance, reader.weight.copy()
        return cls(inverse, weight, np.stack(places), variance, reader.norms)

    def losses(self, alive: Array) -> Scores:
        """What removing each one of `alive` would cost now."""
        at = self.places[alive]
        parts = np.linalg.inv(self.inverse[at[:, :, None], at[:, None, :]])
        weights = self.weight[:, at]
        if self.norms:
            return (
                np.asarray((weights[0] ** 2 * np.einsum("ukk->uk", parts)).sum(1)) / self.variance
            )
        return np.asarray(
            np.einsum("muk,ukl,mul->u", weights, parts, weights, optimize=True) / self.variance
        )

    def remove(self, gone: Array) -> None:
        """These units are gone; the others make up for them."""
        at = self.places[gone].ravel()
        rows = self.inverse[at]
        solved = np.linalg.solve(rows[:, at], rows)
        if not self.norms:
            self.weight = self.weight - self.weight[:, at] @ solved
        self.inverse = self.inverse - rows.T @ solved


_BY_NAME = {"wanda": wanda, "flap": flap, "reconstruction": reconstruction}
#: Criteria that need data.
MEASURED: tuple[str, ...] = (*_BY_NAME, "taylor")
