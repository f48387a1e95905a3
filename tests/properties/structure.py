"""Productions that move, pick, join and repeat."""

from __future__ import annotations

from tests.properties.registry import production
from tests.properties.writer import MOST, SIDE, Value, Writer


@production(weight=2)
def concat(g: Writer) -> None:
    """Two values side by side, or one and a constant."""
    x = g.pick()
    if x is None:
        return
    y = g.pick(x.kind)
    assert y is not None
    if x.channels + y.channels <= MOST:
        g.put(x.kind, x.channels + y.channels, f"Concat<axis={x.axis}>({x}, {y})")


@production(weight=2)
def split(g: Writer) -> None:
    """Two parts, both of them live."""
    x = g.pick()
    if x is None or x.channels < 2:
        return
    first = g.integer(1, x.channels - 1)
    sizes = g.numbers(first, x.channels - first)
    for name, size in zip(
        g.emit(f"Split<axis={x.axis}>({x}, {sizes})", 2),
        (first, x.channels - first),
        strict=True,
    ):
        g.live.append(Value(name, x.kind, size))


@production
def gated_halves(g: Writer) -> None:
    """A gated linear unit."""
    x = g.pick()
    if x is None or x.channels % 2:
        return
    half = x.channels // 2
    a, b = g.emit(f"Split<axis={x.axis}>({x}, {g.numbers(half, half)})", 2)
    g.put(x.kind, half, f"Mul({a}, Sigmoid({b}))")


@production(weight=2)
def slice_(g: Writer) -> None:
    """A range of channels, also with steps and backwards."""
    x = g.pick()
    if x is None:
        return
    c = x.channels
    start, step = g.integer(0, c - 1), g.choose((1, 1, 2))
    bounds = ", ".join(g.numbers(n) for n in (start, c, x.axis, step))
    g.put(x.kind, len(range(start, c, step)), f"Slice({x}, {bounds})")


@production
def roll(g: Writer) -> None:
    """Channels or positions shifted round."""
    x = g.pick()
    if x is None or x.channels < 2:
        return
    axis = g.choose((x.axis, x.axis, 2 if x.kind == "image" else 1))
    length = SIDE if x.kind == "image" and axis == 2 else x.channels
    if x.rank == 3 and axis == 1:
        length = 1 << 40
    by = g.integer(1, min(length, x.channels) - 1) if axis == x.axis else 1
    a = f"Slice({x}, {g.numbers(by)}, {g.numbers(length)}, {g.numbers(axis)})"
    b = f"Slice({x}, {g.numbers(0)}, {g.numbers(by)}, {g.numbers(axis)})"
    g.same(x, f"Concat<axis={axis}>({a}, {b})")


