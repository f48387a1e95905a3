"""Operators that pick, join and repeat indices along an axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels, reduce_to_varying
from onnxprune.ops.numbers import numbered
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter
from onnxprune.shapes import Shapes
from onnxprune.vocabulary import remap

Array = NDArray[Any]


def _pass_other_axes(node: Node, c: Interpreter, *own: int) -> dict[int, Labels | None]:
    rank = len(c.dims(node, 0))
    return {a: c.axis(node, 0, a) for a in range(rank) if a not in own}


@rule("Concat")
def concat(node: Node, c: Interpreter) -> None:
    """x1[*D], x2[*D'], ... -> y, joined along one axis"""
    rank = len(c.out_dims(node))
    own = node.attr("axis") % rank
    parts = []
    for slot in range(len(node.inputs)):
        length = c.dims(node, slot)[own]
        labels = c.axis(node, slot, own)
        parts.append(np.zeros(length, np.int32) if labels is None else labels)
    joined = np.concatenate(parts)
    found: dict[int, Labels | None] = {own: joined if joined.any() else None}
    for axis in range(rank):
        if axis != own and c.out_dims(node)[axis] > 1:
            first = c.axis(node, 0, axis)
            for slot in range(1, len(node.inputs)):
                c.tie(node, first, c.axis(node, slot, axis))
            found[axis] = first
    c.set(node, found)


@rule("Split")
def split(node: Node, c: Interpreter) -> None:
    """x[*D] -> parts along one axis"""
    rank = len(c.dims(node, 0))
    own = node.attr("axis", 0) % rank
    rest = _pass_other_axes(node, c, own)
    labels = c.axis(node, 0, own)
    sizes = [c.out_dims(node, i)[own] if name else 0 for i, name in enumerate(node.outputs)]
    if labels is None or sum(sizes) != labels.size:
        c.freeze(node, labels, f"the parts of {node.title} are not all known")
        labels = None
    start = 0
    for index, size in enumerate(sizes):
        part = None if labels is None else labels[start : start + size]
        c.must_keep(node, part)
        c.set(node, {**rest, own: part}, index)
        start += size


@rewrite("Split")
def rewrite_split(node: Node, r: Rewriter) -> None:
    """Part sizes that are left."""
    own = node.attr("axis", 0) % len(r.dims(node, 0))
    before = [r.out_dims(node, i)[own] for i in range(len(node.outputs))]
    after = [r.out_dims_after(node, i)[own] for i in range(len(node.outputs))]
    if before == after:
        return
    if r.coupling.graph.opset < 13:
        r.set_attribute(node, "split", after)
    else:
        r.drop_attribute(node, "num_outputs")
        r.set_operand(node, 1, np.array(after, np.int64))


@rule("Slice")
def slice_(node: Node, c: Interpreter) -> None:
    """x[*D], starts, ends, axes, steps -> y[*D']"""
    rank = len(c.dims(node, 0))
    bounds = slice_bounds(node, [c.value(node, s) for s in range(1, 5)], rank)
    found: dict[int, Labels | None] = {}
    for axis in range(rank):
        labels = c.axis(node, 0, axis)
        whole = c.dims(node, 0)[axis] == c.out_dims(node)[axis]
        if labels is None or (bounds is not None and axis not in bounds):
            found[axis] = labels
        elif bounds is None:
            if whole and (axis not in _maybe_sliced(node, c, rank)):
                found[axis] = labels
            else:
                c.freeze(node, labels, f"the bounds of {node.title} are computed at run time")
        else:
            found[axis] = labels[bounds[axis]]
            c.must_keep(node, found[axis])
    c.set(node, found)


def _maybe_sliced(node: Node, c: Interpreter, rank: int) -> set[int]:
    axes = node.attr("axes") if not node.input(3) else c.value(node, 3)
    return set(range(rank)) if axes is None else {int(a) % rank for a in axes}


def slice_bounds(node: Node, values: list[Array | None], rank: int) -> dict[int, slice] | None:
    """The slice of each axis that is cut; None where a bound is unknown."""
    starts, ends, axes, steps = values
    if not node.input(1):
        starts, ends, axes = (
            None if (v := node.attr(n)) is None else np.asarray(v)
            for n in ("starts", "ends", "axes")
        )
    if (
        starts is None
        or ends is None
        or (node.input(3) and axes is None)
        or (node.input(4) and steps is None)
    ):
        return None
    where = range(len(starts)) if axes is None else [int(a) % rank for a in axes]
    strides = [1] * len(starts) if steps is None else [int(s) for s in steps]
    found = {}
    for axis, start, end, stride in zip(where, starts, ends, strides, strict=True):
        stop: int | None = int(end)
        if stride < 0 and int(end) <= -(2**31):
            stop = None
        found[axis] = slice(int(start), stop, stride)
    return found


@rewrite("Slice")
def rewrite_slice(node: Node, r: Rewriter) -> None:
    """Bounds in terms of what is left; a Gather where that is no range any more."""
    rank = len(r.dims(node, 0))
    bounds = slice_bounds(node, [r.value(node, s) for s in range(1, 5)], rank)
    if bounds is None:
        return
    changed = False
    for axis, cut in bounds.items():
        labels = r.labels(node, 0, axis)
        if labels is None or r.mask(labels).all():
            continue
        changed = True
        if cut.step != 1 and len(bounds) == 1:
            r.replace_by_gather(node, axis, r.positions(labels, np.arange(labels.size)[cut]))
            return
        if cut.step != 1:
            r.fail(node, "a strided slice of a pruned axis together with other axes")
        first, last, _ = cut.indices(labels.size)
        kept = np.concatenate([[0], np.cumsum(r.mask(labels))])
        bounds[axis] = slice(int(kept[first]), int(kept[max(first, last)]), 1)
    if changed:
        _set_bounds(node, r, bounds)


def _set_bounds(node: Node, r: Rewriter, bounds: dict[int, slice]) -> None:
    starts = np.array([b.start for b in bounds.values()], np.int64)
    ends = np.array([-(2**63) + 1 if b.stop is None else b.stop for b in bounds.values()], np.int64)
    if not node.input(1):
        r.set_attribute(node, "starts", starts.tolist())
        r.set_attribute(node, "ends", ends.tolist())
        return
    kind = r.value_type(node, 1)
    r.set_operand(node, 1, starts.astype(kind))
    r.set_operand(node, 2, np.clip(ends, np.iinfo(kind).min + 1, np.iinfo(kind).max).astype(kind))


@rule("Gather")
def gather(node: Node, c: Interpreter) -> None:
    """x[*A, n, *B], index[*I] -> y[*A, *I, *B]"""
    rank, extra = len(c.dims(node, 0)), len(c.dims(node, 1)) - 1
    own = node.attr("axis", 0) % rank
    found: dict[int, Labels | None] = {}
    for axis in range(rank):
        if axis != own:
            found[axis if axis < own else axis + extra] = c.axis(node, 0, axis)
            c.prefer(found[axis if axis < own else axis + extra])
    labels, index = c.axis(node, 0, own), c.value(node, 1)
    if labels is not None and index is None and is_view(node, c.shapes):
        _view(node, c, labels)
        return
    if labels is not None:
        found.update(_pick(node, c, labels, index, own))
    if c.is_static(node, 0):
        for axis, v in found.items():
            if axis > own + extra:
                c.produce(node, v)
    c.set(node, found)


def is_view(node: Node, shapes: Shapes) -> bool:
    """Whether Gather reads all of a flat tensor in order: a reshape, as strided views export."""
    data, index = node.inputs[:2]
    for sizing in (shapes.first, shapes.second):
        value, dims = sizing.values.get(index), sizing.dims.get(data)
        if value is None or dims is None or len(dims) != 1 or value.size != dims[0]:
            return False
        if not np.array_equal(value.ravel(), np.arange(dims[0])):
            return False
    return True


def _view(node: Node, c: Interpreter, labels: Labels) -> None:
    dims = c.out_dims(node)
    block = reduce_to_varying(labels.reshape(dims), range(len(dims)))
    if block is None:
        c.freeze(node, labels[:1], f"the only channel left in {node.title}")
    else:
        c.set_layout(node, (block,))


def _pick(
    node: Node, c: Interpreter, labels: Labels, index: Array | None, own: int
) -> dict[int, Labels | None]:
    if node.index in c.vocabulary:
        c.lookups[node.index] = labels
        c.produce(node, labels)
        return {}
    if numbered(node, c, 1, labels):
        return {}
    if index is None:
        c.freeze(node, labels, f"{node.title} looks it up with an index computed at run time")
        return {}
    picked = labels[index]
    if index.ndim != 1:
        c.freeze(node, np.atleast_1d(picked).ravel(), f"{node.title} looks it up by number")
        return {}
    c.must_keep(node, picked)
    return {own: picked}


@rewrite("Gather")
def rewrite_gather(node: Node, r: Rewriter) -> None:
    """Positions among what is left."""
    own = node.attr("axis", 0) % len(r.dims(node, 0))
    labels, index = r.labels(node, 0, own), r.value(node, 1)
    if labels is None or r.mask(labels).all():
        return
    vocabulary = r.coupling.granularity.vocabulary
    if vocabulary is not None and node.index in r.coupling.lookups:
        r.edits.remaps[node.index] = remap(r.mask(labels), vocabulary.unknown)
        return
    if index is None:
        if is_view(node, r.shapes):
            r.replace_by_reshape(node)
        return
    new = r.positions(labels, index % labels.size)
    r.set_operand(node, 1, new.astype(index.dtype))


@rule("Tile")
def tile(node: Node, c: Interpreter) -> None:
    """x[*D], repeats -> y[*D * repeats]; an axis made of one value is as long as its users want"""
    found: dict[int, Labels | None] = {}
    for axis, (m, n) in enumerate(zip(c.dims(node, 0), c.out_dims(node), strict=True)):
        labels = c.axis(node, 0, axis)
        if labels is not None and n % m:
            c.freeze(node, labels, f"the repeats of {node.title} are computed at run time")
        elif labels is not None:
            found[axis] = np.tile(labels, n // m)
        elif m == 1 < n and c.constant(node, 1) is not None:
            found[axis] = c.system.fresh(n)
    c.set(node, found)


@rewrite("Tile")
def rewrite_tile(node: Node, r: Rewriter) -> None:
    """How often an axis of length 1 is repeated."""
    repeats = r.value(node, 1)
    if repeats is None:
        return
    after = r.out_dims_after(node)
    single = [a for a, n in enumerate(r.dims(node, 0)) if n == 1]
    changed = repeats.copy()
    changed[single] = [after[a] for a in single]
    if not np.array_equal(changed, repeats):
        r.set_operand(node, 1, changed)


@rule("Pad")
def pad(node: Node, c: Interpreter) -> None:
    """x[*D], pads -> y[*D']; padding along a prunable axis stays, negative padding cuts it"""
    rank = len(c.dims(node, 0))
    found: dict[int, Labels | None] = {}
    pads = _pads(node, c.value(node, 1), c.value(node, 3), rank)
    if pads is None or (node.input(3) and c.value(node, 3) is None):
        pads = dict.fromkeys(range(rank))
    constant = node.attr("mode", b"constant") == b"constant"
    for axis in range(rank):
        labels = c.axis(node, 0, axis)
        sides = pads.get(axis, (0, 0))
        if labels is None or sides == (0, 0):
            found[axis] = labels
        elif sides is None:
            c.freeze(node, labels, f"the padding of {node.title} is computed at run time")
        elif not constant:
            c.freeze(node, labels, f"{node.title} pads it from its own values")
        else:
            edge = -c.system.reason(node.index, f"padding of {node.title}")
            inner = labels[max(-sides[0], 0) : labels.size - max(-sides[1], 0)]
            edges = [np.full(max(n, 0), edge, np.int32) for n in sides]
            found[axis] = np.concatenate([edges[0], inner, edges[1]])
            c.must_keep(node, found[axis])
    c.set(node, found)


def _pads(
    node: Node, value: Array | None, axes: Array | None, rank: int
) -> dict[int, tuple[int, int] | None] | None:
    """What is padded before and behind each axis; None where it is computed."""
    pads = value if node.input(1) else node.attr("pads", node.attr("paddings"))
    if pads is None:
        return None
    where = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    ends = (int(v) for v in pads[len(where) :])
    return {a: (int(n), m) for a, n, m in zip(where, pads, ends, strict=False)}


@rewrite("Pad")
def rewrite_pad(node: Node, r: Rewriter) -> None:
    """Where channels are cut off, how many of those that are left."""
    rank = len(r.dims(node, 0))
    pads = _pads(node, r.value(node, 1), r.value(node, 3), rank)
    changed = False
    for axis, sides in (pads or {}).items():
        labels = r.labels(node, 0, axis)
        if sides is None or min(sides) >= 0 or labels is None or r.mask(labels).all():
            continue
        mask = r.mask(labels)
        first = sides[0] if sides[0] >= 0 else -int(mask[: -sides[0]].sum())
        last = sides[1] if sides[1] >= 0 else -int(mask[sides[1] :].sum())
        assert pads is not None
        pads[axis] = (first, last)
        changed = True
    if changed and pads is not None:
        values = [side[i] for i in (0, 1) for side in pads.values() if side is not None]
        if node.input(1):
            r.set_operand(node, 1, np.array(values, np.int64))
        else:
            r.set_attribute(node, "pads", values)
