"""What a pruned model is repaired with: the user's data, or inputs made up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.coupling import Coupling

if TYPE_CHECKING:
    from onnxprune.data import Dataset

Array = NDArray[Any]
#: Samples of the user's data, and of made-up inputs.
SAMPLES, SYNTHETIC = 1024, 2048
#: Multiply-adds that made-up inputs may cost, and how often each runs through the model.
OPERATIONS, RUNS = 5e11, 6
#: Samples made up however large the model is.
_FEWEST = 32
_BATCH = 64
#: Activations that may be held at a time.
MEMORY_BYTES = 2_000_000_000
_BOTH_MODELS = 2


@dataclass(frozen=True)
class Calibration:
    """Feeds by batch, and in words where they come from.

    `is_typical`: channels can be ranked by them.
    """

    batches: Sequence[Mapping[str, Array]]
    source: str
    is_real: bool
    is_typical: bool

    @property
    def samples(self) -> int:
        """How many samples there are in all."""
        return sum(_rows(b) for b in self.batches)


def from_data(data: Dataset, *, samples: int = SAMPLES, seed: int = 0) -> Calibration:
    """The first samples of the shuffled data: its order may be by class."""
    batches: list[Mapping[str, Array]] = []
    count = 0
    for batch in data.batches(_BATCH, rng=np.random.default_rng(seed)):
        batches.append(dict(batch.feeds))
        count += _rows(batch.feeds)
        if count >= samples:
            break
    return Calibration(batches, "data", True, True)


def made_up(
    model: onnx.ModelProto, *, macs: float = 0.0, seed: int = 0, threads: int | None = None
) -> Calibration:
    """Images, as the model knows them as far as it tells, or random inputs where it reads none.

    `macs`: multiply-adds of one sample; the more, the fewer are made.
    """
    from onnxprune.calibration.synthetic import synthesize
    from onnxprune.feeds import random_feeds

    affordable = OPERATIONS / max(macs, 1.0)
    samples = int(np.clip(affordable / RUNS, _FEWEST, SYNTHETIC))
    images = synthesize(model, samples, tries=int(affordable), seed=seed, threads=threads)
    if images is not None:
        return Calibration(images, "synthesized images", False, True)
    batches: list[Mapping[str, Array]] = []
    while sum(map(_rows, batches)) < samples and len(batches) < samples:
        number = seed + len(batches)
        feeds = random_feeds(model, seed=number, batch=min(_BATCH, samples))
        batches.append(repetitive(feeds, np.random.default_rng(number)))
    return Calibration(batches, "random inputs", False, False)


def repetitive(feeds: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Rows of integers, such as tokens, in which a few of their values come often, as in texts.

    With frequencies that fall with the square of the rank, after Zipf (1949). On evenly drawn
    tokens a recurrent network is in states that no text brings about.
    """
    found = dict(feeds)
    for name, array in feeds.items():
        if array.dtype.kind in "iu" and array.ndim > 1 and array.size:
            share = 1.0 / np.arange(1, array.shape[-1] + 1) ** 2
            picked = rng.choice(array.shape[-1], array.shape, p=share / share.sum())
            found[name] = np.take_along_axis(array, picked, -1)
    return found


def limited(
    calibration: Calibration, coupling: Coupling, budget_bytes: int = MEMORY_BYTES
) -> Calibration:
    """As many of the batches as can be walked through within a memory budget.

    At least one; of one that is too large by itself, as many rows as fit, if the model allows.
    """
    batches = calibration.batches
    if not batches:
        return calibration
    each = max(peak_bytes(coupling, batches[0]), 1)
    fitting = list(batches[: max(1, budget_bytes // each)])
    rows = max(1, _rows(batches[0]) * budget_bytes // each)
    free = not any(coupling.shapes.is_fixed(name, 0) for name, a in fitting[0].items() if a.ndim)
    if each > budget_bytes and free:
        fitting = [{name: a[:rows] for name, a in fitting[0].items()}]
    if len(fitting) == 1 and free:
        fitting = _halved(fitting[0])
    return replace(calibration, batches=fitting)


def _halved(batch: Mapping[str, Array]) -> list[Mapping[str, Array]]:
    """Two batches, where that can be: each half of the data checks what the other one gives."""
    lengths = {a.shape[0] if a.ndim else 0 for a in batch.values()}
    if len(lengths) > 1 or min(lengths) < 2:
        return [batch]
    middle = -(-lengths.pop() // 2)
    parts = (slice(middle), slice(middle, None))
    return [{name: a[part] for name, a in batch.items()} for part in parts]


def peak_bytes(coupling: Coupling, feeds: Mapping[str, Array]) -> int:
    """About how much of a batch is alive at once, in the original and the pruned model."""
    graph, shapes = coupling.graph, coupling.shapes
    sizes = {
        name: 4 * int(np.prod(shapes.dims(name) or (0,)))
        for node in graph.nodes
        for name in node.outputs
        if name
    }
    last = {name: use[-1][0] for name, use in graph.uses.items()}
    alive = peak = 0
    ending: dict[int, int] = {}
    for node in graph.nodes:
        for name in filter(None, node.outputs):
            alive += sizes[name]
            end = max(last.get(name, node.index), node.index)
            ending[end] = ending.get(end, 0) + sizes[name]
        peak = max(peak, alive)
        alive -= ending.pop(node.index, 0)
    return int(_BOTH_MODELS * peak * relative_size(coupling, feeds))


def relative_size(coupling: Coupling, feeds: Mapping[str, Array]) -> float:
    """How much more there is in a batch than in the inputs that shapes were inferred for."""
    known = sum(int(np.prod(coupling.shapes.dims(n) or (1,))) for n in feeds)
    return sum(np.size(a) for a in feeds.values()) / max(known, 1)


def _rows(feeds: Mapping[str, Array]) -> int:
    return max((a.shape[0] for a in feeds.values() if np.ndim(a)), default=1)