@production
def gather(g: Writer) -> None:
    """Channels in another order, or some of them."""
    x = g.pick()
    if x is None:
        return
    order = g.permutation(x.channels)
    if g.flip():
        order = order[: max(1, x.channels // 2)]
    g.put(x.kind, len(order), f"Gather<axis={x.axis}>({x}, {g.numbers(*order)})")


@production
def compress(g: Writer) -> None:
    """The channels where a constant condition holds."""
    x = g.pick()
    if x is None:
        return
    flags = [True, *(g.flip() for _ in range(x.channels - 1))]
    g.put(x.kind, sum(flags), f"Compress<axis={x.axis}>({x}, {g.flags(*flags)})")


@production
def tile(g: Writer) -> None:
    """Channels repeated, or one value made as wide as the others."""
    x = g.pick()
    if x is None:
        return
    repeats = [1] * x.rank
    if g.flip() and x.channels * 2 <= MOST:
        repeats[x.axis] = 2
        g.put(x.kind, x.channels * 2, f"Tile({x}, {g.numbers(*repeats)})")
    else:
        repeats[x.axis] = x.channels
        one = g.reduce(g.choose(("ReduceMax", "ReduceSum")), str(x), (x.axis,))
        g.same(x, f"Mul({x}, Tanh(Tile({one}, {g.numbers(*repeats)})))")


@production
def expand(g: Writer) -> None:
    """A row made as large as a value, by a constant or a computed shape."""
    x = g.pick()
    if x is None:
        return
    row = g.row(x)
    target = g.numbers(*((1,) * (x.rank - 1)), x.channels) if x.kind != "image" else None
    if target is None or g.flip():
        g.same(x, f"Add({x}, Expand({row}, Shape({x})))")
    else:
        g.same(x, f"Add({x}, Expand({g.weight(1)}, {target}))")


@production
def constant_of_shape(g: Writer) -> None:
    """A constant as large as a value."""
    x = g.pick()
    if x is not None:
        made = "ConstantOfShape<value: tensor = float[1] {0.5}>"
        g.same(x, f"Sub({x}, {made}(Shape({x})))")


@production
def pad(g: Writer) -> None:
    """Channels padded with zeros or cut off; positions padded and cut again."""
    x = g.pick()
    if x is None:
        return
    sides = [0] * (2 * x.rank)
    width = x.channels
    for place in (x.axis, x.rank + x.axis):
        change = g.choose((-1, 0, 1, 2))
        if 1 <= width + change <= MOST:
            sides[place], width = change, width + change
    crops = sum(-n for n in sides if n < 0)
    if crops < x.channels:
        g.put(x.kind, width, f"Pad({x}, {g.numbers(*sides)})")


@production
def pad_space(g: Writer) -> None:
    """A border around images, then a convolution without one."""
    x = g.pick("image")
    if x is not None:
        mode = g.choose(("constant", "reflect", "edge"))
        border = g.numbers(0, 0, 1, 1, 0, 0, 1, 1)
        w = g.weight(4, x.channels, 3, 3)
        g.put("image", 4, f'Conv(Pad<mode="{mode}">({x}, {border}), {w})')


@production
def shuffle(g: Writer) -> None:
    """Channels split into groups and transposed; sometimes with something in between."""
    x = g.pick("image", "flat")
    if x is None or x.channels % 2 or x.channels < 4:
        return
    side = (SIDE, SIDE) if x.kind == "image" else ()
    groups = g.choose([n for n in (2, x.channels // 2) if x.channels % n == 0])
    apart = g.emit(f"Reshape({x}, {g.numbers(0, groups, x.channels // groups, *side)})")[0]
    apart = g.choose((apart, f"Relu({apart})", f"Cast<to=1>({apart})"))
    perm = ",".join(map(str, (0, 2, 1, *range(3, 3 + len(side)))))
    merged = g.numbers(g.choose((0, -1)), x.channels, *side)
    g.same(x, f"Reshape(Transpose<perm=[{perm}]>({apart}), {merged})")


@production
def to_tokens(g: Writer) -> None:
    """Images to tokens; a computed shape does it too."""
    x = g.pick("image")
    if x is None:
        return
    flat = f"Reshape({x}, {g.numbers(0, x.channels, -1)})"
    if g.flip():
        head = f"Slice(Shape({x}), {g.numbers(0)}, {g.numbers(2)})"
        flat = f"Reshape({x}, Concat<axis=0>({head}, {g.numbers(-1)}))"
    g.put("patches", x.channels, f"Transpose<perm=[0,2,1]>({flat})")


@production
def from_patches(g: Writer) -> None:
    """Tokens back to images."""
    x = g.pick("patches")
    if x is not None:
        turned = f"Transpose<perm=[0,2,1]>({x})"
        g.put("image", x.channels, f"Reshape({turned}, {g.numbers(0, x.channels, SIDE, SIDE)})")


@production(weight=2)
def to_flat(g: Writer) -> None:
    """Images or tokens to one row, whole or averaged."""
    x = g.pick("image", "tokens", "patches")
    if x is None:
        return
    if x.rank == 3:
        op = g.choose(("ReduceMean", "ReduceMax"))
        g.put("flat", x.channels, g.reduce(op, str(x), (1,), keep=False))
    elif g.flip():
        flat = g.choose((f"Flatten({x})", f"Reshape({x}, {g.numbers(0, -1)})"))
        if g.flip():
            flat = f"Flatten(Transpose<perm=[0,2,3,1]>({x}))"
        w = g.weight(x.channels * SIDE * SIDE, 4)
        g.put("flat", 4, f"MatMul({flat}, {w})")
    else:
        pooled = f"{g.choose(('GlobalAveragePool', 'GlobalMaxPool'))}({x})"
        g.put("flat", x.channels, f"Squeeze({pooled}, {g.numbers(2, 3)})")


@production
def to_image(g: Writer) -> None:
    """Rows to images: an axis put in, and made wide."""
    x = g.pick("flat")
    if x is not None:
        wide = g.numbers(1, 1, SIDE, SIDE)
        spread = f"Expand(Unsqueeze({x}, {g.numbers(2, 3)}), {wide})"
        g.put("image", x.channels, spread)


@production
def spread_tokens(g: Writer) -> None:
    """A row added to every token."""
    x, y = g.pick("flat"), g.pick("tokens")
    if x is not None and y is not None and x.channels == y.channels:
        g.same(y, f"Add({y}, Unsqueeze({x}, {g.numbers(1)}))")


@production
def shared(g: Writer) -> None:
    """One weight in two places."""
    x = g.pick()
    if x is None:
        return
    y = g.pick(x.kind, channels=x.channels)
    if x.kind == "image":
        w = g.weight(6, x.channels, 1, 1)
        made = [g.put("image", 6, f"Conv({v}, {w})") for v in (x, y)]
    else:
        w = g.weight(x.channels, 6)
        made = [g.put(x.kind, 6, f"MatMul({v}, {w})") for v in (x, y)]
    if g.flip():
        g.put(x.kind, 6, f"Add({made[0]}, {made[1]})")


@production
def looked_up(g: Writer) -> None:
    """Positions picked by number: GatherElements, GatherND, ScatterElements, ScatterND."""
    x = g.pick("tokens", "patches")
    if x is None:
        return
    first = f"Slice({x}, {g.numbers(0)}, {g.numbers(2)}, {g.numbers(1)})"
    kind = g.choose(("GatherElements", "ScatterElements", "ScatterND", "GatherND"))
    if kind == "GatherElements":
        index = f"Mul(Cast<to=7>(Sigmoid({first})), {g.numbers(0)})"
        found = f"GatherElements<axis=1>({x}, {index})"
        g.put("flat", x.channels, g.reduce("ReduceSum", found, (1,), keep=False))
    elif kind == "ScatterElements":
        index = f"Cast<to=7>(Mul(Sigmoid({first}), {g.weight(1, kind='var')}))"
        zero = g.numbers(0)
        index = f"Mul({index}, {zero})"
        reduce = '<axis=1, reduction="add">' if g.opset >= 16 else "<axis=1>"
        g.same(x, f"ScatterElements{reduce}({x}, {index}, Tanh({first}))")
    else:
        turned = f"Transpose<perm=[1,0,2]>({x})"
        rows = f"Reshape({g.numbers(1, 0)}, {g.numbers(2, 1)})"
        picked = g.emit(f"GatherND({turned}, {rows})")[0]
        if kind == "ScatterND":
            written = f"ScatterND({turned}, {rows}, Tanh({picked}))"
            g.same(x, f"Transpose<perm=[1,0,2]>({written})")
        else:
            g.put("flat", x.channels, g.reduce("ReduceSum", picked, (0,), keep=False))


@production
def ordered(g: Writer) -> None:
    """Operators that number positions; channels pass by."""
    x = g.pick("image")
    if x is None:
        return
    kind = g.choose(("TopK", "ArgMax", "ArgMin", "Trilu", "CenterCropPad", "Det", "NonZero"))
    if kind == "TopK":
        values, _ = g.emit(f"TopK<axis=2>({x}, {g.numbers(1)})", 2)
        g.same(x, f"Sub({x}, {values})")
    elif kind in ("ArgMax", "ArgMin"):
        g.same(x, f"Add({x}, Cast<to=1>({kind}<axis=2>({x})))")
    elif kind == "Trilu" and g.opset >= 14:
        g.same(x, f"Trilu<upper={g.choose((0, 1))}>({x})")
    elif kind == "CenterCropPad" and g.opset >= 18:
        g.same(x, f"CenterCropPad<axes=[2,3]>({x}, {g.numbers(SIDE, SIDE)})")
    elif kind == "Det":
        g.same(x, f"Add({x}, Tanh(Unsqueeze(Det(Tanh({x})), {g.numbers(2, 3)})))")
    else:
        counted = f"Cast<to=1>(ReduceSum<keepdims=0>(NonZero({x})))"
        g.same(x, f"Add({x}, Tanh({counted}))")
