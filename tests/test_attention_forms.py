"""Attention as exporters write it, without fused operators: heads are the units of every form.

Each form reads the normalized residual stream n[N, 5, 12] and makes a[N, 5, 16], four heads of four
channels; keys and values have two heads where queries share them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest

from onnxprune import verify
from onnxprune.granularity import Granularity
from tests.graphs import TOLERANCE, Pruned, build, prune_half
from tests.rows import check_uneven, shrunk

SIGNATURE = "(float[N,5,6] x) => (float[N,5,3] y)"
BEFORE = "e = MatMul(x, we)  n = LayerNormalization(e, g1, b1)"
AFTER = "o = MatMul(a, wo)  r = Add(e, o)  m = LayerNormalization(r, g2, b2)  y = MatMul(m, wh)"
STREAM = "we:6,12 g1:12 b1:12 g2:12 b2:12 wh:12,3"

SEPARATE = "q0 = MatMul(n, wq)  k0 = MatMul(n, wk)  v0 = MatMul(n, wv)"
WEIGHTS = "wq:12,16 wk:12,16 wv:12,16"
PACKED = "p0 = MatMul(n, wqkv)  p = Add(p0, bqkv)"
PACKED_WEIGHTS = "wqkv:12,48 bqkv:48"
HEADS = "q1 = Reshape(q0, heads)  k1 = Reshape(k0, heads)  v1 = Reshape(v0, heads)"
TURN = """q = Transpose<perm=[0,2,1,3]>(q1)  kt = Transpose<perm=[0,2,1,3]>(k1)
v = Transpose<perm=[0,2,1,3]>(v1)"""
TURN_RAW = """qr = Transpose<perm=[0,2,1,3]>(q1)  kr = Transpose<perm=[0,2,1,3]>(k1)
v = Transpose<perm=[0,2,1,3]>(v1)"""
BACK = "c1 = Transpose<perm=[0,2,1,3]>(c)  a = Reshape(c1, back)"
COMMON = "heads=0,0,4,4 few=0,0,2,4 back=0,0,16 i0=0 i1=1 i2=2 i3=3 i4=4"
FEW = """q1 = Reshape(q0, heads)  k1 = Reshape(k0, few)  v1 = Reshape(v0, few)
q = Transpose<perm=[0,2,1,3]>(q1)  k2 = Transpose<perm=[0,2,1,3]>(k1)
v2 = Transpose<perm=[0,2,1,3]>(v1)"""
FEW_WEIGHTS = "wq:12,16 wk:12,8 wv:12,8"


def attend(scores: str = "s = Identity(s0)", values: str = "c = MatMul(w, v)") -> str:
    """a from q, kt and v; `scores` makes s from s0, `values` c from the softmax w and v."""
    return f"""k = Transpose<perm=[0,1,3,2]>(kt)  s0 = MatMul(q, k)  {scores}
    w = Softmax(s)  {values}  {BACK}"""


@dataclass(frozen=True)
class Form:
    """`body` makes a from n; `stays`: weights that keep their size or go into constants."""

    name: str
    body: str
    weights: str
    stays: frozenset[str] = field(default_factory=frozenset)

    def model(self) -> onnx.ModelProto:
        """One block with a residual stream."""
        weights = f"{STREAM} wo:16,12 {self.weights} {COMMON}"
        model = build(SIGNATURE, f"{BEFORE}\n{self.body}\n{AFTER}", weights)
        onnx.checker.check_model(model, full_check=True)
        return model


def separate(name: str, body: str, weights: str = "", *stays: str) -> Form:
    """q, k and v by three layers."""
    return Form(name, f"{SEPARATE}  {body}", f"{WEIGHTS} {weights}", frozenset(stays))


def packed(name: str, body: str, weights: str = "") -> Form:
    """q, k and v by one layer."""
    return Form(name, f"{PACKED}  {body}", f"{PACKED_WEIGHTS} {weights}")


def grouped(name: str, body: str, weights: str = "") -> Form:
    """Two query heads share a key and a value head."""
    return Form(name, f"{SEPARATE}  {FEW}  {body}", f"{FEW_WEIGHTS} {weights}")


def repeated(how: str) -> str:
    """Keys and values of two heads become those of four."""
    lines = []
    for source, result in (("k", "kt"), ("v", "v")):
        line = f"X3 = Unsqueeze(X2, i2)  X4 = {how}  Y = Reshape(X4, four)"
        lines.append(line.replace("X", source).replace("Y", result))
    return "  ".join(lines)


def both(lines: str) -> str:
    """The same on q and k: T is one of their letters, OUT is q or kt."""
    return "\n".join(lines.replace("OUT", o).replace("T", t) for t, o in (("q", "q"), ("k", "kt")))


PACKINGS = [
    packed(
        "split",
        f"q0, k0, v0 = Split<axis=-1>(p, parts)  {HEADS}  {TURN}  {attend()}",
        "parts=16,16,16",
    ),
    packed(
        "slices",
        f"""q0 = Slice(p, i0, i16, i2)  k0 = Slice(p, i16, i32, i2)  v0 = Slice(p, i32, i48, i2)
        {HEADS}  {TURN}  {attend()}""",
        "i16=16 i32=32 i48=48",
    ),
    packed(
        "three-then-heads",
        f"""p1 = Reshape(p, five)  q5 = Slice(p1, i0, i1, i2)  k5 = Slice(p1, i1, i2, i2)
        v5 = Slice(p1, i2, i3, i2)  q1 = Squeeze(q5, i2)  k1 = Squeeze(k5, i2)
        v1 = Squeeze(v5, i2)  {TURN}  {attend()}""",
        "five=0,0,3,4,4",
    ),
    packed(
        "heads-then-three",
        f"""p1 = Reshape(p, five)  z0 = Constant<value_int=0>()  z1 = Constant<value_int=1>()
        z2 = Constant<value_int=2>()  q1 = Gather<axis=3>(p1, z0)  k1 = Gather<axis=3>(p1, z1)
        v1 = Gather<axis=3>(p1, z2)  {TURN}  {attend()}""",
        "five=0,0,4,3,4",
    ),
    packed(
        "split-of-a-turned-tensor",
        f"""p1 = Reshape(p, five)  p2 = Transpose<perm=[0,2,3,1,4]>(p1)
        q5, k5, v5 = Split<axis=2>(p2, ones)  q = Squeeze(q5, i2)  kt = Squeeze(k5, i2)
        v = Squeeze(v5, i2)  {attend()}""",
        "five=0,0,4,3,4 ones=1,1,1",
    ),
    packed(
        "heads-of-all",
        f"p1 = Reshape(p, twelve)  q1, k1, v1 = Split<axis=2>(p1, fours)  {TURN}  {attend()}",
        "twelve=0,0,12,4 fours=4,4,4",
    ),
    packed(
        "three-in-each-head",
        f"p1 = Reshape(p, four)  q1, k1, v1 = Split<axis=3>(p1, fours)  {TURN}  {attend()}",
        "four=0,0,4,12 fours=4,4,4",
    ),
    Form(
        "gemm-of-rows",
        f"""d = Shape(n)  d2 = Slice(d, i0, i2)  wide = Concat<axis=0>(d2, all)
        rows = Reshape(n, flat)  p0 = Gemm(rows, wqkv, bqkv)  p = Reshape(p0, wide)
        q0, k0, v0 = Split<axis=-1>(p, parts)  {HEADS}  {TURN}  {attend()}""",
        f"{PACKED_WEIGHTS} flat=-1,12 all=48 parts=16,16,16",
    ),
    Form(
        "einsum-of-three",
        f"""p = Einsum<equation="bnc,cthd->tbhnd">(n, wqkv)  q5, k5, v5 = Split<axis=0>(p, ones)
        q = Squeeze(q5, i0)  kt = Squeeze(k5, i0)  v = Squeeze(v5, i0)  {attend()}""",
        "wqkv:12,3,4,4 ones=1,1,1",
    ),
]
GROUPED = [
    grouped("repeat-by-tile", f"{repeated('Tile(X3, twice)')}  {attend()}",
            "twice=1,1,2,1,1 four=0,4,5,4"),
    grouped("repeat-by-concat", f"{repeated('Concat<axis=2>(X3, X3)')}  {attend()}",
            "four=0,4,5,4"),
    grouped("repeat-by-expand", f"{repeated('Expand(X3, wide)')}  {attend()}",
            "wide=1,2,2,5,4 four=0,4,5,4"),
    grouped("repeat-by-gather",
            f"kt = Gather<axis=1>(k2, pick)  v = Gather<axis=1>(v2, pick)  {attend()}",
            "pick=0,0,1,1"),
    Form("groups-by-broadcasting",
         f"""{SEPARATE}  q1 = Reshape(q0, five)  q = Transpose<perm=[0,2,3,1,4]>(q1)
         k1 = Reshape(k0, few)  v1 = Reshape(v0, few)  k2 = Transpose<perm=[0,2,3,1]>(k1)
         v2 = Transpose<perm=[0,2,1,3]>(v1)  k = Unsqueeze(k2, i2)  v = Unsqueeze(v2, i2)
         s = MatMul(q, k)  w = Softmax(s)  c = MatMul(w, v)
         c1 = Transpose<perm=[0,3,1,2,4]>(c)  a = Reshape(c1, back)""",
         f"{FEW_WEIGHTS} five=0,0,2,2,4"),
    Form("one-key-head",
         f"""{SEPARATE}  q1 = Reshape(q0, heads)  q = Transpose<perm=[0,2,1,3]>(q1)
         kt = Unsqueeze(k0, i1)  v = Unsqueeze(v0, i1)  {attend()}""",
         "wq:12,16 wk:12,4 wv:12,4"),
]  # fmt: skip
ROTATED = [
    separate(
        "rotary-halves",
        f"""{HEADS}  {TURN_RAW}  {
            both('''Tx = Mul(Tr, cos)  Tl = Slice(Tr, i0, i2, i3)
        Th = Slice(Tr, i2, i4, i3)  Tn = Neg(Th)  Ts = Concat<axis=3>(Tn, Tl)  Ty = Mul(Ts, sin)
        OUT = Add(Tx, Ty)''')
        }  {attend()}""",
        "cos:5,4 sin:5,4",
        "cos",
        "sin",
    ),
    separate(
        "rotary-turns",
        f"""{HEADS}  {TURN_RAW}  {
            both('''Ta = Slice(Tr, i0, i4, i3, i2)  Tb = Slice(Tr, i1, i4, i3, i2)
        Tc = Mul(Ta, cos)  Td = Mul(Tb, sin)  Te = Sub(Tc, Td)  Tf = Mul(Ta, sin)
        Tg = Mul(Tb, cos)  Th = Add(Tf, Tg)  Ti = Unsqueeze(Te, i4)  Tj = Unsqueeze(Th, i4)
        Tp = Concat<axis=4>(Ti, Tj)  OUT = Reshape(Tp, flat)''')
        }  {attend()}""",
        "cos:5,2 sin:5,2 flat=0,0,0,4",
        "cos",
        "sin",
    ),
    separate(
        "rotary-of-a-part",
        f"""{HEADS}  {TURN_RAW}  {
            both('''Tq = Slice(Tr, i0, i2, i3)  Tu = Slice(Tr, i2, i4, i3)
        Tx = Mul(Tq, cos)  Tl = Slice(Tq, i0, i1, i3)  Th = Slice(Tq, i1, i2, i3)  Tn = Neg(Th)
        Ts = Concat<axis=3>(Tn, Tl)  Ty = Mul(Ts, sin)  Tw = Add(Tx, Ty)
        OUT = Concat<axis=3>(Tw, Tu)''')
        }  {attend()}""",
        "cos:5,2 sin:5,2",
        "cos",
        "sin",
    ),
]
SQUARE = "0,1,2,3,4,1,0,1,2,3,2,1,0,1,2,3,2,1,0,1,4,3,2,1,0"
SCORES = [
    separate(
        "bias-table",
        f"""ids = Reshape(index, square)  {HEADS}  {TURN}  {
            attend('''t0 = Gather(table, ids)  t1 = Transpose<perm=[2,0,1]>(t0)
        t = Unsqueeze(t1, i0)  s = Add(s0, t)''')
        }""",
        f"table:7,4 square=5,5 index={SQUARE}",
    ),
    separate(
        "window-bias-table",
        f"""{HEADS}  {TURN}  {
            attend('''t0 = Gather(table, index)  t1 = Reshape(t0, square)
        t2 = Transpose<perm=[2,0,1]>(t1)  t = Unsqueeze(t2, i0)  s = Add(s0, t)''')
        }""",
        f"table:7,4 square=5,5,-1 index={SQUARE}",
    ),
    separate(
        "slopes",
        f"{HEADS}  {TURN}  {attend('t = Mul(slopes, places)  s = Add(s0, t)')}",
        "slopes:4,1,1 places:1,1,5",
        "places",
    ),
    separate(
        "relative-keys",
        f"""{HEADS}  {TURN}  {
            attend('''t = Einsum<equation="bhld,lrd->bhlr">(q, distance)
        s = Add(s0, t)''')
        }""",
        "distance:5,5,4",
        "distance",
    ),
    separate(
        "window-mask",
        f"""{HEADS}  {TURN}  near = Less(far, limit)  {attend("s = Where(near, s0, low)")}""",
        "far:1,1,5,5 limit:1 low:1",
        "far",
        "limit",
        "low",
    ),
    separate(
        "talking-heads",
        f"""{HEADS}  {TURN}  {
            attend('''s1 = Transpose<perm=[0,2,3,1]>(s0)  s2 = MatMul(s1, mix)
        s = Transpose<perm=[0,3,1,2]>(s2)''')
        }""",
        "mix:4,4",
    ),
    separate(
        "gated-heads",
        f"""{HEADS}  {TURN}  {
            attend(
                values='''c0 = MatMul(w, v)  g0 = MatMul(n, wg)  g = Sigmoid(g0)
        g3 = Transpose<perm=[0,2,1]>(g)  g4 = Unsqueeze(g3, i3)  c = Mul(c0, g4)'''
            )
        }""",
        "wg:12,4",
    ),
    separate(
        "normalized-queries-and-keys",
        f"""q9 = Reshape(q0, heads)  k9 = Reshape(k0, heads)  v1 = Reshape(v0, heads)
        q1 = LayerNormalization(q9, gq, bq)  k1 = LayerNormalization(k9, gk, bk)
        {TURN}  {attend()}""",
        "gq:4 bq:4 gk:4 bk:4",
        *("gq", "bq", "gk", "bk"),
    ),
]
PRODUCTS = [
    separate(
        "heads-in-the-batch",
        f"""{HEADS}  {TURN}  qb = Reshape(q, rows)  kb = Reshape(kt, rows)  vb = Reshape(v, rows)
        k = Transpose<perm=[0,2,1]>(kb)  s0 = MatMul(qb, k)  s1 = Reshape(s0, square)
        s2 = Add(s1, mask)  s = Reshape(s2, merged)  w = Softmax(s)  c0 = MatMul(w, vb)
        c = Reshape(c0, four)  {BACK}""",
        "rows=-1,5,4 square=-1,4,5,5 merged=-1,5,5 four=-1,4,5,4 mask:1,1,5,5",
        "mask",
    ),
    separate(
        "einsum",
        f"""{HEADS}  {TURN}  s = Einsum<equation="bhid,bhjd->bhij">(q, kt)  w = Softmax(s)
        c1 = Einsum<equation="bhij,bhjd->bihd">(w, v)  a = Reshape(c1, back)""",
    ),
    separate(
        "channels-attend",
        f"""{HEADS}  q = Transpose<perm=[0,2,3,1]>(q1)  k = Transpose<perm=[0,2,1,3]>(k1)
        v = Transpose<perm=[0,2,3,1]>(v1)  u = LpNormalization<axis=3, p=2>(q)  s = MatMul(u, k)
        w = Softmax(s)  c = MatMul(w, v)  c1 = Transpose<perm=[0,3,1,2]>(c)
        a = Reshape(c1, back)""",
    ),
    separate(
        "linear-attention",
        f"""{HEADS}  {TURN}  qs = Softmax<axis=3>(q)  ks = Softmax<axis=2>(kt)
        k = Transpose<perm=[0,1,3,2]>(ks)  state = MatMul(k, v)  c = MatMul(qs, state)  {BACK}""",
    ),
    Form(
        "learned-queries",
        f"""q0 = MatMul(learned, wq)  k0 = MatMul(n, wk)  v0 = MatMul(n, wv)
        {HEADS}  {TURN}  {attend()}""",
        f"{WEIGHTS} learned:1,5,12",
        frozenset(("learned", "wq")),
    ),
]
FORMS = [*PACKINGS, *GROUPED, *ROTATED, *SCORES, *PRODUCTS]


@pytest.mark.parametrize("form", [pytest.param(form, id=form.name) for form in FORMS])
def test_heads_and_the_residual_stream_go(form: Form) -> None:
    model = form.model()
    for scope in ("exact", "all"):
        pruned = prune_half(model, scope)
        assert verify.structure_problems(pruned.model, model) == []
        assert pruned.error <= TOLERANCE
        assert pruned.effect > 1e-3
        assert removes_whole_heads(pruned)
    floats = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert shrunk(model, pruned.model) == floats - form.stays


@pytest.mark.parametrize("form", [pytest.param(form, id=form.name) for form in FORMS])
def test_uneven_shares_of_the_channels_of_heads(form: Form) -> None:
    check_uneven(form.model(), Granularity(head_dims=True))


def removes_whole_heads(pruned: Pruned) -> bool:
    """Whether the rows of the output projection that stay are those of whole heads, not of all."""
    kept = np.zeros(16, bool)
    kept[list(pruned.applied.slices["wo"].keep["0"])] = True
    heads = kept.reshape(4, 4)
    return bool((heads == heads[:, :1]).all()) and heads[:, 0].sum() == 2
