"""How operators that move values without computing carry facts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.facts import Fact, Facts, exactly, fact_rule
from onnxprune.graph import Node
from onnxprune.labels import runs
from onnxprune.ops.indexing import slice_bounds


@fact_rule("Identity", "Dropout", "Cast", "CastLike")
def carry(node: Node, facts: Facts) -> Fact | None:
    """x[*D] -> y[*D]"""
    trains = node.op_type == "Dropout" and (node.attr("is_test", 1) == 0 or node.input(2))
    return None if trains else facts.input(node, 0)


@fact_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Node, facts: Facts) -> Fact | None:
    """x[*D] -> y[*D'], the same elements in row-major order"""
    before, after = facts.dims(node, 0), facts.out_dims(node)
    x = facts.input(node, 0)
    parts = runs(before, after)
    handled = {a for inner, _ in parts for a in inner}
    if any(n > 1 and a not in handled for a, n in enumerate(x.low.shape)):
        x = x.over([a for a in range(x.rank) if a not in handled])
    shape, spread = [1] * len(after), list(x.low.shape)
    for inner, outer in parts:
        if all(x.low.shape[a] == 1 for a in inner):
            continue
        if len(inner) == len(outer) == 1:
            shape[outer[0]] = before[inner[0]]
        elif all(facts.is_fixed(node, 0, a) for a in inner):
            for axis in inner:
                spread[axis] = before[axis]
            for axis in outer:
                shape[axis] = after[axis]
        else:
            x = x.over(inner)
            for axis in inner:
                spread[axis] = 1
    return x.map(lambda v: np.broadcast_to(v, spread).reshape(shape))


@fact_rule("Transpose")
def transpose(node: Node, facts: Facts) -> Fact:
    """x[*D] -> y[*D[perm]]"""
    perm = node.attr("perm") or None
    return facts.input(node, 0).map(lambda v: np.transpose(v, perm))


@fact_rule("Expand")
def expand(node: Node, facts: Facts) -> Fact:
    """x[*D], shape -> y[*broadcast(D, shape)]"""
    rank = len(facts.out_dims(node))
    return facts.input(node, 0).map(lambda v: v.reshape((1,) * (rank - v.ndim) + v.shape))


@fact_rule("Concat")
def concat(node: Node, facts: Facts) -> Fact:
    """x1[*D], x2[*D'], ... -> y, joined along one axis"""
    rank = len(facts.out_dims(node))
    own = node.attr("axis") % rank
    fixed = all(facts.is_fixed(node, s, own) for s in range(len(node.inputs)))
    parts = []
    for slot in range(len(node.inputs)):
        x = facts.input(node, slot)
        parts.append(x.full(own, facts.dims(node, slot)[own]) if fixed else x.over((own,)))
    rest = [max(p.low.shape[a] for p in parts) for a in range(rank)]
    parts = [
        p.map(lambda v: np.broadcast_to(v, [*rest[:own], v.shape[own], *rest[own + 1 :]]))
        for p in parts
    ]
    if fixed:
        low, high = (np.concatenate([getattr(p, e) for p in parts], own) for e in ("low", "high"))
        return Fact(low, high)
    low = np.minimum.reduce([p.low for p in parts])
    return Fact(low, np.maximum.reduce([p.high for p in parts]))


@fact_rule("Split")
def split(node: Node, facts: Facts) -> Sequence[Fact | None]:
    """x[*D] -> parts along one axis"""
    x = facts.input(node, 0)
    own = node.attr("axis", 0) % x.rank
    sizes = [facts.out_dims(node, i)[own] if n else 0 for i, n in enumerate(node.outputs)]
    known = sum(sizes) == facts.dims(node, 0)[own] and facts.is_fixed(node, 0, own)
    if x.low.shape[own] == 1 or not known:
        return [x.over((own,))] * len(sizes)
    edges = np.cumsum([0, *sizes])
    return [
        x.map(lambda v, i=i: np.take(v, range(edges[i], edges[i + 1]), own))  # type: ignore[misc]
        for i in range(len(sizes))
    ]


@fact_rule("Slice")
def slice_(node: Node, facts: Facts) -> Fact:
    """x[*D], starts, ends, axes, steps -> y[*D']"""
    x = facts.input(node, 0)
    bounds = slice_bounds(node, [facts.value(node, s) for s in range(1, 5)], x.rank)
    if bounds is None:
        return x.over(range(x.rank))
    for axis, cut in bounds.items():
        if x.low.shape[axis] == 1:
            continue
        where = tuple(cut if a == axis else slice(None) for a in range(x.rank))
        x = x.map(lambda v, where=where: v[where])  # type: ignore[misc]
    return x


@fact_rule("Gather")
def gather(node: Node, facts: Facts) -> Fact:
    """x[*A, n, *B], index[*I] -> y[*A, *I, *B]"""
    x, index = facts.input(node, 0), facts.value(node, 1)
    own = node.attr("axis", 0) % x.rank
    if index is None or x.low.shape[own] == 1:
        extra = len(facts.dims(node, 1))
        x = x.over((own,))
        shape = (*x.low.shape[:own], *(1,) * extra, *x.low.shape[own + 1 :])
        return x.map(lambda v: v.reshape(shape))
    return x.map(lambda v: np.take(v, index, own))


@fact_rule("Tile")
def tile(node: Node, facts: Facts) -> Fact:
    """x[*D], repeats -> y[*D * repeats]"""
    x = facts.input(node, 0)
    times = [n // m for m, n in zip(facts.dims(node, 0), facts.out_dims(node), strict=True)]
    fixed = all(t == 1 or facts.is_fixed(node, 0, a) for a, t in enumerate(times))
    if not fixed or facts.value(node, 1) is None:
        return x.over(range(x.rank))
    return x.map(
        lambda v: np.tile(v, [t if n > 1 else 1 for t, n in zip(times, v.shape, strict=True)])
    )


@fact_rule("Pad")
def pad(node: Node, facts: Facts) -> Fact:
    """x[*D], pads -> y[*D']"""
    x = facts.input(node, 0)
    changed = [
        a
        for a, (m, n) in enumerate(zip(facts.dims(node, 0), facts.out_dims(node), strict=True))
        if m != n
    ]
    pads = node.attr("pads") if not node.input(1) else facts.value(node, 1)
    if pads is None:
        changed = list(range(x.rank))
    elif not node.input(3):
        changed = [a for a in range(x.rank) if pads[a] or pads[a + x.rank]]
    y = x.over(changed)
    if not changed or node.attr("mode", b"constant") != b"constant":
        return y
    value = facts.input(node, 2) if node.input(2) else exactly(np.asarray(node.attr("value", 0.0)))
    low, high = float(value.low.min(initial=np.inf)), float(value.high.max(initial=-np.inf))
    return Fact(np.minimum(y.low, low), np.maximum(y.high, high))


@fact_rule("DepthToSpace")
def depth_to_space(node: Node, facts: Facts) -> Fact:
    """x[N, C*b*b, H, W] -> y[N, C, H*b, W*b]"""
    x, block = facts.input(node, 0).over((0, 2, 3)), node.attr("blocksize") ** 2
    if x.low.shape[1] == 1:
        return x
    crd = node.attr("mode", b"DCR") == b"CRD"
    shape, axis = ((-1, block), 1) if crd else ((block, -1), 0)
    low, high = x.low.reshape(shape).min(axis=axis), x.high.reshape(shape).max(axis=axis)
    return Fact(low.reshape(1, -1, 1, 1), high.reshape(1, -1, 1, 1))


@fact_rule("SpaceToDepth")
def space_to_depth(node: Node, facts: Facts) -> Fact:
    """x[N, C, H*b, W*b] -> y[N, b*b*C, H, W]"""
    x = facts.input(node, 0).over((0, 2, 3))
    times = node.attr("blocksize") ** 2 if x.low.shape[1] > 1 else 1
    return x.map(lambda v: np.tile(v, (1, times, 1, 1)))


@fact_rule("Resize", "Upsample")
def resize(node: Node, facts: Facts) -> Fact | None:
    """x[*D] -> y[*D']; interpolation stays inside the bounds, cubic only on constants"""
    x = facts.input(node, 0)
    if node.attr("coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
        return None
    pairs = enumerate(zip(facts.dims(node, 0), facts.out_dims(node), strict=True))
    y = x.over([a for a, (m, n) in pairs if m != n])
    if node.attr("mode", b"nearest") == b"cubic":
        return Fact(np.where(y.constant, y.low, -np.inf), np.where(y.constant, y.high, np.inf))
    return y


@fact_rule("ConstantOfShape")
def constant_of_shape(node: Node, facts: Facts) -> Fact:
    """shape -> y[*shape], one value everywhere"""
    from onnx import numpy_helper

    tensor = node.attr("value")
    value = float(numpy_helper.to_array(tensor).ravel()[0]) if tensor is not None else 0.0
    return exactly(np.full((1,) * len(facts.out_dims(node)), value))
