"""Weights of layers as matrices: which axis is summed, what is read, and how to write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.editing import input_axis
from onnxprune.grams import ROWS_AT_LEAST, ROWS_PER_COLUMN, Moments, patches
from onnxprune.graph import Constant, Graph, Node

Array = NDArray[Any]
_CELLS = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Matrix:
    """Input `slot` of `node` as matrices [G, M, K]: K are summed with the elements of tensor `x`.

    Along K the input channels run fastest, so that N:M patterns lie along channels. The rows of a
    ConvTranspose are its taps too: what it adds up has one input position each. `why`: the reason
    for which `x` cannot be had; `shared`: other layers that multiply with the same weight.
    """

    node: Node
    slot: int
    name: str
    x: str
    groups: int
    dims: tuple[int, ...]
    why: str = ""
    shared: tuple[Matrix, ...] = ()

    @property
    def title(self) -> str:
        """How reports name it."""
        return self.name

    def read(self, weight: Array) -> Array:
        """[G, M, K]"""
        if self.node.op_type == "Conv":
            rows = weight.reshape(self.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
            return np.asarray(rows.swapaxes(2, 3).reshape(*rows.shape[:2], -1))
        if self.node.op_type == "ConvTranspose":
            return np.asarray(weight.reshape(self.groups, self.width, -1).swapaxes(1, 2))
        if self.node.op_type in _CELLS:
            return weight
        if self.node.op_type == "MatMul" and self.slot == 0:
            return weight[None]
        if self.node.op_type == "MatMul":
            return np.asarray(weight.reshape(self.groups, *self.dims[-2:]).swapaxes(1, 2))
        return np.moveaxis(weight, input_axis(self.node, 2), 1)[None]

    def write(self, rows: Array) -> Array:
        """The weight again, from [G, M, K]."""
        if self.node.op_type == "Conv":
            channels, taps = self.dims[1], int(np.prod(self.dims[2:]))
            split = rows.reshape(*rows.shape[:2], taps, channels).swapaxes(2, 3)
            return np.asarray(split.reshape(self.dims))
        if self.node.op_type in _CELLS:
            return rows
        if self.node.op_type == "MatMul" and self.slot == 0:
            return np.asarray(rows[0])
        if self.node.op_type in ("MatMul", "ConvTranspose"):
            return np.asarray(rows.swapaxes(1, 2).reshape(self.dims))
        return np.moveaxis(rows[0], 1, input_axis(self.node, 2))

    def read_alike(self, other: Matrix) -> bool:
        """Whether the weight is the same matrix in both places."""
        kinds = [
            (m.node.op_type, m.slot, m.groups, m.node.attr("transB", 0)) for m in (self, other)
        ]
        return kinds[0] == kinds[1]

    @property
    def period(self) -> int:
        """How many neighbours along K are input channels of one tap: patterns stay within."""
        return self.dims[1] if self.node.op_type == "Conv" else self.width

    @property
    def width(self) -> int:
        """K"""
        if self.node.op_type == "Conv":
            return int(np.prod(self.dims[1:]))
        if self.node.op_type == "ConvTranspose":
            return self.dims[0] // self.groups
        if self.node.op_type in _CELLS:
            return self.dims[2]
        if self.node.op_type == "MatMul":
            return self.dims[-1 if self.slot == 0 else -2]
        return self.dims[input_axis(self.node, 2)]

    def moments(self, batches: Sequence[Array], goals: Sequence[Array], seed: int) -> Moments:
        """Moments of what is multiplied with the matrices; `goals` is the same in the original."""
        found = Moments.zero(self.groups, self.width)
        limit = -(-(ROWS_PER_COLUMN * self.width + ROWS_AT_LEAST) // len(batches))
        for i, (x, t) in enumerate(zip(batches, goals, strict=True)):
            rows = self._rows(x, limit, np.random.default_rng([seed, i]))
            goal = rows
            if t is not x:
                goal = self._rows(t, limit, np.random.default_rng([seed, i]))
            found.add(rows, goal)
        return found

    def _rows(self, x: Array, limit: int, rng: np.random.Generator) -> Array:
        """[G, R, K]"""
        if self.node.op_type == "Conv":
            per_sample = -(-limit // max(1, len(x)))
            p = patches(x, self.node, self.dims[2:], per_sample, rng)
            n, places, channels, taps = p.shape
            p = p.reshape(n * places, self.groups, channels // self.groups, taps)
            return p.transpose(1, 0, 3, 2).reshape(self.groups, n * places, -1)
        if self.node.op_type == "ConvTranspose":
            split = np.moveaxis(x, 1, -1).reshape(-1, self.groups, self.width)
            rows = split.swapaxes(0, 1)
        elif self.node.op_type in _CELLS and self.slot == 2:
            hidden = x[:-1].transpose(1, 0, 2, 3) if len(x) > 1 else x.transpose(1, 0, 2, 3)
            rows = hidden.reshape(self.groups, -1, x.shape[-1])
        else:
            turned = self.node.op_type == "MatMul" and self.slot == 0
            turned |= bool(self.node.op_type == "Gemm" and self.node.attr("transA", 0))
            x = np.swapaxes(x, -1, -2) if turned else x
            rows = np.broadcast_to(
                x.reshape(-1, x.shape[-1]), (self.groups, x.size // x.shape[-1], x.shape[-1])
            )
        if rows.shape[1] > limit:
            rows = rows[:, np.sort(rng.choice(rows.shape[1], limit, replace=False))]
        return rows


def find_matrices(graph: Graph) -> Iterator[Matrix]:
    """The weights of every layer, in topological order, each once."""
    found: dict[str, Matrix] = {}
    outer = {node.index for node in graph.top}
    for node in graph.nodes:
        for slot, x, groups in _slots(graph, node):
            name = node.input(slot)
            constant = graph.constants.get(name)
            if constant is None or not constant.is_float or constant.is_vector:
                continue
            if node.op_type == "Gemm" and len(constant.dims) != 2:
                continue
            if node.op_type == "MatMul":
                groups = int(np.prod(constant.dims[:-2]))
            why = "" if x else "its inputs are not at hand"
            if node.op_type == "MatMul" and len(constant.dims) > 2:
                x, why = "", "it is a stack of matrices"
            if node.index not in outer:
                x, why = "", "it is inside of a loop or branch"
            matrix = Matrix(node, slot, name, x, groups, constant.dims, why)
            found[name] = _joined(found[name], matrix) if name in found else matrix
    yield from found.values()


def _joined(first: Matrix, other: Matrix) -> Matrix:
    """The weight of both layers; its inputs are those of both where they are multiplied alike."""
    alike = first.read_alike(other) and first.x and other.x
    if alike:
        return replace(first, shared=(*first.shared, other))
    why = first.why or "layers read it in different ways"
    return replace(first, x="", why=why, shared=(*first.shared, other))


#: Input slots of layers in which there may be a weight that `find_matrices` does not see.
_PLACES = {
    **dict.fromkeys(
        ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedMatMul"), (0, 1)
    ),
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "MatMulNBits", "FusedGemm"), (0, 1)),
    **dict.fromkeys(_CELLS, (1, 2)),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), (0, 3)),
}


def left_alone(graph: Graph) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Weights of layers that `find_matrices` leaves out: name, shape, and why."""
    known = {m.name for m in find_matrices(graph)}
    origin = _origins(graph)
    for node in graph.nodes:
        for slot in _PLACES.get(node.op_type, ()):
            name = node.input(slot)
            constant = graph.constants.get(origin.get(name, ""))
            if constant is None or constant.name in known:
                continue
            known.add(constant.name)
            if len(constant.dims) > 1 and not constant.is_vector:
                yield constant.name, constant.dims, _why_left(node, name, constant)


