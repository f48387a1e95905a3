"""Convolutions by blocks of channels equal the plain ones, forwards and backwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune import runtime
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.blocked import DOMAIN, block_of, probe_image, probe_model, use_blocks
from onnxprune.training.client import Worker

BLOCK = block_of(runtime.run(runtime.session(probe_model()), {"x": probe_image()})["y"])
needs_blocks = pytest.mark.skipif(not BLOCK, reason="this CPU has no blocked convolutions")
# channels in and out, kernel, strides, pads, dilations, whether it gains
CASES: list[tuple[int, int, list[int], dict[str, Any], bool]] = [
    (16, 16, [3, 3], {"pads": [1, 1, 1, 1]}, True),
    (32, 48, [3, 3], {"pads": [1, 0, 1, 0], "strides": [2, 2]}, True),
    (16, 32, [2, 3], {"pads": [0, 1, 1, 2], "dilations": [2, 1]}, True),
    (12, 14, [3, 3], {}, True),
    (28, 30, [5, 1], {"pads": [2, 0, 2, 0]}, True),
    (18, 32, [3, 3], {}, False),  # images of 18 channels cannot be brought into blocks
    (3, 16, [3, 3], {}, False),  # too few
    (16, 32, [1, 1], {}, False),  # plain products are as fast
    (20, 17, [3, 3], {}, False),  # blocks would be half empty
    (32, 32, [3, 3], {"group": 2}, False),
    (16, 32, [3, 3], {"auto_pad": "SAME_UPPER"}, False),
]


def graph(op_type: str, channels: tuple[int, int], kernel: list[int], **options: Any) -> Any:
    """x, w, b -> y, as a model, and feeds for it."""
    c, m = channels
    rng = np.random.default_rng(0)
    weight = [m, c // options.get("group", 1), *kernel]
    shapes = {"x": [2, c, 6, 7], "w": weight, "b": [m]}
    if op_type == "ConvTranspose":
        shapes = {"x": [2, m, 6, 7], "w": weight}
    feeds = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node(op_type, list(shapes), ["y"], kernel_shape=kernel, **options)
    proto = helper.make_graph([node], "one", inputs, [output])
    return helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    ), feeds


def run(model: onnx.ModelProto, feeds: Any) -> Any:
    return runtime.run(runtime.session(model, threads=1, optimize=False), feeds)["y"]


@needs_blocks
@pytest.mark.parametrize(("c", "m", "kernel", "options", "gains"), CASES)
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_values(
    op_type: str, c: int, m: int, kernel: list[int], options: dict[str, Any], gains: bool
) -> None:
    if op_type == "ConvTranspose":
        if "strides" in options:
            gains = False
        c, m = m, c  # images of m channels become images of c
    model, feeds = graph(op_type, (c, m), kernel, **options)
    expected = run(model, feeds)
    assert use_blocks(model, BLOCK) is gains
    domains = {node.domain for node in model.graph.node}
    assert (DOMAIN in domains) is gains
    np.testing.assert_allclose(run(model, feeds), expected, rtol=1e-4, atol=1e-4)


def test_the_probe_tells_the_block() -> None:
    order = np.arange(64).reshape(-1, 16).repeat(2, 0).reshape(4, 2, 16)
    pixels = np.where(np.arange(2)[None, :, None] == 0, order, -1).astype(np.float32)
    assert block_of(pixels) == 16
    assert block_of(probe_image()) == 0, "no blocks: the image as it was"


def test_the_worker_and_the_caller_have_the_same_kernels(worker: Worker) -> None:
    trainer = object.__new__(WorkerTrainer)
    trainer._worker = worker
    assert trainer._block() == BLOCK
