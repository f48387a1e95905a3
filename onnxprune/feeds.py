"""Random inputs that a model accepts, made from its graph alone.

Floats are normal(0, 1), bools and masks true, integers small valid indices: where an integer input
reaches a Gather, also through casts and reshapes, the size of the table bounds it.
"""

from __future__ import annotations

import ast
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import InvalidDataError, InvalidModelError

_BATCH: Final = 2
_SIZE: Final = 16
_IMAGE_SIZE: Final = (
    64  # an image of 16 pixels does not survive five strides of 2 and an upsampling
)

# fmt: off
_KEEPS_VALUES: Final = frozenset([
    "Cast", "CastLike", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose",
    "Expand", "Tile", "Concat", "Slice", "Split", "Gather", "GatherElements", "GatherND", "Where",
    "ReduceMax", "ReduceMin", "Max", "Min", "Clip",
])
# fmt: on
_ARITHMETIC: Final = frozenset(["Add", "Sub", "Mul", "Div", "Mod", "Abs", "CumSum", "ReduceSum"])
_MASKING: Final = frozenset(["Mul", "Sub", "Where", "Div"])
_COUNTS: Final[Mapping[str, tuple[int, ...]]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "ConstantOfShape": (0,),
    "TopK": (1,),
    "Range": (0, 1, 2),
    "OneHot": (1,),
    "Loop": (0,),
    "LSTM": (4,),
    "GRU": (4,),
    "RNN": (4,),
}
# operator: position of the indices, position of the table
_LOOKUPS: Final[Mapping[str, Sequence[tuple[int, int]]]] = {
    "Gather": [(1, 0)],
    "GatherElements": [(1, 0)],
    "GatherND": [(1, 0)],
    "ScatterElements": [(1, 0)],
    "ScatterND": [(1, 0)],
    "GatherBlockQuantized": [(1, 0)],
    "EmbedLayerNormalization": [(0, 2), (1, 4), (8, 3)],
    "QEmbedLayerNormalization": [(0, 2), (1, 4)],
}


@dataclass(frozen=True)
class _Defaults:
    """The sizes of dynamic axes that nothing else determines."""

    batch: int
    scale: int
    batch_second: bool

    def size(self, value: onnx.ValueInfoProto, axis: int) -> int:
        dims = value.type.tensor_type.shape.dim
        dynamic = [not _is_static(dim, index) for index, dim in enumerate(dims)]
        if axis == 0 or (axis == 1 and self.batch_second and not dynamic[0]):
            return self.batch
        image = len(dims) == 4 and axis > 1 and all(dynamic[2:])
        return self.scale * (_IMAGE_SIZE if image else _SIZE)


def random_feeds(
    model: onnx.ModelProto,
    *,
    seed: int = 0,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
    scale: int = 1,
    batch_second: bool = False,
) -> dict[str, NDArray[Any]]:
    """One random array for each input that is not an initializer.

    Args:
        model: The model to feed.
        seed: The same seed gives the same values, input by input.
        batch: Size of dynamic first axes, 2 if not given.
        sizes: Size of other dynamic axes by their name in the model, or by "input:axis"; 16 (64 for
            the height and width of images) if not given. Equal names get equal sizes.

    Raises:
        InvalidModelError: An input is no tensor or of unknown rank.
        InvalidDataError: `sizes` names an axis that the model does not have.
    """
    given = {tensor.name for tensor in model.graph.initializer}
    given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    inputs = [value for value in model.graph.input if value.name not in given]
    for value in inputs:
        _check_input(value)
    shapes = _shapes(inputs, sizes or {}, _Defaults(batch or _BATCH, scale, batch_second))
    trace = _Trace(model.graph)
    feeds = {}
    for value in inputs:
        rng = np.random.default_rng([seed, zlib.crc32(value.name.encode())])
        feeds[value.name] = _values(value, shapes[value.name], trace, rng)
    return feeds


def _check_input(value: onnx.ValueInfoProto) -> None:
    """Only tensors of known rank can be made up."""
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        name = (kind or "unknown type").removesuffix("_type").replace("_", " ")
        raise InvalidModelError(
            f"input '{value.name}' is no tensor ({name}): random values cannot be made; give data"
        )
    if not value.type.tensor_type.HasField("shape"):
        raise InvalidModelError(
            f"input '{value.name}' has no shape: random values cannot be made; give data"
        )


