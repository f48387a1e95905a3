"""What may go of a model's layers, and the maps that are fitted to take their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxprune.branches import Branch, find_branches
from onnxprune.grams import Moments, patches
from onnxprune.graph import Graph, Node
from onnxprune.layer_edits import LayerEdit
from onnxprune.plain import Plain, Pool, Reader, find_plain
from onnxprune.protos import fresh_name
from onnxprune.shapes import infer

Array = NDArray[Any]
Tensors = Mapping[str, Array]
Replacement = Literal["none", "affine", "linear"]
Kinds = Literal["auto", "branch", "plain", "all"]
#: Ridge of the fits, as a share of the mean square of the inputs.
RIDGE = 1e-3
#: Rows of a tensor that a batch adds to the fit of a branch.
ROWS = 4096
#: Rows that all batches add to the fit of a layer: so many times its inputs, and some more.
ROWS_PER_INPUT, ROWS_AT_LEAST = 16, 4096


@dataclass
class Likeness:
    """The mean cosine, over samples, of two tensors."""

    total: float = 0.0
    count: int = 0

    def add(self, x: Array, y: Array) -> None:
        """Add a batch of both."""
        a, b = (v.reshape(len(v), -1).astype(np.float64) for v in (x, y))
        size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        self.total += float(((a * b).sum(axis=1) / np.maximum(size, 1e-30)).sum())
        self.count += len(a)

    @property
    def mean(self) -> float:
        """In [-1, 1]; 0 without samples."""
        return self.total / max(self.count, 1)


@dataclass
class BranchOut:
    """skip + f(skip) becomes a map of skip."""

    branch: Branch
    replacement: Replacement
    rank: int
    dtype: Any
    taken: set[str]
    likeness: Likeness = field(default_factory=Likeness)

    def __post_init__(self) -> None:
        """No rows yet."""
        self.moments = Moments.zero(1, self.branch.width)

    @property
    def output(self) -> str:
        """The tensor that is made anew."""
        return self.branch.output

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that go."""
        return self.branch.layers

    @property
    def kind(self) -> str:
        """What reports call it."""
        return "branch"

    @property
    def goals(self) -> list[str]:
        """Tensors of the original to imitate."""
        return [self.branch.output]

    def probe(self, model: onnx.ModelProto) -> list[str]:
        """The tensors of `model` that the fit reads."""
        return [self.branch.skip]

    def observe(self, goals: Tensors, inputs: Tensors, seed: Sequence[int], batches: int) -> None:
        """Add a batch."""
        x, y = inputs[self.branch.skip], goals[self.branch.output]
        self.likeness.add(x, y)
        self.moments.add(*(_rows(v, self.branch.axis, seed) for v in (x, y)))

    def edit(self) -> LayerEdit:
        """The nodes that make the branch's output from its input."""
        skip, out, axis = self.branch.skip, self.branch.output, self.branch.axis
        if self.replacement == "none":
            node = helper.make_node("Identity", [skip], [out])
            return self._named([node], {})
        first, second, middle = (
            fresh_name(f"{out}_{word}", self.taken) for word in ("weight", "bias", "mapped")
        )
        weight, bias = fitted(self.moments, self.replacement)
        shape = [-1 if a == axis else 1 for a in range(self.rank)]
        if self.replacement == "affine":
            values = {first: weight.reshape(shape), second: bias.reshape(shape)}
            nodes = [
                helper.make_node("Mul", [skip, first], [middle]),
                helper.make_node("Add", [middle, second], [out]),
            ]
        elif axis == 1 and self.rank > 2:
            values = {first: weight.reshape(*weight.shape, *(1,) * (self.rank - 2)), second: bias}
            nodes = [helper.make_node("Conv", [skip, first, second], [out])]
        else:
            values = {first: weight.T, second: bias}
            nodes = [
                helper.make_node("MatMul", [skip, first], [middle]),
                helper.make_node("Add", [middle, second], [out]),
            ]
        return self._named(nodes, values)

    def _named(self, nodes: Sequence[onnx.NodeProto], values: Tensors) -> LayerEdit:
        for node in nodes:
            node.name = fresh_name(f"{self.output}_map", self.taken)
        return LayerEdit(tuple(nodes), tuple(_tensor(v, n, self.dtype) for n, v in values.items()))


