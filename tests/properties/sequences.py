"""Productions over tokens: attention, recurrence, einsum, transforms, control flow."""

from __future__ import annotations

from tests.properties.registry import production
from tests.properties.writer import Value, Writer


def _heads(g: Writer, x: str, heads: int, size: int, turn: str = "0,2,1,3") -> str:
    return f"Transpose<perm=[{turn}]>(Reshape({x}, {g.numbers(0, -1, heads, size)}))"


@production(weight=3)
def attention(g: Writer) -> None:
    """Attention by parts: separate or packed, with grouped queries, masks, Einsum."""
    x = g.pick("tokens", "patches")
    if x is None:
        return
    heads, size = g.choose((2, 4)), g.choose((2, 4))
    all_ = heads * size
    if g.flip():
        packed = g.emit(f"MatMul({x}, {g.weight(x.channels, 3 * all_)})")[0]
        parts = g.numbers(all_, all_, all_)
        q, k, v = g.emit(f"Split<axis=-1>({packed}, {parts})", 3)
    else:
        q, k, v = (g.emit(f"MatMul({x}, {g.weight(x.channels, all_)})")[0] for _ in range(3))
    if g.opset >= 13 and g.flip():
        q, k, v = (g.emit(f"Reshape({p}, {g.numbers(0, -1, heads, size)})")[0] for p in (q, k, v))
        scores = f'Einsum<equation="bqhd,bkhd->bhqk">({q}, {k})'
        mixed = f'Einsum<equation="bhqk,bkhd->bqhd">(Softmax<axis=-1>({scores}), {v})'
    else:
        scores = f"MatMul({_heads(g, q, heads, size)}, {_heads(g, k, heads, size, '0,2,3,1')})"
        if g.flip():
            scores = f"Add({scores}, {g.weight(1, heads, 1, 1)})"
        mixed = f"MatMul(Softmax<axis=-1>({scores}), {_heads(g, v, heads, size)})"
        mixed = f"Transpose<perm=[0,2,1,3]>({mixed})"
    joined = f"Reshape({mixed}, {g.numbers(0, -1, all_)})"
    width = g.choose((x.channels, g.width()))
    made = g.put(x.kind, width, f"MatMul({joined}, {g.weight(all_, width)})")
    if width == x.channels:
        g.same(x, f"Add({x}, {made})")


@production
def fused_attention(g: Writer) -> None:
    """The standard's Attention and RotaryEmbedding."""
    x = g.pick("tokens", "patches")
    if x is None or g.opset < 23:
        return
    heads, few, size = 4, g.choose((2, 4)), 4
    q = f"MatMul({x}, {g.weight(x.channels, heads * size)})"
    k, v = (f"MatMul({x}, {g.weight(x.channels, few * size)})" for _ in range(2))
    made = f"Attention<q_num_heads={heads}, kv_num_heads={few}>({q}, {k}, {v})"
    g.put(x.kind, x.channels, f"MatMul({made}, {g.weight(heads * size, x.channels)})")


@production(weight=2)
def feed_forward(g: Writer) -> None:
    """Two layers and a residual connection."""
    x = g.pick("tokens", "patches", "flat")
    if x is None:
        return
    width = 2 * g.width()
    hidden = f"Relu(MatMul({x}, {g.weight(x.channels, width)}))"
    g.same(x, f"Add({x}, MatMul({hidden}, {g.weight(width, x.channels)}))")


@production(weight=2)
def recurrent(g: Writer) -> None:
    """LSTM, GRU, RNN: one or two directions, all inputs."""
    x = g.pick("tokens", "patches")
    if x is None:
        return
    cell = g.choose(("LSTM", "GRU", "RNN"))
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[cell]
    direction, ways = g.choose((("forward", 1), ("reverse", 1), ("bidirectional", 2)))
    hidden = g.width()
    inputs = [f"Transpose<perm=[1,0,2]>({x})"]
    inputs += [g.weight(ways, gates * hidden, x.channels), g.weight(ways, gates * hidden, hidden)]
    if g.flip():
        inputs.append(g.weight(ways, 2 * gates * hidden))
    extra = ", linear_before_reset=1" if cell == "GRU" and g.flip() else ""
    call = f'{cell}<hidden_size={hidden}, direction="{direction}"{extra}>({", ".join(inputs)})'
    y, *states = g.emit(call, 3 if cell == "LSTM" else 2)
    if g.flip():
        width = hidden * ways
        turned = f"Transpose<perm=[2,0,1,3]>({y})"
        g.put(x.kind, width, f"Reshape({turned}, {g.numbers(0, 0, width)})")
    else:
        last = g.reduce("ReduceSum", g.choose(states), (0,), keep=False)
        g.put("flat", hidden, last)


@production
def einsum(g: Writer) -> None:
    """Sums of products by letters."""
    x = g.pick("tokens", "patches", "flat")
    if x is None:
        return
    c, width = x.channels, g.width()
    options = [
        (width, f'Einsum<equation="...c,cd->...d">({x}, {g.weight(c, width)})'),
        (c, f'Einsum<equation="...c,c->...c">({x}, {g.weight(c)})'),
        (
            width,
            f'Einsum<equation="...c,cd,d->...d">({x}, {g.weight(c, width)}, {g.weight(width)})',
        ),
    ]
    if x.kind == "flat":
        square = f'Einsum<equation="ni,nj->nij">({x}, {x})'
        options.append((c, f'Einsum<equation="nii->ni">({square})'))
    width, expression = g.choose(options)
    g.put(x.kind, width, expression)


