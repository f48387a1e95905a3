"""What onnx infers for single operator calls, remembered: repeated blocks are alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx

from onnxprune.graph import Graph, Node

Dims = tuple[int, ...]
#: Element type and, where it is complete, shape.
Kind = tuple[int, Dims | None]


def kind_of(kind: onnx.TypeProto) -> Kind | None:
    """Element type and, if it is complete, shape; None for what is no tensor."""
    if not kind.HasField("tensor_type"):
        return None
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    dims = [d.dim_value or (0 if d.HasField("dim_value") else -1) for d in tensor.shape.dim]
    return tensor.elem_type, None if -1 in dims else tuple(dims)


@dataclass(frozen=True)
class Cache:
    """What onnx's inference said of an operator call: repeated blocks of a network are alike."""

    outputs: dict[Any, list[Kind | None]] = field(default_factory=dict)
    attributes: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    schemas: dict[tuple[str, str], onnx.defs.OpSchema | None] = field(default_factory=dict)

    def schema(self, node: Node, graph: Graph) -> onnx.defs.OpSchema | None:
        """The definition of the node's operator; None where onnx has none."""
        key = (node.domain, node.op_type)
        if key not in self.schemas:
            version = graph.opsets.get(node.domain)
            known = version is not None and onnx.defs.has(node.op_type, version, node.domain)
            found = onnx.defs.get_schema(node.op_type, version or 1, node.domain) if known else None
            self.schemas[key] = found
        return self.schemas[key]

    def attribute_key(self, node: Node) -> tuple[bytes, ...]:
        """What tells the node's attributes from those of others."""
        key = self.attributes.get(node.index)
        if key is None:
            key = tuple(a.SerializeToString() for a in node.proto.attribute)
            self.attributes[node.index] = key
        return key
