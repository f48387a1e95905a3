"""Clean up the structure: fewer nodes that answer the same, in standard operators as before.

onnxslim folds BatchNormalization and constants and drops what does nothing; linear layers with
nothing between are merged by `onnxprune.merging`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from onnxprune.errors import InvalidRecipeError, OnnxPruneError
from onnxprune.float32 import float32_copy
from onnxprune.merging import merge_layers
from onnxprune.protos import bodies
from onnxprune.verify import structure_problems

Feeds = Mapping[str, NDArray[Any]]


def require_library(asked_by: str) -> None:
    """Find onnxslim.

    Raises:
        InvalidRecipeError: it is not installed.
    """
    try:
        import onnxslim  # noqa: F401
    except ImportError as error:
        raise InvalidRecipeError(
            f"{asked_by} needs onnxslim: pip install 'onnxprune[simplify]'"
        ) from error


@dataclass(frozen=True)
class Simplified:
    """`merged`: layers that went into others. With a `problem` the model is the given one."""

    model: onnx.ModelProto
    nodes_before: int
    nodes_after: int
    merged: int = 0
    max_error: float = 0.0
    problem: str = ""

    @property
    def note(self) -> str:
        """What reports say."""
        if self.problem:
            return f"not simplified: {self.problem}"
        return f"simplified: {self.nodes_before} nodes became {self.nodes_after}"


@dataclass(frozen=True)
class Simplify:
    """Fold and merge layers. `as_float32`: the model only runs as a float32 copy."""

    name: ClassVar[str] = "simplify"
    threads: int | None = None
    as_float32: bool = False

    def __call__(self, model: onnx.ModelProto, feeds: Sequence[Feeds] = ()) -> Simplified:
        """The simpler model; the given one, untouched, where none is the same and no larger."""
        try:
            slim = _slim(model)
        except Exception as error:  # whatever another library raises
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            return self._kept(model, f"onnxslim failed: {first}")
        small, count = merge_layers(slim)
        found = self._checked(model, small, feeds)
        if found.problem and count:
            return self._checked(model, slim, feeds)
        return replace(found, merged=0 if found.problem else count)

    def _checked(
        self, model: onnx.ModelProto, small: onnx.ModelProto, feeds: Sequence[Feeds]
    ) -> Simplified:
        from onnxprune.passes.lossless import compare

        problems = [*structure_problems(small, model), *_size_problems(small, model)]
        if problems:
            return self._kept(model, f"onnxslim's result is not the same model: {problems[0]}")
        pair = (model, small)
        try:
            if self.as_float32:
                pair = (float32_copy(model), float32_copy(small))
            error, tolerance = compare(*pair, feeds, threads=self.threads)
        except OnnxPruneError as failure:
            return self._kept(model, f"onnxslim's result cannot be compared: {failure}")
        if not error <= tolerance:
            return self._kept(model, f"onnxslim's result is not the same model: error {error:.3g}")
        return Simplified(small, _node_count(model), _node_count(small), max_error=error)

    def _kept(self, model: onnx.ModelProto, problem: str) -> Simplified:
        count = _node_count(model)
        return Simplified(model, count, count, problem=problem)


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    slim: onnx.ModelProto = onnxslim.slim(copy)
    _record_as_before(slim.graph, model.graph)
    return slim


def _record_as_before(graph: onnx.GraphProto, old: onnx.GraphProto) -> None:
    """Say about tensors what the model said: onnxslim notes every shape, in outputs' names too."""
    for ours, theirs in zip(graph.output, old.output, strict=False):
        if ours.name == theirs.name:
            ours.CopyFrom(theirs)
    made = {name for node in graph.node for name in node.output}
    del graph.value_info[:]
    graph.value_info.extend(value for value in old.value_info if value.name in made)


def _node_count(model: onnx.ModelProto) -> int:
    return len(model.graph.node)


def _size_problems(small: onnx.ModelProto, model: onnx.ModelProto) -> Iterator[str]:
    """Operators of a vendor that were not there before, and a file that grew."""
    for name in sorted(_foreign(small.graph) - _foreign(model.graph)):
        yield f"it has operators {name}"
    if small.ByteSize() > model.ByteSize():
        yield f"it is larger: {small.ByteSize()} bytes instead of {model.ByteSize()}"


def _foreign(graph: onnx.GraphProto) -> set[str]:
    """The operators, by domain and name, that are none of the standard."""
    found = set()
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            found.add(f"{node.domain}.{node.op_type}")
        for body in bodies(node):
            found |= _foreign(body)
    return found
