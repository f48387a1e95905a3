"""Small networks that read characters, written as ONNX graphs: token [N, T] -> scores [N, K]."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from models.transformer import Transformer

LENGTH, SYMBOLS, LANGUAGES = 32, 128, 16


class Reader(Transformer):
    """Layers over embedded tokens; methods take and return tensor names."""

    def tokens(self, length: int, name: str = "token") -> str:
        """The network's input [N, T], numbers of symbols."""
        self._input = helper.make_tensor_value_info(name, TensorProto.INT64, ["N", length])
        return name

    def embed(self, x: str, name: str, symbols: int, width: int) -> str:
        """A learnt vector for each symbol: [N, T, D]."""
        table = self._value(f"{name}.weight", self._normal((symbols, width)) * np.float32(10))
        return self._node("Gather", [table, x], name, width, axis=0)

    def turn(self, x: str, name: str, perm: list[int], channels: int) -> str:
        """The axes in another order."""
        return self._node("Transpose", [x], name, channels, perm=perm)

    def conv1d(self, x: str, name: str, channels: int, kernel: int) -> str:
        """A convolution over [N, C, T] with bias that keeps the length; He's initial values."""
        weight = self._value(f"{name}.weight", self._he((channels, self._channels[x], kernel)))
        bias = self._value(f"{name}.bias", np.zeros(channels, np.float32))
        window = {"kernel_shape": [kernel], "pads": [kernel // 2] * 2}
        return self._node("Conv", [x, weight, bias], name, channels, **window)

    def max_all(self, x: str, name: str) -> str:
        """[N, C, T] -> [N, C], the maximum over all positions."""
        pooled = self._node("GlobalMaxPool", [x], name, self._channels[x])
        return self._node("Flatten", [pooled], f"{name}.flatten", self._channels[x])

    def lstm(self, x: str, name: str, hidden: int) -> str:
        """The last state [N, H] of a recurrent layer over [T, N, D] (Hochreiter and Schmidhuber,
        1997)."""
        weights = [
            self._value(f"{name}.{part}", self._uniform((1, 4 * hidden, *rest), hidden**-0.5))
            for part, rest in (("input", [self._channels[x]]), ("recurrent", [hidden]))
        ]
        bias = self._value(f"{name}.bias", np.zeros((1, 8 * hidden), np.float32))
        state = f"{name}.state"
        node = helper.make_node(
            "LSTM", [x, *weights, bias], ["", state], name=name, hidden_size=hidden
        )
        self._nodes.append(node)
        axis = self._value(f"{name}.axis", np.array([0], np.int64))
        return self._node("Squeeze", [state, axis], f"{name}.last", hidden)

    def _uniform(
        self, shape: tuple[int, ...], limit: float
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return self._rng.uniform(-limit, limit, shape).astype(np.float32)


def language_cnn(seed: int = 0, *, training: bool = False) -> onnx.ModelProto:
    """Embedding, two convolutions, the maximum over positions, a dense layer (after Kim, 2014)."""
    net = Reader(seed, training=training)
    x = net.embed(net.tokens(LENGTH), "embed", SYMBOLS, 32)
    x = net.turn(x, "channels", [0, 2, 1], 32)
    x = net.relu(net.conv1d(x, "conv1", 96, 5), "relu1")
    x = net.relu(net.conv1d(x, "conv2", 128, 5), "relu2")
    return net.model(net.dense(net.max_all(x, "pool"), "fc", LANGUAGES), "language_cnn")


def language_lstm(seed: int = 0, *, training: bool = False) -> onnx.ModelProto:
    """Embedding, one recurrent layer, a dense layer on its last state."""
    net = Reader(seed, training=training)
    x = net.embed(net.tokens(LENGTH), "embed", SYMBOLS, 32)
    x = net.turn(x, "steps", [1, 0, 2], 32)
    return net.model(net.dense(net.lstm(x, "lstm", 96), "fc", LANGUAGES), "language_lstm")
