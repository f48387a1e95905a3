"""How the cost grows with the network: generated graphs of 1,000 to 40,000 nodes.

    python -m benchmarks.scaling [NODES ...]

Prints CPU seconds of analysis, scoring and slicing, in all and per 1,000 nodes. If the cost is
linear, the last column stays the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from benchmarks.conformance import prune

WIDTH = 8


class _Net:
    """A network under construction."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.rng = np.random.default_rng(0)

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        """A node; the name of its output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def conv(self, x: str, inner: int, out: int) -> str:
        """A 1x1 convolution."""
        values = self.rng.normal(size=(out, inner, 1, 1)).astype(np.float32)
        name = f"w{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(values, name))
        return self.add("Conv", x, name)

    def model(self, y: str) -> onnx.ModelProto:
        """The finished model, with four outputs."""
        self.nodes.append(helper.make_node("Identity", [y], ["y"]))
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", WIDTH, 8, 8])
            for name in ("x", "y")
        ]
        graph = helper.make_graph(self.nodes, "net", values[:1], values[1:], self.tensors)
        opset = [helper.make_opsetid("", 17)]
        return helper.make_model(graph, opset_imports=opset, ir_version=8)


def chain(nodes: int) -> onnx.ModelProto:
    """Convolution and activation, one after the other."""
    net, x = _Net(), "x"
    while len(net.nodes) < nodes:
        x = net.add("Relu", net.conv(x, WIDTH, WIDTH))
    return net.model(x)


def residual(nodes: int) -> onnx.ModelProto:
    """Blocks of two convolutions around a long residual stream."""
    net, x = _Net(), "x"
    while len(net.nodes) < nodes:
        inner = net.add("Relu", net.conv(x, WIDTH, WIDTH))
        x = net.add("Add", x, net.conv(inner, WIDTH, WIDTH))
    return net.model(x)


def dense(nodes: int) -> onnx.ModelProto:
    """Blocks in which each layer reads the concatenation of up to eight layers before it."""
    net, x = _Net(), "x"
    while len(net.nodes) < nodes:
        parts = [x]
        for _ in range(8):
            joined = net.add("Concat", *parts, axis=1) if len(parts) > 1 else x
            parts.append(net.add("Relu", net.conv(joined, WIDTH * len(parts), WIDTH)))
        x = net.conv(net.add("Concat", *parts, axis=1), WIDTH * len(parts), WIDTH)
    return net.model(x)


def branches(nodes: int) -> onnx.ModelProto:
    """Many small branches that are summed up."""
    net = _Net()
    ends = []
    while len(net.nodes) < nodes:
        inner = net.add("Relu", net.conv("x", WIDTH, WIDTH))
        ends.append(net.conv(inner, WIDTH, WIDTH))
    return net.model(net.add("Sum", *ends))


def shapes(nodes: int) -> onnx.ModelProto:
    """A layer between reshapes whose targets are computed from the input's shape."""
    net, x = _Net(), "x"
    for name, value in (("nought", 0), ("one", 1), ("rest", WIDTH), ("open", -1)):
        net.tensors.append(numpy_helper.from_array(np.array([value], np.int64), name))
    while len(net.nodes) < nodes:
        batch = net.add("Slice", net.add("Shape", x), "nought", "one")
        flat = net.add("Reshape", x, net.add("Concat", batch, "rest", "open", axis=0))
        side = net.add("Slice", net.add("Shape", x), "one", "open")
        x = net.add("Reshape", flat, net.add("Concat", batch, side, "open", axis=0))
        x = net.add("Relu", net.conv(x, WIDTH, WIDTH))
    return net.model(x)


FORMS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "chain": chain,
    "residual": residual,
    "dense": dense,
    "branches": branches,
    "shapes": shapes,
}


def cpu_seconds(model: onnx.ModelProto, repeats: int = 2) -> float:
    """The least CPU time of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        prune(model, "all")
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    """Measure all forms at the given sizes."""
    sizes = [int(n) for n in sys.argv[1:]] or [1_000, 10_000, 40_000]
    table = Table("network", "nodes", "CPU s", "ms per 1,000 nodes")
    for name, form in FORMS.items():
        for size in sizes:
            model = form(size)
            seconds, count = cpu_seconds(model), len(model.graph.node)
            table.add_row(name, f"{count:,}", f"{seconds:.2f}", f"{1e6 * seconds / count:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
