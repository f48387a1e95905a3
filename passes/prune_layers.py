"""Drop whole layers: residual branches, replaced by nothing or by a small fitted map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxprune import runtime
from onnxprune.analysis import normalized
from onnxprune.branches import Branch, find_branches
from onnxprune.data import Dataset
from onnxprune.errors import BudgetError, InvalidRecipeError
from onnxprune.facts import find_facts
from onnxprune.grams import Moments, calibration_batches
from onnxprune.graph import Graph
from onnxprune.noops import remove_dead, remove_noops
from onnxprune.progress import Progress, Silent
from onnxprune.shapes import infer
from onnxprune.verify import difference

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Replacement = Literal["none", "affine", "linear"]
Ranking = Literal["output", "cosine"]
#: Ridge of the fits, as a share of the mean square of the inputs; it pulls towards the identity.
RIDGE = 1e-3
#: Rows of a tensor that a batch adds to a fit.
ROWS = 4096
#: Samples on which the change of the outputs is measured.
RANKING_SAMPLES = 256


@dataclass(frozen=True)
class Dropped:
    """A branch that went: `similarity` is the cosine of what entered and left it with its sum."""

    output: str
    layers: tuple[str, ...]
    similarity: float
    output_error: float
    replacement: str


@dataclass(frozen=True)
class LayersResult:
    """The model without the branches, and which went, in the order in which they were chosen."""

    model: onnx.ModelProto
    dropped: tuple[Dropped, ...]
    candidates: int


@dataclass(frozen=True)
class _Candidate:
    branch: Branch
    moments: Moments
    similarity: float


@dataclass(frozen=True)
class PruneLayers:
    """Drop the residual branches that matter least, one after another.

    A branch whose output is close to its input matters little (ShortGPT, Men et al., 2024); which
    of the closest goes is decided by what the model's outputs lose on calibration data. In the
    place of x + f(x) comes x; or s * x + t for each channel; or W x + t; fitted by ridge regression
    to what the original has there, on the inputs that the model without the branches gives.
    """

    name: ClassVar[str] = "prune-layers"

    layers: int = 1
    replacement: Replacement = "linear"
    ranking: Ranking = "output"
    samples: int = 1024
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        if self.layers < 1:
            raise InvalidRecipeError(f"layers {self.layers}: must be at least 1")
        for option, kind in (("replacement", Replacement), ("ranking", Ranking)):
            if getattr(self, option) not in get_args(kind):
                raise InvalidRecipeError(
                    f"{option} {getattr(self, option)!r}: choose {', '.join(get_args(kind))}"
                )

    def __call__(
        self, model: onnx.ModelProto, data: Dataset | None, *, progress: Progress | None = None
    ) -> LayersResult:
        """A copy of the model without `layers` of its residual branches.

        Raises:
            InvalidRecipeError: there is no data.
            BudgetError: the model has fewer branches.
        """
        if data is None:
            raise InvalidRecipeError("prune-layers needs data to calibrate on: give --data")
        batches = calibration_batches(data, self.samples)
        original = current = normalized(model).whole()
        listener = progress or Silent()
        listener.stage("prune-layers", self.layers)
        total = len(_branches(original))
        if total < self.layers:
            raise BudgetError(f"the model has {total} residual branches: {self.layers} cannot go")
        dropped: list[Dropped] = []
        for step in range(self.layers):
            candidates = self._candidates(original, current, batches)
            if not candidates:
                raise BudgetError(f"after {step} branches no other is left to drop")
            current, row = self._best(original, current, candidates, batches)
            dropped.append(row)
            listener.step(step + 1)
        return LayersResult(_cleaned(current), tuple(dropped), total)

    def _candidates(
        self, original: onnx.ModelProto, current: onnx.ModelProto, batches: Sequence[Feeds]
    ) -> list[_Candidate]:
        """The branches of `current`, the most idle first, with what a fit needs."""
        branches = _branches(current)
        sessions = [
            _tapped(m, n, self.threads)
            for m, n in (
                (original, [b.output for b in branches]),
                (current, [b.skip for b in branches]),
            )
        ]
        moments = [Moments.zero(1, b.width) for b in branches]
        near = np.zeros((len(branches), 2))
        for number, feeds in enumerate(batches):
            goals, inputs = (runtime.run(s, feeds) for s in sessions)
            for i, branch in enumerate(branches):
                x, y = inputs[branch.skip], goals[branch.output]
                near[i] += np.array([_cosine(x, y) * len(x), len(x)])
                seed = [number, i]
                moments[i].add(*(_rows(v, branch.axis, seed) for v in (x, y)))
        similarity = near[:, 0] / np.maximum(near[:, 1], 1)
        order = np.argsort(-similarity, kind="stable")
        return [_Candidate(branches[i], moments[i], float(similarity[i])) for i in order]

    def _best(
        self,
        original: onnx.ModelProto,
        current: onnx.ModelProto,
        candidates: Sequence[_Candidate],
        batches: Sequence[Feeds],
    ) -> tuple[onnx.ModelProto, Dropped]:
        """The model without the branch that the outputs miss least."""
        tried = candidates if self.ranking == "output" else candidates[:1]
        few = batches[: max(1, RANKING_SAMPLES // max(1, _length(batches[0])))]
        wanted = self._outputs(original, few)
        best: tuple[float, onnx.ModelProto, _Candidate] | None = None
        for candidate in tried:
            model = without(current, candidate.branch, candidate.moments, self.replacement)
            found = self._outputs(model, few)
            error = float(np.mean([difference(a, b) for a, b in zip(found, wanted, strict=True)]))
            if best is None or error < best[0]:
                best = (error, model, candidate)
        assert best is not None
        error, model, chosen = best
        branch = chosen.branch
        row = Dropped(branch.output, branch.layers, chosen.similarity, error, self.replacement)
        return model, row

    def _outputs(self, model: onnx.ModelProto, batches: Sequence[Feeds]) -> list[list[Any]]:
        session = runtime.session(model, threads=self.threads)
        return [list(runtime.run(session, feeds).values()) for feeds in batches]


def _branches(model: onnx.ModelProto) -> list[Branch]:
    graph = Graph.of(model)
    return list(find_branches(graph, infer(graph)))


def _tapped(model: onnx.ModelProto, names: Sequence[str], threads: int | None) -> Any:
    """A session whose outputs are the given tensors."""
    piece = onnx.ModelProto()
    piece.CopyFrom(model)
    del piece.graph.output[:]
    unique = dict.fromkeys(names)
    piece.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in unique)
    remove_dead(piece)
    return runtime.session(piece, threads=threads)


def _length(feeds: Feeds) -> int:
    return max((len(v) for v in feeds.values() if np.ndim(v)), default=1)


def _cosine(x: Array, y: Array) -> float:
    """The mean cosine of the samples."""
    a, b = (v.reshape(len(v), -1).astype(np.float64) for v in (x, y))
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.maximum(size, 1e-30)))


def _rows(value: Array, axis: int, seed: Sequence[int]) -> Array:
    """[1, R, C], at most `ROWS` of them, the same places for the same seed."""
    rows = np.moveaxis(value, axis, -1).reshape(1, -1, value.shape[axis])
    if rows.shape[1] > ROWS:
        picked = np.random.default_rng(seed).choice(rows.shape[1], ROWS, replace=False)
        rows = rows[:, np.sort(picked)]
    return np.asarray(rows, np.float32)


def fitted(moments: Moments, replacement: Replacement) -> tuple[Array, Array]:
    """(W [C, C] or s [C], t [C]) of the map that fits best, drawn towards the identity."""
    square, cross = (m[0] for m in moments.means(True))
    width = len(square)
    level = RIDGE * max(float(np.trace(square)) / width, 1e-12)
    n = max(moments.rows, 1)
    x, t = moments.total[0] / n, moments.goal[0] / n
    if replacement == "affine":
        scale = (np.diag(cross) + level) / (np.diag(square) + level)
        return scale, t - scale * x
    eye = level * np.eye(width)
    matrix = np.linalg.solve(square + eye, (cross + eye).T).T
    return matrix, t - matrix @ x


def without(
    model: onnx.ModelProto, branch: Branch, moments: Moments, replacement: Replacement
) -> onnx.ModelProto:
    """A copy in which `branch` is replaced."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    at = next(i for i, n in enumerate(copy.graph.node) if branch.output in n.output)
    nodes, tensors = _replacement(model, branch, moments, replacement)
    del copy.graph.node[at]
    for offset, node in enumerate(nodes):
        copy.graph.node.insert(at + offset, node)
    copy.graph.initializer.extend(tensors)
    remove_dead(copy)
    return copy


