"""Operators that move values about."""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune.training.draft import Builder, Draft, Undifferentiable, attributes, replaced, rule


@rule("Split")
def split(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x -> parts along an axis.

    The builder needs every part used, so unused ones turn all into Slices.
    """
    if all(name and draft.uses.get(name) for name in node.output):
        return None
    axis = attributes(node).get("axis", 0)
    lengths = draft.value(node, 1)
    if lengths is None:
        size = draft.static(node, node.input[0], [axis])[0]
        part = -(-size // len(node.output))
        bounds = np.minimum(np.arange(len(node.output) + 1) * part, size)
    else:
        bounds = np.concatenate([[0], np.cumsum(lengths)])
    b = Builder(draft, node)
    for index, name in enumerate(node.output):
        if name and draft.uses.get(name):
            limits = [np.array([int(bounds[index + i])]) for i in (0, 1)]
            b.op("Slice", node.input[0], *limits, np.array([axis]), output=name)
    return b.nodes


@rule("DepthToSpace")
def depth_to_space(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x[N, C b b, H, W] -> y[N, C, H b, W b]"""
    options = attributes(node)
    block = options["blocksize"]
    channels, height, width = draft.static(node, node.input[0], [1, 2, 3])
    depth = channels // block**2
    b = Builder(draft, node)
    if options.get("mode", "DCR") == "DCR":
        shape, order = [0, block, block, depth, height, width], [0, 3, 4, 1, 5, 2]
    else:
        shape, order = [0, depth, block, block, height, width], [0, 1, 4, 2, 5, 3]
    parts = b.op("Transpose", b.op("Reshape", node.input[0], np.array(shape)), perm=order)
    b.op(
        "Reshape", parts, np.array([0, depth, height * block, width * block]), output=node.output[0]
    )
    return b.nodes


@rule("SpaceToDepth")
def space_to_depth(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x[N, C, H b, W b] -> y[N, b b C, H, W]"""
    block = attributes(node)["blocksize"]
    channels, height, width = draft.static(node, node.input[0], [1, 2, 3])
    high, wide = height // block, width // block
    b = Builder(draft, node)
    parts = b.op("Reshape", node.input[0], np.array([0, channels, high, block, wide, block]))
    moved = b.op("Transpose", parts, perm=[0, 3, 5, 1, 2, 4])
    b.op("Reshape", moved, np.array([0, channels * block**2, high, wide]), output=node.output[0])
    return b.nodes


@rule("Pad")
def pad(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x -> y: constant pads of every axis stay; other modes gather along each padded axis."""
    mode = attributes(node).get("mode", "constant")
    amounts = draft.value(node, 1)
    assert amounts is not None
    rank = draft.rank(node, node.input[0])
    axes = draft.value(node, 3)
    chosen = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    full = np.zeros((2, rank), np.int64)
    full[:, chosen] = amounts.reshape(2, -1)
    if mode == "constant":
        if axes is None:
            return None
        value = list(node.input[2:3]) or [""]
        return [replaced(node, [node.input[0], draft.constant(full.reshape(-1), "pads"), *value])]
    b = Builder(draft, node)
    x = node.input[0]
    numpy_mode = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}[mode]
    for axis in np.flatnonzero(full.any(axis=0)):
        if full[:, axis].min() < 0:
            raise Undifferentiable(f"Pad: negative pads in mode {mode!r}")
        size = draft.static(node, node.input[0], [int(axis)])[0]
        index = np.pad(np.arange(size), tuple(full[:, axis]), mode=numpy_mode)  # type: ignore[call-overload]
        x = b.op("Gather", x, index, axis=int(axis))
    return b.done(x)


@rule("Dropout")
def dropout(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x -> x: a deployed model drops nothing."""
    if len(node.output) > 1 and node.output[1] and draft.uses.get(node.output[1]):
        raise Undifferentiable("Dropout: its mask is used")
    return Builder(draft, node).done(node.input[0])


@rule("CastLike")
def cast_like(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x, y -> x in y's type"""
    kind = draft.types.get(node.input[1])
    if not kind:
        raise Undifferentiable(f"CastLike: the type of {node.input[1]!r} is not known")
    b = Builder(draft, node)
    b.op("Cast", node.input[0], output=node.output[0], to=kind)
    return b.nodes
