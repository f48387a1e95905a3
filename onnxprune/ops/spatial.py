"""Pooling, resizing and moves between channels and space."""

from __future__ import annotations

import numpy as np

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
        if _only_unpools(node, c):
            c.set(node, {1: channels}, 1)
        else:
            c.freeze(node, channels, f"the indices of {node.title} are used")


def _only_unpools(node: Node, c: Interpreter) -> bool:
    """Whether the positions that MaxPool puts out are read by MaxUnpool alone."""
    name = node.outputs[1]
    uses = c.graph.uses.get(name, ())
    unpools = all(c.graph.nodes[i].op_type == "MaxUnpool" and s == 1 for i, s in uses)
    return unpools and name not in c.graph.leaving


@rule("MaxUnpool")
def unpool(node: Node, c: Interpreter) -> None:
    """x[N, C, *S], positions[N, C, *S] -> y[N, C, *S']"""
    channels = c.axis(node, 0, 1)
    c.tie(node, channels, c.axis(node, 1, 1))
    c.set(node, {1: channels})


@rewrite("MaxUnpool")
def rewrite_unpool(node: Node, r: Rewriter) -> None:
    """The number of channels that are left."""
    if node.input(2):
        r.rewrite_shape(node, 2, None)


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
        if _keeps(node, c, axis, m == n):
            found[axis] = labels
        else:
            c.freeze(node, labels, f"{node.title} interpolates along it")
    c.set(node, found)


def _keeps(node: Node, c: Interpreter, axis: int, same_length: bool) -> bool:
    """Whether an axis comes out as it went in."""
    if node.attr("coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
        return False
    slot = 1 if node.op_type == "Upsample" or c.graph.opset < 11 else 2
    scales = c.value(node, slot) if node.input(slot) else node.attr("scales")
    axes = node.attr("axes")
    if scales is None or len(scales) == 0:
        return same_length
    rank = len(c.dims(node, 0))
    where = list(range(rank)) if axes is None else [a % rank for a in axes]
    return axis not in where or float(scales[where.index(axis)]) == 1.0


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


@rule("Col2Im")
def col2im(node: Node, c: Interpreter) -> None:
    """x[N, C*prod(block), L], image[S], block[S] -> y[N, C, *image]"""
    block = c.value(node, 2)
    x = c.axis(node, 0, 1)
    c.freeze(node, c.axis(node, 0, 2), f"positions of {node.title}")
    if x is None or block is None or x.size == block.prod():
        c.freeze(node, x, f"all channels of {node.title} form one image")
        return
    grid = x.reshape(-1, int(block.prod()))
    channels = c.system.fresh(grid.shape[0])
    for column in range(grid.shape[1]):
        c.tie(node, channels, grid[:, column])
    c.set(node, {1: channels})


@rule("SpaceToDepth")
def space_to_depth(node: Node, c: Interpreter) -> None:
    """x[N, C, H*b, W*b] -> y[N, b*b*C, H, W]"""
    x = c.axis(node, 0, 1)
    if x is not None:
        c.set(node, {1: np.tile(x, node.attr("blocksize") ** 2)})
