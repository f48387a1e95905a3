"""Set single weights to zero: for smaller compressed files, and for sparse kernels."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.analysis import normalized
from onnxprune.data import Dataset
from onnxprune.editing import Edit
from onnxprune.errors import InvalidRecipeError, VerificationError
from onnxprune.grams import Moments, Taps, calibration_batches
from onnxprune.graph import Graph
from onnxprune.matrices import Matrix, find_matrices, left_alone
from onnxprune.progress import Progress, Silent
from onnxprune.sparsity import (
    Pattern,
    choose,
    exchange,
    inverse_factor,
    obs,
    relative_error,
    resolve,
)

Array = NDArray[Any]
Method = Literal["magnitude", "wanda", "sparsegpt"]
Allocation = Literal["layer", "global"]
#: Up to this width the weights that stay are re-solved exactly; beyond, OBS's own update is kept.
RESOLVE_WIDTH = 1536
#: Up to this width weights of an N:M pattern change places as long as that helps.
EXCHANGE_WIDTH = 768
#: Steps in which a share of weights goes.
STAGES = 2
#: Between these the damping is the number of inputs over that of rows.
DAMPING = (0.01, 0.1)


@dataclass(frozen=True)
class SparseLayer:
    """One weight: its share of zeros, and the squared error of its outputs, relative to them."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    error: float | None
    note: str = ""


