"""What several modules do with bare protos: copy fields, look into bodies, order nodes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
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


def topological_order(
    nodes: Sequence[onnx.NodeProto], read: Callable[[onnx.NodeProto], Iterable[str]]
) -> list[int]:
    """Positions in an order in which each node comes after what it reads (Kahn, 1962).

    Otherwise the given order stays. Nodes on a cycle, and behind one, are left out.
    """
    made_by = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    sources = [{made_by[name] for name in read(node) if name in made_by} for node in nodes]
    if all(max(before, default=-1) < i for i, before in enumerate(sources)):
        return list(range(len(nodes)))
    followers: list[list[int]] = [[] for _ in nodes]
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
