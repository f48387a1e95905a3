"""Gradients of operators that move elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from onnxprune.training.autodiff.tape import Grad, Tape, vjp
from onnxprune.training.draft import attributes


@vjp("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """The same elements in the old shape."""
    return [t.op("Reshape", grads[0], t.shape_of(node.input[0]))]


@vjp("Transpose")
def transpose(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """The inverse permutation."""
    perm = attributes(node).get("perm") or list(range(t.rank(node.input[0])))[::-1]
    return [t.op("Transpose", grads[0], perm=[int(i) for i in np.argsort(perm)])]


@vjp("Expand")
def expand(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """Sum over what was repeated."""
    assert grads[0] is not None
    return [t.unbroadcast(grads[0], node, 0)]


@vjp("Tile")
def tile(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """An axis of length r n is r times n: sum over the r."""
    x, rank = node.input[0], t.rank(node.input[0])
    columns = [t.op("Unsqueeze", s, np.array([1])) for s in (node.input[1], t.shape_of(x))]
    pairs = t.op("Reshape", t.op("Concat", *columns, axis=1), np.array([-1]))
    return [t.op("ReduceSum", t.op("Reshape", grads[0], pairs), 2 * np.arange(rank), keepdims=0)]


@vjp("Concat")
def concat(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """Split along the axis."""
    rank = t.rank(node.output[0])
    axis = attributes(node)["axis"] % rank
    if len(node.input) == 1:
        return grads
    sizes = t.op("Concat", *(t.size_of(name, axis) for name in node.input), axis=0)
    return list(t.ops("Split", grads[0], sizes, outputs=len(node.input), axis=axis))


@vjp("Split")
def split(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """Concatenate; an output without a gradient gives zeros."""
    axis = attributes(node).get("axis", 0)
    parts = [g or t.zeros_like(o) for g, o in zip(grads, node.output, strict=True)]
    return [t.op("Concat", *parts, axis=axis)]


@vjp("Pad")
def pad(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """Constant padding by p is undone by padding by -p."""
    if attributes(node).get("mode", "constant") != "constant" or t.needs(node, 2):
        raise ValueError(f"Pad ({node.name}) has a gradient in constant mode only")
    if len(node.input) > 3 and node.input[3]:
        raise ValueError(f"Pad ({node.name}): axes have no gradient rule")
    return [t.op("Pad", grads[0], t.op("Neg", node.input[1]))]


@vjp("Trilu")
def trilu(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """The same triangle."""
    return [t.op("Trilu", grads[0], *node.input[1:], upper=attributes(node).get("upper", 1))]


@vjp("Slice")
def slicing(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """Axis by axis: row j of dx is the row of dy that came from it, or zero.

    The rows are chosen by Gather from dy with a row of zeros behind it.
    """
    x, dx = node.input[0], grads[0]
    rank = t.rank(x)
    axes = t.value(node, 3) if len(node.input) > 3 and node.input[3] else None
    if axes is None and len(node.input) > 3 and node.input[3]:
        raise ValueError(f"Slice ({node.name}): the axes are not constant")
    count = t.shape(node.input[1])
    assert count is not None and isinstance(count[0], int)
    chosen = range(count[0]) if axes is None else [int(a) % rank for a in axes]
    for place, axis in enumerate(chosen):
        bounds = [_element(t, name, place) for name in node.input[1:3]]
        step = _element(t, node.input[4], place) if len(node.input) > 4 else np.array([1])
        size = t.size_of(x, axis)
        scalar = t.op("Squeeze", size, np.array([0]))
        every = t.op("Range", np.array(0), scalar, np.array(1))
        taken = t.op("Slice", every, *bounds, np.array([0]), step)
        length = t.op("Size", taken)
        blank = t.op("Expand", length, size)
        numbers = t.op("Range", np.array(0), length, np.array(1))
        source = t.op("ScatterElements", blank, taken, numbers, axis=0)
        zero = t.op("Mul", t.op("ReduceSum", dx, np.array([axis]), keepdims=1), 0.0)
        dx = t.op("Gather", t.op("Concat", dx, zero, axis=axis), source, axis=axis)
    return [dx]


def _element(t: Tape, tensor: str, place: int) -> str:
    """One element of a vector, as a tensor [1]."""
    if tensor in t.constants:
        return t.constant(t.constants[tensor][place : place + 1].astype(np.int64))
    part = t.op("Slice", tensor, np.array([place]), np.array([place + 1]))
    return t.op("Cast", part, to=onnx.TensorProto.INT64)


@vjp("Gather")
def gather(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """dy is added up at the places that were read."""
    x, indices = node.input[:2]
    rank = t.rank(x)
    axis = attributes(node).get("axis", 0) % rank
    before = [t.size_of(x, a) for a in range(axis)]
    after = [t.size_of(x, a) for a in range(axis + 1, rank)]
    rows = t.op("Reshape", grads[0], t.op("Concat", *before, np.array([-1]), *after, axis=0))
    spread = np.array([1] * axis + [-1] + [1] * (rank - axis - 1))
    places = t.op("Expand", t.op("Reshape", indices, spread), t.op("Shape", rows))
    zeros = t.zeros_like(x)
    return [t.op("ScatterElements", zeros, places, rows, axis=axis, reduction="add")]


@vjp("GatherElements")
def gather_elements(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """dy is added up at the places that were read."""
    axis = attributes(node).get("axis", 0)
    zeros = t.zeros_like(node.input[0])
    return [t.op("ScatterElements", zeros, node.input[1], grads[0], axis=axis, reduction="add")]


@vjp("GatherND")
def gather_nd(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """x[D..., R...], indices[..., K] over the first K axes: dy is added up by row of the flat x."""
    x, indices = node.input[:2]
    shape = t.shape(indices)
    if attributes(node).get("batch_dims", 0) or shape is None or not isinstance(shape[-1], int):
        raise ValueError(f"GatherND ({node.name}) has a gradient without batch axes only")
    depth, rank = shape[-1], t.rank(x)
    sizes = t.op("Slice", t.shape_of(x), np.array([0]), np.array([depth]))
    whole = t.op("Mod", indices, sizes)
    one = np.array([1])
    steps: list[Any] = [one]
    for axis in reversed(range(1, depth)):
        steps.insert(0, t.op("Mul", steps[0], t.size_of(x, axis)))
    flat = t.op("ReduceSum", t.op("Mul", whole, t.op("Concat", *steps, axis=0)), np.array([-1]))
    rest = [t.size_of(x, axis) for axis in range(depth, rank)]
    width = one if not rest else t.op("ReduceProd", t.op("Concat", *rest, axis=0), keepdims=1)
    rows = t.op("Reshape", grads[0], t.op("Concat", np.array([-1]), width, axis=0))
    zeros = t.op("Reshape", t.zeros_like(x), t.op("Concat", np.array([-1]), width, axis=0))
    places = t.op("Expand", t.op("Reshape", flat, np.array([-1, 1])), t.op("Shape", rows))
    total = t.op("ScatterElements", zeros, places, rows, axis=0, reduction="add")
    return [t.op("Reshape", total, t.shape_of(x))]


@vjp("ScatterElements", "ScatterND")
def scatter(node: onnx.NodeProto, grads: Sequence[Grad], t: Tape) -> Sequence[Grad]:
    """y is x with updates u at some places: du = dy there, dx = dy elsewhere."""
    options = attributes(node)
    if options.get("reduction", "none") != "none":
        raise ValueError(f"{node.op_type} ({node.name}): no gradient rule for its reduction")
    _, indices, updates = node.input
    named = {"axis": options["axis"]} if "axis" in options else {}
    dx = du = None
    if t.needs(node, 0):
        dx = t.op(node.op_type, grads[0], indices, t.zeros_like(updates), **named)
    if t.needs(node, 2):
        reader = {"ScatterElements": "GatherElements", "ScatterND": "GatherND"}[node.op_type]
        du = t.op(reader, grads[0], indices, **named)
    return [dx, None, du]