@dataclass
class PlainOut:
    """A plain layer goes, and those behind it read its input, with weights that are fitted anew."""

    plain: Plain
    graph: Graph
    taken: set[str]
    likeness: Likeness = field(default_factory=Likeness)

    def __post_init__(self) -> None:
        """Name what stands in for the tail."""
        self.moments: dict[str, Moments] = {}
        end = self.plain.end
        self.names = {end: self.plain.start}
        self.bypass: list[onnx.NodeProto] = []
        if self.plain.pool is not None:
            self.names[end] = fresh_name(f"{end}_pooled", self.taken)
            self.bypass.append(_pooling(self.plain.pool, self.plain.start, self.names[end]))
        for index in self.plain.tail:
            old = self.graph.nodes[index].proto
            node = onnx.NodeProto()
            node.CopyFrom(old)
            node.input[0] = self.names[old.input[0]]
            self.names[old.output[0]] = fresh_name(f"{old.output[0]}_bypass", self.taken)
            node.output[0] = self.names[old.output[0]]
            node.name = fresh_name(f"{node.output[0]}_node", self.taken)
            self.bypass.append(node)

    @property
    def output(self) -> str:
        """The tensor that is no longer made."""
        return self.plain.end

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that go."""
        return (self.plain.name,)

    @property
    def kind(self) -> str:
        """What reports call it."""
        return "layer"

    @property
    def goals(self) -> list[str]:
        """Tensors of the original to imitate."""
        end = [self.plain.end] if self.plain.alike else []
        return [r.output for r in self.plain.readers] + end

    def probe(self, model: onnx.ModelProto) -> list[str]:
        """Add to `model` what stands in for the tail; the tensors that the fit reads."""
        model.graph.node.extend(self.bypass)
        alike = [self.plain.start] if self.plain.alike else []
        return [self.names[r.source] for r in self.plain.readers] + alike

    def observe(self, goals: Tensors, inputs: Tensors, seed: Sequence[int], batches: int) -> None:
        """Add a batch."""
        if self.plain.alike:
            self.likeness.add(inputs[self.plain.start], goals[self.plain.end])
        for reader in self.plain.readers:
            x, y = inputs[self.names[reader.source]], goals[reader.output]
            x, y = self._aligned(reader, x, y, np.random.default_rng(seed), batches)
            if reader.output not in self.moments:
                self.moments[reader.output] = Moments.of(x, y)
            self.moments[reader.output].add(x, y)

    def _aligned(
        self, reader: Reader, x: Array, y: Array, rng: np.random.Generator, batches: int
    ) -> tuple[Array, Array]:
        """Rows x[G, R, K] and what the layer makes of them, y[G, R, M]."""
        node = self.graph.nodes[reader.layer]
        if node.op_type != "Conv":
            x, y = (v.reshape(1, -1, v.shape[-1]) for v in (x, y))
            few = _few(x.shape[2], batches)
            if x.shape[1] > few:
                picked = np.sort(rng.choice(x.shape[1], few, replace=False))
                x, y = x[:, picked], y[:, picked]
            return x, y
        groups = node.attr("group", 1)
        kernel = self.graph.constants[node.inputs[1]].dims[2:]
        width = x.shape[1] // groups * int(np.prod(kernel))
        positions = max(1, min(_few(width, batches) // len(x), int(np.prod(y.shape[2:]))))
        state = rng.bit_generator.state
        rows = patches(x, node, kernel, positions, rng)
        rows = rows.reshape(-1, groups, width).swapaxes(0, 1)
        rng.bit_generator.state = state
        targets = _places(y, positions, rng)
        return rows, targets.reshape(-1, groups, y.shape[1] // groups).swapaxes(0, 1)

    def edit(self) -> LayerEdit:
        """The stand-in for the tail, and the next layers with their new weights."""
        nodes, tensors = list(self.bypass), []
        for reader in self.plain.readers:
            node = self.graph.nodes[reader.layer]
            old = self.graph.constants[node.inputs[1]]
            weight, bias = ridge(self.moments[reader.output])
            words = ("weight", "bias", "product")
            names = [fresh_name(f"{reader.output}_{w}", self.taken) for w in words]
            dtype = helper.tensor_dtype_to_np_dtype(old.dtype)
            source = self.names[reader.source]
            if node.op_type == "Conv":
                weight = weight.reshape(old.dims[0], -1, *old.dims[2:])
            elif node.op_type == "MatMul":
                weight = weight[0].T
            else:
                weight = weight[0]
            made = _layer(node, source, reader.output, names)
            for new in made:
                new.name = fresh_name(f"{reader.output}_layer", self.taken)
            nodes += made
            tensors += [_tensor(v, n, dtype) for v, n in zip((weight, bias), names, strict=False)]
        return LayerEdit(tuple(nodes), tuple(tensors))


Candidate = BranchOut | PlainOut


def find_candidates(
    current: onnx.ModelProto, replacement: Replacement, kinds: Kinds, taken: set[str]
) -> Iterator[Candidate]:
    """What may go of `current`; "auto" is branches, or plain layers where there are none."""
    graph = Graph.of(current)
    shapes = infer(graph)
    branches = list(find_branches(graph, shapes)) if kinds != "plain" else []
    for branch in branches:
        kind = helper.tensor_dtype_to_np_dtype(shapes.types[branch.output])
        rank = len(shapes.dims(branch.skip) or ())
        yield BranchOut(branch, replacement, rank, kind, taken)
    if kinds in ("plain", "all") or (kinds == "auto" and not branches):
        for plain in find_plain(graph, shapes):
            yield PlainOut(plain, graph, taken)


def _pooling(pool: Pool, source: str, made: str) -> onnx.NodeProto:
    node = helper.make_node("AveragePool", [source], [made], made)
    values = {"kernel_shape": list(pool.kernel_shape), "strides": list(pool.strides)}
    node.attribute.extend(helper.make_attribute(k, v) for k, v in values.items())
    if pool.ceil_mode:
        node.attribute.append(helper.make_attribute("ceil_mode", 1))
    return node


def _layer(node: Node, source: str, output: str, names: Sequence[str]) -> list[onnx.NodeProto]:
    """The layer with other weights, and its bias; `names` are theirs and an inner tensor's."""
    weight, bias, product = names
    if node.op_type == "MatMul":
        return [
            helper.make_node("MatMul", [source, weight], [product]),
            helper.make_node("Add", [product, bias], [output]),
        ]
    if node.op_type == "Gemm":
        return [helper.make_node("Gemm", [source, weight, bias], [output], transB=1)]
    copy = onnx.NodeProto()
    copy.CopyFrom(node.proto)
    copy.input[:] = [source, weight, bias]
    return [copy]


