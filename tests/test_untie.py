"""Equal vectors stored once tie no layers together, whatever steps they take before use."""

from __future__ import annotations

import onnx
import pytest

from onnxprune import verify
from onnxprune.graph import Graph
from onnxprune.untie import untie_vectors
from tests.graphs import TOLERANCE, build, prune_half, shapes
from tests.quantized import weights

TWO = "(float[N,6] x) => (float[N,4] y)"


def two_layers(steps: str, bias: str) -> onnx.ModelProto:
    """Two layers of eight channels in a row that add the same vector c, made by `steps`."""
    body = f"""{steps}  a = MatMul(x, w1)  d = Add(a, c)  h = Relu(d)
    e = MatMul(h, w2)  f = Add(e, c)  g = Relu(f)  y = MatMul(g, w3)"""
    model = build(TWO, body, opset=21, ir=10)
    model.graph.initializer.extend(weights(f"w1:f:6,8 w2:f:8,8 w3:f:8,4 {bias}"))
    return model


STEPS = {
    "plain": ("c = Identity(v)", "v:f:8"),
    "dequantized": ("c = DequantizeLinear<axis=0>(v, s)", "v:i32:8 s:f:8"),
    "cast": ("c = Cast<to=1>(v)", "v:h:8"),
    "chain": (
        "d1 = DequantizeLinear(v, s)  q = QuantizeLinear(d1, s)  u = Unsqueeze(d1, zero)"
        "  c = Reshape(u, to)",
        "v:i8:8 s:f: zero=0 to=1,8",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_two_layers_with_one_bias_keep_different_channels(name: str) -> None:
    model = two_layers(*STEPS[name])
    pruned = prune_half(model)
    assert len(pruned.analysis.groups) == 2
    assert pruned.error <= TOLERANCE
    after = shapes(pruned.model)
    assert (after["w1"], after["w2"], after["w3"]) == ((6, 4), (4, 4), (4, 4))


def test_matrices_stay_shared() -> None:
    model = two_layers("c = DequantizeLinear(v, s)", "v:i8:8,8 s:f:")
    model.graph.node[1].input[1] = model.graph.node[4].input[1] = "c"
    graph = Graph.of(model)
    assert untie_vectors(graph) is graph


def test_a_vector_with_one_reader_changes_nothing() -> None:
    model = build(TWO, "c = Cast<to=1>(v)  a = MatMul(x, w)  y = Add(a, c)", opset=21, ir=10)
    model.graph.initializer.extend(weights("w:f:6,4 v:h:4"))
    graph = Graph.of(model)
    assert untie_vectors(graph) is graph


def test_readers_inside_bodies_keep_the_original() -> None:
    model = build(
        "(float[N,6] x, bool b) => (float[N,4] y)",
        """c = Cast<to=1>(v)  a = MatMul(x, w1)  d = Add(a, c)
        h = If<then_branch = yes () => (float[N,8] r) { r = Add(d, c) },
               else_branch = no () => (float[N,8] s) { s = Relu(d) }>(b)
        y = MatMul(h, w2)""",
        opset=21,
        ir=10,
    )
    model.graph.initializer.extend(weights("w1:f:6,8 w2:f:8,4 v:h:8"))
    pruned = prune_half(model)
    assert pruned.error <= TOLERANCE
    assert shapes(pruned.model)["w1"] == (6, 4)


def test_the_recorded_shape_of_an_alias_is_that_of_its_weight() -> None:
    model = build(
        TWO,
        """c = Identity(v)  a = MatMul(x, w1)  d = Add(a, v)  n = LayerNormalization(d, c, c)
        y = MatMul(n, w2)""",
        "w1:6,8 v:8 w2:8,4",
    )
    model = onnx.shape_inference.infer_shapes(model)
    assert "c" in {value.name for value in model.graph.value_info}
    pruned = prune_half(model)
    assert shapes(pruned.model)["v"] == (4,)
    assert verify.structure_problems(pruned.model, model) == []
    assert pruned.error <= TOLERANCE