def _replacement(
    model: onnx.ModelProto, branch: Branch, moments: Moments, replacement: Replacement
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes that make the branch's output from its input."""
    skip, out = branch.skip, branch.output
    if replacement == "none":
        return [helper.make_node("Identity", [skip], [out], name=f"{out}_skipped")], []
    graph = Graph.of(model)
    shapes = infer(graph)
    kind = helper.tensor_dtype_to_np_dtype(shapes.types[out])
    rank = len(shapes.dims(skip) or ())
    first, second = f"{out}_weight", f"{out}_bias"
    weight, bias = fitted(moments, replacement)
    shape = [-1 if a == branch.axis else 1 for a in range(rank)]
    if replacement == "affine":
        values = {first: weight.reshape(shape), second: bias.reshape(shape)}
        nodes = [
            helper.make_node("Mul", [skip, first], [f"{out}_scaled"], name=f"{out}_scale"),
            helper.make_node("Add", [f"{out}_scaled", second], [out], name=f"{out}_shift"),
        ]
    elif branch.axis == 1 and rank > 2:
        values = {first: weight.reshape(*weight.shape, *(1,) * (rank - 2)), second: bias}
        nodes = [helper.make_node("Conv", [skip, first, second], [out], name=f"{out}_map")]
    else:
        values = {first: weight.T, second: bias}
        nodes = [
            helper.make_node("MatMul", [skip, first], [f"{out}_mapped"], name=f"{out}_map"),
            helper.make_node("Add", [f"{out}_mapped", second], [out], name=f"{out}_shift"),
        ]
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(v).astype(kind), n) for n, v in values.items()
    ]
    return nodes, tensors


def _cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the Identity nodes that stand for dropped branches."""
    graph = Graph.of(model)
    remove_noops(model, find_facts(graph, infer(graph)))
    return model
