"""Let convolutions of a gradient graph use ONNX Runtime's blocked kernels.

On CPUs these kernels read images as [N, C / B, H, W, B] and take half the time of the plain ones.
ONNX Runtime turns to them by itself only where a weight is constant, and here all weights change.
So each weight is brought into their order inside the graph, and each image on its way in and out:

* y = Conv(x, W), any stride, one group;
* dx = Conv(dy, W turned by 180 degrees, channels exchanged) of a Conv with stride 1, which the
  gradient graph writes as ConvGrad or as ConvTranspose.

Their operators (domain com.microsoft.nchwc) are ONNX Runtime's own, and so are the gradient graphs,
which never leave the session that they were made for. Measured on ONNX Runtime 1.19, one thread,
128 images of [16, 14, 14], 3 x 3: 0.85 ms instead of 1.72.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxprune.training.draft import attributes

DOMAIN = "com.microsoft.nchwc"
ALIGNED = 4  # images of other numbers of channels cannot be brought into blocks
FEW = 8  # channels below which the plain kernels are faster, as they are for 1 x 1
WASTE = 1.5  # times the products, at most, that filling up the blocks may cost
CHANNELS = 64


def probe_model() -> onnx.ModelProto:
    """Shows how many channels a block has: see `block_of`."""
    graph = helper.make_graph(
        [helper.make_node("ReorderInput", ["x"], ["y"], domain=DOMAIN, channels_last=0)],
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, CHANNELS, 1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CHANNELS, 1, 2])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def probe_image() -> NDArray[np.float32]:
    """What to run the probe on: each channel's number in its first pixel, -1 in the second."""
    image = np.full((1, CHANNELS, 1, 2), -1, np.float32)
    image[0, :, 0, 0] = np.arange(CHANNELS)
    return image


def block_of(answer: NDArray[np.float32]) -> int:
    """The channels of a block, from what the probe answered; 0 where there are no such kernels."""
    flat = answer.reshape(-1)
    size = int(np.argmax(flat < 0))
    right = size in (8, 16) and np.array_equal(flat[:size], np.arange(size))
    return size if right else 0


def use_blocks(model: onnx.ModelProto, block: int) -> bool:
    """Rewrite, in place, the convolutions that gain; whether there were any."""
    rewriter = _Rewriter(model, block)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += rewriter.replacement(node)
    if not rewriter.found:
        return False
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(rewriter.constants.values())
    if all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return True


