"""Operators that move labels between axes without touching values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.coupling import Interpreter, Origin, Shuffle
from onnxprune.graph import Node
from onnxprune.labels import (
    Block,
    Labels,
    Layout,
    compress,
    reduce_to_varying,
    repeat,
    runs,
)
from onnxprune.operator_shapes import Dims
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter

#: Above this many labels a reshape is not followed (only reached by flattening whole feature maps).
SPREAD_LIMIT = 1 << 24
SIMULATION_LIMIT = 1 << 22
#: Operators that a chain of moves is made of; others in it treat all elements alike.
MOVES = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"))


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Node, c: Interpreter) -> None:
    """x[*D] -> y[*D'], the same elements in row-major order"""
    before, after = c.dims(node, 0), c.out_dims(node)
    layout = c.layout(node, 0)
    if not layout:
        return
    parts = runs(before, after)
    single = {i[0]: o[0] for i, o in parts if len(i) == len(o) == 1}
    layout = _settle_torn(node, c, layout, parts, single)
    found: list[Block] = []
    for block in layout:
        if all(a in single for a in block.axes):
            axes = tuple(single[a] for a in block.axes)
            found.append(Block(axes, block.labels, _carried(node, block)))
    for inner, outer in parts:
        if len(inner) > 1 or len(outer) > 1:
            found += _regroup(node, c, layout, before, after, inner, outer)
    c.set_layout(node, tuple(found))


def _carried(node: Node, block: Block) -> Origin | None:
    origin: Origin | None = block.origin
    return None if origin is None else origin.through(node)


def _settle_torn(
    node: Node,
    c: Interpreter,
    layout: Layout,
    parts: Sequence[tuple[list[int], list[int]]],
    single: dict[int, int],
) -> Layout:
    """Joint blocks survive where all their axes stay single, or all fall into one run."""
    kept: list[Block] = []
    for block in layout:
        whole = all(a in single for a in block.axes)
        together = any(set(block.axes) <= set(inner) for inner, _ in parts)
        if not block.joint or whole or together:
            kept.append(block)
        else:
            kept += [Block((a,), v) for a, v in c.settle(block, node).items()]
    return tuple(kept)


def _regroup(
    node: Node,
    c: Interpreter,
    layout: Layout,
    before: Dims,
    after: Dims,
    inner: list[int],
    outer: list[int],
) -> Layout:
    blocks = [b for b in layout if set(b.axes) <= set(inner)]
    if not blocks:
        return ()
    lengths = [before[a] for a in inner]
    if np.prod(lengths) > SPREAD_LIMIT:
        for block in blocks:
            c.freeze(node, block.labels, f"{node.title} spreads it over too many elements")
        return ()
    block = blocks[0] if len(blocks) == 1 else _combine(node, c, blocks)
    shape = [before[a] if a in block.axes else 1 for a in inner]
    spread = np.broadcast_to(block.labels.reshape(shape), lengths)
    labels = spread.reshape([after[a] for a in outer])
    result = reduce_to_varying(labels, outer)
    if result is None:
        c.freeze(node, block.labels.ravel()[:1], f"the only channel left in {node.title}")
        return ()
    if block.joint and not result.joint:
        return _close(node, c, block, result)
    if result.joint:
        origin = _carried(node, block)
        if not block.joint:
            origin = Origin(node.inputs[0], block.axes[0], block.labels, (node.index,))
        return (Block(result.axes, result.labels, origin),)
    return (result,)


def _combine(node: Node, c: Interpreter, blocks: Sequence[Block]) -> Block:
    """One block for several: an element goes where any of its factors goes."""
    parts: dict[int, Labels] = {}
    for block in blocks:
        if block.joint:
            parts.update(c.settle(block, node))
        else:
            parts[block.axes[0]] = block.labels
    live = {a: v for a, v in sorted(parts.items()) if (v > 0).any()}
    if len(live) <= 1:
        axis, labels = next(iter(live.items()), next(iter(parts.items())))
        return Block((axis,), labels)
    factors, lengths = zip(*(compress(v) for v in live.values()), strict=True)
    labels = c.system.fresh(*(v.size for v in factors))
    c.factor(node, labels, factors)
    block = Block(tuple(live), repeat(labels, [n for (n,) in lengths]))
    c.settled[id(block)] = (block, live)
    return block


def _close(node: Node, c: Interpreter, block: Block, result: Block) -> Layout:
    """A split axis is merged again: if the chain only permuted it, it needs no common factor."""
    if block.origin is None:
        c.settle(block, node)
        return (result,)
    origin: Origin = block.origin
    chain = (*origin.chain, node.index)
    permutation = _permutation(c, origin, chain, result.axes[0])
    if permutation is None:
        c.settle(block, node)
        return (result,)
    target = node.outputs[0]
    c.shuffles.append(Shuffle(origin.tensor, origin.axis, permutation, block.labels, target, chain))
    return (result,)


def _permutation(
    c: Interpreter, origin: Origin, chain: tuple[int, ...], axis: int
) -> Labels | None:
    """How the chain permutes `axis`; None where it does more, or others look in between."""
    source = c.shapes.dims(origin.tensor)
    target = c.shapes.dims(c.graph.nodes[chain[-1]].outputs[0])
    if (
        source is None
        or source != target
        or axis != origin.axis
        or np.prod(source) > SIMULATION_LIMIT
    ):
        return None
    for index in chain[:-1]:
        name = c.graph.nodes[index].outputs[0]
        if len(c.graph.uses.get(name, ())) != 1 or name in c.graph.outputs:
            return None
    index_map = np.arange(np.prod(source), dtype=np.int32).reshape(source)
    moved = index_map
    for i in chain:
        node = c.graph.nodes[i]
        if node.op_type == "Transpose":
            moved = np.transpose(moved, node.attr("perm"))
        elif node.op_type in MOVES:
            moved = moved.reshape(c.shapes.dims(node.outputs[0]) or ())
    stride = int(np.prod(source[axis + 1 :]))
    row = moved[tuple(slice(None) if a == axis else 0 for a in range(moved.ndim))]
    permutation = row // stride
    return (
        permutation if np.array_equal(np.take(index_map, permutation, axis=axis), moved) else None
    )


@rewrite("Reshape")
def rewrite_reshape(node: Node, r: Rewriter) -> None:
    """Target lengths of axes that were pruned; a shuffle whose halves differ becomes a Gather."""
    shuffle = r.shuffle(node)
    if shuffle is not None and not r.is_product(shuffle.joint):
        labels = r.layout_labels(shuffle.source, shuffle.axis)
        assert labels is not None
        index = r.positions(labels, shuffle.labels, only_kept=True)
        moves = [n for i in shuffle.chain if (n := r.node(i)).op_type in MOVES]
        if len(moves) == len(shuffle.chain):
            r.replace_by_gather(node, shuffle.axis, index, source=shuffle.source)
        else:  # what lies between the moves treats all channels alike: it may follow the Gather
            r.hoist_gather(shuffle.chain, moves, shuffle.axis, index)
        return
    if node.input(1):
        r.rewrite_shape(node, 1, None, reshape=True)
    elif node.attr("shape") is not None:
        old = list(node.attr("shape"))
        new = r.new_target(node, old, None, reshape=True)
        if new != old:
            r.set_attribute(node, "shape", new)


@rule("Transpose")
def transpose(node: Node, c: Interpreter) -> None:
    """x[*D] -> y[*D[perm]]"""
    rank = len(c.dims(node, 0))
    perm = node.attr("perm") or list(range(rank))[::-1]
    place = {old: new for new, old in enumerate(perm)}
    found = []
    for block in c.layout(node, 0):
        axes = [place[a] for a in block.axes]
        order = np.argsort(axes)
        labels = np.transpose(block.labels, order) if block.joint else block.labels
        found.append(Block(tuple(sorted(axes)), labels, _carried(node, block)))
    c.set_layout(node, tuple(found))


@rule("Expand")
def expand(node: Node, c: Interpreter) -> None:
    """x[*D], shape -> y[*broadcast(D, shape)]; a repeated axis is as long as its users want"""
    before, after = c.dims(node, 0), c.out_dims(node)
    shift = len(after) - len(before)
    found: dict[int, Labels | None] = {}
    for axis, length in enumerate(after):
        own = axis - shift
        if own >= 0 and before[own] == length:
            found[axis] = c.axis(node, 0, own)
        elif length > 1 and c.shapes.is_fixed(node.outputs[0], axis):
            found[axis] = c.system.fresh(length)
    c.set(node, found)


@rule("ConstantOfShape")
def constant_of_shape(node: Node, c: Interpreter) -> None:
    """shape -> y[*shape], one value everywhere"""
    fixed = (a for a, n in enumerate(c.out_dims(node)) if 1 < n <= 1 << 16)
    c.set(
        node,
        {
            a: c.system.fresh(c.out_dims(node)[a])
            for a in fixed
            if c.shapes.is_fixed(node.outputs[0], a)
        },
    )


@rewrite("Expand")
def rewrite_expand(node: Node, r: Rewriter) -> None:
    """Sizes of axes that were pruned."""
    r.rewrite_shape(node, 1, None)


@rewrite("ConstantOfShape")
def rewrite_constant_of_shape(node: Node, r: Rewriter) -> None:
    """Sizes of axes that were pruned."""
    r.rewrite_shape(node, 0, None)
