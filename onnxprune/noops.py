"""Layers that do nothing, found from shapes and constants, and taken out of the graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from onnxprune.facts import Facts
from onnxprune.graph import FLOATS, Graph, Node, captured_by
from onnxprune.ops.indexing import slice_bounds
from onnxprune.protos import reads

Test = Callable[[Node, Facts], "int | None"]
_TESTS: dict[str, Test] = {}


def _noop(*op_types: str) -> Callable[[Test], Test]:
    """Register a test of these operators: the input slot that the output always equals, or None."""

    def register(function: Test) -> Test:
        for op_type in op_types:
            _TESTS[op_type] = function
        return function

    return register


def passed_slot(node: Node, facts: Facts) -> int | None:
    """The input slot that the node's first output always equals; None where it computes."""
    test = _TESTS.get(node.op_type) if node.domain == "" else None
    if test is None or any(node.outputs[1:]):
        return None
    return test(node, facts)


def _same_shape(node: Node, facts: Facts, slot: int) -> bool:
    """Whether the output always has the shape of input `slot`."""
    source, target = node.inputs[slot], node.outputs[0]
    sizings = (facts.shapes.first.dims, facts.shapes.second.dims)
    same = all(source in s and s.get(source) == s.get(target) for s in sizings)
    return same and target not in facts.shapes.doubted


@_noop("Identity")
def _identity(node: Node, facts: Facts) -> int | None:
    return 0


@_noop("Dropout")
def _dropout(node: Node, facts: Facts) -> int | None:
    trains = node.input(2) and not (
        node.input(2) in facts.graph.constants
        and not facts.graph.constants[node.input(2)].array().any()
    )
    old = facts.graph.opset < 7 and not node.attr("is_test", 0)
    return None if trains or old else 0


@_noop("Cast")
def _cast(node: Node, facts: Facts) -> int | None:
    kind = facts.shapes.types.get(node.inputs[0])  # integers are folded, and not always in theirs
    return 0 if kind == node.attr("to") and kind in FLOATS else None


@_noop("Add", "Sub", "Mul", "Div", "Sum", "Concat", "Max", "Min")
def _neutral(node: Node, facts: Facts) -> int | None:
    """x + 0, x * 1, or a single operand."""
    if len(node.inputs) == 1:
        return 0
    if len(node.inputs) != 2 or node.op_type in ("Concat", "Max", "Min"):
        return None
    neutral = 1 if node.op_type in ("Mul", "Div") else 0
    for slot in (0, 1) if node.op_type in ("Add", "Mul", "Sum") else (0,):
        other = facts.of(node.inputs[1 - slot])
        if (
            facts.shapes.types.get(node.outputs[0]) in FLOATS
            and ((other.low == neutral) & (other.high == neutral)).all()
            and _same_shape(node, facts, slot)
        ):
            return slot
    return None


@_noop("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand")
def _reshape(node: Node, facts: Facts) -> int | None:
    return 0 if _same_shape(node, facts, 0) else None


@_noop("Tile")
def _tile(node: Node, facts: Facts) -> int | None:
    repeats = facts.value(node, 1)
    return 0 if repeats is not None and (repeats == 1).all() else None


@_noop("Transpose")
def _transpose(node: Node, facts: Facts) -> int | None:
    perm = node.attr("perm")
    return 0 if perm is not None and list(perm) == sorted(perm) else None


@_noop("Pad")
def _pad(node: Node, facts: Facts) -> int | None:
    pads = node.attr("pads") if not node.input(1) else facts.value(node, 1)
    return 0 if pads is not None and not np.any(pads) else None


@_noop("Slice")
def _slice(node: Node, facts: Facts) -> int | None:
    rank = len(facts.dims(node, 0))
    bounds = slice_bounds(node, [facts.value(node, s) for s in range(1, 5)], rank)
    if bounds is None:
        return None
    for axis, cut in bounds.items():
        length = facts.dims(node, 0)[axis]
        endless = cut.stop is not None and cut.stop >= 2**31 - 1
        whole = facts.is_fixed(node, 0, axis) and cut.stop is not None and cut.stop >= length
        if cut.start != 0 or cut.step != 1 or not (endless or whole):
            return None
    return 0


@_noop("MaxPool", "AveragePool")
def _pool(node: Node, facts: Facts) -> int | None:
    ones = all(
        n == 1 for key in ("kernel_shape", "strides", "dilations") for n in node.attr(key, ())
    )
    return 0 if ones and not any(node.attr("pads", ())) and _same_shape(node, facts, 0) else None


def remove_noops(model: onnx.ModelProto, facts: Facts) -> int:
    """Take layers that do nothing out of `model`, which `facts` describes; how many went.

    Names of the model's inputs and outputs stay. What a loop or branch body reads stays as well.
    """
    graph = facts.graph
    held = {name for node in graph.top for name in captured_by(node.proto)}
    ends = set(graph.outputs)
    alias: dict[str, str] = {}
    gone: set[int] = set()
    for node in graph.top:
        slot = passed_slot(node, facts)
        if slot is None or held & {node.inputs[slot], node.outputs[0]}:
            continue
        source, target = alias.get(node.inputs[slot], node.inputs[slot]), node.outputs[0]
        if target in ends:
            maker = graph.producer.get(source)
            if maker is None or source in ends or source in held or source in alias.values():
                continue
            ends.add(source)
            alias = {k: target if v == source else v for k, v in alias.items()}
            alias[source] = target
        else:
            alias[target] = source
        gone.add(node.index)
    if gone:
        _rewire(graph, alias, gone)
        _drop(model, {id(graph.nodes[i].proto) for i in gone})
    return len(gone)


def _rewire(graph: Graph, alias: dict[str, str], gone: set[int]) -> None:
    for node in graph.top:
        if node.index in gone:
            continue
        for names in (node.proto.input, node.proto.output):
            for i, name in enumerate(names):
                names[i] = alias.get(name, name)


def _drop(model: onnx.ModelProto, gone: set[int]) -> None:
    for i in reversed(range(len(model.graph.node))):
        if id(model.graph.node[i]) in gone:
            del model.graph.node[i]


def remove_dead(model: onnx.ModelProto) -> int:
    """Take out nodes that reach no output, and initializers that nothing reads; nodes that went."""
    graph = model.graph
    used = {o.name for o in graph.output}
    count = 0
    for i in reversed(range(len(graph.node))):
        if used.isdisjoint(name for name in graph.node[i].output if name):
            del graph.node[i]
            count += 1
        else:
            used.update(reads(graph.node[i]))
    inputs = {i.name for i in graph.input}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used | inputs:
            del graph.initializer[i]
    made = {name for node in graph.node for name in node.output}
    for i in reversed(range(len(graph.value_info))):
        if graph.value_info[i].name not in made:
            del graph.value_info[i]
    return count
