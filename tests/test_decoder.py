"""A decoder with a cache of keys and values, as builders for ONNX Runtime write it."""

from __future__ import annotations

import onnx
import pytest

from onnxprune import runtime, verify
from onnxprune.cost import count_params
from tests.graphs import TOLERANCE, prune_half, shapes
from tests.rows import MICROSOFT, build

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
