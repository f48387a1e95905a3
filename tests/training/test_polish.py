"""Slow nodes of a gradient graph are replaced by others of the same value."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune import runtime
from onnxprune.training.polish import polish


def graph(op_type: str, domain: str = "") -> onnx.ModelProto:
    """One node dy, y -> dx over vectors of length 4."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("dy", "y", "dx")]
    node = helper.make_node(op_type, ["dy", "y"], ["dx"], domain=domain)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_graph([node], "gradient", values[:2], values[2:])
    return helper.make_model(proto, opset_imports=imports, ir_version=10)


def test_relu() -> None:
    fast = onnx.load_from_string(polish(graph("ReluGrad", "com.microsoft").SerializeToString()))
    assert "ReluGrad" not in {node.op_type for node in fast.graph.node}
    feeds = {
        "dy": np.array([1, 2, 3, -4], np.float32),
        "y": np.array([0, 2e-38, np.inf, 5], np.float32),
    }
    out = runtime.run(runtime.session(fast, threads=1), feeds)
    np.testing.assert_array_equal(out["dx"], np.array([0, 2, 3, -4], np.float32))


def test_other_graphs_stay_as_they_are() -> None:
    same = graph("Mul").SerializeToString()
    assert polish(same) == same
