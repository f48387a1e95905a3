"""Edit graphs with onnx-graphsurgeon without losing what it cannot hold.

graphsurgeon (gs) is a good editor and a lossy serializer. `import_graph` gives gs a stand-in of the
model, in which every node has a unique name and nothing is left that gs would crash on or drop, and
keeps the rest beside it, keyed by the identity of the gs objects. `export_graph` lets gs write the
topology and puts the rest back:

* initializers as they were, or from the array an edit left; each in the scope that it came from;
* inputs that are initializers, value types that gs does not know, documentation and metadata;
* attributes that gs does not read; functions that cannot be inlined; the model's own fields.

Within an edit: do not call gs's `toposort` (recursive; the export sorts), `fold_constants` (wrong
types), `Graph.copy` (unties captured constants), or `cleanup(remove_unused_node_outputs=True)`
(breaks positional outputs). Shapes of values are the model's: an edit that changes them sets
`shape` of what it touches, or None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxprune.errors import InvalidModelError
from onnxprune.protos import copy_fields
from onnxprune.standin import (
    NodeNames,
    check_names,
    dense,
    initializer_names,
    is_editable,
    prepared,
    sort_nodes,
    strip,
)

_SILENT: Final = 1000  # above every severity of gs, which prints to standard output
_FIRST_IR_WITHOUT_INPUTS: Final = 4
_NODE_FIELDS: Final = frozenset(["input", "output", "name", "op_type", "domain", "attribute"])
_GRAPH_FIELDS: Final = frozenset(
    field.name
    for field in onnx.GraphProto.DESCRIPTOR.fields
    if field.name not in ("metadata_props", "quantization_annotation")
)


@dataclass
class _Frame:
    """A graph or body as it was: its proto, its tensors, and the gs objects for the names in it."""

    graph: Any
    proto: onnx.GraphProto
    initializers: list[TensorProto | onnx.SparseTensorProto]
    tensors: dict[str, Any]


@dataclass
class Surgery:
    """A model under edit: change `graph`, a `gs.Graph`, then call `export_graph`."""

    graph: Any
    _model: onnx.ModelProto
    _nodes: dict[int, tuple[Any, onnx.NodeProto, str]] = field(default_factory=dict)
    _frames: dict[int, _Frame] = field(default_factory=dict)
    _seen: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _home: dict[int, tuple[int, int]] = field(default_factory=dict)


def import_graph(model: onnx.ModelProto) -> Surgery:
    """The model as a `gs.Graph` and everything that gs drops. The model is not changed.

    Weights are read from the model when an edit asks for `values`, so it must not change either.

    Raises:
        InvalidModelError: A name is defined twice or hides one outside, or the graph has a cycle.
    """
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

    source = prepared(model)
    stand_in = onnx.ModelProto()
    stand_in.CopyFrom(source)
    stand_in.ClearField("functions")
    names = NodeNames(source.graph)
    strip(stand_in.graph, names)
    try:
        with gs.logger.G_LOGGER.suppress(_SILENT):
            graph = gs.import_onnx(stand_in)
    except OnnxGraphSurgeonException as error:
        raise InvalidModelError(f"the graph cannot be edited: {error}") from error
    surgery = Surgery(graph, source)
    initializers = [*model.graph.initializer, *model.graph.sparse_initializer]
    _link(surgery, graph, source.graph, initializers)
    return surgery


def export_graph(surgery: Surgery) -> onnx.ModelProto:
    """The edited model; the surgery can go on and be exported again.

    Raises:
        InvalidModelError: The edit made a cycle.
    """
    import onnx_graphsurgeon as gs

    with gs.logger.G_LOGGER.suppress(_SILENT):
        _check_tensors(surgery.graph)
        initializers = {id(t): _to_tensor(surgery, t) for t in _constants(surgery.graph)}
        with _Light(surgery.graph):
            model: onnx.ModelProto = gs.export_onnx(surgery.graph, do_type_check=False)
    _restore_graph(surgery, surgery.graph, model.graph, initializers, frozenset())
    check_names(model.graph)
    sort_nodes(model.graph)
    _restore_model(surgery._model, model)
    return model


def _check_tensors(graph: Any) -> None:
    """Two values of one name would become one value."""
    from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

    for of_graph in _all_graphs(graph):
        try:
            of_graph.tensors(check_duplicates=True)
        except OnnxGraphSurgeonException as error:
            text = str(error).splitlines()
            raise InvalidModelError(
                f"two values of the edited graph share a name: {text[1] if text[1:] else text}"
            ) from None


def _restore_model(origin: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Put the model's own fields back, but for those that an edit may change."""
    functions = [*origin.functions, *model.functions]
    edited = ["producer_name", "producer_version", "ir_version"]
    kept = {name for name in edited if getattr(model, name) != getattr(origin, name)}
    kept |= {"graph", "opset_import"}
    for descriptor, _ in model.ListFields():
        if descriptor.name not in kept:
            model.ClearField(descriptor.name)
    copy_fields(origin, model, {*kept, "functions"})
    model.functions.extend(functions)