def _shapes(
    inputs: Sequence[onnx.ValueInfoProto], sizes: Mapping[str, int], defaults: _Defaults
) -> dict[str, tuple[int, ...]]:
    """The shape of each input, equal names of dynamic axes equal in size."""
    symbols = _symbols(inputs, sizes, defaults)
    shapes = {}
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        shape = []
        for axis, dim in enumerate(dims):
            key = f"{value.name}:{axis}"
            if _is_static(dim, axis):
                shape.append(dim.dim_value)
            elif key in sizes:
                shape.append(sizes[key])
            elif dim.dim_param:
                shape.append(_evaluate(dim.dim_param, symbols) or symbols[dim.dim_param])
            else:
                shape.append(defaults.size(value, axis))
        shapes[value.name] = tuple(shape)
    _check_sizes(sizes, symbols, shapes)
    return shapes


def _symbols(
    inputs: Sequence[onnx.ValueInfoProto], sizes: Mapping[str, int], defaults: _Defaults
) -> dict[str, int]:
    """The size of every named axis; a name that is anywhere first is a batch.

    total_N is past_N + N: so decoders with a cache name their axes.
    """
    symbols: dict[str, int] = {}
    for first in (True, False):
        for value in inputs:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param and (axis == 0) is first:
                    default = defaults.size(value, axis)
                    symbols.setdefault(dim.dim_param, sizes.get(dim.dim_param, default))
    for name in symbols.keys() - sizes.keys():
        parts = name.replace("total_", "past_", 1), name.removeprefix("total_")
        if name.startswith("total_") and symbols.keys() >= set(parts):
            symbols[name] = sum(symbols[part] for part in parts)
    return symbols


def _is_static(dim: onnx.TensorShapeProto.Dimension, axis: int) -> bool:
    """Some exporters write a dynamic axis as -1, or a dynamic first axis as 0."""
    return dim.HasField("dim_value") and (dim.dim_value > 0 or (dim.dim_value == 0 and axis > 0))


def _evaluate(text: str, symbols: Mapping[str, int]) -> int | None:
    """The value of a dimension such as "past + 1"; None unless every name in it is an axis."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name):
                return symbols[name]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return value(left) // value(right)
        raise KeyError(text)

    try:
        size = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, KeyError, ValueError, ZeroDivisionError):
        return None
    return size if size > 0 else None


def _check_sizes(
    sizes: Mapping[str, int], symbols: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Every given size has an axis."""
    known = {
        *symbols,
        *(f"{n}:{axis}" for n, shape in shapes.items() for axis in range(len(shape))),
    }
    for name in sizes:
        if name not in known:
            names = ", ".join(symbols) or "none"
            raise InvalidDataError(
                f"no input has a dynamic axis '{name}': the model's are {names} (or INPUT:AXIS)"
            )


def _values(
    value: onnx.ValueInfoProto, shape: tuple[int, ...], trace: _Trace, rng: np.random.Generator
) -> NDArray[Any]:
    """Random values of the input's type."""
    kind = value.type.tensor_type.elem_type
    if kind == TensorProto.STRING:
        return np.full(shape, "text", dtype=object)
    if kind == TensorProto.UNDEFINED:
        raise InvalidModelError(f"input '{value.name}' has no element type: export the model again")
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    if kind == TensorProto.BOOL:
        return np.ones(shape, dtype)
    name = TensorProto.DataType.Name(kind)
    if name.startswith(("INT", "UINT")):
        low, high = _range(value.name, name, len(shape), trace)
        return rng.integers(low, high, shape).astype(dtype)
    if "mask" in value.name.lower():
        return np.ones(shape, dtype)
    array = rng.standard_normal(shape, dtype=np.float32 if dtype == np.float32 else np.float64)
    return array.astype(dtype)


def _range(name: str, kind: str, rank: int, trace: _Trace) -> tuple[int, int]:
    """Lowest value and the one above the highest of an integer input."""
    use = trace.use(name)
    bits = int(kind.removeprefix("U").removeprefix("INT"))
    most = 2 ** (bits if kind.startswith("U") else bits - 1)
    if use.bound is None and kind == "UINT8" and rank >= 3 and "mask" not in name.lower():
        return 0, most  # pixels
    high = min(most, max(1, use.bound if use.bound is not None else 2))
    ones = "mask" in name.lower() or (use.bound is None and (use.masks or use.counts))
    return (1, 2) if ones and high > 1 else (0, high)


