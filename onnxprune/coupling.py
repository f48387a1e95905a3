"""One pass over the graph that labels every axis and ties what must be pruned together.

Each operator's rule (onnxprune.ops) reads the labels of its inputs, ties some, freezes some with a
reason, and names the labels of its outputs. What remains connected by ties is a *unit*: the set of
indices over all tensors that are removed together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.granularity import HEADS, Granularity
from onnxprune.graph import Body, Constant, Graph, Node
from onnxprune.labels import Block, Factor, Labels, Layout, Solution, System, compress
from onnxprune.operator_shapes import Dims
from onnxprune.shapes import Shapes

Array = NDArray[Any]
#: Why channels must stay that meet positions, or what was given up long before.
NO_CHANNELS = "lines up in {} with an axis that holds no channels"
Use = tuple[int, int]
#: From a weight as it is stored to the numbers that it stands for; labelled axes stay in place.
Decoder = Callable[[Array], Array]
#: Labels that a shape value's elements depend on, one tuple per element.
Lengths = tuple[tuple[Labels, ...], ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """A weighted operator: `macs`, times the surviving share of each label vector in `axes`.

    `weight` is the input slot of its main weight, -1 for products of activations.
    """

    node: int
    weight: int
    macs: float
    axes: tuple[Labels, ...]


@dataclass(frozen=True, eq=False)
class Contraction:
    """Input `slot` of node `node` is summed over `axis`: zeros there equal removal there.

    `zero` is the input slot of the zero point of a quantized input, -1 where a zero is 0.
    """

    node: int
    slot: int
    axis: int
    labels: Labels
    zero: int = -1


@dataclass(frozen=True, eq=False)
class Statistic:
    """Node `node` computes over `labels` what a zero changes: a mean, a maximum, a softmax."""

    node: int
    labels: Labels


@dataclass(frozen=True, eq=False)
class Shuffle:
    """A chain from `source` to `target` that permutes one axis.

    Removable indices need not be a product of factors: a Gather can replace the chain.
    """

    source: str
    axis: int
    labels: Labels
    joint: Labels
    target: str
    chain: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Pin:
    """Input `slot` of node `node` is a length of axes with `labels`; it keeps its old value."""

    node: int
    slot: int
    labels: Labels


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a joint pair of axes came from: tensor before the split, its axis, nodes since."""

    tensor: str
    axis: int
    labels: Labels
    chain: tuple[int, ...]

    def through(self, node: Node) -> Origin:
        """The same origin, one node further."""
        return Origin(self.tensor, self.axis, self.labels, (*self.chain, node.index))


@dataclass(frozen=True)
class Coupling:
    """The result of the interpretation, immutable."""

    graph: Graph
    shapes: Shapes
    solution: Solution
    system: System
    layouts: Mapping[str, Layout]
    constants: Mapping[str, Mapping[Use, Layout]]
    layers: tuple[Layer, ...]
    contractions: tuple[Contraction, ...]
    statistics: tuple[Statistic, ...]
    products: tuple[tuple[int, Labels], ...]
    shuffles: tuple[Shuffle, ...]
    pins: tuple[Pin, ...]
    lengths: Mapping[str, Lengths]
    aliases: Mapping[str, str]
    settled: Mapping[int, tuple[Block, dict[int, Labels]]]
    notes: Mapping[int, Labels]
    keepers: tuple[Labels, ...]
    quotas: tuple[tuple[Labels, int], ...]
    numbers: Mapping[str, Labels]
    lookups: Mapping[int, Labels]
    granularity: Granularity
    interpreted: frozenset[int]
    taken: Mapping[int, Body]
    decoders: Mapping[str, Decoder]


