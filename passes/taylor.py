"""Importance of each unit from gradients: how the loss changes when the unit is taken away.

A unit is taken away by a gate from 1 to 0 on what it feeds into its readers; to first order the
loss changes by the sum of g w over the weights that read it. Its importance is the mean square of
that over small batches (Molchanov et al., Importance Estimation for Neural Network Pruning, 2019).
Against its own answers a model's gradient vanishes, so the target of each sample is drawn from the
model's own distribution: then the mean square is the Fisher information of the gate (Theis et al.,
Faster gaze prediction with dense networks and Fisher pruning, 2018), and needs no labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.coupling import Coupling
from onnxprune.data import Batch
from onnxprune.groups import Group
from onnxprune.labels import Labels
from onnxprune.passes.score import Scores, score
from onnxprune.training.autodiff.local import LocalWorker
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.loss import SMALLEST, Objective, append_loss, plan_objective, softmax
from onnxprune.training.run import differentiable

Array = NDArray[Any]
Feeds = Mapping[str, Array]
#: Samples of one gradient: in the mean of many, what they disagree on cancels.
ROWS = 16


def taylor(
    coupling: Coupling,
    groups: Sequence[Group],
    batches: Sequence[Feeds],
    *,
    seed: int = 0,
    threads: int | None = None,
) -> Scores:
    """Importance of every unit, [units]; unit 0 (frozen) gets infinity.

    Groups that no gradient reaches are ranked by the size of their weights.

    Raises:
        TrainingError: the model cannot be differentiated.
    """
    small = [part for batch in batches for part in _parts(coupling, batch)]
    places = list(_places(coupling))
    units = coupling.solution.units
    squares: Array = np.zeros((2, units))
    seen: Array = np.zeros((2, units), bool)
    for gradients in _gradients(coupling.graph.whole(), small, seed, threads):
        change = np.zeros((2, units))
        for name, axis, unit, makes in places:
            if name not in gradients:
                continue
            value = coupling.graph.constants[name].array()
            product = (gradients[name] * value).astype(np.float64)
            others = tuple(a for a in range(product.ndim) if a != axis)
            change[makes] += np.bincount(unit, product.sum(axis=others), units)
            seen[makes, unit] = True
        squares += change**2 / len(small)
    total: Scores = np.where(seen[0], squares[0], squares[1])
    known: Array = np.asarray(seen.any(axis=0))
    by_size = score(coupling, "l2", seed=seed)
    for group in groups:
        if not known[group.units].all():
            share = by_size[group.units] / max(float(by_size[group.units].sum()), 1e-30)
            total[group.units] = share * max(float(total[known].sum()), 1e-30)
    total[0] = np.inf
    return total


def _parts(coupling: Coupling, batch: Feeds) -> list[Feeds]:
    """The batch in small parts, where the model takes them."""
    counts = {a.shape[0] if a.ndim else 0 for a in batch.values()}
    free = not any(coupling.shapes.is_fixed(name, 0) for name, a in batch.items() if a.ndim)
    if len(counts) != 1 or not free:
        return [batch]
    (count,) = counts
    return [{n: a[i : i + ROWS] for n, a in batch.items()} for i in range(0, count, ROWS)]


def _places(coupling: Coupling) -> Iterator[tuple[str, int, Labels, int]]:
    """Axes of weights that hold channels: weight, axis, unit of each index, 1 if it makes them."""
    makers = {id(labels) for _, labels in coupling.products}
    for name, uses in coupling.constants.items():
        constant = coupling.graph.constants[name]
        if not constant.is_float or constant.is_vector:
            continue
        for block in next(iter(uses.values())):
            if (block.labels > 0).any():
                unit = coupling.solution.unit[np.maximum(block.labels, 0)]
                yield name, block.axes[0], unit, int(id(block.labels) in makers)


def _gradients(
    model: onnx.ModelProto, batches: Sequence[Feeds], seed: int, threads: int | None
) -> Iterator[Mapping[str, Array]]:
    """By batch the gradient of each weight, for targets drawn from the model's own answers."""
    rng = np.random.default_rng(seed)
    session = runtime.session(model, threads=threads)
    graph = differentiable(model, Batch(batches[0], None))
    answers = runtime.run(session, batches[0])
    objective = plan_objective(
        graph.draft, answers, None, has_teacher=True, alpha=1.0, temperature=1.0
    )
    append_loss(graph.draft, objective)
    with LocalWorker() as worker:
        trainer = WorkerTrainer(worker, graph, optimizer={"name": "adamw"}, threads=threads or 1)
        for feeds in batches:
            drawn = _drawn(objective, runtime.run(session, feeds), rng)
            yield trainer.grads({**feeds, **objective.feeds(None, drawn)})[1]


def _drawn(
    objective: Objective, answers: Mapping[str, Array], rng: np.random.Generator
) -> dict[str, Array]:
    """Outputs of the same form, drawn from the distributions that the answers stand for.

    Class scores: one class; sigmoids: 0 or 1; numbers: with noise of their own spread.
    """
    drawn = {}
    for term in objective.terms:
        z = answers[term.output].astype(np.float32)
        if term.kind == "soft":
            p = z if term.final == "softmax" else softmax(z, term.axis)
            high = np.cumsum(p, axis=term.axis)
            level = rng.random(np.delete(p.shape, term.axis))
            chosen = (high > np.expand_dims(level, term.axis)).argmax(axis=term.axis)
            sure = np.zeros_like(p)
            np.put_along_axis(sure, np.expand_dims(chosen, term.axis), 1, axis=term.axis)
            drawn[term.output] = sure if term.final == "softmax" else np.log(sure + SMALLEST)
        elif term.kind == "binary":
            drawn[term.output] = (rng.random(z.shape) < z).astype(np.float32)
        else:
            noise = rng.normal(0, max(float(z.std()), 1e-12), z.shape)
            drawn[term.output] = z + noise.astype(np.float32)
    return drawn