def _link(
    surgery: Surgery,
    graph: Any,
    proto: onnx.GraphProto,
    initializers: list[TensorProto | onnx.SparseTensorProto],
) -> dict[str, Any]:
    """Tie gs objects to what they came from; gives the tensors that come from scopes outside."""
    tensors: dict[str, Any] = {}
    for node, origin in zip(graph.nodes, proto.node, strict=True):
        surgery._nodes[id(node)] = (node, origin, node.name)
        for attribute in origin.attribute:
            if attribute.type == AttributeProto.GRAPH:
                body, of_body = node.attrs[attribute.name], attribute.g
                own = [*of_body.initializer, *of_body.sparse_initializer]
                tensors |= _link(surgery, body, of_body, own)
            elif attribute.type == AttributeProto.TENSOR and attribute.name in node.attrs:
                constant = node.attrs[attribute.name]
                constant._values = _lazy(constant._values.tensor)
    tensors |= graph.tensors()
    for tensor in tensors.values():
        surgery._seen.setdefault(id(tensor), (tensor, _type(tensor)))
    for position, initializer in enumerate(initializers):
        constant = tensors.get(_name(initializer))
        if constant is not None:
            constant._values = _lazy(initializer)
            surgery._home[id(constant)] = (id(graph), position)
    frame = _Frame(graph, proto, initializers, tensors)
    surgery._frames[id(graph)] = frame
    local = {*initializer_names(proto), *(value.name for value in proto.input)}
    local |= {name for node in proto.node for name in node.output}
    return {name: tensor for name, tensor in tensors.items() if name not in local}


def _name(initializer: TensorProto | onnx.SparseTensorProto) -> str:
    if isinstance(initializer, TensorProto):
        return initializer.name
    return initializer.values.name


def _lazy(initializer: TensorProto | onnx.SparseTensorProto) -> Any:
    """Values that are read from the proto when an edit asks for them, in their own type.

    What gs itself reads is zeros or doubles for sparse tensors, and comes with printed warnings.
    """
    from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

    if isinstance(initializer, TensorProto):
        values = LazyValues(initializer)
        values.load = lambda: np.array(numpy_helper.to_array(initializer))
    else:
        values = SparseValues(initializer)
        values.load = lambda: dense(initializer)
    return values


def _is_constant(tensor: Any) -> bool:
    from onnx_graphsurgeon import Constant

    return isinstance(tensor, Constant)


def _type(tensor: Any) -> Any:
    """What an edit may change of a value's type, None for constants."""
    if _is_constant(tensor):
        return None
    return tensor.dtype, None if tensor.shape is None else tuple(tensor.shape)


def _all_graphs(graph: Any) -> Iterator[Any]:
    """The gs graph and its bodies, outer ones first."""
    yield graph
    yield from graph.subgraphs(recursive=True)


def _constants(graph: Any) -> Iterator[Any]:
    """The constants that this graph and its bodies use, each once."""
    found: dict[int, Any] = {}
    for of_graph in _all_graphs(graph):
        for tensor in of_graph.tensors().values():
            if _is_constant(tensor):
                found.setdefault(id(tensor), tensor)
    yield from found.values()


def _to_tensor(surgery: Surgery, constant: Any) -> TensorProto | onnx.SparseTensorProto:
    """The initializer of a constant: the original itself, or a new one where it was edited."""
    values = constant._values
    if hasattr(values, "tensor"):
        original: TensorProto | onnx.SparseTensorProto = values.tensor
        if _name(original) == constant.name:
            return original
        renamed = type(original)()
        renamed.CopyFrom(original)
        (renamed if isinstance(renamed, TensorProto) else renamed.values).name = constant.name
        return renamed
    graph, position = surgery._home.get(id(constant), (0, 0))
    origin = surgery._frames[graph].initializers[position] if graph else None
    return _from_array(values, constant, origin if isinstance(origin, TensorProto) else None)


def _from_array(values: Any, constant: Any, origin: TensorProto | None) -> TensorProto:
    """An edited array as a tensor of its own type, with what the original said about it."""
    kind = constant._export_dtype
    if kind is not None:
        values = values.astype(helper.tensor_dtype_to_np_dtype(kind) if type(kind) is int else kind)
    tensor = numpy_helper.from_array(values, constant.name)
    if origin is not None:
        if origin.HasField("doc_string"):
            tensor.doc_string = origin.doc_string
        tensor.metadata_props.extend(origin.metadata_props)
    return tensor


