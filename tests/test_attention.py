"""Fused attention in every form: heads, or channels within heads, go as in the masked twin."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune import runtime, verify
from onnxprune.analysis import analyse
from onnxprune.errors import OnnxPruneError
from onnxprune.granularity import Granularity
from onnxprune.ops import REWRITES
from onnxprune.passes.apply import apply_keep
from onnxprune.pipeline import inspect
from tests.graphs import TOLERANCE, prune_half, shapes
from tests.rows import Row, check_uneven

SEQUENCE = "(float[N,S,8] x) => (float[N,S,8] y)"
FIXED = "(float[2,5,8] x) => (float[2,5,8] y)"
CACHED = """(float[N,S,8] x, float[N,4,P,4] pk, float[N,4,P,4] pv)
    => (float[N,S,8] y, float[N,4,T,4] nk, float[N,4,T,4] nv)"""
QKV = "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
OUT = "y = MatMul(a, o)"
WEIGHTS = "wq:8,16 wk:8,16 wv:8,16 o:16,8"
GROUPED = "wq:8,32 wk:8,16 wv:8,16 o:32,8"
ALL = "wq wk wv o"
HEADS = "q_num_heads=4, kv_num_heads=4"
MS = "com.microsoft"


def attention(
    name: str,
    call: str,
    weights: str = WEIGHTS,
    shrinks: str = ALL,
    *,
    more: str = "",
    **options: object,
) -> Row:
    """`call` makes a from q, k and v, which are projections of x; y is a projection of a."""
    signature = str(options.pop("signature", SEQUENCE))
    text = f"{more}\n{QKV}\n{call}\n{OUT}"
    return Row(name, signature, text, weights, shrinks, opset=24, **options)  # type: ignore[arg-type]


STANDARD = [
    attention("3d", f"a = Attention<{HEADS}>(q, k, v)"),
    attention(
        "3d-wider-values",
        f"a = Attention<{HEADS}, softcap=2.0>(q, k, v)",
        "wq:8,16 wk:8,16 wv:8,24 o:24,8",
    ),
    attention("3d-one-head", "a = Attention<q_num_heads=1, kv_num_heads=1>(q, k, v)"),
    attention(
        "3d-one-head-with-scale", "a = Attention<q_num_heads=1, kv_num_heads=1, scale=0.3>(q, k, v)"
    ),
    attention("3d-grouped", "a = Attention<q_num_heads=8, kv_num_heads=4>(q, k, v)", GROUPED),
    attention(
        "3d-multi-query",
        "a = Attention<q_num_heads=8, kv_num_heads=1, is_causal=1>(q, k, v)",
        "wq:8,32 wk:8,4 wv:8,4 o:32,8",
        "wq o",
    ),
    attention(
        "mask-of-one-head",
        f"a = Attention<{HEADS}>(q, k, v, m)",
        signature="(float[N,S,8] x, float[N,1,S,S] m) => (float[N,S,8] y)",
    ),
    attention(
        "mask-for-each-head",
        f"a = Attention<{HEADS}>(q, k, v, m)",
        f"{WEIGHTS} m:4,5,5",
        f"{ALL} m",
        signature=FIXED,
    ),
    attention(
        "mask-of-the-model-keeps-heads",
        f"a = Attention<{HEADS}>(q, k, v, m)",
        signature="(float[N,S,8] x, float[N,4,S,S] m) => (float[N,S,8] y)",
    ),
    attention(
        "cache", f"a, nk, nv = Attention<{HEADS}>(q, k, v, , pk, pv)", shrinks="", signature=CACHED
    ),
    attention(
        "cache-grouped",
        "a, nk, nv = Attention<q_num_heads=8, kv_num_heads=4>(q, k, v, , pk, pv)",
        GROUPED,
        "wq o",
        signature=CACHED,
    ),
    Row(
        "scores",
        SEQUENCE,
        f"""{QKV}  a, , , s = Attention<{HEADS}, qk_matmul_output_mode=3>(q, k, v)
        t = ReduceSum(s, axes)  u = Reshape(t, column)  b = MatMul(a, o)  y = Add(b, u)""",
        f"{WEIGHTS} axes=1,3 column=0,-1,1",
        ALL,
        opset=24,
    ),
    attention(
        "4d-grouped",
        """q1 = Reshape(q, eight)  k1 = Reshape(k, four)  v1 = Reshape(v, four)
        q2 = Transpose<perm=[0,2,1,3]>(q1)  k2 = Transpose<perm=[0,2,1,3]>(k1)
        v2 = Transpose<perm=[0,2,1,3]>(v1)  b = Attention<is_causal=1>(q2, k2, v2)
        b1 = Transpose<perm=[0,2,1,3]>(b)  a = Reshape(b1, flat)""",
        f"{GROUPED} eight=0,0,8,4 four=0,0,4,4 flat=0,0,-1",
    ),
    attention(
        "rotary",
        """q1 = RotaryEmbedding<num_heads=8>(q, cos, sin, p)
        k1 = RotaryEmbedding<num_heads=4>(k, cos, sin, p)
        a = Attention<q_num_heads=8, kv_num_heads=4>(q1, k1, v)""",
        f"{GROUPED} cos:16,2 sin:16,2",
        signature="(float[N,S,8] x, int64[N,S] p) => (float[N,S,8] y)",
    ),
    attention(
        "rotary-one-head",
        """q1 = RotaryEmbedding<num_heads=1>(q, cos, sin, p)
        k1 = RotaryEmbedding<num_heads=1>(k, cos, sin, p)
        a = Attention<q_num_heads=1, kv_num_heads=1>(q1, k1, v)""",
        f"{WEIGHTS} cos:16,8 sin:16,8",
        "wv o",
        signature="(float[N,S,8] x, int64[N,S] p) => (float[N,S,8] y)",
    ),
    attention(
        "tensor-scatter",
        f"""k1 = Reshape(k, four)  k2 = Transpose<perm=[0,2,1,3]>(k1)  z = Mul(k2, zero)
        k3 = TensorScatter(z, k2)  k4 = Transpose<perm=[0,2,1,3]>(k3)  k5 = Reshape(k4, flat)
        a = Attention<{HEADS}>(q, k5, v)""",
        f"{WEIGHTS} zero:1 four=0,0,4,4 flat=0,0,-1",
    ),
]
PACKED = [
    Row(
        "packed",
        SEQUENCE,
        f"a = {MS}.Attention<num_heads=4>(x, w, b)  {OUT}",
        "w:8,48 b:48 o:16,8",
        "w b o",
    ),
    Row(
        "packed-causal-without-bias",
        SEQUENCE,
        f"a = {MS}.Attention<num_heads=4, unidirectional=1>(x, w)  {OUT}",
        "w:8,48 o:16,8",
        "w o",
    ),
    Row(
        "packed-narrow-values",
        SEQUENCE,
        f"a = {MS}.Attention<num_heads=4, qkv_hidden_sizes=[16,16,8]>(x, w, b)  {OUT}",
        "w:8,40 b:40 o:8,8",
        "w b o",
    ),
    Row(
        "packed-one-head",
        SEQUENCE,
        f"h = MatMul(x, e)  a = {MS}.Attention<num_heads=1>(h, w, b)  {OUT}",
        "e:8,12 w:12,48 b:48 o:16,8",
        "e w b o",
    ),
    Row(
        "packed-bias-and-mask",
        "(float[2,5,8] x, int32[2,5] m) => (float[2,5,8] y)",
        f"a = {MS}.Attention<num_heads=4>(x, w, b, m, , s)  {OUT}",
        "w:8,48 b:48 o:16,8 s:1,4,5,5",
        "w b o s",
    ),
    Row(
        "packed-cache",
        "(float[N,S,8] x, float[2,N,4,P,4] p) => (float[N,S,8] y, float[2,N,4,T,4] n)",
        f"h = MatMul(x, e)  a, n = {MS}.Attention<num_heads=4>(h, w, b, , p)  {OUT}",
        "e:8,12 w:12,48 b:48 o:16,8",
        "e w",
    ),
]
LENGTHS = "l = Cast<to=6>(last)  t = Cast<to=6>(total)"
GROUP_QUERY = f"{MS}.GroupQueryAttention<num_heads=4, kv_num_heads=2"
GROUP_WEIGHTS = "wq:8,32 wk:8,16 wv:8,16 o:32,8 last=4,4 total=5"
MULTI = f"{MS}.MultiHeadAttention<num_heads=4>"
POSITIONS = "(float[N,S,8] x, int64[N,S] p) => (float[N,S,8] y)"
MULTI_HEAD = [
    attention("multi-head", f"a = {MULTI}(q, k, v)"),
    attention(
        "multi-head-bias-and-wide-values",
        f"a = {MULTI}(q, k, v, b)",
        "wq:8,16 wk:8,16 wv:8,24 b:56 o:24,8",
        f"{ALL} b",
    ),
    attention(
        "multi-head-of-one",
        f"a = {MS}.MultiHeadAttention<num_heads=1>(q, k, v, b)",
        f"{WEIGHTS} b:48",
        f"{ALL} b",
    ),
    attention(
        "multi-head-scores",
        f"a = {MULTI}(q, k, v, b, , s)",
        f"{WEIGHTS} b:48 s:1,4,5,5",
        f"{ALL} b s",
        signature=FIXED,
    ),
    attention(
        "multi-head-cache",
        f"a, nk, nv = {MULTI}(q, k, v, , , , pk, pv)",
        shrinks="",
        signature=CACHED,
    ),
    attention(
        "multi-head-cross",
        f"""k1 = Reshape(k, four)  k2 = Transpose<perm=[0,2,1,3]>(k1)
        v1 = Reshape(v, four)  v2 = Transpose<perm=[0,2,1,3]>(v1)  a = {MULTI}(q, k2, v2)""",
        f"{WEIGHTS} four=0,0,4,4",
    ),
    attention(
        "multi-head-decoder",
        f"""p = Cast<to=6>(place)  a, nk, nv = {MS}.DecoderMaskedMultiHeadAttention<
        num_heads=4, past_present_share_buffer=1>(q, k, v, , , pk, pv, p, , , b)""",
        f"{WEIGHTS} b:48 place=3",
        "",
        signature="""(float[2,1,8] x, float[2,4,6,4] pk, float[2,4,6,4] pv)
        => (float[2,1,8] y, float[2,4,6,4] nk, float[2,4,6,4] nv)""",
    ),
    attention(
        "multi-head-rotary",
        f"""q1 = {MS}.RotaryEmbedding(q, p, cos, sin)
        k1 = {MS}.RotaryEmbedding<num_heads=4, rotary_embedding_dim=4>(k, p, cos, sin)
        a = {MULTI}(q1, k1, v)""",
        f"{WEIGHTS} cos:16,2 sin:16,2",
        signature=POSITIONS,
    ),
    attention(
        "multi-head-rotary-4d",
        f"""q1 = Reshape(q, four)  q2 = Transpose<perm=[0,2,1,3]>(q1)
        q3 = {MS}.RotaryEmbedding(q2, p, cos, sin)
        q4 = Transpose<perm=[0,2,1,3]>(q3)  q5 = Reshape(q4, flat)  a = {MULTI}(q5, k, v)""",
        f"{WEIGHTS} cos:16,2 sin:16,2 four=0,0,4,4 flat=0,0,-1",
        signature=POSITIONS,
    ),
    attention(
        "multi-head-rotary-of-images",
        f"""q1 = {MS}.MRotaryEmbedding<num_heads=4, rotary_embedding_dim=4,
        mrope_section=[1,1,0]>(q, p, cos, sin)  a = {MULTI}(q1, k, v)""",
        f"{WEIGHTS} cos:16,2 sin:16,2",
        signature="(float[N,S,8] x, int64[3,N,S] p) => (float[N,S,8] y)",
    ),
    attention(
        "group-query",
        f"a = {GROUP_QUERY}>(q, k, v, , , l, t)",
        GROUP_WEIGHTS,
        more=LENGTHS,
        signature=FIXED,
    ),
    attention(
        "group-query-sink-and-scores",
        f"a = {GROUP_QUERY}, causal=0>(q, k, v, , , l, t, , , , s, h)",
        f"{GROUP_WEIGHTS} s:1,4,5,5 h:4",
        f"{ALL} s h",
        more=LENGTHS,
        signature=FIXED,
    ),
    attention(
        "group-query-of-one",
        f"a = {MS}.GroupQueryAttention<num_heads=4, kv_num_heads=1>(q, k, v, , , l, t)",
        "wq:8,32 wk:8,8 wv:8,8 o:32,8 last=4,4 total=5",
        "wq o",
        more=LENGTHS,
        signature=FIXED,
    ),
    attention(
        "group-query-cache",
        f"a, nk, nv = {GROUP_QUERY}>(q, k, v, pk, pv, l, t)",
        "wq:8,32 wk:8,16 wv:8,16 o:32,8 last=7 total=8",
        "wq o",
        more=LENGTHS,
        signature="""(float[1,5,8] x, float[1,2,3,8] pk, float[1,2,3,8] pv)
        => (float[1,5,8] y, float[1,2,8,8] nk, float[1,2,8,8] nv)""",
    ),
    Row(
        "group-query-packed-and-rotary",
        FIXED,
        f"{LENGTHS} q = MatMul(x, w) a = {GROUP_QUERY}, do_rotary=1>(q, , , , , l, t, c, s) {OUT}",
        "w:8,128 o:64,8 c:32,8 s:32,8 last=4,4 total=5",
        "w o",
    ),
]
LINEAR = [
    attention(
        "linear-delta",
        f"""d1 = MatMul(x, wd)  d2 = Sigmoid(d1)  d = Neg(d2)  b1 = MatMul(x, wb)  b = Sigmoid(b1)
        a, s = {MS}.LinearAttention<{HEADS}, update_rule="gated_delta">(q, k, v, , d, b)""",
        f"{WEIGHTS} wd:8,4 wb:8,4",
        f"{ALL} wd wb",
    ),
    attention(
        "linear-one-head",
        f"""d1 = MatMul(x, wd)  d2 = Sigmoid(d1)  d = Neg(d2)
        a, s = {MS}.LinearAttention<q_num_heads=1, kv_num_heads=1, update_rule="gated">(
        q, k, v, , d)""",
        f"{WEIGHTS} wd:8,16",
        f"{ALL} wd",
    ),
    attention(
        "linear-grouped",
        f"""d1 = MatMul(x, wd)  d2 = Sigmoid(d1)  d = Neg(d2)
        a, s = {MS}.LinearAttention<q_num_heads=8, kv_num_heads=4, update_rule="gated">(
        q, k, v, , d)""",
        f"{GROUPED} wd:8,16",
        f"{ALL} wd",
    ),
    attention(
        "linear-gate",
        f"""d1 = MatMul(x, wd)  b1 = MatMul(x, wb)
        d, b = {MS}.LinearAttentionGate(d1, bias, scale, b1)
        a, s = {MS}.LinearAttention<{HEADS}, update_rule="gated_delta">(q, k, v, , d, b)""",
        f"{WEIGHTS} wd:8,4 wb:8,4 bias:4 scale:4",
        f"{ALL} wd wb bias scale",
    ),
]
ROWS = [*STANDARD, *PACKED, *MULTI_HEAD, *LINEAR]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_half_of_every_group_equals_the_twin(row: Row) -> None:
    row.check()


@pytest.mark.parametrize("head_dims", [False, True])
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_uneven_shares_of_heads_or_of_their_channels(row: Row, head_dims: bool) -> None:
    check_uneven(row.model(), Granularity(head_dims=head_dims))


def test_the_original_scale_is_written_down() -> None:
    row = next(r for r in STANDARD if r.name == "3d-one-head")
    node = _node(prune_half(row.model()).model, "Attention")
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
        "q_num_heads": 1,
        "kv_num_heads": 1,
        "scale": pytest.approx(0.25),
    }


def test_the_numbers_of_heads_are_rewritten() -> None:
    row = next(r for r in STANDARD if r.name == "cache-grouped")
    node = _node(prune_half(row.model()).model, "Attention")
    counts = {a.name: a.i for a in node.attribute}
    assert counts == {"q_num_heads": 4, "kv_num_heads": 4}


def test_a_wrong_scale_is_seen() -> None:
    """Without the original scale the pruned model differs from its twin."""
    row = next(r for r in PACKED if r.name == "packed-one-head")
    model = row.model()
    pruned = prune_half(model)
    assert pruned.error <= TOLERANCE
    node = _node(pruned.model, "Attention")
    (scale,) = [a for a in node.attribute if a.name == "scale"]
    node.attribute.remove(scale)
    feeds = [runtime.random_feeds(model)]
    error = verify.twin_error(pruned.analysis.coupling, pruned.keep, pruned.model, feeds, threads=1)
    assert error > 1e-3


def _node(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op_type)


@pytest.mark.parametrize("shape", ["0,0,4,3,4", "0,0,2,3,8"])
def test_packed_qkv_that_only_other_devices_run(shape: str) -> None:
    heads = int(shape.split(",")[2])
    row = Row(
        "packed-qkv",
        SEQUENCE,
        f"""p = MatMul(x, w)  q = Reshape(p, shape)
        a = {MS}.MultiHeadAttention<num_heads={heads}>(q)  {OUT}""",
        f"w:8,48 o:16,8 shape={shape}",
        "",
    )
    analysis = analyse(row.model())
    (group,) = analysis.groups
    assert (group.size, group.exact) == (heads, True)
    keep = analysis.everything
    keep[group.units[0]] = False
    pruned = apply_keep(analysis.coupling, keep).model
    left = 16 - 16 // heads
    assert shapes(pruned)["w"] == (8, 3 * left)
    assert shapes(pruned)["o"] == (left, 8)
    assert _node(pruned, "MultiHeadAttention").attribute[0].i == heads - 1


def test_packed_key_and_value_that_only_other_devices_run() -> None:
    row = Row(
        "packed-kv",
        SEQUENCE,
        f"""q = MatMul(x, wq)  p = MatMul(x, w)  k = Reshape(p, shape)  a = {MULTI}(q, k)  {OUT}""",
        "wq:8,16 w:8,32 o:16,8 shape=0,0,4,2,4",
        "",
    )
    analysis = analyse(row.model())
    keep = analysis.everything
    keep[analysis.groups[0].units[:2]] = False
    left = shapes(apply_keep(analysis.coupling, keep).model)
    assert (left["wq"], left["w"], left["o"]) == ((8, 8), (8, 16), (8, 8))


def test_a_quantized_cache_keeps_its_heads() -> None:
    body = f"""{LENGTHS}  {QKV}
    a, nk, nv = {GROUP_QUERY}, k_quant_type="PER_TENSOR">(
    q, k, v, pk, pv, l, t, , , , , , ks, vs)  {OUT}"""
    signature = """(float[1,5,8] x, int8[1,K,P,8] pk, int8[1,K,P,8] pv)
    => (float[1,5,8] y, int8[1,K,T,8] nk, int8[1,K,T,8] nv)"""
    weights = "wq:8,32 wk:8,16 wv:8,16 o:32,8 ks:1 vs:1 last=7 total=8"
    report = inspect(Row("quantized", signature, body, weights, "").model())
    reasons = {(row.tensor, row.axis): row.reason for row in report.frozen}
    assert reasons["wk", 1] == "the cache of GroupQueryAttention a is quantized"


def test_heads_can_be_kept_and_their_channels_removed() -> None:
    row = next(r for r in STANDARD if r.name == "3d")
    analysis = analyse(row.model(), granularity=Granularity(head_dims=True))
    assert sorted(g.size for g in analysis.groups) == [4, 4]
    keep = analysis.everything
    for group in analysis.groups:
        keep[group.units[:2]] = False
    pruned = apply_keep(analysis.coupling, keep).model
    node = _node(pruned, "Attention")
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
        "q_num_heads": 4,
        "kv_num_heads": 4,
        "scale": pytest.approx(0.5),
    }
    feeds = [runtime.random_feeds(row.model())]
    assert verify.twin_error(analysis.coupling, keep, pruned, feeds, threads=1) <= TOLERANCE
    assert np.prod(shapes(pruned)["wq"]) == 8 * 8


@pytest.mark.parametrize(
    ("name", "key", "head_dims"),
    [
        ("3d", ("", "Attention"), False),
        ("3d", ("", "Attention"), True),
        ("packed", (MS, "Attention"), False),
        ("packed-narrow-values", (MS, "Attention"), True),
        ("multi-head", (MS, "MultiHeadAttention"), False),
        ("group-query", (MS, "GroupQueryAttention"), False),
        ("linear-one-head", (MS, "LinearAttention"), True),
    ],
)
def test_a_missing_rewrite_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, key: tuple[str, str], head_dims: bool
) -> None:
    model = next(r for r in ROWS if r.name == name).model()
    analysis = analyse(model, granularity=Granularity(head_dims=head_dims))
    keep = analysis.everything
    for group in analysis.groups:
        keep[group.units[1::2]] = False
    feeds = [runtime.random_feeds(model)]

    def error() -> float:
        pruned = apply_keep(analysis.coupling, keep).model
        return verify.twin_error(analysis.coupling, keep, pruned, feeds, threads=1)

    assert error() <= TOLERANCE
    monkeypatch.delitem(REWRITES, key)
    try:
        assert error() > 1e-3
    except OnnxPruneError:  # it does not even run
        return
