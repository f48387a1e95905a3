"""The model's inputs, and how arrays are fitted to them: names, types, ranks and lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from onnxprune.data.dataset import Array
from onnxprune.errors import InvalidDataError

LABEL_NAMES = ("y", "labels", "label")


@dataclass(frozen=True)
class Input:
    """One input of the model. `shape` is None where the rank is unknown; a None length is dynamic.

    `batched`: axis 0 counts samples.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None
    batched: bool

    def __str__(self) -> str:
        """The input as messages show it: float32 [batch, 1, 8, 8]."""
        if self.shape is None:
            return f"{self.dtype} of any shape"
        lengths = ["?" if n is None else str(n) for n in self.shape]
        if self.batched and self.shape[0] is None:
            lengths[0] = "batch"
        return f"{self.dtype} [{', '.join(lengths)}]"

    def target(self, shape: tuple[int, ...], where: str) -> tuple[int, ...]:
        """The shape that an array of `shape` takes to be fed.

        Axes of length 1 are added or dropped, and samples are flattened or unflattened, where the
        wanted lengths are fixed: [N, 28, 28], [N, 1, 28, 28] and [N, 784] hold the same numbers in
        the same order.

        Raises:
            InvalidDataError: the shape does not fit.
        """
        if self.shape is None and not shape:
            raise InvalidDataError(
                f"{where}: input {self.name!r} got a scalar; samples need a batch axis in front"
            )
        if self.shape is None or _fits(self.shape, shape, skip_first=self.batched):
            return shape
        rest = self.shape[1:]
        if self.batched and shape and all(n is not None for n in rest):
            wanted, given = tuple(n for n in rest if n is not None), shape[1:]
            if math.prod(wanted) == math.prod(given) and _same_order(wanted, given):
                return (shape[0], *wanted)
        raise InvalidDataError(
            f"{where}: input {self.name!r} takes {self}, not {list(shape)}; {_advice(self, shape)}"
        )

    def check_dtype(self, dtype: np.dtype[Any], where: str) -> None:
        """Raise InvalidDataError where this input's type cannot stand for values of `dtype`."""
        if not _castable(dtype, self.dtype):
            raise InvalidDataError(
                f"{where}: input {self.name!r} takes {self.dtype}, not {dtype}; convert the data "
                "first"
            )

    def fit(self, array: Array, where: str) -> Array:
        """`array` in this input's type and shape, without a copy where both agree already."""
        self.check_dtype(array.dtype, where)
        shape = self.target(array.shape, where)
        if self.dtype.kind in "iu" and array.size and not np.can_cast(array.dtype, self.dtype):
            _check_range(array, self, where)
        return np.ascontiguousarray(array, dtype=self.dtype).reshape(shape)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a model that have to be fed; `batch` is a fixed batch length, or None."""

    specs: tuple[Input, ...]
    batch: int | None

    @property
    def joinable(self) -> bool:
        """Whether feeds can be joined and cut along axis 0: every input counts samples there."""
        return all(spec.batched for spec in self.specs)

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the model's order."""
        return tuple(spec.name for spec in self.specs)

    @property
    def only(self) -> Input | None:
        """The input of a model that has just one."""
        return self.specs[0] if len(self.specs) == 1 else None

    def by_name(self, arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`arrays` keyed by this model's input names; a lone array named x goes to the only input.

        Raises:
            InvalidDataError: an input is missing or a name is unknown.
        """
        given = dict(arrays)
        if self.only is not None and list(given) == ["x"]:
            given = {self.only.name: given["x"]}
        missing = [name for name in self.names if name not in given]
        unknown = [name for name in given if name not in self.names]
        if missing or unknown:
            faults = [f"lacks {', '.join(map(repr, missing))}"] if missing else []
            faults += [f"has {', '.join(map(repr, unknown))}"] if unknown else []
            raise InvalidDataError(
                f"{where}: {' and '.join(faults)}; the model's inputs are "
                f"{', '.join(map(repr, self.names))}, "
                "and labels are called 'y'"
            )
        return {name: given[name] for name in self.names}

    def counting(self, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
        """Also inputs whose free first axis has another name count samples, if as long as others.

        torch.export names the batch axis of each input by itself (s10, s86).
        """
        first = next((s.name for s in self.specs if s.batched), None)
        if first is None or not shapes[first]:
            return self
        count = shapes[first][0]
        return replace(
            self,
            specs=tuple(
                replace(spec, batched=True)
                if spec.shape and spec.shape[0] is None and shapes[spec.name][:1] == (count,)
                else spec
                for spec in self.specs
            ),
        )

    def label_name(self, names: list[str]) -> str | None:
        """Which of `names` holds the labels, if one does."""
        return next((n for n in LABEL_NAMES if n in names and n not in self.names), None)

    def fit(self, arrays: Mapping[str, Array], where: str) -> dict[str, Array]:
        """The arrays of one batch, each in its input's type and shape."""
        feeds = {spec.name: spec.fit(arrays[spec.name], where) for spec in self.specs}
        lengths = {spec.name: len(feeds[spec.name]) for spec in self.specs if spec.batched}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InvalidDataError(
                f"{where}: batch lengths differ ({told}); axis 0 of each input counts samples"
            )
        return feeds


def model_inputs(model: onnx.ModelProto) -> Inputs:
    """The inputs that a caller has to feed: those of the graph that no initializer fills."""
    filled = {t.name for t in model.graph.initializer} | {
        t.values.name for t in model.graph.sparse_initializer
    }
    values = [value for value in model.graph.input if value.name not in filled]
    if not values:
        raise InvalidDataError("the model has no inputs; data cannot be fed to it")
    first = next((d for d in map(_first_dim, values) if d is not None), None)
    specs = tuple(_spec(value, first) for value in values)
    lengths = [spec.shape[0] for spec in specs if spec.batched and spec.shape]
    return Inputs(specs, next((n for n in lengths if n is not None), None))


def _spec(value: onnx.ValueInfoProto, first: onnx.TensorShapeProto.Dimension | None) -> Input:
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value") or "untyped"
        raise InvalidDataError(
            f"input {value.name!r} of the model is {kind}; only tensors can be fed"
        )
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if not tensor.HasField("shape"):
        return Input(value.name, dtype, None, True)
    shape = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
        for d in tensor.shape.dim
    )
    own = _first_dim(value)
    return Input(
        value.name, dtype, shape, own is not None and first is not None and _same_dim(own, first)
    )