@dataclass
class Interpreter:
    """The state of the pass, and what rules may do to it."""

    graph: Graph
    shapes: Shapes
    granularity: Granularity = HEADS
    system: System = field(default_factory=System)
    layouts: dict[str, Layout] = field(default_factory=dict)
    constants: dict[str, dict[Use, dict[int, Labels]]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    products: list[tuple[int, Labels]] = field(default_factory=list)
    shuffles: list[Shuffle] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    settled: dict[int, tuple[Block, dict[int, Labels]]] = field(default_factory=dict)
    notes: dict[int, Labels] = field(default_factory=dict)
    keepers: list[Labels] = field(default_factory=list)
    decoders: dict[str, Decoder] = field(default_factory=dict)
    quotas: list[tuple[Labels, int]] = field(default_factory=list)
    numbers: dict[str, Labels] = field(default_factory=dict)
    lookups: dict[int, Labels] = field(default_factory=dict)
    vocabulary: frozenset[int] = frozenset()
    interpreted: set[int] = field(default_factory=set)
    taken: dict[int, Body] = field(default_factory=dict)
    static: set[str] = field(default_factory=set)
    touched: set[tuple[int, int]] = field(default_factory=set)
    repeats: float = 1.0
    lost: dict[str, dict[int, int]] = field(default_factory=dict)
    _frozen_here: dict[int, int] = field(default_factory=dict)
    _blank: str = ""
    _factors: dict[tuple[int, int], list[Factor]] = field(default_factory=dict)

    # -- around a rule -----------------------------------------------------------------------------

    def begin(self, node: Node) -> None:
        """A rule is about to look at `node`."""
        self.touched, self._blank, self._frozen_here = set(), "", {}
        self.interpreted.add(node.index)
        if not node.bodies and all(
            not name or self.is_static(node, slot) for slot, name in enumerate(node.inputs)
        ):
            self.static.update(node.outputs)

    def finish(self, node: Node) -> None:
        """What the rule of `node` did not look at must stay."""
        for slot, name in enumerate(node.inputs):
            for block in self.layouts.get(name, ()):
                if not all((slot, a) in self.touched for a in block.axes):
                    words = f"{node.title} does not pass this axis on"
                    why = self.system.freeze(block.labels, node.index, words)
                    if self.shapes.types.get(name) in _FLOAT_TYPES:
                        self._frozen_here[block.labels.size] = why
        self.lose(node)

    def lose(self, node: Node) -> None:
        """Remember, by length, why axes of the outputs of `node` have no labels any more."""
        found: dict[int, int] = {}
        for name in node.inputs if self.lost else ():
            found |= self.lost.get(name, {})
        found |= self._frozen_here
        self._frozen_here = {}
        for name in node.outputs if found else ():
            kept = {b.labels.size for b in self.layouts.get(name, ())}
            lengths = set(self.shapes.dims(name) or ()) - kept
            rest = {n: why for n, why in found.items() if n in lengths}
            if rest:
                self.lost[name] = rest

    def is_static(self, node: Node, slot: int) -> bool:
        """Whether input `slot` is a constant or computed from constants alone."""
        return self.constant(node, slot) is not None or node.input(slot) in self.static

    # -- reading -----------------------------------------------------------------------------------

    def dims(self, node: Node, slot: int) -> Dims:
        """The shape of input `slot`; empty where the input is absent or unknown."""
        return self.shapes.dims(node.input(slot)) or ()

    def out_dims(self, node: Node, index: int = 0) -> Dims:
        """The shape of output `index`; empty where it is absent or unknown."""
        name = node.outputs[index] if index < len(node.outputs) else ""
        return self.shapes.dims(name) or ()

    def value(self, node: Node, slot: int) -> Array | None:
        """The folded value of input `slot` where it is the same for every input size."""
        name = node.input(slot)
        return self.shapes.value(name) if name and self.shapes.is_fixed_value(name) else None

    def constant(self, node: Node, slot: int) -> Constant | None:
        """The constant in input `slot`, also through Identity; None for activations."""
        name = node.input(slot)
        return self.graph.constants.get(self.aliases.get(name, name))

    def axis(self, node: Node, slot: int, axis: int) -> Labels | None:
        """The labels of one axis of input `slot`; None where it cannot be pruned (all settled)."""
        dims = self.dims(node, slot)
        axis = axis % len(dims) if dims else axis
        self.touched.add((slot, axis))
        constant = self.constant(node, slot)
        if constant is not None:
            return self._constant_axis(constant, node, slot, axis)
        for block in self.layouts.get(node.input(slot), ()):
            if axis in block.axes:
                if not block.joint:
                    return block.labels
                return self.settle(block, node)[axis]
        self._blank = node.input(slot)
        return None

    def layout(self, node: Node, slot: int) -> Layout:
        """All labels of input `slot`, joint blocks included."""
        constant = self.constant(node, slot)
        if constant is None:
            layout = self.layouts.get(node.input(slot), ())
            self.touched.update((slot, a) for block in layout for a in block.axes)
            return layout
        axes = (a for a, n in enumerate(constant.dims) if n > 1)
        found = ((a, self._constant_axis(constant, node, slot, a)) for a in axes)
        return tuple(Block((a,), labels) for a, labels in found if labels is not None)

    def _constant_axis(self, constant: Constant, node: Node, slot: int, axis: int) -> Labels | None:
        if (
            axis >= len(constant.dims)
            or constant.dims[axis] <= 1
            or constant.name in self.graph.leaving
        ):
            return None
        own = self.constants.setdefault(constant.name, {})
        key = (node.index, slot)
        if not constant.is_vector and own:
            shared = next(iter(own.values()))
            own.setdefault(key, shared)
        labels = own.setdefault(key, {})
        if axis not in labels:
            labels[axis] = self.system.fresh(constant.dims[axis])
        return labels[axis]

    # -- stating facts -----------------------------------------------------------------------------

    def set(self, node: Node, axes: Mapping[int, Labels | None], index: int = 0) -> None:
        """Output `index` carries these labels on these axes; its other axes cannot be pruned."""
        if index >= len(node.outputs) or not node.outputs[index]:
            return
        rank = len(self.out_dims(node, index))
        dims = self.out_dims(node, index)
        blocks = [
            Block((a % rank,), labels)
            for a, labels in axes.items()
            if labels is not None and labels.size == dims[a % rank] and labels.size > 1
        ]
        self.set_layout(node, tuple(blocks), index)

    def set_layout(self, node: Node, layout: Layout, index: int = 0) -> None:
        """Output `index` carries this layout."""
        if layout:
            self.layouts[node.outputs[index]] = layout

    def tie(self, node: Node, a: Labels | None, b: Labels | None) -> None:
        """Labels a[i] and b[i] are removed together; None is an axis that cannot be pruned."""
        if a is None and b is None:
            return
        if a is None or b is None:
            labels = a if b is None else b
            assert labels is not None
            why = self.lost.get(self._blank, {}).get(labels.size)
            number = why or self.system.reason(node.index, NO_CHANNELS.format(node.title))
            self.system.freeze_for(labels, number)
            return
        if a.size != b.size:
            self.freeze(node, a, f"lengths {a.size} and {b.size} do not agree in {node.title}")
            self.freeze(node, b, f"lengths {a.size} and {b.size} do not agree in {node.title}")
            return
        self.system.tie(a, b, node.index, NO_CHANNELS.format(node.title))

    def freeze(self, node: Node, labels: Labels | None, words: str) -> None:
        """These labels must stay, because of `words`."""
        if labels is not None:
            why = self.system.freeze(labels, node.index, words)
            self._frozen_here |= {labels.size: why} if (labels > 0).any() else {}

    def inexact(self, node: Node, labels: Labels | None, words: str) -> None:
        """Removing these labels is another function than zeroing them, because of `words`."""
        if labels is not None:
            self.system.inexact(labels, node.index, words)
            self.statistics.append(Statistic(node.index, labels))

    def prefer(self, labels: Labels | None, weight: int = 1) -> None:
        """Where a product axis must choose one of its factors, choose the one with these labels."""
        if labels is not None:
            self.system.prefer(labels, weight)

    def contract(self, node: Node, slot: int, axis: int, zero: int = -1) -> Labels | None:
        """Input `slot` is summed over `axis`; input `zero` holds what counts as zero there."""
        labels = self.axis(node, slot, axis)
        if labels is not None:
            dims = self.dims(node, slot)
            self.contractions.append(Contraction(node.index, slot, axis % len(dims), labels, zero))
        return labels

    def layer(self, node: Node, weight: int, macs: float, *axes: Labels | None) -> None:
        """The node does `macs` multiply-adds at full width, shrinking with each of `axes`."""
        found = tuple(a for a in axes if a is not None)
        self.layers.append(Layer(node.index, weight, macs * self.repeats, found))

    def produce(self, node: Node, labels: Labels | None) -> None:
        """The node makes these channels: they are one layer's width."""
        if labels is not None:
            self.products.append((node.index, labels))

    def must_keep_several(self, labels: Labels | None, count: int) -> None:
        """At least `count` of these labels have to survive."""
        if labels is not None:
            self.quotas.append((labels, count))

    def must_keep(self, node: Node, labels: Labels | None) -> None:
        """At least one of these labels has to survive, or an empty tensor would arise."""
        if labels is not None and labels.size == 1:
            self.freeze(node, labels, f"the only channel in a part of {node.title}")
        elif labels is not None:
            self.keepers.append(labels)

    def decode(self, node: Node, slot: int, decoder: Decoder) -> None:
        """The weight in input `slot` is quantized: how importance is to read it."""
        constant = self.constant(node, slot)
        if constant is not None:
            self.decoders.setdefault(constant.name, decoder)

    def keep_labels(self, node: Node, labels: Labels) -> None:
        """Hand labels to the node's rewrite."""
        self.notes[node.index] = labels

    def factor(self, node: Node, labels: Labels, factors: Sequence[Labels]) -> None:
        """labels[i, j] is removed exactly where factors[0][i] or factors[1][j] is."""
        factor = Factor(labels, tuple(factors), node.index)
        self.system.factors.append(factor)
        self._factors.setdefault((int(labels.max()), labels.size), []).append(factor)

    def settle(self, block: Block, node: Node) -> dict[int, Labels]:
        """Separate labels for each axis of a jointly labelled block, related to it by a factor."""
        known = self.settled.get(id(block))
        if known is None:
            labels, lengths = compress(block.labels)
            factors = self._factors_of(labels)
            if factors is None:
                factors = [self.system.fresh(n) for n in labels.shape]
                self.factor(node, labels, factors)
            spread = (np.repeat(f, n) for f, n in zip(factors, lengths, strict=True))
            known = (block, dict(zip(block.axes, spread, strict=True)))
            self.settled[id(block)] = known
        return known[1]

    def _factors_of(self, labels: Labels) -> list[Labels] | None:
        """The factors of these labels where another tensor, maybe transposed, has them already."""
        key = (int(labels.max()), labels.size)
        for other in self._factors.get(key, ()):
            if other.labels.ndim != labels.ndim:
                continue
            for order in permutations(range(labels.ndim)):
                same = np.transpose(other.labels, order)
                if same.shape == labels.shape and np.array_equal(same, labels):
                    return [other.factors[axis] for axis in order]
        return None

    def settle_all(self, layout: Layout, node: Node) -> Layout:
        """The layout with every joint block settled."""
        if not any(b.joint for b in layout):
            return layout
        single = [b for b in layout if not b.joint]
        for block in layout:
            if block.joint:
                single += [Block((a,), v) for a, v in self.settle(block, node).items()]
        return tuple(single)

    def carried(self, node: Node, layout: Layout) -> Layout:
        """The layout behind a node that treats all elements alike."""
        return tuple(
            b if b.origin is None else Block(b.axes, b.labels, b.origin.through(node))
            for b in layout
        )

    def freeze_input(self, node: Node, slot: int, words: str) -> None:
        """Nothing of input `slot` may be removed."""
        for block in self.layout(node, slot):
            self.freeze(node, block.labels, words)


def couple(graph: Graph, shapes: Shapes, *, granularity: Granularity = HEADS) -> Coupling:
    """Interpret `graph` once, forwards, and solve the ties."""
    from onnxprune.ops import interpret_node

    state = Interpreter(graph, shapes, granularity)
    if granularity.vocabulary is not None:
        from onnxprune.vocabulary import find_lookups

        state.vocabulary = find_lookups(graph, granularity.vocabulary)
    _label_inputs(state)
    for node in graph.top:
        interpret_node(state, node)
    _freeze_outputs(state)
    constants = {
        name: {
            use: tuple(Block((a,), v) for a, v in sorted(axes.items()))
            for use, axes in uses.items()
        }
        for name, uses in state.constants.items()
    }
    return Coupling(
        graph=graph,
        shapes=shapes,
        solution=state.system.solve(),
        system=state.system,
        layouts=state.layouts,
        constants=constants,
        layers=tuple(state.layers),
        contractions=tuple(state.contractions),
        statistics=tuple(state.statistics),
        products=tuple(state.products),
        shuffles=tuple(state.shuffles),
        pins=tuple(state.pins),
        lengths=state.lengths,
        aliases=state.aliases,
        settled=state.settled,
        notes=state.notes,
        keepers=tuple(state.keepers),
        quotas=tuple(state.quotas),
        numbers=state.numbers,
        lookups=state.lookups,
        granularity=granularity,
        interpreted=frozenset(state.interpreted),
        taken=state.taken,
        decoders=state.decoders,
    )


def _label_inputs(state: Interpreter) -> None:
    """Model inputs keep their shapes: their fixed axes carry frozen labels that say so."""
    for name in state.graph.inputs:
        dims = state.shapes.dims(name)
        if dims is None or state.shapes.types.get(name) not in _FLOAT_TYPES:
            continue
        blocks = []
        for axis, length in enumerate(dims):
            if axis > 0 and 1 < length <= 4096 and state.shapes.is_fixed(name, axis):
                words = f"axis {axis} of model input {name!r}"
                blocks.append(Block((axis,), state.system.frozen_axis(length, -1, words)))
        state.layouts[name] = tuple(blocks)


_FLOAT_TYPES = frozenset((1, 10, 11, 16))


def _freeze_outputs(state: Interpreter) -> None:
    """Model outputs keep their shapes."""
    for name in state.graph.outputs:
        for block in state.layouts.get(name, ()):
            state.system.freeze(block.labels, -1, f"axis {block.axes[0]} of model output {name!r}")
        for element in state.lengths.get(name, ()):
            for labels in element:
                state.system.freeze(labels, -1, f"its length is in model output {name!r}")
    for name in state.numbers.keys() & state.graph.leaving:
        state.system.freeze(state.numbers[name], -1, f"numbered by output {name!r}")
