"""Random graphs from a grammar: around any operators, pruning equals the masked twin."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from onnxprune import pipeline, runtime, verify
from onnxprune.analysis import analyse
from onnxprune.passes.apply import apply_keep
from onnxprune.passes.score import score
from onnxprune.passes.select import Budget, Limits, select
from tests.graphs import NOBODY, TOLERANCE, build, prune, prune_half

SIDE = 4
WIDTHS = (2, 4, 6, 8)


@dataclass
class Writer:
    """Writes nodes over values [N, C, 4, 4]; `live` maps each to C."""

    draw: st.DrawFn
    lines: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    live: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def name(self, kind: str) -> str:
        """A new name."""
        self.count += 1
        return f"{kind}{self.count}"

    def weight(self, dims: str, kind: str = "w") -> str:
        """A new float weight."""
        name = self.name(kind)
        self.weights.append(f"{name}:{dims}")
        return name

    def numbers(self, *values: int) -> str:
        """A new int64 constant."""
        name = self.name("i")
        self.weights.append(f"{name}={','.join(map(str, values))}")
        return name

    def put(self, channels: int, expression: str) -> str:
        """One more node; its value is live."""
        name = self.name("v")
        self.lines.append(f"{name} = {expression}")
        self.live[name] = channels
        return name

    def pick(self, channels: int | None = None) -> str:
        """Any live value, or one with so many channels."""
        names = [n for n, c in self.live.items() if channels in (None, c)]
        return self.draw(st.sampled_from(names))

    def conv(self, x: str, width: int | None = None) -> str:
        """A 1x1 or padded 3x3 convolution."""
        width = width or self.draw(st.sampled_from(WIDTHS))
        kernel = self.draw(st.sampled_from((1, 3)))
        w = self.weight(f"{width},{self.live[x]},{kernel},{kernel}")
        bias = f", {self.weight(f'{width}')}" if self.draw(st.booleans()) else ""
        pads = "<pads=[1,1,1,1]>" if kernel == 3 else ""
        return self.put(width, f"Conv{pads}({x}, {w}{bias})")


def _conv(g: Writer) -> None:
    g.conv(g.pick())


def _grouped(g: Writer) -> None:
    x = g.pick()
    c = g.live[x]
    groups = g.draw(st.sampled_from([n for n in (2, c) if c % n == 0]))
    g.put(c, f"Conv<group={groups}>({x}, {g.weight(f'{c},{c // groups},1,1')})")


def _transposed(g: Writer) -> None:
    x = g.pick()
    g.put(6, f"ConvTranspose({x}, {g.weight(f'{g.live[x]},6,1,1')})")


def _activation(g: Writer) -> None:
    x = g.pick()
    op = g.draw(st.sampled_from(("Relu", "Tanh", "Sigmoid", "Identity", "Softsign")))
    g.put(g.live[x], f"{op}({x})")


def _join(g: Writer) -> None:
    x = g.pick()
    y = g.pick(g.live[x]) if g.draw(st.booleans()) else g.conv(g.pick(), g.live[x])
    g.put(g.live[x], f"{g.draw(st.sampled_from(('Add', 'Mul', 'Max')))}({x}, {y})")


def _concat(g: Writer) -> None:
    x, y = g.pick(), g.pick()
    if g.live[x] + g.live[y] <= 24:
        g.put(g.live[x] + g.live[y], f"Concat<axis=1>({x}, {y})")


def _split(g: Writer) -> None:
    x = g.pick()
    c = g.live[x]
    first = g.draw(st.integers(1, c - 1)) if c > 1 else 0
    if not first:
        return
    a, b = g.name("v"), g.name("v")
    g.lines.append(f"{a}, {b} = Split<axis=1>({x}, {g.numbers(first, c - first)})")
    g.live |= {a: first, b: c - first}


def _slice(g: Writer) -> None:
    x = g.pick()
    c = g.live[x]
    step = g.draw(st.sampled_from((1, 2)))
    start = g.draw(st.integers(0, c - 1))
    bounds = ", ".join(g.numbers(n) for n in (start, c, 1, step))
    g.put(len(range(start, c, step)), f"Slice({x}, {bounds})")


def _gather(g: Writer) -> None:
    x = g.pick()
    order = g.draw(st.permutations(range(g.live[x])))
    g.put(g.live[x], f"Gather<axis=1>({x}, {g.numbers(*order)})")


def _batch_norm(g: Writer) -> None:
    x = g.pick()
    c = str(g.live[x])
    names = ", ".join(g.weight(c, kind) for kind in ("s", "b", "m", "var"))
    g.put(g.live[x], f"BatchNormalization({x}, {names})")


def _scale(g: Writer) -> None:
    x = g.pick()
    dims = g.draw(st.sampled_from((f"{g.live[x]},1,1", f"1,{g.live[x]},1,1", "1", "")))
    g.put(g.live[x], f"Mul({x}, {g.weight(dims)})")


def _shuffle(g: Writer) -> None:
    x = g.pick()
    c = g.live[x]
    if c % 2 or c < 4:
        return
    split, merge = g.numbers(0, 2, c // 2, SIDE, SIDE), g.numbers(0, c, SIDE, SIDE)
    a, b = g.name("u"), g.name("u")
    g.lines.append(f"{a} = Reshape({x}, {split})")
    g.lines.append(f"{b} = Transpose<perm=[0,2,1,3,4]>({a})")
    g.put(c, f"Reshape({b}, {merge})")


def _tokens(g: Writer) -> None:
    """To [N, 16, C], through a dense layer or LayerNormalization, and back."""
    x = g.pick()
    c = g.live[x]
    a, b, d, e = (g.name("u") for _ in range(4))
    g.lines.append(f"{a} = Reshape({x}, {g.numbers(0, c, -1)})")
    g.lines.append(f"{b} = Transpose<perm=[0,2,1]>({a})")
    if g.draw(st.booleans()):
        width = g.draw(st.sampled_from(WIDTHS))
        g.lines.append(f"{d} = MatMul({b}, {g.weight(f'{c},{width}')})")
    else:
        width = c
        g.lines.append(f"{d} = LayerNormalization({b}, {g.weight(str(c), 's')})")
    g.lines.append(f"{e} = Transpose<perm=[0,2,1]>({d})")
    g.put(width, f"Reshape({e}, {g.numbers(0, width, SIDE, SIDE)})")


def _attention_over_channels(g: Writer) -> None:
    x = g.pick()
    p = g.name("u")
    g.lines.append(f"{p} = GlobalAveragePool({x})")
    q, c = g.name("u"), g.live[x]
    g.lines.append(f"{q} = Conv({p}, {g.weight(f'{c},{c},1,1')})")
    g.put(c, f"Mul({x}, {q})")


def _statistic(g: Writer) -> None:
    x = g.pick()
    op = g.draw(st.sampled_from(("ReduceMean", "ReduceSum", "ReduceMax")))
    m = g.name("u")
    axis = g.draw(st.sampled_from((1, 2)))
    g.lines.append(f"{m} = {op}({x}, {g.numbers(axis)})")
    g.put(g.live[x], f"Mul({x}, {m})")


def _softmax(g: Writer) -> None:
    x = g.pick()
    g.put(g.live[x], f"Softmax<axis={g.draw(st.sampled_from((1, 3)))}>({x})")


def _shared(g: Writer) -> None:
    """One weight in two places."""
    x = g.pick()
    y = g.pick(g.live[x])
    w = g.weight(f"6,{g.live[x]},1,1")
    g.put(6, f"Conv({x}, {w})")
    g.put(6, f"Conv({y}, {w})")


def _pool(g: Writer) -> None:
    x = g.pick()
    op = g.draw(st.sampled_from(("MaxPool", "AveragePool")))
    g.put(g.live[x], f"{op}<kernel_shape=[3,3], pads=[1,1,1,1]>({x})")


PRODUCTIONS = (
    _conv,
    _conv,
    _grouped,
    _transposed,
    _activation,
    _join,
    _concat,
    _split,
    _slice,
    _gather,
    _batch_norm,
    _scale,
    _shuffle,
    _tokens,
    _attention_over_channels,
    _statistic,
    _softmax,
    _shared,
    _pool,
)


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    """A valid model with one or two inputs and one or two outputs."""
    batch = draw(st.sampled_from(("N", "2")))
    g = Writer(draw)
    sources = ["x", "z"][: draw(st.integers(1, 2))]
    g.live |= dict.fromkeys(sources, 3)
    entries = [g.conv(name) for name in sources]
    for name in sources:
        if draw(st.booleans()):
            del g.live[name]
    for _ in range(draw(st.integers(1, 8))):
        draw(st.sampled_from(PRODUCTIONS))(g)
    ends = [f"{batch},2,{SIDE},{SIDE}"]
    last = list(g.live)[-1]
    g.lines.append(f"y0 = Conv({last}, {g.weight(f'2,{g.live[last]},1,1')})")
    if draw(st.booleans()):
        other = g.pick() if draw(st.booleans()) else entries[0]
        if draw(st.booleans()):
            flat = g.name("u")
            g.lines.append(f"{flat} = Flatten({other})")
            w = g.weight(f"{g.live[other] * SIDE * SIDE},3")
            g.lines.append(f"y1 = MatMul({flat}, {w})")
            ends.append(f"{batch},3")
        else:
            g.lines.append(f"y1 = Identity({other})")
            ends.append(f"{batch},{g.live[other]},{SIDE},{SIDE}")
    inputs = ", ".join(f"float[{batch},3,{SIDE},{SIDE}] {name}" for name in sources)
    outputs = ", ".join(f"float[{dims}] y{i}" for i, dims in enumerate(ends))
    return build(f"({inputs}) => ({outputs})", "\n".join(g.lines), " ".join(g.weights))


def _text(model: onnx.ModelProto) -> str:
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    for tensor in slim.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.ClearField("raw_data")
    return str(onnx.printer.to_text(slim))


@given(
    model=models(),
    ratio=st.sampled_from((0.25, 0.5, 0.75)),
    scope=st.sampled_from(("all", "exact")),
    seed=st.integers(0, 1000),
)
def test_random_graphs_equal_their_twins(
    model: onnx.ModelProto, ratio: float, scope: str, seed: int
) -> None:
    note(_text(model))
    onnx.checker.check_model(model, full_check=True)
    pruned = prune_half(model, scope, ratio=ratio, seed=seed, criterion="random")
    assert verify.structure_problems(pruned.model, model) == []
    assert pruned.error <= TOLERANCE


@given(model=models(), seed=st.integers(0, 1000))
def test_any_choice_of_single_units_equals_its_twin(model: onnx.ModelProto, seed: int) -> None:
    """Not only whole budgets: each group loses an arbitrary subset."""
    note(_text(model))
    analysis = analyse(model)
    keep = select(
        analysis.coupling,
        analysis.groups,
        score(analysis.coupling, "random", seed=seed),
        analysis.cost,
        Budget("params", 1.0),
        Limits(min_keep=0.0),
        NOBODY,
    )
    assert keep.all()
    rng = np.random.default_rng(seed)
    for group in analysis.groups:
        keep[rng.permutation(group.units)[: rng.integers(0, group.size)]] = False
    for labels in analysis.coupling.keepers:
        members = analysis.coupling.solution.unit[np.maximum(labels, 0)]
        keep[members[:1]] = True
    pruned = apply_keep(analysis.coupling, keep).model
    feeds = [runtime.random_feeds(model, seed=seed)]
    assert verify.twin_error(analysis.coupling, keep, pruned, feeds, threads=1) <= TOLERANCE
    params, macs = analysis.cost.params(keep), analysis.cost.macs(keep)
    after = analyse(pruned)
    assert after.cost.params(after.everything) == pytest.approx(params)
    assert after.cost.macs(after.everything) == pytest.approx(macs)


@given(model=models())
def test_pruning_nothing_gives_the_same_bytes(model: onnx.ModelProto) -> None:
    analysis = analyse(model)
    before = model.SerializeToString(deterministic=True)
    applied = apply_keep(analysis.coupling, analysis.everything)
    assert applied.model.SerializeToString(deterministic=True) == before
    assert model.SerializeToString(deterministic=True) == before


@given(model=models(), seed=st.integers(0, 1000))
def test_pruning_twice_works(model: onnx.ModelProto, seed: int) -> None:
    note(_text(model))
    once = prune_half(model, ratio=0.75, seed=seed, criterion="random").model
    twice = prune_half(once, ratio=0.75, seed=seed, criterion="random")
    assert verify.structure_problems(twice.model, model) == []
    assert twice.error <= TOLERANCE


def test_a_full_share_returns_the_model() -> None:
    model = build(
        "(float[N,3,4,4] x) => (float[N,2,4,4] y)",
        "a = Conv(x, w1)  y = Conv(a, w2)",
        "w1:8,3,1,1 w2:2,8,1,1",
    )
    result = prune(model, channels=1.0)
    assert result.model.SerializeToString() == model.SerializeToString()
    assert pipeline.apply(model, result.plan) is model