def _first_dim(value: onnx.ValueInfoProto) -> onnx.TensorShapeProto.Dimension | None:
    dims = value.type.tensor_type.shape.dim
    return dims[0] if len(dims) else None


def _same_dim(a: onnx.TensorShapeProto.Dimension, b: onnx.TensorShapeProto.Dimension) -> bool:
    """Whether both may count samples: equal lengths, equal names, or one side says nothing."""
    if a.dim_value > 0 and b.dim_value > 0:
        return a.dim_value == b.dim_value
    if a.dim_value > 0 or b.dim_value > 0:
        return False
    return not a.dim_param or not b.dim_param or a.dim_param == b.dim_param


def _fits(wanted: tuple[int | None, ...], given: tuple[int, ...], *, skip_first: bool) -> bool:
    """Whether rank and fixed lengths agree; `skip_first` where axis 0 is settled by batching."""
    first = int(skip_first)
    return len(wanted) == len(given) and all(
        w in (None, g) for w, g in zip(wanted[first:], given[first:], strict=True)
    )


def _same_order(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether a reshape between the two only flattens, unflattens, or moves axes of length 1."""
    long_a, long_b = [n for n in a if n != 1], [n for n in b if n != 1]
    return long_a == long_b or len(long_a) <= 1 or len(long_b) <= 1


def _advice(spec: Input, shape: tuple[int, ...]) -> str:
    assert spec.shape is not None
    if _fits(spec.shape[1:], shape, skip_first=False):
        return "samples need a batch axis in front"
    if len(shape) == len(spec.shape) == 4 and _moved_channels(spec.shape, shape):
        return "channels sit on another axis; transpose the data"
    wrong = [
        a
        for a, (w, g) in enumerate(zip(spec.shape, shape, strict=False))
        if a and w not in (None, g)
    ]
    if len(shape) == len(spec.shape) and wrong:
        return f"axis {wrong[0]} must have length {spec.shape[wrong[0]]}"
    return "resize or reshape the data to fit"


def _moved_channels(wanted: tuple[int | None, ...], given: tuple[int, ...]) -> bool:
    moved = (given[3], given[1], given[2]), (given[2], given[3], given[1])
    return any(all(w in (None, g) for w, g in zip(wanted[1:], m, strict=True)) for m in moved)


def _castable(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Whether numbers become no narrower kind (bool < integer < float), and text stays text."""
    if source == target:
        return True
    if target.kind == "O":
        return source.kind in "OUS"
    ranks = {"b": 0, "i": 1, "u": 1, "f": 2, "V": 2}
    if source.kind not in ranks or target.kind not in ranks or target.kind == "b":
        return False
    return ranks[source.kind] <= ranks[target.kind]


def _check_range(array: Array, spec: Input, where: str) -> None:
    limits = np.iinfo(spec.dtype)
    low, high = int(array.min()), int(array.max())
    if low < limits.min or high > limits.max:
        raise InvalidDataError(
            f"{where}: input {spec.name!r} takes {spec.dtype}, but values reach from {low} to "
            f"{high}; "
            f"it holds {limits.min} to {limits.max}"
        )
