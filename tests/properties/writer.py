"""Writes random graphs as ONNX text: values of three kinds, nested expressions, weights by shape.

Kinds of values: "image" [N, C, 4, 4], "tokens" [N, S, C] with a free length S, "patches"
[N, 16, C], "flat" [N, C].
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeVar

Kind = Literal["image", "tokens", "patches", "flat"]
T = TypeVar("T")
SIDE = 4
WIDTHS = (2, 4, 6, 8)
MOST = 24
RANK = {"image": 4, "tokens": 3, "patches": 3, "flat": 2}


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its name, its kind and its channels."""

    name: str
    kind: Kind
    channels: int

    def __str__(self) -> str:
        return self.name

    @property
    def axis(self) -> int:
        """The axis of its channels."""
        return 2 if self.rank == 3 else 1

    @property
    def rank(self) -> int:
        """The number of axes."""
        return RANK[self.kind]


@dataclass
class Writer:
    """Nodes, weights and live values so far."""

    rng: random.Random
    opset: int
    lines: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    quantized: list[str] = field(default_factory=list)
    live: list[Value] = field(default_factory=list)
    count: int = 0

    # -- choices -----------------------------------------------------------------------------------

    def choose(self, options: Sequence[T]) -> T:
        """One of the options."""
        return self.rng.choice(options)

    def flip(self) -> bool:
        """True or false."""
        return self.rng.random() < 0.5

    def integer(self, low: int, high: int) -> int:
        """A number from low to high."""
        return self.rng.randint(low, high)

    def permutation(self, count: int) -> list[int]:
        """The numbers below `count` in any order."""
        return self.rng.sample(range(count), count)

    def width(self) -> int:
        """A small number of channels."""
        return self.choose(WIDTHS)

    def pick(self, *kinds: Kind, channels: int | None = None) -> Value | None:
        """Any live value of these kinds, of so many channels; None where there is none."""
        found = [
            v
            for v in self.live
            if (not kinds or v.kind in kinds) and channels in (None, v.channels)
        ]
        if not found:
            return None
        return self.choose(found[-3:] if self.flip() else found)

    # -- writing -----------------------------------------------------------------------------------

    def leaves(self) -> list[Value]:
        """Live values that nothing reads."""
        words = set(re.findall(r"\w+", " ".join(line.partition("=")[2] for line in self.lines)))
        return [v for v in self.live if v.name not in words]

    def name(self, kind: str) -> str:
        """A new name."""
        self.count += 1
        return f"{kind}{self.count}"

    def weight(self, *dims: int, kind: str = "w") -> str:
        """A new float weight; of kind "var" it is positive."""
        name = self.name(kind)
        self.weights.append(f"{name}:{','.join(map(str, dims))}")
        return name

    def numbers(self, *values: int) -> str:
        """A new int64 constant."""
        name = self.name("i")
        self.weights.append(f"{name}={','.join(map(str, values))}")
        return name

    def scalar(self, value: int) -> str:
        """A new int64 scalar."""
        return self.emit(f"Constant<value_int={value}>()")[0]

    def flags(self, *values: bool) -> str:
        """A new constant of booleans."""
        name = self.name("f")
        self.weights.append(f"{name}?{','.join(str(int(v)) for v in values)}")
        return name

    def emit(self, expression: str, outputs: int = 1, *, last: str = "") -> list[str]:
        """Nodes for a nested expression, "Add(Relu(x), w)"; the names of the outer one's results.

        `last` comes behind the outer call: the bodies of control flow.
        """
        op, arguments = _parse(expression.strip())
        inputs = [a if "(" not in a else self.emit(a)[0] for a in arguments]
        op, inputs = self._as_attribute(op, inputs)
        names = [self.name("v") for _ in range(outputs)]
        self.lines.append(f"{', '.join(names)} = {op}({', '.join(inputs)}){last}")
        return names

    def _as_attribute(self, op: str, inputs: list[str]) -> tuple[str, list[str]]:
        """Before operator set 13, axes and sizes that later became inputs."""
        name, _, rest = op.partition("<")
        attribute = {"Squeeze": "axes", "Unsqueeze": "axes", "Split": "split"}.get(name)
        if self.opset >= 13 or attribute is None or len(inputs) < 2:
            return op, inputs
        values = next(w for w in self.weights if w.startswith(f"{inputs[1]}=")).partition("=")[2]
        return f"{name}<{attribute}=[{values}]{', ' + rest if rest else '>'}", inputs[:1]

    def put(self, kind: Kind, channels: int, expression: str) -> Value:
        """A live value made by an expression."""
        value = Value(self.emit(expression)[0], kind, channels)
        self.live.append(value)
        return value

    def same(self, x: Value, expression: str) -> Value:
        """A live value of the shape of x."""
        return self.put(x.kind, x.channels, expression)

    def reduce(self, op: str, x: str, axes: Sequence[int], *, keep: bool = True) -> str:
        """A reduction, its axes an attribute or an input, as the operator set has it."""
        kept = f"keepdims={int(keep)}"
        since = 13 if op == "ReduceSum" else 18
        if self.opset < since:
            return f"{op}<axes=[{','.join(map(str, axes))}], {kept}>({x})"
        return f"{op}<{kept}>({x}, {self.numbers(*axes)})"

    def row(self, x: Value, kind: str = "w") -> str:
        """A weight with one number for each channel of x, ready to broadcast."""
        if x.kind == "image":
            dims = self.choose(((x.channels, 1, 1), (1, x.channels, 1, 1)))
        else:
            dims = self.choose(((x.channels,), (1, x.channels)))
        return self.weight(*dims, kind=kind)


def _parse(text: str) -> tuple[str, list[str]]:
    """The operator with its attributes, and its arguments."""
    places = [(letter, depth) for letter, depth in zip(text, _depths(text), strict=True)]
    start = places.index(("(", 0))
    inner = text[start + 1 : -1]
    cuts = [i for i, place in enumerate(places) if place == (",", 1) and i > start]
    edges = [start, *cuts, len(text) - 1]
    arguments = [text[a + 1 : b].strip() for a, b in pairwise(edges)]
    return text[:start], arguments if inner.strip() else []


def _depths(text: str) -> list[int]:
    """How many brackets are open before each letter; an arrow is none."""
    depths, depth = [], 0
    for i, letter in enumerate(text):
        depths.append(depth)
        if letter in "<([" or (letter in ")]" or (letter == ">" and text[i - 1] != "-")):
            depth += 1 if letter in "<([" else -1
    return depths
