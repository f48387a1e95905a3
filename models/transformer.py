"""A small vision transformer written as an ONNX graph (Dosovitskiy et al., 2021)."""

from __future__ import annotations

import numpy as np
import onnx

from models.graphs import EPSILON, Network

HEADS = 4


class Transformer(Network):
    """Layers over tokens [N, T, D]; methods take and return tensor names."""

    def patches(self, x: str, name: str, width: int, patch: int, count: int) -> str:
        """Non-overlapping patches of [N, C, H, W], embedded, with a learnt position: [N, T, D]."""
        kernel = self._value(
            f"{name}.weight", self._normal((width, self._channels[x], patch, patch))
        )
        bias = self._value(f"{name}.bias", np.zeros(width, np.float32))
        window = {"kernel_shape": [patch] * 2, "strides": [patch] * 2}
        grid = self._node("Conv", [x, kernel, bias], name, width, **window)
        flat = self._value(f"{name}.flat", np.array([0, width, count], np.int64))
        rows = self._node("Reshape", [grid, flat], f"{name}.rows", width)
        tokens = self._node("Transpose", [rows], f"{name}.tokens", width, perm=[0, 2, 1])
        position = self._value(f"{name}.position", self._normal((1, count, width)))
        return self._node("Add", [tokens, position], f"{name}.placed", width)

    def layer_norm(self, x: str, name: str) -> str:
        """Layer normalization over the last axis."""
        width = self._channels[x]
        scale = self._value(f"{name}.weight", np.ones(width, np.float32))
        shift = self._value(f"{name}.bias", np.zeros(width, np.float32))
        inputs = [x, scale, shift]
        return self._node("LayerNormalization", inputs, name, width, axis=-1, epsilon=EPSILON)

    def linear(self, x: str, name: str, width: int) -> str:
        """x W + b, [..., K] -> [..., width]."""
        weight = self._value(f"{name}.weight", self._normal((self._channels[x], width)))
        bias = self._value(f"{name}.bias", np.zeros(width, np.float32))
        product = self._node("MatMul", [x, weight], f"{name}.product", width)
        return self._node("Add", [product, bias], name, width)

    def gelu(self, x: str, name: str) -> str:
        """x / 2 (1 + erf(x / sqrt 2)) (Hendrycks and Gimpel, 2016), as exporters write it."""
        width = self._channels[x]
        root = self._value("gelu.root", np.array(2**0.5, np.float32))
        one = self._value("gelu.one", np.array(1, np.float32))
        half = self._value("gelu.half", np.array(0.5, np.float32))
        curve = self._node("Div", [x, root], f"{name}.scaled", width)
        curve = self._node("Erf", [curve], f"{name}.erf", width)
        curve = self._node("Add", [curve, one], f"{name}.shifted", width)
        curve = self._node("Mul", [x, curve], f"{name}.gated", width)
        return self._node("Mul", [curve, half], name, width)

    def attention(self, x: str, name: str, count: int) -> str:
        """Self-attention of HEADS heads over `count` tokens (Vaswani et al., 2017)."""
        width = self._channels[x]
        size = width // HEADS
        split = self._value("heads.split", np.array([0, count, HEADS, size], np.int64))
        merge = self._value("heads.merge", np.array([0, count, width], np.int64))
        parts = {}
        for part, order in (
            ("query", [0, 2, 1, 3]),
            ("key", [0, 2, 3, 1]),
            ("value", [0, 2, 1, 3]),
        ):
            y = self.linear(x, f"{name}.{part}", width)
            y = self._node("Reshape", [y, split], f"{name}.{part}.heads", width)
            parts[part] = self._node("Transpose", [y], f"{name}.{part}.t", width, perm=order)
        root = self._value("heads.scale", np.array(size**-0.5, np.float32))
        scores = self._node("MatMul", [parts["query"], parts["key"]], f"{name}.scores", count)
        scores = self._node("Mul", [scores, root], f"{name}.scaled", count)
        weights = self.softmax(scores, f"{name}.softmax")
        mixed = self._node("MatMul", [weights, parts["value"]], f"{name}.mixed", width)
        mixed = self._node("Transpose", [mixed], f"{name}.back", width, perm=[0, 2, 1, 3])
        mixed = self._node("Reshape", [mixed, merge], f"{name}.merged", width)
        return self.linear(mixed, f"{name}.out", width)

    def block(self, x: str, name: str, count: int, hidden: int) -> str:
        """Attention and a two-layer perceptron, each beside a shortcut, normalized first."""
        y = self.attention(self.layer_norm(x, f"{name}.norm1"), f"{name}.attention", count)
        x = self.add(x, y, f"{name}.add1")
        y = self.linear(self.layer_norm(x, f"{name}.norm2"), f"{name}.mlp1", hidden)
        y = self.linear(self.gelu(y, f"{name}.gelu"), f"{name}.mlp2", self._channels[x])
        return self.add(x, y, f"{name}.add2")

    def mean_token(self, x: str, name: str) -> str:
        """[N, T, D] -> [N, D]."""
        axes = self._value("token_axis", np.array([1], np.int64))
        return self._node("ReduceMean", [x, axes], name, self._channels[x], keepdims=0)

    def _normal(self, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """Normal values of deviation 0.02, as is usual for transformers."""
        return self._rng.normal(0, 0.02, shape).astype(np.float32)


def fashion_vit(seed: int = 0, *, training: bool = False) -> onnx.ModelProto:
    """Four layers, four heads, width 64, patches of 4 x 4, for images [N, 1, 28, 28]; logits."""
    net = Transformer(seed, training=training)
    count, width = 49, 64
    x = net.patches(net.input(1, 28, 28), "patches", width, 4, count)
    for layer in range(4):
        x = net.block(x, f"layer{layer + 1}", count, 2 * width)
    x = net.mean_token(net.layer_norm(x, "norm"), "pool")
    return net.model(net.dense(x, "fc", 10), "fashion_vit")
