"""Edits that take layers out of a model, as data: written to plans, replayed, checked."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from onnxprune.errors import InvalidRecipeError
from onnxprune.noops import remove_dead
from onnxprune.protos import fresh_name


@dataclass(frozen=True)
class LayerEdit:
    """`nodes` make some of the model's tensors anew, from earlier ones and from `tensors`."""

    nodes: tuple[onnx.NodeProto, ...]
    tensors: tuple[onnx.TensorProto, ...]

    @property
    def made(self) -> frozenset[str]:
        """The tensors that the nodes make."""
        return frozenset(name for node in self.nodes for name in node.output)

    def to_text(self) -> str:
        """The edit in letters, for a plan."""
        graph = onnx.GraphProto(name="edit")
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.tensors)
        packed = zlib.compress(graph.SerializeToString(deterministic=True), 9)
        return base64.b64encode(packed).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> LayerEdit:
        """Read what `to_text` wrote.

        Raises:
            InvalidRecipeError: it is something else.
        """
        graph = onnx.GraphProto()
        try:
            graph.ParseFromString(zlib.decompress(base64.b64decode(text, validate=True)))
        except (binascii.Error, zlib.error, DecodeError, ValueError) as error:
            raise InvalidRecipeError(
                f"the plan is malformed: an edit of layers cannot be read ({error})"
            ) from error
        return cls(tuple(graph.node), tuple(graph.initializer))


def edited(model: onnx.ModelProto, edit: LayerEdit) -> onnx.ModelProto:
    """A copy in which the edit's nodes stand where the same tensors were made, without the rest.

    Raises:
        InvalidRecipeError: the model has no such tensor.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    places = _places(copy, edit)
    for at in reversed(places):
        del copy.graph.node[at]
    _insert(copy, edit.nodes, places[0])
    copy.graph.initializer.extend(edit.tensors)
    remove_dead(copy)
    return copy


def shadowed(model: onnx.ModelProto, edits: Iterable[LayerEdit]) -> onnx.ModelProto:
    """The twin of the model with these edits: all its nodes stay, and what they give is not used.

    Each tensor that an edit makes anew is what the edit gives, plus zero times what it was.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = copy.graph.node
    taken = {name for n in nodes for name in (n.name, *n.input, *n.output)}
    for edit in edits:
        _shadow(copy, edit, taken)
    return copy


def _shadow(model: onnx.ModelProto, edit: LayerEdit, taken: set[str]) -> None:
    places = _places(model, edit)
    old = {name for at in places for name in model.graph.node[at].output if name in edit.made}
    taken |= edit.made | {node.name for node in edit.nodes}
    nodes = []
    kinds = {t.name: t.data_type for t in edit.tensors}
    for node in edit.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        for i, name in enumerate(node.output):
            if name in old:
                new, was, none = (fresh_name(f"{name}_{w}", taken) for w in ("new", "was", "none"))
                copy.output[i] = new
                zero = fresh_name(f"{name}_zero", taken)
                kind = next(iter(kinds.values()), onnx.TensorProto.FLOAT)
                value = numpy_helper.from_array(helper.tensor_dtype_to_np_dtype(kind).type(0), zero)
                model.graph.initializer.append(value)
                nodes.append(helper.make_node("Mul", [was, zero], [none]))
                nodes.append(helper.make_node("Add", [new, none], [name]))
                for at in places:
                    of = model.graph.node[at].output
                    of[:] = [was if o == name else o for o in of]
    _insert(model, nodes, places[-1] + 1)
    model.graph.initializer.extend(edit.tensors)


def _places(model: onnx.ModelProto, edit: LayerEdit) -> list[int]:
    places = [i for i, n in enumerate(model.graph.node) if not edit.made.isdisjoint(n.output)]
    if not places:
        raise InvalidRecipeError(
            "the plan was made for another model: it has no tensor "
            f"{next(iter(sorted(edit.made)), '')!r}"
        )
    return places


def _insert(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], at: int) -> None:
    for offset, node in enumerate(nodes):
        model.graph.node.insert(at + offset, node)
