"""Productions that keep shapes: activations, arithmetic, normalizations, reductions."""

from __future__ import annotations

from tests.properties.registry import production
from tests.properties.writer import Value, Writer

#: Nested expressions over {x}; arguments are kept where the function is tame.
UNARY = (
    "Relu({x})", "Tanh({x})", "Sigmoid({x})", "Identity({x})", "Softsign({x})", "Neg({x})",
    "Abs({x})", "LeakyRelu({x})", "Elu({x})", "Selu({x})", "Celu({x})", "Softplus({x})",
    "HardSigmoid({x})", "ThresholdedRelu<alpha=0.2>({x})", "Shrink({x})",
    "Erf({x})", "Sin({x})", "Cos({x})", "Atan({x})", "Asinh({x})", "Clip({x})",
    "Exp(Tanh({x}))", "Log(Exp(Tanh({x})))", "Sqrt(Abs({x}))", "Reciprocal(Exp(Tanh({x})))",
    "Tan(Tanh({x}))", "Sinh(Tanh({x}))", "Cosh(Tanh({x}))", "Acos(Tanh({x}))",
    "Asin(Tanh({x}))", "Atanh(Sin(Sigmoid({x})))", "Acosh(Exp(Sigmoid({x})))",
    "Dropout({x})", "Cast<to=1>(Cast<to=11>({x}))",
    "Where(IsNaN({x}), {x}, Tanh({x}))", "Where(IsInf({x}), Sin({x}), {x})",
    "Cast<to=1>(Not(Cast<to=9>({x})))", "Cast<to=1>(Abs(Cast<to=7>({x})))",
)  # fmt: skip
STEPS = ("Round({x})", "Floor({x})", "Ceil({x})", "Sign({x})")
NEWER = {
    14: ("HardSwish({x})",),
    15: ("CastLike({x}, {x})",),
    18: ("Mish({x})",),
    20: ("Gelu({x})",),
    26: ("BitCast<to=1>(BitCast<to=6>({x}))",),
}
BITS = (
    "BitwiseNot({i})", "BitwiseAnd({i}, {j})", "BitwiseOr({i}, {j})", "BitwiseXor({i}, {j})",
)  # fmt: skip
ARITHMETIC = (
    "Add({x}, {y})", "Sub({x}, {y})", "Mul({x}, {y})", "Max({x}, {y})", "Min({x}, {y})",
    "Sum({x}, {y}, {x})", "Mean({x}, {y})", "Div({x}, Exp(Tanh({y})))",
    "Pow(Exp(Tanh({x})), Tanh({y}))", "PRelu({x}, {y})", "Mod<fmod=1>({x}, Exp(Tanh({y})))",
    "Where(Greater({x}, {y}), {y}, {x})", "Where(Less({x}, {y}), {y}, {x})",
    "Where(GreaterOrEqual({x}, {y}), Tanh({x}), {y})", "Where(LessOrEqual({x}, {y}), {x}, {y})",
    "Where(Equal({x}, {y}), Tanh({x}), {x})",
    "Where(And(Greater({x}, {y}), Cast<to=9>({x})), {x}, {y})",
    "Where(Or(Greater({x}, {y}), Less({x}, {y})), {x}, {y})",
    "Where(Xor(Greater({x}, {y}), Cast<to=9>({y})), {x}, {y})",
)  # fmt: skip
REDUCTIONS = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSumExp", "ReduceProd", "ReduceLogSum",
)  # fmt: skip


@production(weight=4)
def unary(g: Writer) -> None:
    """Functions of every element, one behind the other."""
    x = g.pick()
    options = list(UNARY) + [e for since, es in NEWER.items() if g.opset >= since for e in es]
    options += ["Swish({x})"] if g.opset == 24 else []  # no runtime has it in later sets
    for _ in range(g.integer(1, 4)):
        if x is not None:
            x = g.same(x, g.choose(options).format(x=x))


@production
def steps(g: Writer) -> None:
    """Functions with jumps."""
    x = g.pick()
    if x is not None:
        g.same(x, f"Add({x}, {g.choose(STEPS).format(x=x)})")


@production
def bits(g: Writer) -> None:
    """Integers, bit by bit."""
    x = g.pick()
    if x is None or g.opset < 18:
        return
    y = _partner(g, x)
    integers = {k: g.emit(f"Cast<to=6>({v})")[0] for k, v in (("i", x), ("j", y))}
    if g.flip():
        small = [g.emit(f"Cast<to=12>(Clip(Abs({v}), {g.weight()}))")[0] for v in (x, y)]
        shift = g.emit(f'BitShift<direction="LEFT">({small[0]}, {small[1]})')[0]
        g.same(x, f"Add({x}, Tanh(Cast<to=1>({shift})))")
    else:
        g.same(x, f"Add({x}, Tanh(Cast<to=1>({g.choose(BITS).format(**integers)})))")


