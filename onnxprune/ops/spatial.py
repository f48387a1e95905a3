"""Pooling, resizing and moves between channels and space."""

from __future__ import annotations

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter

POOLS = ["AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"]


@rule(*POOLS)
def pool(node: Node, c: Interpreter) -> None:
    """x[N, C, *S] -> y[N, C, *S']"""
    channels = c.axis(node, 0, 1)
    c.prefer(channels)
    for axis in range(2, len(c.dims(node, 0))):
        c.freeze(node, c.axis(node, 0, axis), f"spatial axis of {node.title}")
    batch = c.axis(node, 0, 0)
    c.set(node, {0: batch, 1: channels})
    if len(node.outputs) > 1 and node.outputs[1]:
        c.freeze(node, channels, f"the indices of {node.title} are used")


@rule("GridSample", "RoiAlign", "MaxRoiPool")
def sample(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], positions -> y[N', C, *S']"""
    c.set(node, {1: c.axis(node, 0, 1)})


@rule("Resize", "Upsample")
def resize(node: Node, c: Interpreter) -> None:
    """x[*D], scales or sizes -> y[*D']; an axis that keeps its length is passed on"""
    before, after = c.dims(node, 0), c.out_dims(node)
    found: dict[int, Labels | None] = {}
    for axis, (m, n) in enumerate(zip(before, after, strict=True)):
        labels = c.axis(node, 0, axis)
        if m == n and node.attr("coordinate_transformation_mode", b"") != b"tf_crop_and_resize":
            found[axis] = labels
        else:
            c.freeze(node, labels, f"{node.title} interpolates along it")
    c.set(node, found)


@rewrite("Resize")
def rewrite_resize(node: Node, r: Rewriter) -> None:
    """Sizes of axes that were pruned."""
    if node.input(3):
        r.rewrite_shape(node, 3, r.axes_attribute(node))


@rule("DepthToSpace")
def depth_to_space(node: Node, c: Interpreter) -> None:
    """x[N, C*b*b, H, W] -> y[N, C, H*b, W*b]"""
    block = node.attr("blocksize") ** 2
    x = c.axis(node, 0, 1)
    if x is None:
        return
    crd = node.attr("mode", b"DCR") == b"CRD"
    grid = x.reshape(-1, block) if crd else x.reshape(block, -1).T
    if grid.shape[0] == 1:
        c.freeze(node, x, f"all channels of {node.title} form one image")
        return
    channels = c.system.fresh(grid.shape[0])
    for column in range(block):
        c.tie(node, channels, grid[:, column])
    c.set(node, {1: channels})


@rule("SpaceToDepth")
def space_to_depth(node: Node, c: Interpreter) -> None:
    """x[N, C, H*b, W*b] -> y[N, b*b*C, H, W]"""
    import numpy as np

    x = c.axis(node, 0, 1)
    if x is not None:
        c.set(node, {1: np.tile(x, node.attr("blocksize") ** 2)})
