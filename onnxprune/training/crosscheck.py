"""Whether a worker's gradients are right, tensor by tensor, before training begins.

One direction over all parameters hides a small tensor whose gradient is wrong; ONNX Runtime 1.19
computes such for some graphs. So they are compared with those of plain ONNX operators, or, where an
operator has no such gradient, with differences of the loss for some tensors at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.errors import OnnxPruneError, TrainingError
from onnxprune.training.autodiff import gradient_model
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.draft import to_model
from onnxprune.training.legalise import TrainingGraph

Arrays = Mapping[str, NDArray[Any]]
#: Share of a gradient's norm; rounding gives some 1e-6.
TOLERANCE = 0.01
#: Share of the norm of all gradients together: what is zero but for rounding, as that of a bias of
#: attention's keys, has no digits to compare.
FLOOR = 1e-6
#: Times what a rounding of the parameters changes.
ROUGH = 4.0
ROUNDING = 1.2e-7
MAX_NODES = 20_000
PARTS = 8
_log = logging.getLogger(__name__)


def doubted(
    trainer: WorkerTrainer, graph: TrainingGraph, batch: Arrays, *, threads: int = 1, seed: int = 0
) -> tuple[str, ...]:
    """Parameters whose gradients are not those of plain ONNX operators.

    Where there are no such gradients, differences of the loss are tried instead.

    Raises:
        TrainingError: differences of the loss contradict the gradient.
    """
    _, grads = trainer.grads(batch)
    try:
        wanted = plain_gradients(graph, trainer.feeds(batch), threads=threads)
    except (ValueError, OnnxPruneError) as error:
        _log.debug("gradients are checked by differences: %s", error)
        _check_parts(trainer, graph, grads, batch, seed)
        return ()
    wrong = differing(grads, wanted)
    if wrong:
        shaken = plain_gradients(graph, trainer.feeds(batch), threads=threads, shake=True)
        wrong = differing(grads, wanted, shaken)
    return wrong


def plain_gradients(
    graph: TrainingGraph, feeds: Arrays, *, threads: int = 1, shake: bool = False
) -> dict[str, NDArray[Any]]:
    """The gradient of every parameter by plain ONNX operators, run as they are written.

    `shake` changes the parameters by a rounding.

    Raises:
        ValueError: an operator has no such gradient, or the graph is too large for a check.
        InvalidModelError: ONNX Runtime cannot load or run the gradient graph.
        InvalidDataError: the feeds do not fit it.
    """
    names = sorted(graph.parameters)
    if len(graph.draft.nodes) > MAX_NODES:
        raise ValueError(f"{len(graph.draft.nodes)} nodes take too long to differentiate")
    model = gradient_model(to_model(graph.draft), names)
    session = runtime.session(model, threads=threads, optimize=False)
    values = {n: p.value for n, p in graph.parameters.items()}
    if shake:
        rng = np.random.default_rng(0)
        values = {n: _rounded(values[n], rng) for n in names}
    everything = {**feeds, **values, **graph.draft.buffers}
    own = {i.name: everything[i.name] for i in session.get_inputs()}
    found = runtime.run(session, own, [name + "_grad" for name in names])
    return {name: found[name + "_grad"] for name in names}


def _rounded(array: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    factor = 1 + rng.choice([-ROUNDING, ROUNDING], array.shape).astype(np.float32)
    return np.asarray(array * factor, np.float32)


def differing(grads: Arrays, wanted: Arrays, shaken: Arrays | None = None) -> tuple[str, ...]:
    """The names of gradients that are further from the wanted ones than rounding explains.

    What rounding does is TOLERANCE; in rough graphs more, which `shaken` tells: the wanted
    gradients at parameters that are off by a rounding.
    """
    noise = {n: _norm(shaken[n] - g) if shaken is not None else 0.0 for n, g in wanted.items()}
    norms = {name: _norm(gradient) for name, gradient in wanted.items()}
    total = float(np.linalg.norm(list(norms.values())))
    if not np.isfinite(total):
        return ()
    return tuple(
        name
        for name, gradient in wanted.items()
        if not _norm(grads[name] - gradient)
        <= TOLERANCE * norms[name] + ROUGH * noise[name] + FLOOR * total
    )


def _norm(array: NDArray[Any]) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _check_parts(
    trainer: WorkerTrainer, graph: TrainingGraph, grads: Arrays, batch: Arrays, seed: int
) -> None:
    """Compare the gradient with differences, for tensors together that move the loss alike."""
    for names in alike(grads, {n: p.value for n, p in graph.parameters.items()}):
        try:
            trainer.check(batch, None, seed=seed, names=names)
        except TrainingError as error:
            raise TrainingError(f"{error} (it is about {_listed(names)})") from error


def alike(grads: Arrays, values: Arrays) -> list[list[str]]:
    """The parameters in at most PARTS parts, by how much they move the loss."""
    moves = {n: _norm(g) * _norm(values[n]) / max(1, g.size) ** 0.5 for n, g in grads.items()}
    order = sorted(moves, key=lambda name: (moves[name], name))
    size = -(-len(order) // PARTS)
    return [order[i : i + size] for i in range(0, len(order), size)]


def described(names: Sequence[str]) -> str:
    """What is wrong with the worker's gradients, in words."""
    return (
        f"onnxruntime-training computes another gradient of {_listed(names)} than plain operators"
    )


def _listed(names: Sequence[str], shown: int = 3) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