@dataclass
class _Use:
    """What an integer input is used for. `bound`: size of the smallest table that it indexes."""

    bound: int | None = None
    masks: bool = False
    counts: bool = False

    def index(self, size: int) -> None:
        self.bound = size if self.bound is None else min(self.bound, size)


@dataclass
class _Trace:
    """Follows values forwards through a graph and its bodies to what they index."""

    graph: onnx.GraphProto
    consumers: dict[str, list[tuple[onnx.NodeProto, int]]] = field(default_factory=dict)
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    tensors: dict[str, TensorProto] = field(default_factory=dict)
    types: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for graph in _graphs(self.graph):
            self.tensors |= {tensor.name: tensor for tensor in graph.initializer}
            self.types |= {v.name: v for values in (graph.input, graph.value_info) for v in values}
            for node in graph.node:
                for position, name in enumerate(node.input):
                    self.consumers.setdefault(name, []).append((node, position))
                for name in node.output:
                    self.producers[name] = node

    def use(self, name: str) -> _Use:
        """Everything that the value with this name reaches."""
        use = _Use()
        waiting = [(name, 0, True)]
        seen = set()
        while waiting:
            state = waiting.pop()
            if state in seen or not state[0] or abs(state[1]) > 1 << 20:
                continue
            seen.add(state)
            for node, position in self.consumers.get(state[0], []):
                waiting += self._step(node, position, state, use)
        return use

    def _step(
        self, node: onnx.NodeProto, position: int, state: tuple[str, int, bool], use: _Use
    ) -> Iterator[tuple[str, int, bool]]:
        """Note what one node does with a value; give what carries the value on.

        The state is (name, offset, exact): the value plus `offset`, or some other arithmetic of it.
        """
        _, offset, exact = state
        op = node.op_type
        use.counts |= position in _COUNTS.get(op, ())
        use.masks |= op in _MASKING
        for indices, table in _LOOKUPS.get(op, ()):
            if position == indices:
                size = self._table_size(node, table)
                use.index(2 if size is None else size - offset if exact else min(2, size))
                return
        if op == "OneHot" and position == 0:
            depth = self._constant(node.input[1])
            use.index(int(depth.flat[0]) - offset if depth is not None and depth.size else 2)
        elif op in _KEEPS_VALUES and (position == 0 or op in ("Concat", "Where", "Max", "Min")):
            yield from ((output, offset, exact) for output in node.output)
        elif op == "Add" and (added := self._constant(node.input[1 - position])) is not None:
            change = int(added.max()) if added.size and added.dtype.kind in "iu" else 0
            yield from ((output, offset + change, exact) for output in node.output)
        elif op in _ARITHMETIC:
            yield from ((output, 0, False) for output in node.output)

    def _constant(self, name: str) -> NDArray[Any] | None:
        """The value of an initializer or Constant node."""
        tensor = self.tensors.get(name)
        node = self.producers.get(name)
        if tensor is None and node is not None and node.op_type == "Constant":
            tensor = next((a.t for a in node.attribute if a.HasField("t")), None)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)

    def _table_size(self, node: onnx.NodeProto, position: int) -> int | None:
        """How many entries the node's indices may choose from, where that is known."""
        dims = self._dims(node.input[position]) if position < len(node.input) else None
        if not dims:
            return None
        if node.op_type in ("GatherND", "ScatterND"):
            return min(dims)
        axis = next((a.i for a in node.attribute if a.name in ("axis", "gather_axis")), 0)
        size = dims[axis] if -len(dims) <= axis < len(dims) else 0
        return size if size > 0 else None

    def _dims(self, name: str) -> list[int] | None:
        """The shape of a table, also behind Identity, Cast, DequantizeLinear; 0 where unknown."""
        for _ in range(100):
            if name in self.tensors:
                return list(self.tensors[name].dims)
            node = self.producers.get(name)
            if node is None or node.op_type not in ("Identity", "Cast", "DequantizeLinear"):
                break
            name = node.input[0]
        constant = self._constant(name)
        if constant is not None:
            return list(constant.shape)
        value = self.types.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and the bodies in it."""
    waiting: list[onnx.GraphProto] = [graph]
    while waiting:
        of_these = waiting.pop()
        yield of_these
        for node in of_these.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
