"""Drop whole layers: residual branches and plain layers, with a small fitted map in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from onnxprune import runtime
from onnxprune.analysis import analyse, normalized
from onnxprune.calibration.inputs import Calibration, from_data, limited
from onnxprune.cost import count_params
from onnxprune.data import Dataset
from onnxprune.errors import BudgetError, InvalidDataError, InvalidModelError, InvalidRecipeError
from onnxprune.facts import find_facts
from onnxprune.graph import Graph, captured_by
from onnxprune.layer_candidates import Candidate, Kinds, Replacement, find_candidates
from onnxprune.layer_edits import LayerEdit, edited, shadowed
from onnxprune.noops import remove_dead, remove_noops
from onnxprune.progress import Progress, Silent
from onnxprune.rewriting import Rewriter
from onnxprune.shapes import infer
from onnxprune.verify import (
    FAILURES,
    default_tolerance,
    deviation,
    model_difference,
    structure_problems,
)

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Ranking = Literal["output", "cosine"]
#: Samples on which the change of the outputs is measured.
RANKING_SAMPLES = 256


@dataclass(frozen=True)
class Dropped:
    """What went: a residual "branch" or a plain "layer".

    `similarity` is the cosine of what entered and left it, its sum with the stream for a branch; 0
    where the shapes differ. `output_error` is what the outputs have lost by then. `edit` is what
    took its place, see `onnxprune.layer_edits`.
    """

    output: str
    layers: tuple[str, ...]
    kind: str
    similarity: float
    output_error: float
    macs: float
    params: int
    replacement: str
    edit: str = field(repr=False)


@dataclass(frozen=True)
class LayersResult:
    """The model without these layers, in the order in which they were chosen.

    `candidates`: how many could have gone at first. `max_error`: how far the model was from its
    twin, see `PruneLayers`; `notes`: what else happened.
    """

    model: onnx.ModelProto
    dropped: tuple[Dropped, ...]
    candidates: int
    max_error: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Step:
    """A model on the way, and what was dropped up to it."""

    model: onnx.ModelProto
    macs: float
    params: int
    error: float = 0.0
    dropped: tuple[Dropped, ...] = ()
    edits: tuple[LayerEdit, ...] = ()
    max_error: float = 0.0


@dataclass(frozen=True)
class PruneLayers:
    """Drop the layers that matter least, one after another.

    A branch whose output is close to its input matters little (ShortGPT, Men et al., 2024); which
    goes is decided by what the model's outputs lose on calibration data, for a budget by what they
    lose for each multiply-add or parameter saved. In the place of x + f(x) comes x; or s * x + t
    for each channel; or W x + t. A plain layer, of which only other layers read what it gives,
    leaves nothing: those read its input, with new weights. All are fitted by ridge regression to
    what the original has there, on the inputs that the model without the layers gives. At the end
    all other layers are solved anew as well (`repair`).

    Before that, the result must equal its twin: the original, all its nodes in place, in which the
    tensors made anew come from what was fitted.

    `layers`: how many go; or `macs` or `params`: the share that is left at most; or `max_drop`: as
    many as that many points of the metric allow. `kinds`: "auto" is "branch" where there are any,
    else "plain"; with a budget it is "all".
    """

    name: ClassVar[str] = "prune-layers"

    layers: int | None = None
    replacement: Replacement = "linear"
    ranking: Ranking = "output"
    samples: int = 1024
    threads: int | None = None
    kinds: Kinds = "auto"
    macs: float | None = None
    params: float | None = None
    max_drop: float | None = None
    repair: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        given = [n for n in ("layers", "macs", "params") if getattr(self, n) is not None]
        if len(given) > 1:
            raise InvalidRecipeError(f"give one of layers, macs, params; got {' and '.join(given)}")
        if self.layers is not None and self.layers < 1:
            raise InvalidRecipeError(f"layers {self.layers}: must be at least 1")
        for option in ("macs", "params"):
            value = getattr(self, option)
            if value is not None and not 0 < value <= 1:
                raise InvalidRecipeError(f"{option} {value:g}: a share must be in (0, 1]")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise InvalidRecipeError(f"max_drop {self.max_drop:g}: must be in [0, 100] points")
        if self.samples < 1:
            raise InvalidRecipeError(f"samples {self.samples}: must be at least 1")
        choices = (("replacement", Replacement), ("ranking", Ranking), ("kinds", Kinds))
        for option, kind in choices:
            if getattr(self, option) not in get_args(kind):
                raise InvalidRecipeError(
                    f"{option} {getattr(self, option)!r}: choose {', '.join(get_args(kind))}"
                )

    def __call__(
        self,
        model: onnx.ModelProto,
        data: Dataset | None,
        *,
        val: Dataset | None = None,
        progress: Progress | None = None,
    ) -> LayersResult:
        """A copy of the model without some of its layers; `val` measures `max_drop`.

        Raises:
            InvalidRecipeError: there is no data.
            BudgetError: the model has too few layers that can go, or `max_drop` allows none.
        """
        if data is None:
            raise InvalidRecipeError("prune-layers needs data to calibrate on: give --data")
        return _Run(self, model, data, val or data, progress or Silent()).result()

    def path(
        self, model: onnx.ModelProto, data: Dataset, most: int, *, progress: Progress | None = None
    ) -> list[LayersResult]:
        """The models without 1, 2, ... layers, not repaired, until the budget is reached.

        At most `most`; fewer where no other layer can go.
        """
        return _Run(replace(self, repair=False), model, data, data, progress or Silent()).path(most)

    @property
    def wanted(self) -> int | None:
        """How many layers go, where that is the goal."""
        open_end = self.macs or self.params or self.max_drop is not None
        return None if self.layers is None and open_end else self.layers or 1


class _Run:
    """One run of the pass over a model."""

    def __init__(
        self,
        options: PruneLayers,
        model: onnx.ModelProto,
        data: Dataset,
        val: Dataset,
        listener: Progress,
    ) -> None:
        self.options, self.source, self.val, self.listener = options, model, val, listener
        self.batches = from_data(data, samples=options.samples, seed=options.seed).batches
        if not self.batches:
            raise InvalidDataError("no data to calibrate on: give one batch")
        self.original = normalized(model).whole()
        self.feeds = self._check_feeds(data)
        self.few = self.batches[: max(1, RANKING_SAMPLES // max(1, _length(self.batches[0])))]
        self.answers = self._outputs(self.original, self.few)
        self.tolerance = default_tolerance(self.original)
        self.refused: dict[str, str] = {}
        self.words = ""
        self.taken = _names(self.original)  # the twin holds what all edits have made

    def result(self) -> LayersResult:
        """Drop layers until the goal is reached."""
        options = self.options
        step = first = _Step(self.original, *_costs(self.original))
        self.listener.stage("prune-layers", options.wanted)
        found = list(self._found(first))
        total = len(found)
        self.words = _words(found, self._kinds)
        if options.wanted is not None and total < options.wanted:
            raise BudgetError(f"the model has {total} {self.words}: {options.wanted} cannot go")
        finished: tuple[_Step, onnx.ModelProto] | None = None
        while not self._enough(step, first):
            following = self._best(step)
            if following is None:
                if options.wanted is None and options.max_drop is not None and self._free:
                    break
                raise BudgetError(self._too_few(step, first))
            step = following
            if options.max_drop is not None:
                model = self._finished(step)
                if not self._keeps(model):
                    break
                finished = (step, model)
            self.listener.step(len(step.dropped))
        return self._report(step, finished, total)

    def path(self, most: int) -> list[LayersResult]:
        """See `PruneLayers.path`."""
        step = first = _Step(self.original, *_costs(self.original))
        total = sum(1 for _ in self._found(first))
        found: list[LayersResult] = []
        while len(found) < most and not self._enough(step, first):
            following = self._best(step)
            if following is None:
                break
            step = following
            found.append(self._report(step, None, total))
        return found

    @property
    def _free(self) -> bool:
        """Whether only `max_drop` ends the run."""
        return self.options.macs is None and self.options.params is None

    def _report(
        self, step: _Step, finished: tuple[_Step, onnx.ModelProto] | None, total: int
    ) -> LayersResult:
        options = self.options
        if options.max_drop is not None:
            asked = options.wanted or not self._free
            if finished is None or (asked and finished[0] is not step):
                raise BudgetError(
                    f"--max-drop {options.max_drop:g} is exceeded with {len(step.dropped)} of "
                    f"{total} {self.words} dropped; ask for less"
                )
            step, model = finished
        else:
            model = self._finished(step)
        notes = tuple(f"{name} was kept: {why}" for name, why in self.refused.items())
        return LayersResult(model, step.dropped, total, step.max_error, notes)

    @property
    def _kinds(self) -> Kinds:
        budget = self.options.macs or self.options.params
        return "all" if self.options.kinds == "auto" and budget else self.options.kinds

    def _enough(self, step: _Step, first: _Step) -> bool:
        options = self.options
        if options.macs is not None:
            return step.macs <= options.macs * first.macs
        if options.params is not None:
            return step.params <= options.params * first.params
        return options.wanted is not None and len(step.dropped) >= options.wanted

    def _too_few(self, step: _Step, first: _Step) -> str:
        for option in ("macs", "params"):
            if getattr(self.options, option) is not None:
                left = getattr(step, option) / max(getattr(first, option), 1)
                return (
                    f"--{option} {getattr(self.options, option):g} cannot be reached by dropping "
                    f"layers: {left:.3f} is left without all {len(step.dropped)} that can go"
                )
        why = "".join(f"; {name}: {words}" for name, words in self.refused.items())
        return f"after {len(step.dropped)} of the {self.words} no other can go{why}"

    # -- choosing ----------------------------------------------------------------------------------

    def _found(self, step: _Step) -> Iterator[Candidate]:
        found = find_candidates(step.model, self.options.replacement, self._kinds, self.taken)
        for candidate in found:
            if candidate.output not in self.refused:
                yield candidate

    def _best(self, step: _Step) -> _Step | None:
        """The step without the layer that the outputs miss least; None where none can go."""
        candidates = self._observed(step)
        while candidates:
            tried = candidates if self.options.ranking == "output" else candidates[:1]
            steps = [(c, s) for c in tried if (s := self._without(step, c)) is not None]
            for candidate, following in sorted(steps, key=lambda x: self._rank(step, x[1])):
                checked = self._checked(candidate, following)
                if checked is not None:
                    return checked
            candidates = [c for c in candidates if c not in tried]
        return None

    def _rank(self, before: _Step, after: _Step) -> float:
        lost = after.error
        if self.options.macs or self.options.params:
            kind = "macs" if self.options.macs else "params"
            saved = getattr(before, kind) - getattr(after, kind)
            return (lost - before.error) / saved if saved > 0 else np.inf
        return lost

    def _observed(self, step: _Step) -> list[Candidate]:
        """The candidates, the most idle first, with what a fit needs."""
        candidates = list(self._found(step))
        if not candidates:
            return []
        probe = onnx.ModelProto()
        probe.CopyFrom(step.model)
        inputs = [name for c in candidates for name in c.probe(probe)]
        goals = [name for c in candidates for name in c.goals]
        given = (self._tapped(self.original, goals), self._tapped(probe, inputs))
        for number, feeds in enumerate(self.batches):
            seen = [tap(feeds) for tap in given]
            for i, candidate in enumerate(candidates):
                candidate.observe(seen[0], seen[1], [number, i], len(self.batches))
        return sorted(candidates, key=lambda c: -c.likeness.mean)

    def _without(self, step: _Step, candidate: Candidate) -> _Step | None:
        """The next step, if it can be had and saves something."""
        try:
            edit = candidate.edit()
            model = edited(step.model, edit)
            macs, params = _costs(model)
            error = deviation(self._outputs(model, self.few), self.answers)
        except (*FAILURES, np.linalg.LinAlgError) as failure:
            self.refused[candidate.output] = str(failure)
            return None
        idle = macs > step.macs or (macs == step.macs and candidate.kind == "layer")
        if idle or not np.isfinite(error):
            return None
        row = Dropped(
            candidate.output,
            candidate.layers,
            candidate.kind,
            candidate.likeness.mean,
            error,
            step.macs - macs,
            step.params - params,
            self.options.replacement if candidate.kind == "branch" else "linear",
            edit.to_text(),
        )
        return _Step(model, macs, params, error, (*step.dropped, row), (*step.edits, edit))

    # -- checking ----------------------------------------------------------------------------------

    def _checked(self, candidate: Candidate, step: _Step) -> _Step | None:
        """The step if its model is sound and equals its twin; else the candidate is kept."""
        try:
            cleaned = _cleaned(step.model)
            problems = structure_problems(cleaned, self.source)
            twin = shadowed(self.original, step.edits)
            error = model_difference(cleaned, twin, self.feeds, self.options.threads)
            if not error <= self.tolerance:
                problems.append(f"the model differs from its twin by {error:.3g}")
        except FAILURES as failure:
            problems, error = [str(failure)], np.inf
        if problems:
            self.refused[candidate.output] = "; ".join(problems)
            return None
        return replace(step, max_error=error)

    def _check_feeds(self, data: Dataset) -> list[Feeds]:
        """Inputs for the checks: random ones at two batch sizes, and real ones."""
        real: list[Feeds] = [batch.feeds for batch in islice(data.batches(4), 1)]
        try:
            return [*runtime.working_feeds(self.original, threads=self.options.threads), *real]
        except (InvalidModelError, InvalidDataError):
            return real

    def _keeps(self, model: onnx.ModelProto) -> bool:
        """Whether the metric is within `max_drop`."""
        from onnxprune.metrics import evaluate, points_lost

        old, new = (
            evaluate(m, self.val, threads=self.options.threads, reference=self.source)
            for m in (self.source, model)
        )
        lost = points_lost(old, new)
        if lost is None:
            raise InvalidRecipeError("--max-drop was given, but there is no metric: add labels")
        return self.options.max_drop is None or lost[1] <= self.options.max_drop + 1e-9

    # -- finishing ---------------------------------------------------------------------------------

    def _finished(self, step: _Step) -> onnx.ModelProto:
        """The model with its other layers solved anew, where that brings the outputs nearer."""
        model = _cleaned(step.model)
        if not self.options.repair:
            return model
        repaired = self._repaired(step.model, step.edits)
        if repaired is None or structure_problems(repaired, self.source):
            return model
        error = deviation(self._outputs(repaired, self.few), self.answers)
        return repaired if error < step.error else model

    def _repaired(
        self, model: onnx.ModelProto, edits: Sequence[LayerEdit]
    ) -> onnx.ModelProto | None:
        from onnxprune.passes.reconstruct import Reconstruct

        try:
            analysis = analyse(self.original)
            seen = limited(Calibration(self.batches, "data", True, True), analysis.coupling)
            repair = Reconstruct(
                seed=self.options.seed, threads=self.options.threads, only=_changed(model, edits)
            )
            rewriter = Rewriter(analysis.coupling, analysis.everything)
            return _cleaned(repair(model, rewriter, seen.batches).model)
        except FAILURES:
            return None

    def _outputs(self, model: onnx.ModelProto, batches: Sequence[Feeds]) -> list[list[Any]]:
        session = runtime.session(model, threads=self.options.threads)
        return [list(runtime.run(session, feeds).values()) for feeds in batches]

    def _tapped(self, model: onnx.ModelProto, names: Sequence[str]) -> Any:
        """A function from feeds to the given tensors by name."""
        piece = onnx.ModelProto()
        piece.CopyFrom(model)
        del piece.graph.output[:]
        inputs = {value.name for value in model.graph.input}
        unique = [n for n in dict.fromkeys(names) if n not in inputs]
        piece.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in unique)
        remove_dead(piece)
        session = runtime.session(piece, threads=self.options.threads) if unique else None

        def tap(feeds: Feeds) -> dict[str, Array]:
            found = {n: np.asarray(feeds[n]) for n in names if n in feeds}
            return found if session is None else {**found, **runtime.run(session, feeds)}

        return tap


def _words(found: Sequence[Candidate], kinds: Kinds) -> str:
    """What a user calls these candidates."""
    seen = {c.kind for c in found} or {"plain": {"layer"}}.get(kinds, {"branch"})
    words = {"branch": "residual branches", "layer": "plain layers"}
    return words[seen.pop()] if len(seen) == 1 else "branches and layers"


def _names(model: onnx.ModelProto) -> set[str]:
    found = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    nodes = model.graph.node
    return found | {n for node in nodes for n in (node.name, *node.input, *node.output)}


def _changed(model: onnx.ModelProto, edits: Sequence[LayerEdit]) -> frozenset[str]:
    """The tensors that are other than in the original."""
    changed = {name for edit in edits for name in edit.made}
    for node in Graph.of(model).top:
        if not changed.isdisjoint((*node.inputs, *captured_by(node.proto))):
            changed.update(node.outputs)
    return frozenset(changed)


def _costs(model: onnx.ModelProto) -> tuple[float, int]:
    """Multiply-adds of one sample, and weights."""
    analysis = analyse(model)
    return analysis.cost.macs(analysis.everything), count_params(model)


def _length(feeds: Feeds) -> int:
    return max((len(v) for v in feeds.values() if np.ndim(v)), default=1)


def _cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the Identity nodes that stand for dropped branches."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph.of(copy)
    remove_noops(copy, find_facts(graph, infer(graph)))
    remove_dead(copy)
    return copy
