"""What several modules do with bare protos: copy fields, look into bodies, order nodes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import onnx


def copy_fields(source: Any, target: Any, without: Iterable[str]) -> None:
    """Copy all fields but some; new versions of ONNX may add fields."""
    for descriptor, value in source.ListFields():
        if descriptor.name in without:
            continue
        if hasattr(value, "CopyFrom"):
            getattr(target, descriptor.name).CopyFrom(value)
        elif isinstance(value, (str, bytes, int, float)):
            setattr(target, descriptor.name, value)
        else:
            getattr(target, descriptor.name).extend(value)


@lru_cache(maxsize=4096)
def may_hold_graphs(domain: str, op_type: str) -> bool:
    """False for standard operators without graph attributes, which is nearly all of them."""
    try:
        schema = onnx.defs.get_schema(op_type, "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:
        return True
    kinds = (onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS)
    return any(attribute.type in kinds for attribute in schema.attributes.values())


def fresh_name(wish: str, taken: set[str]) -> str:
    """`wish`, or `wish_1`, `wish_2`, ... if that is taken; the result is taken from then on."""
    name, n = wish, 1
    while name in taken:
        name, n = f"{wish}_{n}", n + 1
    taken.add(name)
    return name


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    if not may_hold_graphs(node.domain, node.op_type):
        return
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, those that are read inside its bodies included."""
    yield from node.input
    for body in bodies(node):
        for inner in body.node:
            yield from reads(inner)
        for output in body.output:
            yield output.name


def topological_order(makes: Sequence[Sequence[str]], reads: Sequence[Sequence[str]]) -> list[int]:
    """Positions in an order in which each node comes after what it reads (Kahn, 1962).

    Node i makes the names `makes[i]` and reads `reads[i]`. Otherwise the given order stays. Nodes
    on a cycle, and behind one, are left out.
    """
    made_by = {name: i for i, names in enumerate(makes) for name in names if name}
    if _is_ordered(made_by, reads):
        return list(range(len(makes)))
    sources = [{made_by[name] for name in names if name in made_by} for names in reads]
    followers: list[list[int]] = [[] for _ in makes]
    for i, before in enumerate(sources):
        for source in before:
            followers[source].append(i)
    waiting = [len(before) for before in sources]
    ready = [i for i, count in enumerate(waiting) if not count]
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for follower in followers[i]:
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(ready, follower)
    return order


def _is_ordered(made_by: Mapping[str, int], reads: Sequence[Sequence[str]]) -> bool:
    for i, names in enumerate(reads):
        for name in names:
            if made_by.get(name, -1) >= i:
                return False
    return True