@production
def vector(g: Writer) -> None:
    """A matrix by a vector, added to every channel."""
    x = g.pick("tokens", "patches", "flat")
    if x is not None:
        dot = f"MatMul({x}, {g.weight(x.channels)})"
        g.same(x, f"Add({x}, Unsqueeze({dot}, {g.numbers(x.rank - 1)}))")


@production
def weight_first(g: Writer) -> None:
    """A constant matrix times a transposed value."""
    x = g.pick("tokens", "patches")
    if x is not None:
        width = g.width()
        made = f"MatMul({g.weight(width, x.channels)}, Transpose<perm=[0,2,1]>({x}))"
        g.put(x.kind, width, f"Transpose<perm=[0,2,1]>({made})")


@production
def over_time(g: Writer) -> None:
    """A convolution over the tokens."""
    x = g.pick("tokens", "patches")
    if x is not None:
        width = g.width()
        turned = f"Transpose<perm=[0,2,1]>({x})"
        made = f"Conv<pads=[1,1]>({turned}, {g.weight(width, x.channels, 3)})"
        g.put(x.kind, width, f"Transpose<perm=[0,2,1]>({made})")


@production
def transform(g: Writer) -> None:
    """A Fourier transform over the tokens, and its power."""
    x = g.pick("tokens", "patches")
    if x is None or g.opset < 17:
        return
    if g.opset < 20:
        made = f"DFT<axis=1>(Unsqueeze({x}, {g.numbers(3)}))"
    else:
        made = f"DFT(Unsqueeze({x}, {g.numbers(3)}), , {g.scalar(1)})"
    g.same(x, g.reduce("ReduceL2", made, (3,), keep=False))


@production
def reversed_rows(g: Writer) -> None:
    """Each token sequence backwards up to a length."""
    x = g.pick("tokens", "patches")
    if x is None:
        return
    ones = f"Cast<to=7>(Exp(Mul({g.reduce('ReduceMax', str(x), (1, 2), keep=False)}, {_zero(g)})))"
    g.same(x, f"ReverseSequence<batch_axis=0, time_axis=1>({x}, {ones})")


def _zero(g: Writer) -> str:
    return g.emit("Constant<value_float=0.0>()")[0]


@production
def branch(g: Writer) -> None:
    """If: both branches read the same value."""
    x = g.pick("tokens", "patches", "flat")
    if x is None:
        return
    asked = f"Greater(ReduceMax<keepdims=0>({x}), {_zero(g)})"
    middle = {"tokens": "S,", "patches": "16,", "flat": ""}[x.kind]
    dims = f"N,{middle}{x.channels}"
    p, q, r = (g.name("p") for _ in range(3))
    w = g.weight(x.channels, x.channels)
    last = (
        f" <then_branch = t () => (float[{dims}] {p}) "
        f"{{ {r} = MatMul({x}, {w})  {p} = Relu({r}) }},"
        f" else_branch = e () => (float[{dims}] {q}) {{ {q} = Tanh({x}) }}>"
    )
    name = g.emit(f"If({asked})", last=last)[0]
    g.live.append(Value(name, x.kind, x.channels))


@production
def loop(g: Writer) -> None:
    """Loop: a state that passes through a layer a few times."""
    x = g.pick("flat")
    if x is None:
        return
    c = x.channels
    i, go, s, u, m = (g.name("p") for _ in range(5))
    w = g.weight(c, c)
    last = (
        f" <body = l (int64 {i}, bool {go}, float[N,{c}] {s}) => (bool {go}_, float[N,{c}] {u}) "
        f"{{ {go}_ = Identity({go})  {m} = MatMul({s}, {w})  {u} = Tanh({m}) }}>"
    )
    name = g.emit(f"Loop({g.scalar(3)}, , {x})", last=last)[0]
    g.live.append(Value(name, "flat", c))


@production
def scan(g: Writer) -> None:
    """Scan: a state over the tokens."""
    x = g.pick("tokens", "patches")
    if x is None:
        return
    c = x.channels
    s, t, u, o = (g.name("p") for _ in range(4))
    rows = g.emit(f"Transpose<perm=[1,0,2]>({x})")[0]
    start = g.emit(g.reduce("ReduceMean", str(x), (1,), keep=False))[0]
    last = (
        f" <num_scan_inputs=1, body = b (float[N,{c}] {s}, float[N,{c}] {t}) => "
        f"(float[N,{c}] {u}, float[N,{c}] {o}) {{ {u} = Add({s}, {t})  {o} = Tanh({u}) }}>"
    )
    final, steps = g.emit(f"Scan({start}, {rows})", 2, last=last)
    g.live.append(Value(final, "flat", c))
    g.put(x.kind, c, f"Transpose<perm=[1,0,2]>({steps})")
