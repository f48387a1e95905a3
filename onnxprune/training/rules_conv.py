"""Convolutions, pooling and resampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune.training.draft import (
    OPSET,
    Builder,
    Draft,
    Undifferentiable,
    attributes,
    replaced,
    rule,
)


@rule("Conv")
def conv(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x[N, C, *S], W[M, C/g, *K], b[M] -> y[N, M, *S'].

    Explicit pads, since the gradient ignores auto_pad.
    """
    return _with_pads(node, draft, draft.static(node, node.input[1])[2:])


@rule("MaxPool")
def max_pool(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto] | None:
    """x[N, C, *S] -> y[N, C, *S']: the gradient takes all sizes but the batch from the graph."""
    draft.static(node, node.input[0], range(1, draft.rank(node, node.input[0])))
    if attributes(node).get("ceil_mode"):
        return [_without_ceil(node, draft)]
    return _with_pads(node, draft, list(attributes(node)["kernel_shape"]))


@rule("AveragePool")
def average_pool(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x[N, C, *S] -> y[N, C, *S']: means of tiles, or sums by a depthwise Conv over the counts.

    The builder's own gradient wants fixed batches and ignores dilations.
    """
    kernel = list(attributes(node)["kernel_shape"])
    ceiled = bool(attributes(node).get("ceil_mode"))
    fresh = _without_ceil(node, draft) if ceiled else (_with_pads(node, draft, kernel) or [node])[0]
    options = attributes(fresh)
    rank = len(kernel)
    pads = list(options.get("pads") or [0] * 2 * rank)
    strides = list(options.get("strides") or [1] * rank)
    dilations = list(options.get("dilations") or [1] * rank)
    b = Builder(draft, node)
    tiles = _tiles(draft, node, kernel, strides, pads, dilations)
    if tiles:
        parts = b.op("Reshape", node.input[0], np.array([0, 0, *tiles]))
        b.op("ReduceMean", parts, np.arange(3, 3 + 2 * rank, 2), output=node.output[0], keepdims=0)
        return b.nodes
    channels = draft.static(node, node.input[0], [1])[0]
    window: dict[str, Any] = {"strides": strides, "pads": pads, "dilations": dilations}
    counts = float(np.prod(kernel))
    ones = np.ones((channels, 1, *kernel), np.float32)
    if not any(pads) or (options.get("count_include_pad") and not ceiled):
        b.op("Conv", node.input[0], ones / counts, output=node.output[0], group=channels, **window)
        return b.nodes
    sizes = draft.static(node, node.input[0], range(2, rank + 2))
    total = b.op("Conv", node.input[0], ones, group=channels, **window)
    b.op("Div", total, _window_counts(sizes, kernel, window), output=node.output[0])
    return b.nodes


def _tiles(
    draft: Draft,
    node: onnx.NodeProto,
    kernel: list[int],
    strides: list[int],
    pads: list[int],
    dilations: list[int],
) -> list[int]:
    """[S1', K1, S2', K2, ...] where windows tile the input; empty where they do not."""
    shape = draft.shape(node.input[0])
    if shape is None or any(pads) or strides != kernel or any(d != 1 for d in dilations):
        return []
    tiles: list[int] = []
    for size, part in zip(shape[2:], kernel, strict=True):
        if size is None or size % part:
            return []
        tiles += [size // part, part]
    return tiles


def _window_counts(sizes: list[int], kernel: list[int], window: dict[str, list[int]]) -> Any:
    """How many values, padding aside, each window holds: [1, 1, *S']."""
    rank = len(sizes)
    counts = np.ones((1, 1, *[1] * rank), np.float32)
    for axis, (size, width) in enumerate(zip(sizes, kernel, strict=True)):
        begin, end = window["pads"][axis], window["pads"][axis + rank]
        stride, step = window["strides"][axis], window["dilations"][axis]
        inside = np.pad(np.ones(size, np.float32), (begin, end))
        starts = np.arange(0, len(inside) - (width - 1) * step, stride)
        held = inside[starts[:, None] + step * np.arange(width)].sum(axis=1)
        spread = [1] * (rank + 2)
        spread[axis + 2] = -1
        counts = counts * held.reshape(spread)
    return counts


def _with_pads(
    node: onnx.NodeProto, draft: Draft, kernel: list[int]
) -> list[onnx.NodeProto] | None:
    """The node with explicit pads; None where it has them."""
    options = attributes(node)
    mode = options.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return None
    if mode == "VALID":
        return [replaced(node, auto_pad=None, pads=[0] * 2 * len(kernel))]
    begins, ends = [], []
    for axis, size in enumerate(kernel):
        total = _same_total(node, draft, axis, size)
        small, large = total // 2, total - total // 2
        begins.append(large if mode == "SAME_LOWER" else small)
        ends.append(small if mode == "SAME_LOWER" else large)
    return [replaced(node, auto_pad=None, pads=[*begins, *ends])]


def _same_total(node: onnx.NodeProto, draft: Draft, axis: int, kernel: int) -> int:
    """Padding in all along one spatial axis for auto_pad SAME."""
    options = attributes(node)
    stride = int((options.get("strides") or [1] * (axis + 1))[axis])
    reach = (kernel - 1) * int((options.get("dilations") or [1] * (axis + 1))[axis]) + 1
    if stride == 1:
        return reach - 1
    size = draft.static(node, node.input[0], [axis + 2])[0]
    return max(0, (-(-size // stride) - 1) * stride + reach - size)


def _without_ceil(node: onnx.NodeProto, draft: Draft) -> onnx.NodeProto:
    """Rounding up as extra padding at the end, where that means the same."""
    options = attributes(node)
    kernel = list(options["kernel_shape"])
    rank = len(kernel)
    pads = list(options.get("pads") or [0] * 2 * rank)
    strides = options.get("strides") or [1] * rank
    dilations = options.get("dilations") or [1] * rank
    for axis in range(rank):
        size = draft.static(node, node.input[0], [axis + 2])[0]
        room = size + pads[axis] + pads[axis + rank] - (kernel[axis] - 1) * dilations[axis] - 1
        extra = -room % strides[axis]
        if extra and room + extra >= size + pads[axis]:
            extra = 0  # the window would begin in the padding
        if extra and node.op_type == "AveragePool" and options.get("count_include_pad"):
            raise Undifferentiable(
                "AveragePool: ceil_mode with count_include_pad has no equal padding"
            )
        pads[axis + rank] += extra
    return replaced(node, ceil_mode=None, auto_pad=None, pads=pads)


@rule("GlobalMaxPool")
def global_max_pool(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x[N, C, *S] -> y[N, C, 1, ...]: the largest of the flattened positions."""
    rank = draft.rank(node, node.input[0])
    b = Builder(draft, node)
    flat = b.op("Reshape", node.input[0], np.array([0, 0, -1]))
    top = b.ops(
        "TopK", flat, np.array([1]), outputs=[draft.name("top"), draft.name("index")], axis=2
    )[0]
    b.op("Reshape", top, np.array([0, 0] + [1] * (rank - 2)), output=node.output[0])
    return b.nodes


@rule("ConvTranspose")
def conv_transpose(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x[N, C, *S], W[C, M/g, *K], b[M] -> y[N, M, *S'].

    Zeros between the values, then Conv with the turned kernel.
    """
    options = attributes(node)
    shape = draft.static(node, node.input[1])
    kernel, group = shape[2:], options.get("group", 1)
    rank = len(kernel)
    strides = list(options.get("strides") or [1] * rank)
    dilations = list(options.get("dilations") or [1] * rank)
    sizes = (
        draft.static(node, node.input[0], range(2, rank + 2))
        if _needs_size(options, strides)
        else []
    )
    begins, ends = _transposed_pads(options, kernel, strides, dilations, sizes)
    b = Builder(draft, node)
    spread = _spread_zeros(b, node.input[0], strides, sizes)
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = [r - p for r, p in zip(reach * 2, begins + ends, strict=True)]
    spread, pads = _cropped(b, spread, pads, rank)
    weight = _turned(b, node.input[1], shape, group)
    inputs = [spread, weight, *node.input[2:3]]
    b.op("Conv", *inputs, output=node.output[0], group=group, dilations=dilations, pads=pads)
    return b.nodes


def _needs_size(options: dict[str, Any], strides: list[int]) -> bool:
    named = options.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return any(s > 1 for s in strides) or bool(options.get("output_shape")) or named


def _transposed_pads(
    options: dict[str, Any],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    sizes: list[int],
) -> tuple[list[int], list[int]]:
    """What ConvTranspose cuts at the begin and end of each axis; a negative number adds."""
    rank = len(kernel)
    extra = list(options.get("output_padding") or [0] * rank)
    pads = list(options.get("pads") or [0] * 2 * rank)
    begins, ends = pads[:rank], [p - e for p, e in zip(pads[rank:], extra, strict=True)]
    mode, wanted = options.get("auto_pad", "NOTSET"), options.get("output_shape")
    if not wanted and mode not in ("SAME_UPPER", "SAME_LOWER"):
        return begins, ends
    for axis in range(rank):
        target = wanted[-rank:][axis] if wanted else sizes[axis] * strides[axis]
        full = (
            strides[axis] * (sizes[axis] - 1)
            + extra[axis]
            + (kernel[axis] - 1) * dilations[axis]
            + 1
        )
        total = full - target
        half = total // 2
        begins[axis] = half if mode == "SAME_UPPER" else total - half
        ends[axis] = total - begins[axis] - extra[axis]
    return begins, ends


def _spread_zeros(b: Builder, x: str, strides: list[int], sizes: list[int]) -> str:
    """x[N, C, *S] with stride - 1 zeros between neighbours along each spatial axis."""
    for axis, stride in enumerate(strides):
        if stride == 1:
            continue
        place = axis + 2
        apart = b.op("Unsqueeze", x, np.array([place + 1]))
        rank = len(strides) + 3
        pads = [0] * 2 * rank
        pads[rank + place + 1] = stride - 1
        padded = b.op("Pad", apart, np.array(pads), 0.0)
        done = [
            s if a > axis else (s - 1) * t + 1
            for a, (s, t) in enumerate(zip(sizes, strides, strict=True))
        ]
        done[axis] = sizes[axis] * stride
        joined = b.op("Reshape", padded, np.array([0, 0, *done]))
        end = (sizes[axis] - 1) * stride + 1
        x = b.op("Slice", joined, np.array([0]), np.array([end]), np.array([place]))
    return x


def _cropped(b: Builder, x: str, pads: list[int], rank: int) -> tuple[str, list[int]]:
    """Negative pads as a Slice."""
    if min(pads) >= 0:
        return x, pads
    starts = [max(0, -p) for p in pads[:rank]]
    ends = [p if p < 0 else np.iinfo(np.int64).max for p in pads[rank:]]
    x = b.op("Slice", x, np.array(starts), np.array(ends), np.arange(2, rank + 2))
    return x, [max(0, p) for p in pads]


def _turned(b: Builder, weight: str, shape: list[int], group: int) -> str:
    """W[C, M/g, *K] -> W'[M, C/g, *K] with every spatial axis reversed."""
    rows, columns, kernel = shape[0] // group, shape[1], shape[2:]
    count = int(np.prod(kernel))
    flat = b.op("Reshape", weight, np.array([group, rows, columns, count]))
    swapped = b.op("Transpose", flat, perm=[0, 2, 1, 3])
    reverse = np.arange(count)[::-1].copy()
    turned = b.op("Gather", swapped, reverse, axis=3)
    return b.op("Reshape", turned, np.array([group * columns, rows, *kernel]))


@rule("Resize")
def resize(node: onnx.NodeProto, draft: Draft) -> list[onnx.NodeProto]:
    """x[*S] -> y[*S']: a constant matrix per axis, whatever the mode.

    ONNX Runtime itself computes the matrices.
    """
    options = attributes(node)
    crops = options.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    keeps_ratio = options.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    if crops or keeps_ratio or options.get("antialias"):
        raise Undifferentiable("Resize: cropping, antialias and aspect ratios are not covered")
    by_size = len(node.input) > 3 and bool(node.input[3])
    scales = None if by_size else draft.value(node, 2)
    rank = draft.rank(node, node.input[0])
    axes = [a % rank for a in options.get("axes") or range(rank)]
    x = node.input[0]
    b = Builder(draft, node)
    for place, axis in enumerate(axes):
        if scales is not None and scales[place] == 1:
            continue
        if axis == 0:
            if by_size:
                continue  # the batch is never resampled
            raise Undifferentiable("Resize: it resamples the batch axis")
        before = draft.static(node, node.input[0], [axis])[0]
        if scales is None:
            after = _size_after(node, draft, place, axis)
        else:
            after = int(np.floor(before * np.float32(scales[place])))
        matrix = _resize_matrix(node, before, after, scales, place)
        if matrix is not None:
            x = _along(b, x, matrix, axis, rank)
    return b.done(x)


def _size_after(node: onnx.NodeProto, draft: Draft, place: int, axis: int) -> int:
    """A resized length: from the sizes, or from the output's shape where they are computed."""
    if node.input[3] in draft.constants:
        return int(draft.constants[node.input[3]][place])
    return draft.static(node, node.output[0], [axis])[0]


def _resize_matrix(node: onnx.NodeProto, before: int, after: int, scales: Any, place: int) -> Any:
    """R[after, before], found by resizing the unit vectors."""
    from onnxprune import runtime

    by_size = scales is None
    if by_size and before == after:
        return None
    inputs = ["x", "", "", "sizes"] if by_size else ["x", "", "scales"]
    limits = (
        {"sizes": np.array([before, after])}
        if by_size
        else {"scales": np.array([1, scales[place]], np.float32)}
    )
    options = {
        k: v for k, v in attributes(node).items() if k not in ("axes", "keep_aspect_ratio_policy")
    }
    tensors = [
        helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape, v)
        for n, v in limits.items()
    ]
    graph = helper.make_graph(
        [helper.make_node("Resize", inputs, ["y"], **options)],
        "resize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [before, before])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    session = runtime.session(model, threads=1, optimize=False)
    return runtime.run(session, {"x": np.eye(before, dtype=np.float32)})["y"].T.copy()


def _along(b: Builder, x: str, matrix: Any, axis: int, rank: int) -> str:
    """The matrix R[m, n] applied along one axis of x."""
    if axis == rank - 1:
        return b.op("MatMul", x, np.ascontiguousarray(matrix.T))
    if axis == rank - 2:
        return b.op("MatMul", matrix, x)
    order = [a for a in range(rank) if a != axis] + [axis]
    back = [int(i) for i in np.argsort(order)]
    moved = b.op("MatMul", b.op("Transpose", x, perm=order), np.ascontiguousarray(matrix.T))
    return b.op("Transpose", moved, perm=back)