def _partner(g: Writer, x: Value) -> object:
    """Something that broadcasts against x: a value like it, a row, or a scalar."""
    kind = g.choose(("value", "row", "scalar", "made"))
    if kind == "value":
        return g.pick(x.kind, channels=x.channels)
    if kind == "made":
        other = g.pick(x.kind)
        assert other is not None
        return dense(g, other, x.channels)
    return g.row(x) if kind == "row" else g.weight(*g.choose(((), (1,))))


def dense(g: Writer, x: Value, width: int) -> Value:
    """A layer from x to `width` channels."""
    if x.kind == "image":
        kernel = g.choose((1, 3))
        w = g.weight(width, x.channels, kernel, kernel)
        bias = f", {g.weight(width)}" if g.flip() else ""
        pads = "<pads=[1,1,1,1]>" if kernel == 3 else ""
        return g.put("image", width, f"Conv{pads}({x}, {w}{bias})")
    if x.kind == "flat" and g.flip():
        if g.flip():
            w = g.weight(width, x.channels)
            return g.put("flat", width, f"Gemm<transB=1>({x}, {w}, {g.weight(width)})")
        return g.put("flat", width, f"Gemm({x}, {g.weight(x.channels, width)})")
    product = f"MatMul({x}, {g.weight(x.channels, width)})"
    return g.put(x.kind, width, f"Add({product}, {g.weight(width)})" if g.flip() else product)


@production(weight=3)
def arithmetic(g: Writer) -> None:
    """Two values, element by element."""
    x = g.pick()
    if x is not None:
        template = g.choose(ARITHMETIC)
        y = g.row(x) if template.startswith("PRelu") else _partner(g, x)
        g.same(x, template.format(x=x, y=y))


@production(weight=4)
def layer(g: Writer) -> None:
    """A weighted layer."""
    x = g.pick()
    if x is not None:
        dense(g, x, g.width())


@production(weight=2)
def reduction(g: Writer) -> None:
    """A statistic over one or two axes, put back by broadcasting."""
    x = g.pick()
    if x is None:
        return
    op = g.choose(REDUCTIONS)
    inner = f"Tanh({x})" if op == "ReduceProd" else f"Exp(Tanh({x}))" if "Log" in op else str(x)
    axes = g.choose([(a,) for a in range(1, x.rank)] + [(1, x.rank - 1)])
    axes = tuple(dict.fromkeys(axes))
    g.same(x, f"Add({x}, {g.reduce(op, inner, axes)})")


@production
def normalization(g: Writer) -> None:
    """Statistics over an axis, without parameters."""
    x = g.pick()
    if x is None:
        return
    axis = g.choose(range(1, x.rank))
    options = [f"Softmax<axis={axis}>({x})", f"LogSoftmax<axis={axis}>({x})"]
    options += [f"LpNormalization<axis={axis}, p=2>(Add({x}, {g.weight(kind='var')}))"]
    options += [f"Add({x}, Hardmax<axis={axis}>({x}))"]
    if x.kind == "image":
        options += [f"LRN<size=3>({x})", f"MeanVarianceNormalization<axes=[0,2,3]>({x})"]
        options += [f"MeanVarianceNormalization<axes=[1,2]>({x})"]
    g.same(x, g.choose(options))


@production(weight=2)
def parametric_normalization(g: Writer) -> None:
    """Normalizations with a scale and a bias per channel."""
    x = g.pick()
    if x is None:
        return
    c = x.channels
    options = []
    if x.rank != 3:
        names = ", ".join(g.weight(c, kind=k) for k in ("s", "b", "m", "var"))
        options.append(f"BatchNormalization({x}, {names})")
    if x.kind == "image":
        options.append(f"InstanceNormalization({x}, {g.weight(c)}, {g.weight(c)})")
        groups = g.choose([n for n in (1, 2, c) if c % n == 0])
        if g.opset >= 21:
            s, b = g.weight(c), g.weight(c)
            options.append(f"GroupNormalization<num_groups={groups}>({x}, {s}, {b})")
    elif g.opset >= 17:
        options.append(f"LayerNormalization({x}, {g.weight(c)}, {g.weight(c)})")
        if g.opset >= 23:
            options.append(f"RMSNormalization({x}, {g.weight(c)})")
    if options:
        g.same(x, g.choose(options))


@production
def running(g: Writer) -> None:
    """Running sums and products."""
    x = g.pick()
    if x is None:
        return
    axis = g.numbers(g.choose(range(1, x.rank)))
    if g.opset >= 26 and g.flip():
        g.same(x, f"CumProd(Tanh({x}), {axis})")
    else:
        g.same(x, f"CumSum<exclusive={g.choose((0, 1))}>({x}, {axis})")


@production
def gate(g: Writer) -> None:
    """Squeeze and excite."""
    x = g.pick("image")
    if x is not None:
        pools = ["GlobalAveragePool", "GlobalMaxPool"] + ["GlobalLpPool"] * (g.opset < 22)
        pooled = g.emit(f"{g.choose(pools)}({x})")
        w = g.weight(x.channels, x.channels, 1, 1)
        g.same(x, f"Mul({x}, Sigmoid(Conv({pooled[0]}, {w})))")
