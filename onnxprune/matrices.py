"""Weights of layers as matrices: which axis is summed, what is read, and how to write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.editing import input_axis
from onnxprune.grams import ROWS_AT_LEAST, ROWS_PER_COLUMN, Moments, patches
from onnxprune.graph import Graph, Node

Array = NDArray[Any]
_CELLS = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Matrix:
    """Input `slot` of `node` as matrices [G, M, K]: K are summed with the elements of tensor `x`.

    Along K the input channels run fastest, so that N:M patterns lie along channels.
    """

    node: Node
    slot: int
    name: str
    x: str
    groups: int
    dims: tuple[int, ...]

    @property
    def title(self) -> str:
        """How reports name it."""
        return self.name

    def read(self, weight: Array) -> Array:
        """[G, M, K]"""
        if self.node.op_type == "Conv":
            rows = weight.reshape(self.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
            return np.asarray(rows.swapaxes(2, 3).reshape(*rows.shape[:2], -1))
        if self.node.op_type in _CELLS:
            return weight
        if self.node.op_type == "MatMul" and self.slot == 0:
            return weight[None]
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
        return np.moveaxis(rows[0], 1, input_axis(self.node, 2))

    @property
    def period(self) -> int:
        """How many neighbours along K are input channels of one tap: patterns stay within."""
        return self.dims[1] if self.node.op_type == "Conv" else self.width

    @property
    def width(self) -> int:
        """K"""
        if self.node.op_type == "Conv":
            return int(np.prod(self.dims[1:]))
        if self.node.op_type in _CELLS:
            return self.dims[2]
        return self.dims[1 if self.slot == 0 else input_axis(self.node, 2)]

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
        if self.node.op_type in _CELLS and self.slot == 2:
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
    """The weights of every layer outside of bodies, in topological order, each once."""
    seen: set[str] = set()
    for node in graph.top:
        for slot, x, groups in _slots(graph, node):
            name = node.input(slot)
            constant = graph.constants.get(name)
            if constant is None or not constant.is_float or name in seen or constant.is_vector:
                continue
            if node.op_type in ("Gemm", "MatMul") and len(constant.dims) != 2:
                continue
            seen.add(name)
            yield Matrix(node, slot, name, x, groups, constant.dims)


def _slots(graph: Graph, node: Node) -> list[tuple[int, str, int]]:
    """(weight slot, tensor that it is multiplied with, groups)"""
    if node.domain != "":
        return []
    if node.op_type == "Conv":
        return [(1, node.inputs[0], node.attr("group", 1))]
    if node.op_type in ("Gemm", "MatMul"):
        left = node.op_type == "MatMul" and node.inputs[0] in graph.constants
        return [(0, node.inputs[1], 1)] if left else [(1, node.inputs[0], 1)]
    if node.op_type in _CELLS and not node.attr("layout", 0):
        constant = graph.constants.get(node.inputs[1])
        directions = constant.dims[0] if constant is not None else 1
        return [(1, node.inputs[0], directions), (2, node.outputs[0], directions)]
    return []