def _tensor(value: Array, name: str, dtype: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value).astype(dtype), name)


def _few(width: int, batches: int) -> int:
    return -(-(ROWS_PER_INPUT * width + ROWS_AT_LEAST) // max(batches, 1))


def _places(y: Array, positions: int, rng: np.random.Generator) -> Array:
    """y[N, M, *S] -> [N, P, M], at the places that `patches` picks with the same generator."""
    sizes = y.shape[2:]
    total = int(np.prod(sizes))
    picked = np.arange(total)
    if positions < total:
        picked = np.sort(rng.choice(total, positions, replace=False))
    flat = y.reshape(*y.shape[:2], total)[:, :, picked]
    return np.moveaxis(flat, 1, 2)


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


def ridge(moments: Moments) -> tuple[Array, Array]:
    """(W [G, M, K], t [G * M]) of the map that fits best (ridge regression)."""
    squares, crosses = moments.means(True)
    n = max(moments.rows, 1)
    found = []
    for square, cross in zip(squares, crosses, strict=True):
        level = RIDGE * max(float(np.trace(square)) / len(square), 1e-12)
        found.append(np.linalg.solve(square + level * np.eye(len(square)), cross.T).T)
    weight = np.stack(found)
    means = np.einsum("gmk,gk->gm", weight, moments.total / n)
    return weight, (moments.goal / n - means).ravel()
