"""Bodies of control-flow nodes, brought into a form in which one flat analysis can follow them.

A name may be defined in several bodies, and a body may hand out a tensor of the graph around it.
Afterwards every name is defined once in the whole model, and each output of a body is made by a
node of that body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import helper

from onnxprune.protos import bodies


def separate_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with unique names; the same object where it has no bodies."""
    if not any(True for node in model.graph.node for _ in bodies(node)):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    taken = set(_defined(copy.graph))
    for node in copy.graph.node:
        for body in bodies(node):
            _rename(body, taken, {})
    return copy


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (name for node in graph.node for name in node.output if name)


def _fresh(wish: str, taken: set[str]) -> str:
    name, n = wish, 1
    while name in taken:
        name, n = f"{wish}_{n}", n + 1
    taken.add(name)
    return name


def _rename(body: onnx.GraphProto, taken: set[str], outer: Mapping[str, str]) -> None:
    names = {**outer, **{name: _fresh(name, taken) for name in dict.fromkeys(_defined(body))}}
    made: set[str] = set()
    for value in (*body.input, *body.initializer, *body.value_info):
        value.name = names.get(value.name, value.name)
    for tensor in body.sparse_initializer:
        tensor.values.name = names.get(tensor.values.name, tensor.values.name)
    for node in body.node:
        for names_of in (node.input, node.output):
            for i, name in enumerate(names_of):
                names_of[i] = names.get(name, name)
        made.update(node.output)
        for inner in bodies(node):
            _rename(inner, taken, names)
    for value in body.output:
        name = names.get(value.name, value.name)
        if name not in made:
            value.name = _fresh(f"{name}_out", taken)
            body.node.append(helper.make_node("Identity", [name], [value.name], name=value.name))
        else:
            made.discard(name)  # a second output of the same name gets a node of its own
            value.name = name
