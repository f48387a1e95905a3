"""Networks written as ONNX graphs, layer by layer.

A network with BatchNormalization is written in one of two forms with the same parameter names:
*training*, where statistics of the present batch are plain ONNX operators, so that gradients flow
through them, and *inference*, with BatchNormalization nodes. `to_inference` carries trained
parameters from the first to the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 18, 9
EPSILON = 1e-5


class Network:
    """Collects the nodes and initial values of a network. Methods take and return tensor names."""

    def __init__(self, seed: int, *, training: bool = False) -> None:
        self.training = training
        self._rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._values: dict[str, NDArray[Any]] = {}
        self._channels: dict[str, int] = {}
        self._input: onnx.ValueInfoProto | None = None

    def input(self, *shape: int, name: str = "image") -> str:
        """The network's input [N, *shape]; `shape` begins with the channels."""
        self._input = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])
        self._channels[name] = shape[0]
        return name

    def conv(
        self, x: str, name: str, channels: int, kernel: int = 3, stride: int = 1, group: int = 1
    ) -> str:
        """A convolution without bias that keeps the size over its stride; He's initial values."""
        shape = (channels, self._channels[x] // group, kernel, kernel)
        weight = self._value(f"{name}.weight", self._he(shape))
        window = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        return self._node("Conv", [x, weight], name, channels, group=group, **window)

    def norm(self, x: str, name: str, scale: float = 1.0) -> str:
        """Batch normalization over [N, H, W], in this network's form.

        A `scale` of 0 at the end of a residual branch lets training start from a shallow network
        (Goyal et al., 2017).
        """
        channels = self._channels[x]
        gamma = self._value(f"{name}.weight", np.full(channels, scale, np.float32))
        beta = self._value(f"{name}.bias", np.zeros(channels, np.float32))
        if self.training:
            return self._batch_statistics(x, name, gamma, beta)
        mean = self._value(f"{name}.running_mean", np.zeros(channels, np.float32))
        variance = self._value(f"{name}.running_var", np.ones(channels, np.float32))
        inputs = [x, gamma, beta, mean, variance]
        return self._node("BatchNormalization", inputs, name, channels, epsilon=EPSILON)

    def relu(self, x: str, name: str) -> str:
        """max(x, 0)."""
        return self._node("Relu", [x], name, self._channels[x])

    def add(self, x: str, y: str, name: str) -> str:
        """x + y, of one shape."""
        return self._node("Add", [x, y], name, self._channels[x])

    def max_pool(self, x: str, name: str) -> str:
        """Maxima over windows of 2 x 2."""
        return self._node(
            "MaxPool", [x], name, self._channels[x], kernel_shape=[2, 2], strides=[2, 2]
        )

    def pool_all(self, x: str, name: str) -> str:
        """[N, C, H, W] -> [N, C], the mean over all positions."""
        pooled = self._node("GlobalAveragePool", [x], name, self._channels[x])
        return self._node("Flatten", [pooled], f"{name}.flatten", self._channels[x])

    def dense(self, x: str, name: str, width: int) -> str:
        """x W^T + b, [N, K] -> [N, width]."""
        weight = self._value(f"{name}.weight", self._he((width, self._channels[x])))
        bias = self._value(f"{name}.bias", np.zeros(width, np.float32))
        return self._node("Gemm", [x, weight, bias], name, width, transB=1)

    def softmax(self, x: str, name: str) -> str:
        """Probabilities along the last axis."""
        return self._node("Softmax", [x], name, self._channels[x], axis=-1)

    def model(self, output: str, name: str) -> onnx.ModelProto:
        """The model that answers `output` [N, K]."""
        assert self._input is not None
        shape: list[str | int | None] = ["N", self._channels[output]]
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
        initializers = [numpy_helper.from_array(v, n) for n, v in self._values.items()]
        graph = helper.make_graph(self._nodes, name, [self._input], [result], initializers)
        model = helper.make_model(
            graph,
            producer_name="onnxprune-models",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def _batch_statistics(self, x: str, name: str, gamma: str, beta: str) -> str:
        """(x - mean) / sqrt(var + epsilon) * gamma + beta, with the batch's own mean and var."""
        channels = self._channels[x]
        batch_axes = self._value("batch_axes", np.array([0, 2, 3], np.int64))
        spatial = self._value("spatial_axes", np.array([1, 2], np.int64))

        def node(op: str, inputs: Sequence[str], part: str) -> str:
            return self._node(op, inputs, f"{name}.{part}", channels)

        mean = node("ReduceMean", [x, batch_axes], "mean")
        centred = node("Sub", [x, mean], "centred")
        square = node("Mul", [centred, centred], "square")
        variance = node("ReduceMean", [square, batch_axes], "var")
        epsilon = self._value("epsilon", np.array(EPSILON, np.float32))
        deviation = node("Sqrt", [node("Add", [variance, epsilon], "guarded")], "deviation")
        scale = node("Div", [node("Unsqueeze", [gamma, spatial], "gamma"), deviation], "scale")
        scaled = node("Mul", [centred, scale], "scaled")
        return node("Add", [scaled, node("Unsqueeze", [beta, spatial], "beta")], "out")

    def _node(
        self, op: str, inputs: Sequence[str], name: str, channels: int, **attributes: Any
    ) -> str:
        output = f"{name}.y"
        self._nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        self._channels[output] = channels
        return output

    def _value(self, name: str, value: NDArray[Any]) -> str:
        self._values[name] = value
        return name

    def _he(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Normal values of variance 2 / fan-in (He et al., 2015)."""
        deviation = (2 / np.prod(shape[1:])) ** 0.5
        return self._rng.normal(0, deviation, shape).astype(np.float32)


Builder = Callable[..., onnx.ModelProto]


def digits_mlp(seed: int = 0, *, training: bool = False) -> onnx.ModelProto:
    """Dense 64-128-64-32-10 with softmax: the multilayer perceptron for digits."""
    return _mlp(64, (128, 64, 32), seed)


def fashion_mlp(seed: int = 0, *, training: bool = False) -> onnx.ModelProto:
    """Dense 784-256-128-64-10 with softmax."""
    return _mlp(784, (256, 128, 64), seed)


def digits_cnn(seed: int = 0, *, training: bool = False) -> onnx.ModelProto:
    """A residual network with a depthwise stage, for digits [N, 1, 8, 8]; answers logits.

    Stem, one residual block, a strided convolution, one depthwise-separable and one inverted
    residual block.
    """
    net = Network(seed, training=training)
    x = _conv_norm(net, net.input(1, 8, 8), "stem", 48)
    x = _residual(net, x, "block1", 48)
    x = _conv_norm(net, x, "down", 96, stride=2)
    x = _separable(net, x, "block2", 96, 96)
    x = _separable(net, x, "block3", 96, 192)
    return net.model(net.dense(net.pool_all(x, "pool"), "fc", 10), "digits_cnn")


def fashion_resnet(seed: int = 0, *, training: bool = False) -> onnx.ModelProto:
    """ResNet-20 (He et al., 2016) with a stride of 2 in the stem, for images [N, 1, 28, 28]."""
    net = Network(seed, training=training)
    x = _conv_norm(net, net.input(1, 28, 28), "stem", 16, stride=2)
    for stage, width in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            x = _residual(net, x, f"stage{stage + 1}.{block}", width, stride)
    return net.model(net.dense(net.pool_all(x, "pool"), "fc", 10), "fashion_resnet")


def fashion_vgg(seed: int = 0, *, training: bool = False) -> onnx.ModelProto:
    """Five convolutions and three poolings (after Simonyan and Zisserman, 2015), [N, 1, 28, 28]."""
    net = Network(seed, training=training)
    x = _conv_norm(net, net.input(1, 28, 28), "conv1", 32)
    x = net.max_pool(x, "pool1")
    x = _conv_norm(net, x, "conv2", 64)
    x = net.max_pool(x, "pool2")
    x = _conv_norm(net, x, "conv3", 96)
    x = net.max_pool(_conv_norm(net, x, "conv4", 96), "pool3")
    x = _conv_norm(net, x, "conv5", 128)
    return net.model(net.dense(net.pool_all(x, "pool"), "fc", 10), "fashion_vgg")


def to_inference(build: Builder, trained: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """The inference form of `build` with trained parameters; its statistics are still unknown."""
    model = build(seed, training=False)
    values = {t.name: t for t in trained.graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(values[tensor.name])
    return model


def has_norm(model: onnx.ModelProto) -> bool:
    """Whether a model has BatchNormalization nodes."""
    return any(node.op_type == "BatchNormalization" for node in model.graph.node)


def fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """The folded twin: each BatchNormalization behind a Conv becomes that Conv's scale and bias.

    With s = gamma / sqrt(var + epsilon):  W <- W * s (output axis),  b <- beta - mean * s.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    graph = folded.graph
    values = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    dropped: set[str] = set()
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = makers[norm.input[0]]
        gamma, beta, mean, variance = (values[name] for name in norm.input[1:])
        scale = gamma / np.sqrt(variance + EPSILON)
        values[conv.input[1]] *= scale[:, None, None, None]
        values[f"{conv.name}.bias"] = beta - mean * scale
        conv.input.append(f"{conv.name}.bias")
        conv.output[0] = norm.output[0]
        dropped |= set(norm.input[1:])
        graph.node.remove(norm)
    kept = {n: v.astype(np.float32) for n, v in values.items() if n not in dropped}
    del graph.initializer[:]
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in kept.items())
    graph.name += "_folded"
    onnx.checker.check_model(folded, full_check=True)
    return folded


def _mlp(inputs: int, widths: Sequence[int], seed: int) -> onnx.ModelProto:
    net = Network(seed)
    x = net.input(inputs)
    for number, width in enumerate(widths, 1):
        x = net.relu(net.dense(x, f"dense{number}", width), f"relu{number}")
    scores = net.dense(x, f"dense{len(widths) + 1}", 10)
    return net.model(net.softmax(scores, "softmax"), "mlp")


def _conv_norm(
    net: Network, x: str, name: str, channels: int, kernel: int = 3, stride: int = 1, group: int = 1
) -> str:
    x = net.conv(x, f"{name}.conv", channels, kernel, stride, group)
    return net.relu(net.norm(x, f"{name}.bn"), f"{name}.relu")


def _residual(net: Network, x: str, name: str, channels: int, stride: int = 1) -> str:
    """Two 3 x 3 convolutions beside a shortcut, which is 1 x 1 where the shape changes."""
    y = _conv_norm(net, x, f"{name}.a", channels, stride=stride)
    y = net.norm(net.conv(y, f"{name}.b.conv", channels), f"{name}.b.bn", scale=0)
    if stride != 1:
        x = net.norm(net.conv(x, f"{name}.short.conv", channels, 1, stride), f"{name}.short.bn")
    return net.relu(net.add(y, x, f"{name}.add"), f"{name}.relu")


def _separable(net: Network, x: str, name: str, channels: int, hidden: int) -> str:
    """Depthwise 3 x 3 and 1 x 1 beside a shortcut, widened first where `hidden` is larger.

    MobileNetV2's block (Sandler et al., 2018).
    """
    y = x if hidden == channels else _conv_norm(net, x, f"{name}.expand", hidden, 1)
    y = _conv_norm(net, y, f"{name}.depthwise", hidden, group=hidden)
    y = net.norm(net.conv(y, f"{name}.project.conv", channels, 1), f"{name}.project.bn", scale=0)
    return net.add(y, x, f"{name}.add")
