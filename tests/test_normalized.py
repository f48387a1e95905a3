"""A model with functions is indexed without copying its weights, and without mixing up names."""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper, parser

from onnxprune.analysis import normalized
from tests.graphs import TOLERANCE, prune_half, shapes

TEXT = """<ir_version: 8, opset_import: ["": 18, "own": 1]>
g (float[N,6] x) => (float[N,4] y) { a = own.f(x, w1)  b = own.f(a, t)  y = MatMul(b, w3) }
<domain: "own", opset_import: ["": 18]> f (x, w) => (r) { t = MatMul(x, w)  r = Relu(t) }"""


def test_functions_are_inlined_around_weights_of_the_same_names() -> None:
    model = parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for name, dims in (("w1", (6, 8)), ("t", (8, 8)), ("w3", (8, 4))):
        value = rng.normal(size=dims).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    before = model.SerializeToString(deterministic=True)
    graph = normalized(model)
    assert not graph.model.graph.initializer and len(graph.initializers) == 3
    assert [node.op_type for node in graph.top] == ["MatMul", "Relu"] * 2 + ["MatMul"]
    result = prune_half(model)
    assert shapes(result.model) == {"w1": (6, 4), "t": (4, 4), "w3": (4, 4)}
    assert result.error <= TOLERANCE
    assert model.SerializeToString(deterministic=True) == before