@dataclass(frozen=True)
class WeightsResult:
    """The model with zeros; sizes in bytes of the file as it is, and compressed by zlib."""

    model: onnx.ModelProto
    layers: tuple[SparseLayer, ...]
    size_bytes: int
    compressed_before: int
    compressed_after: int

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights of all layers."""
        sizes = [float(np.prod(layer.shape)) for layer in self.layers]
        zeros = sum(s * layer.sparsity for s, layer in zip(sizes, self.layers, strict=True))
        return zeros / max(sum(sizes), 1.0)


@dataclass(frozen=True)
class PruneWeights:
    """Set a share of each layer's weights to zero, and adjust the others to make up for them.

    `magnitude`: the smallest go (Han et al., 2015). `wanda`: the smallest times the norm of what
    they read, within each output (Sun et al., 2024). `sparsegpt`: what the squared error of the
    outputs misses least, with an update of the rest (Frantar and Alistarh, 2023), layer after
    layer on the inputs that the pruned layers before it give. `allocation`: every layer loses the
    same share, or layers lose by what they lose of their outputs. `damping`: ridge of the updates
    as a share of the mean square of the inputs; None: the larger, the fewer samples there are.
    """

    name: ClassVar[str] = "prune-weights"

    sparsity: float = 0.5
    pattern: str = "unstructured"
    method: Method = "sparsegpt"
    allocation: Allocation = "global"
    keep: tuple[str, ...] = ()
    samples: int = 1024
    damping: float | None = None
    seed: int = 0
    threads: int | None = None
    _parsed: Pattern = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        object.__setattr__(self, "_parsed", Pattern.parse(self.pattern))
        if not 0 < self.sparsity < 1:
            raise InvalidRecipeError(f"sparsity {self.sparsity:g}: a share must be in (0, 1)")
        for option, kind in (("method", Method), ("allocation", Allocation)):
            if getattr(self, option) not in get_args(kind):
                raise InvalidRecipeError(
                    f"{option} {getattr(self, option)!r}: choose {', '.join(get_args(kind))}"
                )

    def __call__(
        self,
        model: onnx.ModelProto,
        data: Dataset | None = None,
        *,
        progress: Progress | None = None,
    ) -> WeightsResult:
        """A copy of the model with zeros among its weights.

        Raises:
            InvalidRecipeError: the method needs data and there is none.
            InvalidDataError: the data is empty.
            VerificationError: a weight does not follow the pattern.
        """
        if data is None and self.method != "magnitude":
            raise InvalidRecipeError(f"method {self.method} needs data to calibrate on")
        batches = [] if data is None else calibration_batches(data, self.samples)
        run = _Run(
            self, normalized(model).whole(), Taps(batches, self.threads), progress or Silent()
        )
        layers = run.prune()
        small = run.edit.model
        sizes = [compressed_bytes(m) for m in (model, small)]
        return WeightsResult(small, layers, small.ByteSize(), *sizes)


def compressed_bytes(model: onnx.ModelProto) -> int:
    """The size of the file after zlib, as in .zip and .gz."""
    return len(zlib.compress(model.SerializeToString(), 6))


class _Run:
    """One run of the pass over one model."""

    def __init__(
        self, options: PruneWeights, model: onnx.ModelProto, taps: Taps, progress: Progress
    ) -> None:
        self.options, self.taps, self.progress = options, taps, progress
        self.edit = Edit(model)
        self.graph = Graph.of(model)
        self.original = Taps(taps.batches, taps.threads)
        self.changed = False
        self.matrices = list(find_matrices(self.graph))
        self.others = list(left_alone(self.graph))

    def prune(self) -> tuple[SparseLayer, ...]:
        """Prune every layer, and say what became of each."""
        chosen = [m for m in self.matrices if not self._reason(m)]
        shares = self._shares(chosen)
        self.progress.stage("prune-weights", len(chosen))
        rows = []
        for matrix in self.matrices:
            note = self._reason(matrix)
            if note:
                rows.append(SparseLayer(matrix.name, matrix.dims, 0.0, None, note))
                continue
            rows.append(self._layer(matrix, shares[matrix.name]))
            self.progress.step(len(rows))
        rows += [SparseLayer(name, dims, 0.0, None, why) for name, dims, why in self.others]
        return tuple(rows)

    def _reason(self, matrix: Matrix) -> str:
        """Why a weight is left alone; empty where it is not."""
        names = (matrix.name, matrix.node.proto.name, matrix.node.title)
        if any(fnmatch(n, p) for n in names for p in self.options.keep):
            return "kept by name"
        shape = self._weight(matrix).shape
        if not self.options._parsed.fits(shape, matrix.period):
            return f"its shape does not divide into {self.options.pattern}"
        return ""

    def _measured(self, matrix: Matrix) -> bool:
        """Whether what the weight is multiplied with can be read from the data."""
        return bool(matrix.x and self.taps.batches)

    def _weight(self, matrix: Matrix) -> Array:
        return matrix.read(self.edit.weight(matrix.node.index, matrix.slot))

    def _moments(self, matrix: Matrix) -> Moments:
        found = None
        for place in (matrix, *matrix.shared):
            goals = self.original.read(self.graph.model, place.x)
            now = self.taps.read(self.edit.model, place.x) if self.changed else goals
            own = place.moments(now, goals, self.options.seed)
            if found is None:
                found = own
            else:
                found.join(own)
        assert found is not None
        return found

    def _shares(self, matrices: Sequence[Matrix]) -> Mapping[str, float]:
        """The share of each layer that goes."""
        target = self.options.sparsity
        if self.options.allocation == "layer" or self.options._parsed.fixed:
            return dict.fromkeys((m.name for m in matrices), target)
        known = [m for m in matrices if self.options.method == "magnitude" or self._measured(m)]
        found = dict.fromkeys((m.name for m in matrices), target)
        if not known:
            return found
        scores = [self._harm(m).ravel() for m in known]
        order = np.sort(np.concatenate(scores))
        limit = order[min(int(target * order.size), order.size - 1)]
        for matrix, harm in zip(known, scores, strict=True):
            found[matrix.name] = min(float((harm < limit).mean()), 0.95)
        return found

    def _harm(self, matrix: Matrix) -> Array:
        """What each weight adds to its layer's output, as a share of it."""
        weight = self._weight(matrix).astype(np.float64)
        if self.options.method == "magnitude":
            return np.abs(weight)
        moments = self._moments(matrix)
        square, _ = moments.means(False)
        harm = weight**2 * np.diagonal(square, axis1=1, axis2=2)[:, None, :]
        if self.options.method == "sparsegpt":
            damping = self._damping(moments)
            factors = [inverse_factor(h, damping) for h in square]
            harm = (weight / np.stack([np.diag(f) for f in factors])[:, None, :]) ** 2
        whole = np.einsum("gmk,gkl,gml->", weight, square, weight, optimize=True)
        return np.asarray(harm / max(float(whole), 1e-30))

    def _layer(self, matrix: Matrix, share: float) -> SparseLayer:
        old = self._weight(matrix).astype(np.float64)
        moments = self._moments(matrix) if self._measured(matrix) else None
        centred = moments is not None and self._has_bias(matrix)
        means = None if moments is None else moments.means(centred)
        damping = 0.0 if moments is None else self._damping(moments)
        new = self._pruned(old, means, share, damping)
        error = None if means is None else relative_error(old, new, means[0])
        if not self.options._parsed.holds(new):
            raise VerificationError(f"{matrix.name}: not {self.options.pattern}; please report it")
        index = matrix.node.index
        stored = self.edit.weight(index, matrix.slot)
        kind = self.graph.constants[matrix.name].dtype
        self.edit.replace(matrix.name, matrix.write(new).astype(stored.dtype), kind)
        if centred and moments is not None:
            self.edit.add_bias(index, moments.shift(old, new).astype(stored.dtype), kind)
        self.changed = True
        blind = self.options.method != "magnitude" and moments is None
        note = f"chosen by magnitude: {matrix.why}" if blind else ""
        return SparseLayer(matrix.name, matrix.dims, float((new == 0).mean()), error, note)

    def _has_bias(self, matrix: Matrix) -> bool:
        """Whether a change of the mean output can go into a bias."""
        node = matrix.node
        plain = node.op_type == "Conv" or (
            node.op_type == "Gemm" and node.attr("alpha", 1.0) == node.attr("beta", 1.0) == 1.0
        )
        alone = len(self.graph.uses.get(matrix.name, ())) == 1
        return plain and alone and (not node.input(2) or node.input(2) in self.graph.constants)

    def _damping(self, moments: Moments) -> float:
        """The ridge, as a share of the mean square of the inputs."""
        if self.options.damping is not None:
            return self.options.damping
        return float(np.clip(moments.square.shape[1] / max(moments.rows, 1), *DAMPING))

    def _pruned(
        self, old: Array, means: tuple[Array, Array] | None, share: float, damping: float
    ) -> Array:
        pattern, method = self.options._parsed, self.options.method
        if method == "sparsegpt" and means is not None:
            return np.stack(
                [self._by_obs(*part, share, damping) for part in zip(old, *means, strict=True)]
            )
        scores = np.abs(old)
        if method == "wanda" and means is not None:
            norm = np.sqrt(np.maximum(np.diagonal(means[0], axis1=1, axis2=2), 0))
            scores = scores * norm[:, None, :]
        keep = choose(scores, share, pattern, per_row=method == "wanda")
        return np.where(keep, old, 0.0)

    def _by_obs(
        self, weight: Array, hessian: Array, cross: Array, share: float, damping: float
    ) -> Array:
        new = weight
        for pattern, part in self._stages(share):
            new = obs(new, hessian, part, pattern, damping)
            if len(hessian) <= RESOLVE_WIDTH:
                new = resolve(weight, new != 0, hessian, cross, damping)
        if self.options._parsed.fixed and len(hessian) <= EXCHANGE_WIDTH:
            new = exchange(weight, new, hessian, cross, self.options._parsed, damping)
        return new

    def _stages(self, share: float) -> list[tuple[Pattern, float]]:
        """Sparser and sparser: each choice is made among weights that made up for the last."""
        pattern = self.options._parsed
        if pattern.fixed:
            kept = range(pattern.of - 1, pattern.kept - 1, -1)
            return [(replace(pattern, kept=n), share) for n in kept]
        return [(pattern, share * step / STAGES) for step in range(1, STAGES + 1)]
