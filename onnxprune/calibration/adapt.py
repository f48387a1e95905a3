"""Let a model that remembers its data see made-up inputs as if they were that data.

BatchNormalization stores the mean and variance of its inputs. Where both differ on made-up inputs,
those are measured in their place, layer after layer: then each channel behind has the mean and
variance that it has on real data, however unlike that the inputs are (the statistics of Li et al.,
AdaBN, 2018, the other way round). A repair is solved and judged on models adapted in this way;
what it changed is carried back to the recorded statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.calibration.editable import Editable
from onnxprune.calibration.sites import attributes
from onnxprune.calibration.walk import Walk

Array = NDArray[Any]
Kept = Mapping[str, Array]
#: The smallest variance that is taken for measured, relative to the recorded one.
_LEAST = 1e-3


@dataclass(frozen=True)
class Norm:
    """What a BatchNormalization holds: gamma, beta, mean and variance, each [C]; and epsilon."""

    gamma: Array
    beta: Array
    mean: Array
    var: Array
    eps: float

    @classmethod
    def of(cls, model: Editable, index: int) -> Norm | None:
        """None where it is no inference form with stored numbers."""
        node = model.nodes[index]
        given = attributes(node)
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
            return None
        if given.get("training_mode", 0) or len([o for o in node.output if o]) > 1:
            return None
        gamma, beta, mean, var = (model.weight(name) for name in node.input[1:5])
        if gamma is None or beta is None or mean is None or var is None:
            return None
        return cls(gamma, beta, mean, var, given.get("epsilon", 1e-5))

    @property
    def scale(self) -> Array:
        """By how much it multiplies, [C]."""
        return np.asarray(self.gamma / np.sqrt(self.var + self.eps))

    @property
    def shift(self) -> Array:
        """What it adds, [C]."""
        return np.asarray(self.beta - self.mean * self.scale)

    def at(self, kept: Array | None) -> Norm:
        """Only some of the channels."""
        if kept is None:
            return self
        return Norm(self.gamma[kept], self.beta[kept], self.mean[kept], self.var[kept], self.eps)

    def moved(self, old: Norm, new: Norm) -> Norm:
        """This one, a changed form of `old`, as the like change of `new`.

        What was added to the input stays as it is, in the input's units.
        """
        scale = _over(self.scale * new.scale, old.scale)
        shift = new.shift + _over((self.shift - old.shift) * new.scale, old.scale)
        mean = new.mean + self.mean - old.mean
        var = new.var * self.var / np.maximum(old.var, 1e-30)
        return Norm(scale * np.sqrt(var + self.eps), shift + mean * scale, mean, var, self.eps)

    def write(self, model: Editable, index: int) -> None:
        """Store it in a node."""
        for slot, value in enumerate((self.gamma, self.beta, self.mean, self.var), 1):
            model.write(index, slot, value)


@dataclass(frozen=True)
class Adapted:
    """A model as it sees made-up inputs; by output, what its norms hold there and held before."""

    model: onnx.ModelProto
    norms: Mapping[str, tuple[Norm, Norm]]

    def enter(self, model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        """A form of the original as it sees made-up inputs; `kept`: its channels, by output."""
        return self._moved(model, kept, inwards=True)

    def leave(self, model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        """The way back."""
        return self._moved(model, kept, inwards=False)

    def _moved(self, model: onnx.ModelProto, kept: Kept, *, inwards: bool) -> onnx.ModelProto:
        copy = Editable(model)
        for index, node in enumerate(copy.nodes):
            present = Norm.of(copy, index) if node.output[0] in self.norms else None
            if present is None:
                continue
            own, real = (n.at(kept.get(node.output[0])) for n in self.norms[node.output[0]])
            old, new = (real, own) if inwards else (own, real)
            present.moved(old, new).write(copy, index)
        return copy.model()


def adapt(
    model: onnx.ModelProto,
    batches: Sequence[Mapping[str, Array]],
    *,
    may_grow: bool = True,
    threads: int | None = None,
) -> Adapted | None:
    """The model with the statistics of these inputs; None where it records none.

    Unless it `may_grow`, norms that share their numbers with others are left alone.
    """
    strict, copy = Editable(model, may_grow=may_grow), Editable(model)
    norms: dict[str, tuple[Norm, Norm]] = {}
    walk = Walk(copy, batches, threads=threads)
    for index, node in enumerate(copy.nodes):
        recorded = Norm.of(copy, index)
        if recorded is None or not all(strict.can_write(index, slot) for slot in range(1, 5)):
            continue
        walk.advance(index)
        mean, var = _moments([held[node.input[0]] for held in walk.held])
        var = np.maximum(var, _LEAST * recorded.var)
        own = Norm(recorded.gamma, recorded.beta, mean, var, recorded.eps)
        own.write(copy, index)
        norms[node.output[0]] = own, recorded
    return Adapted(copy.model(), norms) if norms else None


def _moments(tensors: Sequence[Array]) -> tuple[Array, Array]:
    """Mean and variance by channel of x[N, C, *S]."""
    count, first, second = 0, np.zeros(1), np.zeros(1)
    for tensor in tensors:
        axes = (0, *range(2, tensor.ndim))
        count += tensor.size // max(tensor.shape[1], 1)
        first = first + tensor.sum(axes, dtype=np.float64)
        second = second + np.square(tensor.astype(np.float64)).sum(axes)
    mean = first / max(count, 1)
    return mean, np.maximum(second / max(count, 1) - mean**2, 0)


def _over(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)