def _why_left(node: Node, name: str, constant: Constant) -> str:
    if not constant.is_float:
        return "it is quantized: set weights to zero before quantizing"
    if constant.name != name:
        return "it is computed from a stored tensor: fold constants first"
    return f"this input of {node.op_type} is none that is pruned"


def _origins(graph: Graph) -> dict[str, str]:
    """For each tensor that constants alone determine the first of them."""
    origin = {name: name for name in graph.constants}
    for node in graph.nodes:
        names = [name for name in node.inputs if name]
        if names and all(name in origin for name in names):
            origin.update((name, origin[names[0]]) for name in node.outputs if name not in origin)
    return origin


def _slots(graph: Graph, node: Node) -> list[tuple[int, str, int]]:
    """(weight slot, tensor that it is multiplied with or "", groups)"""
    if node.domain != "":
        return []
    if node.op_type in ("Conv", "ConvTranspose"):
        return [(1, node.inputs[0], node.attr("group", 1))]
    if node.op_type in ("Gemm", "MatMul"):
        left = graph.constants.get(node.inputs[0])
        turned = node.op_type == "MatMul" and left is not None and len(left.dims) == 2
        return [(0, node.inputs[1], 1)] if turned else [(1, node.inputs[0], 1)]
    if node.op_type in _CELLS:
        constant = graph.constants.get(node.inputs[1])
        directions = constant.dims[0] if constant is not None else 1
        plain = not node.attr("layout", 0)
        hidden = node.outputs[0] if plain else ""
        return [(1, node.inputs[0] if plain else "", directions), (2, hidden, directions)]
    return []