class _Light:
    """Within: constants hold no values for gs to copy; arrays in attributes are tensors."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._saved: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        for constant in _constants(self._graph):
            empty = TensorProto(name=constant.name, data_type=TensorProto.FLOAT, dims=[0])
            self._replace(constant, empty)
        for graph in _all_graphs(self._graph):
            for node in graph.nodes:
                for value in node.attrs.values():
                    if _is_constant(value) and not hasattr(value._values, "tensor"):
                        self._replace(value, _from_array(value._values, value, None))

    def _replace(self, constant: Any, tensor: TensorProto) -> None:
        self._saved.append((constant, constant._values))
        constant._values = _lazy(tensor)

    def __exit__(self, *_: object) -> None:
        for constant, values in reversed(self._saved):
            constant._values = values


def _restore_graph(
    surgery: Surgery,
    graph: Any,
    proto: onnx.GraphProto,
    tensors: dict[int, TensorProto | onnx.SparseTensorProto],
    outer: frozenset[int],
) -> None:
    """Put back into one exported graph what gs does not hold; then into its bodies."""
    frame = surgery._frames.get(id(graph))
    placed = _place(surgery, graph, outer)
    _restore_initializers(frame, proto, [tensors[id(constant)] for constant in placed])
    _restore_values(surgery, graph, frame, proto, {id(c): tensors[id(c)] for c in placed})
    if frame is not None:
        copy_fields(frame.proto, proto, _GRAPH_FIELDS)
    inner = outer | {id(constant) for constant in placed}
    for node, exported in zip(graph.nodes, proto.node, strict=True):
        for attribute in exported.attribute:
            if attribute.type == AttributeProto.GRAPH:
                body = node.attrs[attribute.name]
                _restore_graph(surgery, body, attribute.g, tensors, inner)
        _restore_node(surgery, node, exported)


def _place(surgery: Surgery, graph: Any, outer: frozenset[int]) -> list[Any]:
    """The constants that this graph holds: what it uses and nothing around it holds, and what its
    bodies use and was here before. Old ones come first, in their old order."""
    here = {id(t): t for t in graph.tensors().values() if _is_constant(t)}
    for constant in _constants(graph):
        if surgery._home.get(id(constant), (0, 0))[0] == id(graph):
            here.setdefault(id(constant), constant)
    held = [constant for key, constant in here.items() if key not in outer]

    def position(constant: Any) -> int:
        home, index = surgery._home.get(id(constant), (0, 0))
        return index if home == id(graph) else len(surgery._home)

    return sorted(held, key=position)


def _restore_initializers(
    frame: _Frame | None,
    proto: onnx.GraphProto,
    tensors: list[TensorProto | onnx.SparseTensorProto],
) -> None:
    """Write the initializers; those that nothing ever used stay as well."""
    unused = [t for t in frame.initializers if _name(t) not in frame.tensors] if frame else []
    proto.ClearField("initializer")
    proto.ClearField("sparse_initializer")
    for tensor in (*tensors, *unused):
        if isinstance(tensor, TensorProto):
            proto.initializer.append(tensor)
        else:
            proto.sparse_initializer.append(tensor)


def _restore_values(
    surgery: Surgery,
    graph: Any,
    frame: _Frame | None,
    proto: onnx.GraphProto,
    placed: dict[int, TensorProto | onnx.SparseTensorProto],
) -> None:
    """Write inputs, outputs and value types: the original ones where no edit changed them."""
    for exported, values, name in (
        (proto.input, graph.inputs, "input"),
        (proto.output, graph.outputs, "output"),
    ):
        origins = _origins(frame, name)
        written = [_value_info(surgery, t, origins.get(id(t)), placed) for t in values]
        del exported[:]
        exported.extend(value for value in written if value is not None)
    _restore_default_inputs(surgery, frame, proto, placed)
    made = {id(t): t for node in graph.nodes for t in node.outputs if not t.is_empty()}
    ends = {id(t) for t in (*graph.inputs, *graph.outputs)}
    origins = _origins(frame, "value_info")
    written = []
    for origin in frame.proto.value_info if frame else ():
        tensor = frame.tensors.get(origin.name) if frame else None
        if tensor is None:
            written.append(origin)
        elif id(tensor) in made or id(tensor) in placed:
            written.append(_value_info(surgery, tensor, origin, placed))
    for key, tensor in made.items():
        if key not in origins and key not in ends and key not in surgery._seen:
            written.append(_value_info(surgery, tensor, None, placed))
    del proto.value_info[:]
    proto.value_info.extend(value for value in written if value is not None)


def _origins(frame: _Frame | None, name: str) -> dict[int, onnx.ValueInfoProto]:
    """The original types of inputs, outputs or values, by the identity of the gs tensor."""
    if frame is None:
        return {}
    values = [v for v in getattr(frame.proto, name) if v.name in frame.tensors]
    return {id(frame.tensors[value.name]): value for value in values}


def _value_info(
    surgery: Surgery,
    tensor: Any,
    origin: onnx.ValueInfoProto | None,
    placed: dict[int, TensorProto | onnx.SparseTensorProto],
) -> onnx.ValueInfoProto | None:
    """The type of one value; None where nothing is known and nothing need be said."""
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    if _is_constant(tensor):
        value = _constant_info(tensor, placed)
        changed = origin is None or value is None or not _same_type(origin, value)
    else:
        value = OnnxExporter.export_value_info_proto(tensor, False)
        changed = surgery._seen.get(id(tensor), (None, None))[1] != _type(tensor)
    if origin is None:
        return value
    if not changed or value is None:
        value = onnx.ValueInfoProto()
        value.CopyFrom(origin)
        value.name = tensor.name
        return value
    copy_fields(origin, value, {"name", "type"})
    return value


def _constant_info(
    tensor: Any, placed: dict[int, TensorProto | onnx.SparseTensorProto]
) -> onnx.ValueInfoProto | None:
    """The type of an initializer of this graph."""
    initializer = placed.get(id(tensor))
    if initializer is None:
        return None
    of = initializer if isinstance(initializer, TensorProto) else initializer.values
    return helper.make_tensor_value_info(tensor.name, of.data_type, list(initializer.dims))


def _same_type(one: onnx.ValueInfoProto, other: onnx.ValueInfoProto) -> bool:
    """Equal element type and rank, and no static dimension that differs."""
    a, b = one.type.tensor_type, other.type.tensor_type
    if a.elem_type != b.elem_type:
        return False
    if not a.HasField("shape"):
        return True
    if len(a.shape.dim) != len(b.shape.dim):
        return False
    pairs = zip(a.shape.dim, b.shape.dim, strict=True)
    return all(x.dim_value == y.dim_value or not x.HasField("dim_value") for x, y in pairs)


def _restore_default_inputs(
    surgery: Surgery,
    frame: _Frame | None,
    proto: onnx.GraphProto,
    placed: dict[int, TensorProto | onnx.SparseTensorProto],
) -> None:
    """Inputs with an initializer (all initializers before IR version 4) at their old places."""
    names = set(initializer_names(proto))
    values = list(proto.input)
    for index, origin in enumerate(frame.proto.input if frame else ()):
        tensor = frame.tensors.get(origin.name, origin) if frame else origin
        if tensor.name not in names or any(value.name == tensor.name for value in values):
            continue
        value = origin if tensor is origin else _value_info(surgery, tensor, origin, placed)
        if value is not None:
            values.insert(index, value)
    if frame is not None and surgery._model.ir_version < _FIRST_IR_WITHOUT_INPUTS:
        known = {value.name for value in values}
        if frame.graph is surgery.graph:
            new = [t for t in proto.initializer if t.name not in known]
            values += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in new]
    del proto.input[:]
    proto.input.extend(values)


def _restore_node(surgery: Surgery, node: Any, exported: onnx.NodeProto) -> None:
    """Give a node back its own name, its hidden attributes, its documentation and metadata."""
    if id(node) not in surgery._nodes:
        return
    _, origin, assigned = surgery._nodes[id(node)]
    if node.name == assigned:
        exported.name = origin.name
        if not origin.HasField("name"):
            exported.ClearField("name")
    copy_fields(origin, exported, _NODE_FIELDS)
    if (node.op, node.domain or "") != (origin.op_type, origin.domain):
        return
    written = {attribute.name: attribute for attribute in exported.attribute}
    attributes = []
    for original in origin.attribute:
        present = written.pop(original.name, None)
        if present is None and not is_editable(original):
            attributes.append(original)
        elif present is not None:
            if original.HasField("doc_string"):
                present.doc_string = original.doc_string
            if present.HasField("t") and not present.t.name and not original.t.HasField("name"):
                present.t.ClearField("name")
            attributes.append(present)
    _set_attributes(exported, [*attributes, *written.values()])


def _set_attributes(node: onnx.NodeProto, attributes: Sequence[AttributeProto]) -> None:
    """Write the attributes in this order."""
    copies = []
    for attribute in attributes:
        copy = AttributeProto()
        copy.CopyFrom(attribute)
        copies.append(copy)
    node.ClearField("attribute")
    node.attribute.extend(copies)
