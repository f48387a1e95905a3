"""Editing with graphsurgeon: what an edit changes, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxprune import runtime
from onnxprune.errors import InvalidModelError
from onnxprune.surgeon import export_graph, import_graph


def model(text: str, *, opset: int = 17, ir: int = 8, **initializers: Any) -> onnx.ModelProto:
    """A model from ONNX text; arrays given by name become initializers."""
    head = f'<ir_version: {ir}, opset_import: ["": {opset}]>\n'
    proto = onnx.parser.parse_model(head + text)
    for name, array in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return proto


def outputs(proto: onnx.ModelProto, feeds: dict[str, Any] | None = None) -> list[Any]:
    onnx.checker.check_model(proto, full_check=True)
    session = runtime.session(proto, threads=1)
    return list(runtime.run(session, feeds or runtime.random_feeds(proto)).values())


def round_trip(proto: onnx.ModelProto) -> onnx.ModelProto:
    before = proto.SerializeToString()
    exported = export_graph(import_graph(proto))
    assert proto.SerializeToString() == before
    return exported


F = np.float32
CHAIN = "g (float[2, 3] x) => (float[2, 4] z) { y = MatMul(x, w)  z = Relu(y) }"
W = np.arange(12, dtype=F).reshape(3, 4)

IF = """g (bool c, float[3] x) => (float[3] y) {
  y = If<then_branch = a () => (float[3] p) { p = Add(x, w) },
         else_branch = b () => (float[3] q) { u = Mul(x, w)  q = Add(u, v) }>(c) }"""

LOOP = """g (float[3] x) => (float[3] y) {
  h = Relu(x)
  y = Loop<body = b (int64 i, bool k, float[3] s) => (bool l, float[3] t) {
    l = Identity(k)  o = Sub(s, w)  t = Add(o, h) }>(n, c, x) }"""


def documented() -> onnx.ModelProto:
    """Documentation, metadata and denotations wherever the format has them."""
    proto = model(CHAIN, w=W)
    proto.doc_string, proto.domain, proto.model_version = "doc", "org", 3
    proto.metadata_props.add(key="k", value="v")
    proto.training_info.add().algorithm.name = "train"
    proto.opset_import.append(helper.make_opsetid("com.unused", 1))
    graph = proto.graph
    graph.doc_string = "graph doc"
    graph.metadata_props.add(key="g", value="1")
    annotation = graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    graph.node[0].doc_string, graph.node[0].overload = "node doc", "over"
    graph.node[0].metadata_props.add(key="n", value="2")
    graph.node[1].name = "relu"
    graph.input[0].doc_string = "input doc"
    graph.input[0].metadata_props.add(key="i", value="3")
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.value_info.append(helper.make_tensor_value_info("y", 1, ["N", 4], "y doc"))
    graph.initializer[0].doc_string = "weights"
    return proto


def hidden_attributes() -> onnx.ModelProto:
    """Every kind of attribute, those included that graphsurgeon drops or crashes on."""
    proto = model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    node = proto.graph.node.add(op_type="All", domain="org.test", input=["x"], output=["z"])
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, F), "v"),
        numpy_helper.from_array(np.zeros(1, int), "i"),
        [4],
    )
    tensor = numpy_helper.from_array(np.ones(3, F), "t")
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["r"])], "b", [], [])
    values: dict[str, Any] = {
        "sparse": sparse,
        "float": 0.1,
        "type": helper.make_tensor_type_proto(1, [2]),
        "tensors": [tensor, tensor],
        "graphs": [body],
        "int": 7,
        "text": "text",
        "empty text": "",
        "bytes": b"\xff\xfe",
        "texts": ["a", b"\xff"],
        "floats": [1.0, 2.5],
        "ints": [1, 2],
        "tensor": tensor,
    }
    node.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())
    for kind in ("INTS", "FLOATS", "STRINGS"):
        attribute = helper.make_attribute(kind, [], attr_type=getattr(AttributeProto, kind))
        attribute.doc_string = "nothing"
        node.attribute.append(attribute)
    proto.opset_import.append(helper.make_opsetid("org.test", 1))
    return proto


def default_inputs() -> onnx.ModelProto:
    """IR 3: every initializer is an input as well, here before and after the true one."""
    proto = model(CHAIN, opset=8, ir=3, w=W, unused=np.ones(2, F))
    names = {"w": [3, 4], "x": [2, 3], "unused": [2]}
    del proto.graph.input[:]
    for name, shape in names.items():
        proto.graph.input.append(helper.make_tensor_value_info(name, 1, shape, f"doc of {name}"))
    return proto


def sparse_initializer(rows: bool = False) -> onnx.ModelProto:
    proto = model(CHAIN)
    indices = np.array([[0, 0], [1, 3]]) if rows else np.array([0, 7])
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.array([1, 2], F), "w"),
            numpy_helper.from_array(indices, "i"),
            [3, 4],
        )
    )
    return proto


def unnamed_twins() -> onnx.ModelProto:
    """Equal nodes without a name compare equal in graphsurgeon."""
    text = "g (float[2] x) => (float[2] y) { a = Relu(x)  b = Relu(x)  y = Add(a, b) }"
    return model(text)


def equal_names() -> onnx.ModelProto:
    proto = unnamed_twins()
    for node in proto.graph.node:
        node.name = "same"
    proto.graph.node[2].name = "same__0"
    return proto


def dtypes() -> onnx.ModelProto:
    """An initializer of each type, each by way of Identity to an output of a body or the graph."""
    proto = model("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=23, ir=11)
    for kind in TensorProto.DataType.values():
        if kind == TensorProto.UNDEFINED:
            continue
        name = TensorProto.DataType.Name(kind)
        array = np.array(["a", "ü", "c"], object)
        if kind != TensorProto.STRING:
            array = np.array([0, 1, 1]).astype(helper.tensor_dtype_to_np_dtype(kind))
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
        proto.graph.node.add(op_type="Identity", input=[name], output=[f"{name}_out"])
    return proto


def values_of_other_types() -> onnx.ModelProto:
    text = """g (seq(float[2]) s, optional(float[2]) o) => (seq(float[2]) t, float[2] e) {
      t = Identity(s)  e = OptionalGetElement(o) }"""
    proto = model(text)
    proto.graph.value_info.add(name="s_out").type.sparse_tensor_type.elem_type = 1
    return proto


WHOLE: list[Callable[[], onnx.ModelProto]] = [
    documented,
    hidden_attributes,
    default_inputs,
    sparse_initializer,
    unnamed_twins,
    equal_names,
    dtypes,
    values_of_other_types,
    lambda: model(IF, w=np.ones(3, F), v=np.ones(3, F)),
    lambda: model(LOOP, w=np.ones(3, F), n=3, c=True),
    lambda: model("g () => (float[2] w) { u = Relu(w) }", w=np.ones(2, F)),
]


@pytest.mark.parametrize("make", WHOLE)
def test_without_an_edit_nothing_changes(
    make: Callable[[], onnx.ModelProto], capfd: pytest.CaptureFixture[str]
) -> None:
    proto = make()
    assert round_trip(proto) == proto
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", [IF, LOOP])
def test_outer_initializers_stay_shared_with_bodies(text: str) -> None:
    more: dict[str, Any] = {"v": np.ones(3, F)} if text is IF else {"n": 3, "c": True}
    proto = model(text, w=np.ones(3, F), **more)
    surgery = import_graph(proto)
    body = next(surgery.graph.subgraphs())
    shared = next(t for t in body.tensors().values() if t.name == "w")
    shared.values = shared.values * 2
    exported = export_graph(surgery)
    names = [tensor.name for tensor in exported.graph.initializer]
    assert names == [tensor.name for tensor in proto.graph.initializer]
    bodies = [a.g for node in exported.graph.node for a in node.attribute if a.HasField("g")]
    assert not any(b.initializer for b in bodies)
    doubled = model(text, w=np.full(3, 2, F), **more)
    feeds = runtime.random_feeds(proto)
    for ours, theirs in zip(outputs(exported, feeds), outputs(doubled, feeds), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bodies_keep_their_own_initializers() -> None:
    proto = model(IF, w=np.ones(3, F))
    for attribute, value in zip(proto.graph.node[0].attribute, (5, 7), strict=True):
        attribute.g.initializer.append(numpy_helper.from_array(np.full(3, value, F), "v"))
    assert round_trip(proto) == proto
    surgery = import_graph(proto)
    for body in surgery.graph.subgraphs():
        for tensor in body.tensors().values():
            if tensor.name == "v":
                tensor.values = tensor.values + 1
    bodies = [a.g for a in export_graph(surgery).graph.node[0].attribute]
    own = [[numpy_helper.to_array(t)[0] for t in body.initializer] for body in bodies]
    assert own[1] == [8]


@pytest.mark.parametrize("change", ["read", "write"])
def test_edited_values_keep_their_type(change: str, capfd: pytest.CaptureFixture[str]) -> None:
    proto = dtypes()
    surgery = import_graph(proto)
    for tensor in surgery.graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            array = tensor.values
            if change == "write":
                tensor.values = array[:2].copy()
    exported = export_graph(surgery)
    for ours, theirs in zip(exported.graph.initializer, proto.graph.initializer, strict=True):
        assert (ours.name, ours.data_type) == (theirs.name, theirs.data_type)
        expected = numpy_helper.to_array(theirs)[: 2 if change == "write" else 3]
        actual = numpy_helper.to_array(ours)
        if actual.dtype != object:
            actual, expected = actual.view(np.uint8), expected.view(np.uint8)
        np.testing.assert_array_equal(actual, expected)
    assert export_graph(surgery) == exported
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("rows", [False, True])
def test_edited_sparse_values_keep_their_type(rows: bool) -> None:
    surgery = import_graph(sparse_initializer(rows))
    tensor = surgery.graph.tensors()["w"]
    tensor.values = tensor.values * 3
    exported = export_graph(surgery)
    assert not exported.graph.sparse_initializer
    assert exported.graph.initializer[0].data_type == TensorProto.FLOAT
    assert numpy_helper.to_array(exported.graph.initializer[0]).ravel()[[0, 7]].tolist() == [3, 6]


def test_arrays_put_into_attributes() -> None:
    proto = model("g () => (bfloat16[1] y) { y = Constant<value = bfloat16[1] {1}>() }")
    surgery = import_graph(proto)
    value = surgery.graph.nodes[0].attrs["value"]
    value.values = np.array([2], ml_dtypes.bfloat16)
    tensor = export_graph(surgery).graph.node[0].attribute[0].t
    assert tensor.data_type == TensorProto.BFLOAT16
    assert float(numpy_helper.to_array(tensor)[0]) == 2
    assert value.values[0] == 2


def test_edits_keep_what_they_do_not_touch() -> None:
    surgery = import_graph(documented())
    graph = surgery.graph
    weight, hidden = graph.tensors()["w"], graph.tensors()["y"]
    weight.values = weight.values[:, :2].copy()
    hidden.shape = ["N", 2]
    graph.outputs[0].shape = [2, 2]
    graph.nodes[0].name = "new name"
    exported = export_graph(surgery)
    origin = documented()
    assert exported.graph.value_info[0].doc_string == "y doc"
    assert exported.graph.value_info[0].type.tensor_type.shape.dim[1].dim_value == 2
    assert exported.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 2
    assert exported.graph.input == origin.graph.input
    assert exported.graph.node[0].name == "new name"
    assert exported.graph.node[0].metadata_props == origin.graph.node[0].metadata_props
    assert exported.graph.initializer[0].doc_string == "weights"
    assert exported.training_info == origin.training_info
    exported.graph.node[0].ClearField("overload")
    assert outputs(exported)[0].shape == (2, 2)


def test_added_and_removed_nodes() -> None:
    proto = model(CHAIN, w=W)
    surgery = import_graph(proto)
    graph = surgery.graph
    relu = graph.nodes[1]
    middle = gs.Variable("m", dtype=np.float32, shape=[2, 4])
    bias = gs.Constant("bias", np.full(4, 100, F))
    graph.nodes.append(gs.Node("Add", "add", inputs=[relu.inputs[0], bias], outputs=[middle]))
    relu.inputs = [middle]
    exported = export_graph(surgery)
    assert [node.op_type for node in exported.graph.node] == ["MatMul", "Add", "Relu"]
    assert [value.name for value in exported.graph.value_info] == ["m"]
    x = np.ones((2, 3), F)
    np.testing.assert_array_equal(outputs(exported, {"x": x})[0], x @ W + 100)
    relu.inputs = [graph.inputs[0]]
    graph.outputs[0].shape = [2, 3]
    graph.cleanup()
    exported = export_graph(surgery)
    assert [node.op_type for node in exported.graph.node] == ["Relu"]
    assert not exported.graph.initializer
    assert not exported.graph.value_info


def test_constants_made_and_renamed() -> None:
    surgery = import_graph(model(CHAIN, w=W))
    hidden = surgery.graph.tensors()["y"]
    surgery.graph.tensors()["w"].name = "kernel"
    exported = export_graph(surgery)
    assert exported.graph.initializer[0].name == exported.graph.node[0].input[1] == "kernel"
    hidden.inputs.clear()
    hidden.to_constant(np.full((2, 4), -1, F))
    surgery.graph.cleanup()
    assert outputs(export_graph(surgery), {"x": np.ones((2, 3), F)})[0].tolist() == [[0] * 4] * 2


def test_default_inputs_follow_their_initializers() -> None:
    surgery = import_graph(default_inputs())
    graph = surgery.graph
    weight = graph.tensors()["w"]
    weight.values = weight.values[:, :2].copy()
    graph.outputs[0].shape = [2, 2]
    new = gs.Constant("extra", np.ones(2, F))
    out = gs.Variable("sum", np.float32, [2, 2])
    graph.nodes.append(gs.Node("Add", "add", inputs=[graph.outputs[0], new], outputs=[out]))
    graph.outputs = [out]
    exported = export_graph(surgery)
    assert [value.name for value in exported.graph.input] == ["w", "x", "unused", "extra"]
    dims = exported.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [3, 2]
    assert exported.graph.input[0].doc_string == "doc of w"
    assert outputs(exported)[0].shape == (2, 2)


def test_long_chains_and_any_order() -> None:
    text = "".join(f"v{i} = Relu(v{i - 1}) " for i in range(1, 3000))
    proto = model(f"g (float[2] v0) => (float[2] v2999) {{ {text} }}")
    surgery = import_graph(proto)
    surgery.graph.nodes.reverse()
    assert export_graph(surgery) == proto
    proto.graph.node.reverse()
    assert [node.output[0] for node in round_trip(proto).graph.node[:2]] == ["v1", "v2"]


def test_bodies_wait_for_what_they_capture() -> None:
    proto = model(LOOP, w=np.ones(3, F), n=3, c=True)
    surgery = import_graph(proto)
    surgery.graph.nodes.reverse()
    assert export_graph(surgery) == proto


def test_functions_are_inlined_or_carried() -> None:
    same, other = helper.make_opsetid("", 17), helper.make_opsetid("", 13)
    proto = model("g (float[2] x) => (float[2] z) { y = F1(x)  z = F2(y) }")
    proto.opset_import.append(helper.make_opsetid("org", 1))
    for node, opset in zip(proto.graph.node, (same, other), strict=True):
        node.domain = "org"
        body = [helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Abs", ["b"], ["c"])]
        function = helper.make_function("org", node.op_type, ["a"], ["c"], body, [opset])
        proto.functions.append(function)
    exported = round_trip(proto)
    assert [node.op_type for node in exported.graph.node] == ["Neg", "Abs", "F2"]
    assert [function.name for function in exported.functions] == ["F2"]
    feeds = {"x": np.array([1, -2], F)}
    np.testing.assert_array_equal(outputs(exported, feeds)[0], outputs(proto, feeds)[0])


def test_the_long_name_of_the_standard_domain() -> None:
    proto = model(CHAIN, w=W)
    proto.opset_import[0].domain = "ai.onnx"
    proto.graph.node[0].domain = "ai.onnx"
    exported = round_trip(proto)
    assert exported.opset_import[0].domain == exported.graph.node[0].domain == ""
    assert outputs(exported)[0].shape == (2, 4)


def test_edits_of_the_models_own_fields() -> None:
    surgery = import_graph(documented())
    surgery.graph.producer_name, surgery.graph.ir_version = "me", 10
    surgery.graph.nodes[1].domain = "org.new"
    exported = export_graph(surgery)
    assert (exported.producer_name, exported.ir_version, exported.doc_string) == ("me", 10, "doc")
    assert [entry.domain for entry in exported.opset_import] == ["", "com.unused", "org.new"]


SHADOW = IF.replace("u = Mul(x, w)  q = Add(u, v)", "y = Mul(x, w)  q = Add(y, v)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHADOW, r"value 'y' in the body 'b' hides one of the same name outside: rename it"),
        (CHAIN.replace("z = Relu", "y = Relu"), r"value 'y' is defined twice in graph 'g'"),
        (CHAIN.replace("(x, w)", "(z, w)"), r"cycle at or before node '' \(MatMul\)"),
    ],
)
def test_graphs_that_would_go_wrong_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        import_graph(model(text, w=np.ones(3, F), v=np.ones(3, F)))


def test_edits_that_would_go_wrong_are_refused() -> None:
    surgery = import_graph(model(CHAIN, w=W))
    first, second = surgery.graph.nodes
    saved = first.inputs[0]
    first.inputs[0] = second.outputs[0]
    with pytest.raises(InvalidModelError, match=r"cycle at or before node '' \(MatMul\)"):
        export_graph(surgery)
    first.inputs[0] = saved
    second.inputs[0] = gs.Variable("x")
    with pytest.raises(InvalidModelError, match=r"two values of the edited graph share"):
        export_graph(surgery)


def test_bodies_and_functions_added_by_an_edit() -> None:
    """Initializers that only new bodies use go into those; new functions are written."""
    surgery = import_graph(model(CHAIN, w=W))
    graph = surgery.graph
    bodies = []
    for name, value in (("then", 5), ("else", 7)):
        out = gs.Variable(f"{name}_out", np.float32, [2, 4])
        constant = gs.Constant(f"{name}_c", np.full(4, value, F))
        node = gs.Node("Add", name, inputs=[graph.outputs[0], constant], outputs=[out])
        bodies.append(gs.Graph(nodes=[node], outputs=[out], name=name, opset=17))
    test, result = gs.Constant("test", np.array(False)), gs.Variable("r", np.float32, [2, 4])
    attributes = {"then_branch": bodies[0], "else_branch": bodies[1]}
    graph.nodes.insert(0, gs.Node("If", "if", attributes, inputs=[test], outputs=[result]))
    graph.outputs = [result]
    exported = export_graph(surgery)
    assert [tensor.name for tensor in exported.graph.initializer] == ["w", "test"]
    x = np.ones((2, 3), F)
    np.testing.assert_array_equal(outputs(exported, {"x": x})[0], x @ W + 7)
