"""What the granularity decides: heads or channels inside of them, whole experts or their width."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels

#: Votes of a factor that the granularity asks for: more than operators have.
ASKED = 1 << 16


def prefer_heads(
    node: Node, c: Interpreter, heads: Sequence[Labels | None], within: Sequence[Labels | None]
) -> None:
    """Attention heads, and the channels inside of them: the granularity says which to prune."""
    dims = c.granularity.head_dims
    chosen, others = (within, heads) if dims else (heads, within)
    for labels in chosen:
        c.prefer(labels, ASKED if dims else 1)
    if not any(v is not None and v.size > 1 and (v > 0).any() for v in heads):
        return
    for labels in chosen:
        if labels is not None:
            c.system.claim(labels)
    words = "heads stay whole; --granularity head-dim removes channels of each"
    words = "all heads stay; --granularity head removes them" if dims else words
    for labels in others:
        if labels is not None:
            c.system.reserve(labels, node.index, words)


def experts(
    node: Node, c: Interpreter, blocks: Labels | None, within: Sequence[Labels | None]
) -> None:
    """Blocks along a batch axis of a weight, and the axes that each block multiplies."""
    if blocks is None:
        return
    if c.granularity.experts:
        c.prefer(blocks, ASKED)
        c.produce(node, blocks)
        return
    for labels in within:
        c.prefer(labels)
    words = f"whole experts of {node.title} stay; --granularity expert removes them"
    c.system.reserve(blocks, node.index, words)
