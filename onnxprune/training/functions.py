"""Replace a node by the function body that the ONNX standard gives its operator."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from onnxprune.training.draft import Draft


def expand_function(
    node: onnx.NodeProto, source: Draft | onnx.GraphProto, version: int
) -> list[onnx.NodeProto] | None:
    """The nodes of the operator's body, with names that nothing else has.

    None where the standard has none.
    """
    try:
        schema = onnx.defs.get_schema(node.op_type, version)
    except onnx.defs.SchemaError:
        return None
    body = _body(schema, node, source, version)
    return None if body is None else _instantiate(body, node, schema)


def _body(schema: Any, node: onnx.NodeProto, source: Draft | onnx.GraphProto, version: int) -> Any:
    """The FunctionProto for this node, at the newest opset not above `version`."""
    if schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= version]
        if versions:
            return onnx.FunctionProto.FromString(
                schema.get_function_with_opset_version(max(versions))
            )
    if schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= version]
        if versions:
            types = [_type(name, source) for name in node.input]
            data = schema.get_context_dependent_function_with_opset_version(
                max(versions), node.SerializeToString(), types
            )
            return onnx.FunctionProto.FromString(data) if data else None
    return None


def _type(name: str, source: Draft | onnx.GraphProto) -> bytes:
    """The serialized type of a tensor."""
    if isinstance(source, Draft):
        shape = source.shape(name)
        kind = source.types.get(name, onnx.TensorProto.FLOAT)
        return bytes(helper.make_tensor_type_proto(kind, shape).SerializeToString())
    for info in [*source.input, *source.value_info, *source.output]:
        if info.name == name:
            return bytes(info.type.SerializeToString())
    for tensor in source.initializer:
        if tensor.name == name:
            kind, shape = tensor.data_type, tuple(tensor.dims)
            return bytes(helper.make_tensor_type_proto(kind, shape).SerializeToString())
    return bytes(onnx.TypeProto().SerializeToString())


def _instantiate(
    body: onnx.FunctionProto, node: onnx.NodeProto, schema: Any
) -> list[onnx.NodeProto]:
    """Bind inputs, outputs and attributes of a body to those of the node."""
    names = dict(zip(body.output, node.output, strict=False))
    for index, formal in enumerate(body.input):
        names[formal] = node.input[index] if index < len(node.input) else ""
    given = {a.name: a for a in node.attribute}
    defaults = {n: a.default_value for n, a in schema.attributes.items() if a.default_value.type}
    defaults.update({a.name: a for a in body.attribute_proto})
    prefix = f"onnxprune.{node.output[0]}."
    nodes = []
    for index, inner in enumerate(body.node):
        fresh = onnx.NodeProto(
            op_type=inner.op_type, domain=inner.domain, name=f"{prefix}{inner.op_type}{index}"
        )
        fresh.input.extend(names.get(i, prefix + i) if i else "" for i in inner.input)
        fresh.output.extend(names.get(o, prefix + o) if o else "" for o in inner.output)
        for attribute in inner.attribute:
            bound = _bound(attribute, given, defaults)
            if bound is not None:
                fresh.attribute.append(bound)
        nodes.append(fresh)
    return nodes


def _bound(attribute: onnx.AttributeProto, given: dict[str, Any], defaults: dict[str, Any]) -> Any:
    """An attribute of a body's node, with a reference to the outer attribute resolved."""
    if not attribute.ref_attr_name:
        return attribute
    source = given.get(attribute.ref_attr_name) or defaults.get(attribute.ref_attr_name)
    if source is None:
        return None
    bound = onnx.AttributeProto()
    bound.CopyFrom(source)
    bound.name = attribute.name
    return bound
