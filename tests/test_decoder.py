"""A decoder with a cache of keys and values, as builders for ONNX Runtime write it."""

from __future__ import annotations

import onnx
import pytest

from onnxprune import runtime, verify
from onnxprune.cost import count_params
from tests.graphs import TOLERANCE, prune_half, shapes
from tests.rows import MICROSOFT, Row, build

SIGNATURE = """(int64[batch_size,sequence_length] ids,
    int64[batch_size,total_sequence_length] mask,
    float[batch_size,2,past_sequence_length,16] pk, float[batch_size,2,past_sequence_length,16] pv)
    => (float[batch_size,sequence_length,50] y, float[batch_size,2,total_sequence_length,16] nk,
    float[batch_size,2,total_sequence_length,16] nv)"""
BODY = """e = Gather(table, ids)
    ones = ReduceSum<keepdims=1>(mask, axis)  before = Sub(ones, one)
    wide = Cast<to=6>(before)  last = Squeeze(wide, axis)
    d = Shape(mask)  t0 = Gather(d, place)  t1 = Cast<to=6>(t0)  total = Squeeze(t1, zero)
    n = SimplifiedLayerNormalization(e, g0)
    {qkv}
    a, nk, nv = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>(
        {call}, pk, pv, last, total, cos, sin)
    o = MatMul(a, wo)
    m, , , r = com.microsoft.SkipSimplifiedLayerNormalization(e, o, g1)
    gate = MatMul(m, wg)  s = Sigmoid(gate)  act = Mul(gate, s)  up = MatMul(m, wu)
    h = Mul(act, up)  f = MatMul(h, wd)
    z = com.microsoft.SkipSimplifiedLayerNormalization(r, f, g2)
    y = MatMul(z, head)"""
WEIGHTS = """table:50,16 g0:16 g1:16 g2:16 wo:64,16 wg:16,24 wu:16,24 wd:24,16 head:16,50
    cos:64,8 sin:64,8 axis=1 one=1 place=1 zero=0"""


def decoder(packed: bool) -> onnx.ModelProto:
    """One layer, grouped queries, rotary positions inside of the attention."""
    qkv, call, weights = "q = MatMul(n, wq)", "q, , ", "wq:16,128"
    if not packed:
        qkv = "q = MatMul(n, wq)  k = MatMul(n, wk)  v = MatMul(n, wv)"
        call, weights = "q, k, v", "wq:16,64 wk:16,32 wv:16,32"
    body = BODY.format(qkv=qkv, call=call)
    model = build(SIGNATURE, body, f"{WEIGHTS} {weights}", imports=MICROSOFT, ir=10)
    for node in model.graph.node:
        node.name = node.output[0]
    return model


@pytest.mark.parametrize("packed", [True, False])
def test_query_heads_and_channels_go_and_the_cache_stays(packed: bool) -> None:
    model = decoder(packed)
    for feeds in runtime.working_feeds(model):
        assert feeds["mask"].shape[1] == feeds["pk"].shape[2] + feeds["ids"].shape[1]
    pruned = prune_half(model)
    assert verify.structure_problems(pruned.model, model) == []
    left = shapes(pruned.model)
    assert (left["wo"], left["wd"], left["table"]) == ((32, 8), (12, 8), (50, 8))
    assert left["wq"] == (8, 96 if packed else 32)
    if not packed:
        assert left["wk"] == left["wv"] == (8, 32)
    assert count_params(pruned.model) < 0.6 * count_params(model)
    feeds = runtime.working_feeds(model)
    error = verify.twin_error(pruned.analysis.coupling, pruned.keep, pruned.model, feeds, threads=1)
    assert error <= TOLERANCE


CACHED = """(float[N,5,12] x, float[N,2,P,4] pk, float[N,2,P,4] pv)
    => (float[N,5,3] y, float[N,2,T,4] nk, float[N,2,T,4] nv)"""
REPEATED = """q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)
    q1 = Reshape(q0, heads)  k1 = Reshape(k0, few)  v1 = Reshape(v0, few)
    q = Transpose<perm=[0,2,1,3]>(q1)  k2 = Transpose<perm=[0,2,1,3]>(k1)
    v2 = Transpose<perm=[0,2,1,3]>(v1)
    nk = Concat<axis=2>(pk, k2)  nv = Concat<axis=2>(pv, v2)  d = Shape(nk)
    n = Slice(d, i0, i1)  t = Slice(d, i2, i3)  four = Concat<axis=0>(n, c4, t, c4)
    wide = Concat<axis=0>(n, c2, c2, t, c4)
    k3 = Unsqueeze(nk, i2)  v3 = Unsqueeze(nv, i2)  {repeat}
    k5 = Reshape(k4, four)  v = Reshape(v4, four)  k = Transpose<perm=[0,1,3,2]>(k5)
    s = MatMul(q, k)  w = Softmax(s)  c = MatMul(w, v)  c1 = Transpose<perm=[0,2,1,3]>(c)
    a = Reshape(c1, back)  y = MatMul(a, wo)"""


@pytest.mark.parametrize(
    "repeat",
    [
        "k4 = Expand(k3, wide)  v4 = Expand(v3, wide)",
        "k4 = Tile(k3, times)  v4 = Tile(v3, times)",
    ],
)
def test_without_fused_attention_query_heads_go_evenly_from_each_group(repeat: str) -> None:
    row = Row(
        "cached",
        CACHED,
        REPEATED.format(repeat=repeat),
        """wq:12,16 wk:12,8 wv:12,8 wo:16,3 heads=0,0,4,4 few=0,0,2,4 back=0,0,16 times=1,1,2,1,1
        i0=0 i1=1 i2=2 i3=3 c2=2 c4=4""",
        "wq wo",
    )
    row.check()
    kept = prune_half(row.model()).applied.slices["wo"].keep["0"]
    assert {i // 4 for i in kept} in ({0, 2}, {1, 3})
