"""Output shapes of the operators that transformer and graph optimizers put in.

Shapes are those of ONNX Runtime's contrib operators (docs/ContribOperators.md there).
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from onnxprune.graph import Node
from onnxprune.vendor import Dims, Inputs, Outputs, product_dims, shape_rule


def _dims(inputs: Inputs, slot: int) -> Dims:
    """The shape of input `slot`; empty where it is absent."""
    return inputs[slot][0] if slot < len(inputs) else ()


@shape_rule(
    "BiasAdd",
    "BiasDropout",
    "BiasGelu",
    "BiasSoftmax",
    "FastGelu",
    "GatedAdd",
    "GatedRMSNorm",
    "Gelu",
    "GroupNorm",
    "MoE",
    "MRotaryEmbedding",
    "QuickGelu",
    "RotaryEmbedding",
    "ScaledSiLU",
    "SkipGroupNorm",
    "Trilu",
)
def same(node: Node, inputs: Inputs) -> Outputs:
    """x[*D], ... -> y[*D], where there is a second output that one too"""
    return [inputs[0]] * len(node.outputs)


@shape_rule("LayerNormalization", "SimplifiedLayerNormalization", domain="")
@shape_rule("LayerNormalization", "SimplifiedLayerNormalization")
def layer_norm(node: Node, inputs: Inputs) -> Outputs:
    """x[*B, *D], ... -> y[*B, *D], mean[*B, 1, ...], inverse deviation"""
    dims, kind = inputs[0]
    first = node.attr("axis", -1) % len(dims)
    moments = ((*dims[:first], *(1,) * (len(dims) - first)), TensorProto.FLOAT)
    return [(dims, kind), moments, moments]


@shape_rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def skip_layer_norm(node: Node, inputs: Inputs) -> Outputs:
    """x[*B, D], skip, ... -> y[*B, D], mean[*B, 1], inverse deviation[*B, 1], sum[*B, D]"""
    dims, kind = inputs[0]
    moments = ((*dims[:-1], 1), TensorProto.FLOAT)
    return [(dims, kind), moments, moments, (dims, kind)]


@shape_rule("EmbedLayerNormalization")
def embed_layer_norm(node: Node, inputs: Inputs) -> Outputs:
    """ids[B, S], segments, words[V, D], ... -> y[B, S, D], mask index[B], sum[B, S, D]"""
    (batch, length), (table, kind) = inputs[0][0], inputs[2]
    out = ((batch, length, table[1]), kind)
    return [out, ((batch,), TensorProto.INT32), out]


@shape_rule("FusedMatMul", "TransposeMatMul", "GemmFastGelu")
def fused_product(node: Node, inputs: Inputs) -> Outputs:
    """a[*B, M, K], b[*B, K, N], each maybe transposed -> y[*B, M, N]"""
    a = [inputs[0][0][i] for i in operand_order(node, "A", len(inputs[0][0]))]
    b = [inputs[1][0][i] for i in operand_order(node, "B", len(inputs[1][0]))]
    return [(product_dims(tuple(a), tuple(b)), inputs[0][1])]


def operand_order(node: Node, which: str, rank: int) -> list[int]:
    """The axes of operand "A" or "B" in the order batch axes, rows, columns.

    `transBatchA` moves axis 0 behind the batch axes, `transA` swaps rows and columns.
    """
    order = list(range(rank))
    if rank > 2 and node.attr(f"transBatch{which}", 0):
        order = [*order[1:-1], 0, order[-1]]
    if rank > 1 and node.attr(f"trans{which}", 0):
        order[-2:] = order[:-3:-1]
    return order


@shape_rule("FusedConv", "FusedGemm")
def like_the_standard(node: Node, inputs: Inputs) -> Outputs:
    """as Conv and Gemm without the activation"""
    schema = onnx.defs.get_schema(node.op_type.removeprefix("Fused"), 13, "")
    proto = helper.make_node(schema.name, list(node.inputs[:3]), [node.outputs[0]])
    proto.attribute.extend(a for a in node.proto.attribute if a.name in schema.attributes)
    kinds = {
        name: helper.make_tensor_type_proto(kind, dims)
        for name, (dims, kind) in zip(node.inputs[:3], inputs[:3], strict=True)
        if name
    }
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, proto, kinds)
    except onnx.shape_inference.InferenceError as error:
        raise ValueError(str(error)) from error
    tensor = found[node.outputs[0]].tensor_type
    return [(tuple(d.dim_value for d in tensor.shape.dim), inputs[0][1])]


@shape_rule("BiasSplitGelu")
def split_gelu(node: Node, inputs: Inputs) -> Outputs:
    """x[*B, 2 * D], bias -> y[*B, D]"""
    dims, kind = inputs[0]
    return [((*dims[:-1], dims[-1] // 2), kind)]


@shape_rule("Attention")
def attention(node: Node, inputs: Inputs) -> Outputs:
    """x[B, S, I], w[I, 2 * H + V], ..., past[2, B, N, P, d] -> y[B, S, V], present"""
    (batch, length, _), kind = inputs[0]
    width = _dims(inputs, 1)[1]
    sizes = node.attr("qkv_hidden_sizes") or [width // 3] * 3
    heads, past = node.attr("num_heads"), _dims(inputs, 4)
    shared = node.attr("past_present_share_buffer", 0)
    total = past[3] if past and shared else length + (past[3] if past else 0)
    present = (2, batch, heads, total, sizes[1] // heads)
    return [((batch, length, sizes[2]), kind), (present, kind)]


@shape_rule("MultiHeadAttention", "DecoderMaskedMultiHeadAttention")
def multi_head(node: Node, inputs: Inputs) -> Outputs:
    """q[B, S, H], k[B, L, H], v[B, L, V], ... -> y[B, S, V], present k and v, weights[B, N, S, T]

    Also packed qkv[B, S, N, 3, d], packed kv[B, L, N, 2, d], and k, v as [B, N, L, d].
    """
    heads, (query, kind) = node.attr("num_heads"), inputs[0]
    key, value = _dims(inputs, 1), _dims(inputs, 2)
    batch, length = query[:2]
    past = _dims(inputs, 6 if node.op_type == "MultiHeadAttention" else 5)
    shared = node.attr("past_present_share_buffer", 0)
    if not key and len(query) == 3:
        raise ValueError("packed qkv of three axes")
    keys, size = (length, query[4]) if not key else (key[1], query[2] // heads)
    wide = size * heads
    if value:
        keys, wide = (value[1], value[2]) if len(value) == 3 else (value[2], value[3] * heads)
    total = past[2] if past and shared else keys + (past[2] if past else 0)
    return [
        ((batch, length, wide), kind),
        ((batch, heads, total, size), kind),
        ((batch, heads, total, wide // heads), kind),
        ((batch, heads, length, total), kind),
    ]


@shape_rule("GroupQueryAttention")
def group_query(node: Node, inputs: Inputs) -> Outputs:
    """q[B, S, N * d], k[B, L, K * d], v, past k[B, K, P, d], ... -> y[B, S, N * d], present k, v"""
    heads, shared_heads = node.attr("num_heads"), node.attr("kv_num_heads")
    (batch, length, wide), kind = inputs[0]
    packed = not _dims(inputs, 1)
    size = wide // (heads + 2 * shared_heads if packed else heads)
    past = _dims(inputs, 3)
    total = (past[2] if past else 0) + (length if packed else _dims(inputs, 1)[1])
    present = ((batch, shared_heads, total, size), inputs[3][1] if past else kind)
    scores = ((batch, heads, length, total), kind)
    return [((batch, length, heads * size), kind), present, present, scores]


@shape_rule("LinearAttention")
def linear_attention(node: Node, inputs: Inputs) -> Outputs:
    """q[B, T, N * d], k[B, T, K * d], v[B, T, K * e] -> y[B, T, N * e], state[B, K, d, e]"""
    if node.attr("state_window", 0):
        raise ValueError("several states")
    (batch, length, wide), kind = inputs[0]
    heads, states = node.attr("q_num_heads"), node.attr("kv_num_heads")
    size = _dims(inputs, 2)[2] // states
    state = (batch, states, wide // heads, size)
    return [((batch, length, max(heads, states) * size), kind), (state, kind)]


@shape_rule("CausalConvWithState")
def causal_conv(node: Node, inputs: Inputs) -> Outputs:
    """x[N, C, L], w[C, 1, k], ... -> y[N, C, L], state[N, C, k - 1]"""
    dims, kind = inputs[0]
    if len(dims) != 3 or any(node.attr(n, 0) for n in ("channels_last", "state_window")):
        raise ValueError("another layout")
    length = (_dims(inputs, 1)[2] - 1) * node.attr("dilation", 1)
    return [(dims, kind), ((*dims[:2], length), kind)]


@shape_rule("LinearAttentionGate")
def linear_attention_gate(node: Node, inputs: Inputs) -> Outputs:
    """a[B, T, N], bias[N], scale[N], b[B, T, N] -> decay[B, T, N], beta[B, T, N]"""
    return [inputs[0], inputs[0]]