class _Rewriter:
    """Replaces node after node of one graph."""

    def __init__(self, model: onnx.ModelProto, block: int) -> None:
        self.block = block
        self.found = 0
        self.constants: dict[str, onnx.TensorProto] = {}
        self._nodes: list[onnx.NodeProto] = []
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self._shapes = {t.name: tuple(t.dims) for t in inferred.initializer}
        for info in [*inferred.input, *inferred.value_info, *inferred.output]:
            dims = info.type.tensor_type.shape.dim
            if all(d.HasField("dim_value") for d in dims):
                self._shapes[info.name] = tuple(d.dim_value for d in dims)

    def replacement(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that do what this one does."""
        self._nodes = []
        kind = (node.domain, node.op_type)
        if kind == ("", "Conv"):
            done = self._forward(node)
        elif kind == ("com.microsoft", "ConvGrad"):
            done = self._gradient(node)
        elif kind == ("", "ConvTranspose"):
            done = self._transposed(node)
        else:
            done = False
        self.found += done
        return self._nodes if done else [node]

    def _forward(self, node: onnx.NodeProto) -> bool:
        """y = Conv(x, W, b)"""
        shape = self._weight(node, node.input[1])
        if shape is None or attributes(node).get("auto_pad", "NOTSET") != "NOTSET":
            return False
        m, c = shape[:2]
        if not self._gains(c, m):
            return False
        options = attributes(node)
        bias = node.input[2] if len(node.input) > 2 else ""
        weight = self._ordered(node.input[1], shape, turned=False, hint=node.output[0])
        options["kernel_shape"] = shape[2:]
        self._convolve(node.input[0], weight, bias, c, m, node.output[0], options)
        return True

    def _gradient(self, node: onnx.NodeProto) -> bool:
        """dx of dx, dw, db = ConvGrad(dy, x, W)"""
        if not node.output[0] or not self._backward(node, node.input[0], node.input[2]):
            return False
        if any(node.output[1:]):
            rest = onnx.NodeProto()
            rest.CopyFrom(node)
            rest.output[0] = ""
            self._nodes.append(rest)
        return True

    def _transposed(self, node: onnx.NodeProto) -> bool:
        """dx = ConvTranspose(dy, W)"""
        options = attributes(node)
        plain = len(node.input) == 2 and options.get("auto_pad", "NOTSET") == "NOTSET"
        if not plain or options.get("output_shape") or any(options.get("output_padding", [])):
            return False
        return self._backward(node, *node.input)

    def _backward(self, node: onnx.NodeProto, dy: str, weight: str) -> bool:
        """dx, whose pads are what is left of the kernel's reach."""
        shape = self._weight(node, weight)
        if shape is None:
            return False
        options = attributes(node)
        m, c = shape[:2]
        if not self._gains(m, c) or any(s != 1 for s in options.get("strides", [1, 1])):
            return False
        kernel, spread = shape[2:], options.get("dilations", [1, 1])
        reach = [(k - 1) * d for k, d in zip(kernel, spread, strict=True)] * 2
        pads = [r - p for r, p in zip(reach, options.get("pads", [0] * 4), strict=True)]
        if min(pads) < 0:
            return False
        dx = node.output[0]
        turned = self._ordered(weight, shape, turned=True, hint=dx)
        self._convolve(dy, turned, "", m, c, dx, {**options, "pads": pads, "kernel_shape": kernel})
        return True

    def _weight(self, node: onnx.NodeProto, name: str) -> tuple[int, ...] | None:
        """[M, C, H, W] of a weight that the kernels can use; None otherwise."""
        shape = self._shapes.get(name)
        if shape is None or len(shape) != 4 or attributes(node).get("group", 1) != 1:
            return None
        return shape if shape[2] * shape[3] > 1 else None

    def _gains(self, source: int, target: int) -> bool:
        """Whether images with this many channels fill the blocks well enough."""
        taken = source if source < self.block else self._filled(source)
        waste = taken * self._filled(target) / (source * target)
        fits = source < self.block or source % ALIGNED == 0
        return fits and source >= FEW and waste <= WASTE

    def _filled(self, channels: int) -> int:
        return -(-channels // self.block) * self.block

    def _convolve(
        self, x: str, weight: str, bias: str, source: int, target: int, y: str, options: Any
    ) -> None:
        """Append a convolution of x to y."""
        if source >= self.block:
            x = self._add("ReorderInput", [x], f"{y}.in", domain=DOMAIN, channels_last=0)
        inputs = [x, weight]
        full = self._filled(target)
        if bias:
            inputs.append(self._grown(bias, [full - target], f"{y}.bias"))
        names = ("strides", "dilations", "pads", "kernel_shape")
        kept = {n: options[n] for n in names if n in options}
        blocks = self._add("Conv", inputs, f"{y}.blocks", domain=DOMAIN, **kept)
        self._add("ReorderOutput", [blocks], y, domain=DOMAIN, channels=target, channels_last=0)

    def _ordered(self, weight: str, shape: tuple[int, ...], *, turned: bool, hint: str) -> str:
        """A weight [M, C, H, W] as [M / B, C / B, H, W, B of C, B of M]; turned: M and C exchanged,
        H and W backwards. Fewer input channels than a block stay as they are.
        """
        m, c, high, wide = shape
        b, name = self.block, f"{hint}.weight"
        target, source = (c, m) if turned else (m, c)
        inner = b if source >= b else source
        full = [self._filled(target), source if source < b else self._filled(source)]
        rows, columns = full[::-1] if turned else full
        w = self._grown(weight, [rows - m, columns - c, 0, 0], f"{name}.grown")
        if turned:
            w = self._backwards(w, [rows, columns, high * wide], name)
        parts = [b, inner] if not turned else [inner, b]
        split = [rows // parts[0], parts[0], columns // parts[1], parts[1], high * wide]
        w = self._add("Reshape", [w, self._constant(split)], f"{name}.split")
        if source < b:
            order = [2, 0, 1, 4, 3] if turned else [0, 2, 3, 4, 1]
        else:
            order = [2, 0, 4, 1, 3] if turned else [0, 2, 4, 3, 1]
        w = self._add("Transpose", [w], f"{name}.turned", perm=order)
        return self._add("Reshape", [w, self._constant([*full, high, wide])], name)

    def _backwards(self, w: str, shape: list[int], name: str) -> str:
        """The kernel's taps in reverse order."""
        flat = self._add("Reshape", [w, self._constant(shape)], f"{name}.flat")
        taps = self._constant(list(range(shape[2]))[::-1])
        return self._add("Gather", [flat, taps], f"{name}.backwards", axis=2)

    def _grown(self, tensor: str, more: list[int], name: str) -> str:
        """Zeros behind the last of each axis."""
        if not any(more):
            return tensor
        return self._add("Pad", [tensor, self._constant([0] * len(more) + more)], name)

    def _constant(self, values: list[int]) -> str:
        name = "onnxprune.blocked." + ".".join(map(str, values))
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def _add(self, op_type: str, inputs: list[str], output: str, **options: Any) -> str:
        node = helper.make_node(op_type, inputs, [output], name=f"{output}.node", **options)
        self._nodes.append(node)
        return output
