"""Parameters and multiply-adds for any choice of units, without building the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import io, wire
from onnxprune.coupling import Coupling
from onnxprune.graph import Graph
from onnxprune.labels import Labels
from onnxprune.rewriting import Mask

#: Element types that hold weights, by the bits of an element; those that this onnx knows.
_BITS = {
    getattr(onnx.TensorProto, name): bits
    for bits, names in {
        64: "DOUBLE",
        32: "FLOAT",
        16: "FLOAT16 BFLOAT16 INT16 UINT16",
        8: "INT8 UINT8 FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ",
        4: "INT4 UINT4 FLOAT4E2M1",
        2: "INT2 UINT2",
    }.items()
    for name in names.split()
    if hasattr(onnx.TensorProto, name)
}
WEIGHT_TYPES = frozenset(_BITS)


@dataclass(frozen=True)
class _Products:
    """A sum of products of axis lengths: sum_i size[i] * prod_j share(axis j of term i)."""

    size: NDArray[np.float64]
    units: Labels
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    term: NDArray[np.int64]

    @classmethod
    def of(cls, coupling: Coupling, terms: Sequence[tuple[float, Sequence[Labels]]]) -> _Products:
        unit = coupling.solution.unit
        axes = [(i, labels) for i, (_, vectors) in enumerate(terms) for labels in vectors]
        lengths = np.array([v.size for _, v in axes], np.int64)
        flat = [unit[np.maximum(v, 0)] for _, v in axes]
        return cls(
            np.array([size for size, _ in terms], np.float64),
            np.concatenate(flat) if flat else np.zeros(0, np.int32),
            np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
            lengths,
            np.array([i for i, _ in axes], np.int64),
        )

    def shares(self, keep: Mask) -> NDArray[np.float64]:
        """Each axis' share that stays."""
        if not self.lengths.size:
            return np.zeros(0)
        kept = np.add.reduceat(keep[self.units].astype(np.float64), self.starts)
        return np.asarray(kept / self.lengths, np.float64)

    def terms(self, keep: Mask) -> NDArray[np.float64]:
        """Each term's value."""
        value = self.size.copy()
        np.multiply.at(value, self.term, self.shares(keep))
        return value

    def per_unit(self, count: int) -> NDArray[np.float64]:
        """What the sum loses, to first order, with each unit."""
        weight = np.repeat(self.size[self.term] / self.lengths, self.lengths)
        return np.asarray(np.bincount(self.units, weight, count), np.float64)


@dataclass(frozen=True)
class CostModel:
    """Parameters and MACs of a coupled model as functions of the units that stay."""

    params_: _Products
    macs_: _Products
    shared: tuple[tuple[Labels, ...], ...]
    units: int
    param_bytes: float
    graph: Graph

    def params(self, keep: Mask) -> float:
        """The number of weights that stay."""
        return float(self.params_.terms(keep).sum()) + sum(_copies(u, keep) for u in self.shared)

    def macs(self, keep: Mask) -> float:
        """Multiply-adds of one sample."""
        return float(self.macs_.terms(keep).sum())

    @cached_property
    def other_bytes(self) -> float:
        """The file's size without its weights."""
        return float(wire.graph_bytes(self.graph)) - _weight_bytes(self.graph)

    def size_mb(self, keep: Mask) -> float:
        """The file's size, in 10^6 bytes."""
        return (self.params(keep) * self.param_bytes + self.other_bytes) / 1e6

    def layer_macs(self, keep: Mask) -> NDArray[np.float64]:
        """MACs of each of the coupling's layers."""
        return self.macs_.terms(keep)

    def params_per_unit(self) -> NDArray[np.float64]:
        """Weights that go with each unit."""
        return self.params_.per_unit(self.units)

    def macs_per_unit(self) -> NDArray[np.float64]:
        """Multiply-adds that go with each unit."""
        return self.macs_.per_unit(self.units)


def cost_model(coupling: Coupling) -> CostModel:
    """The cost of `coupling`'s model for any choice of units."""
    batch = samples_per_run(coupling)
    params, shared = [], []
    for name, uses in coupling.constants.items():
        constant = coupling.graph.constants[name]
        if constant.dtype not in WEIGHT_TYPES:
            continue
        layout = next(iter(uses.values()))
        if constant.is_vector and len(uses) > 1 and all(len(u) == 1 for u in uses.values()):
            unit = coupling.solution.unit
            shared.append(tuple(unit[np.maximum(u[0].labels, 0)] for u in uses.values()))
        else:
            params.append((float(constant.size), [b.labels for b in layout]))
    untouched = sum(
        c.size
        for n, c in coupling.graph.constants.items()
        if c.dtype in WEIGHT_TYPES and n not in coupling.constants
    )
    params.append((float(untouched), []))
    macs = [(layer.macs / batch, layer.axes) for layer in coupling.layers]
    total = sum(size for size, _ in params) + sum(units[0].size for units in shared)
    return CostModel(
        params_=_Products.of(coupling, params),
        macs_=_Products.of(coupling, macs),
        shared=tuple(shared),
        units=coupling.solution.units,
        param_bytes=_weight_bytes(coupling.graph) / total if total else 0.0,
        graph=coupling.graph,
    )


def _weight_bytes(graph: Graph) -> float:
    weights = (c for c in graph.constants.values() if c.dtype in WEIGHT_TYPES)
    return sum(c.size * _BITS[c.dtype] / 8 for c in weights)


def _copies(uses: tuple[Labels, ...], keep: Mask) -> int:
    """What is left of a vector with several readers: one copy for each way in which it is cut."""
    masks = {mask.tobytes(): mask for units in uses for mask in (keep[units],)}
    return sum(int(mask.sum()) for mask in masks.values())


def samples_per_run(coupling: Coupling) -> int:
    """How many samples the assumed batch holds: 1 where the batch is fixed by the model."""
    for name in coupling.graph.inputs:
        first = coupling.shapes.first.dims.get(name, ())
        second = coupling.shapes.second.dims.get(name, ())
        if first and second and first[0] != second[0]:
            return first[0]
    return 1


def count_params(model: onnx.ModelProto) -> int:
    """The number of weights in a model: elements of float and 16- to 2-bit tensors."""
    found = (t for t in io.tensors(model) if t.data_type in WEIGHT_TYPES)
    return sum(math.prod(tensor.dims) for tensor in found)


def size_bytes(model: onnx.ModelProto) -> int:
    """The size of the saved file, external data included."""
    return wire.model_bytes(model)
