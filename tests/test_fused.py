"""Operators that graph optimizers put in: half of every group goes, as in the masked twin."""

from __future__ import annotations

import pytest

from onnxprune import runtime, verify
from onnxprune import shapes as inference
from onnxprune.analysis import analyse
from onnxprune.granularity import Granularity
from onnxprune.graph import Graph
from onnxprune.passes.apply import apply_keep
from onnxprune.pipeline import inspect
from tests.graphs import TOLERANCE, shapes
from tests.rows import Row, check_uneven

MS = "com.microsoft"
FLAT = "(float[N,6] x) => (float[N,4] y)"
SEQUENCE = "(float[2,5,6] x) => (float[2,5,4] y)"
IMAGE = "(float[N,3,8,8] x) => (float[N,4,?,?] y)"
TOKENS = "(int64[N,S] i) => (float[N,S,4] y)"


def flat(name: str, middle: str, weights: str = "", shrinks: str = "w1 w2", **options: str) -> Row:
    """MatMul to 8 channels `a`, `middle` from a to h, MatMul to y."""
    body = f"a = MatMul(x, w1)\n{middle}\ny = MatMul(h, w2)"
    signature = options.pop("signature", FLAT)
    return Row(name, signature, body, f"w1:6,8 w2:8,4 {weights}", shrinks, **options)  # type: ignore[arg-type]


def two(name: str, middle: str, weights: str = "", shrinks: str = "", **options: str) -> Row:
    """As `flat`, with b like a."""
    middle = f"b = MatMul(x, w0)\n{middle}"
    shrinks = f"w0 w1 w2 {shrinks}"
    return flat(name, middle, f"w0:6,8 {weights}", shrinks, signature=SEQUENCE, **options)


def image(name: str, middle: str, weights: str, shrinks: str) -> Row:
    """Conv to 8 channels `a`, `middle` from a to h, Conv to y."""
    body = f"a = Conv(x, w1)\n{middle}\ny = Conv(h, w2)"
    return Row(name, IMAGE, body, f"w1:8,3,3,3 w2:4,8,1,1 {weights}", f"w1 w2 {shrinks}")


def experts(name: str, kind: str, factor: int, more: str = "") -> Row:
    """Three experts of width 12."""
    call = f'{MS}.MoE<k=2, activation_type="{kind}", normalize_routing_weights=1{more}>'
    return flat(
        name,
        f"r = MatMul(x, wr)  h = {call}(a, r, e1, b1, e2, b2)",
        f"wr:6,3 e1:3,{12 * factor},8 b1:3,{12 * factor} e2:3,8,12 b2:3,8",
        "w1 w2 e1 b1 e2 b2",
        signature="(float[7,6] x) => (float[7,4] y)",
    )


ROWS = [
    *(flat(op.lower(), f"h = {MS}.{op}(a)") for op in ("Gelu", "QuickGelu", "ScaledSiLU")),
    flat("fast-gelu", f"h = {MS}.FastGelu(a)"),
    flat("fast-gelu-bias", f"h = {MS}.FastGelu(a, b)", "b:8", "w1 w2 b"),
    flat("bias-gelu", f"h = {MS}.BiasGelu(a, b)", "b:8", "w1 w2 b"),
    flat(
        "fused-gemm",
        f'h = {MS}.FusedGemm<transB=1, activation="LeakyRelu", activation_alpha=0.1>(a, b, c)',
        "b:8,8 c:8",
        "w1 w2 b c",
    ),
    flat("fused-matmul", f"h = {MS}.FusedMatMul<transB=1, alpha=0.3>(a, b)", "b:8,8", "w1 w2 b"),
    flat("transpose-matmul", f"h = {MS}.TransposeMatMul<transB=1>(a, b)", "b:8,8", "w1 w2 b"),
    flat(
        "fused-matmul-batch",
        f"""b = MatMul(x, w0)  p = Reshape(a, four)  q = Reshape(b, four)
        s = {MS}.FusedMatMul<transA=1, transBatchA=1, transBatchB=1>(p, q)
        t = Softmax(s)  u = {MS}.FusedMatMul<transB=1, transBatchB=1>(t, q)
        v = Transpose<perm=[2,0,1]>(u)  h = Reshape(v, eight)""",
        "w0:6,8 four=5,4,2 eight=5,8",
        "w0 w1 w2",
        signature="(float[5,6] x) => (float[5,4] y)",
    ),
    two(
        "skip-layer-norm",
        f"""n, , , s = {MS}.SkipLayerNormalization(a, b, gamma, beta, bias)  h = Mul(n, s)""",
        "gamma:8 beta:8 bias:8",
        "gamma beta bias",
        exact="",
    ),
    two(
        "skip-rms-norm",
        f"n, , , s = {MS}.SkipSimplifiedLayerNormalization(a, b, gamma, bias)  h = Mul(n, s)",
        "gamma:8 bias:8",
        "gamma bias",
        exact="",
    ),
    flat(
        "skip-layer-norm-table",
        f"h = {MS}.SkipLayerNormalization(a, t, gamma, beta)",
        "t:5,8 gamma:8 beta:8",
        "w1 w2 t gamma beta",
        signature=SEQUENCE,
        exact="",
    ),
    flat(
        "rms-norm-before-opset-23",
        "h = SimplifiedLayerNormalization(a, gamma)",
        "gamma:8",
        "w1 w2 gamma",
        exact="",
    ),
    flat(
        "layer-norm-before-opset-17",
        "h = LayerNormalization(a, gamma, beta)",
        "gamma:8 beta:8",
        "w1 w2 gamma beta",
        exact="",
        opset=13,  # type: ignore[arg-type]
    ),
    Row(
        "embeddings",
        TOKENS,
        f"""j = Cast<to=6>(i)  n, , s = {MS}.EmbedLayerNormalization(j, j, w, p, t, gamma, beta)
        h = Mul(n, s)  y = MatMul(h, w2)""",
        "w:20,8 p:30,8 t:2,8 gamma:8 beta:8 w2:8,4",
        "w p t gamma beta w2",
        "",
    ),
    Row(
        "embeddings-without-segments",
        TOKENS,
        f"""j = Cast<to=6>(i)  h, m = {MS}.EmbedLayerNormalization(j, , w, p, , gamma, beta)
        y = MatMul(h, w2)""",
        "w:20,8 p:30,8 gamma:8 beta:8 w2:8,4",
        "w p gamma beta w2",
        "",
    ),
    image("fused-conv", f'h = {MS}.FusedConv<activation="Relu">(a, w, b)', "w:8,8,3,3 b:8", "w b"),
    image(
        "fused-conv-sum",
        f'h = {MS}.FusedConv<activation="LeakyRelu", activation_params=[0.1]>(a, w, b, a)',
        "w:8,8,1,1 b:8",
        "w b",
    ),
    image(
        "fused-conv-depthwise",
        f'h = {MS}.FusedConv<activation="Relu", group=8, strides=[2,2]>(a, w, b)',
        "w:8,1,3,3 b:8",
        "w b",
    ),
    two("gated-rms-norm", f"h = {MS}.GatedRMSNorm(a, g, b)", "g:8", "g", exact=""),
    two("gated-rms-norm-per-head", f"h = {MS}.GatedRMSNorm(a, g, b)", "g:4"),
    two("gated-add", f"c = MatMul(x, w3)  h = {MS}.GatedAdd(a, b, c)", "w3:6,1"),
    experts("experts", "silu", 1),
    experts("experts-swiglu", "swiglu", 2, ", swiglu_fusion=1"),
    Row(
        "causal-conv",
        "(float[2,6,9] x) => (float[2,4,9] y)",
        f"""a = Conv(x, w1)  h, s = {MS}.CausalConvWithState<activation="silu">(a, w, b)
        y = Conv(h, w2)""",
        "w1:8,6,1 w:8,1,4 b:8 w2:4,8,1",
        "w1 w b w2",
    ),
    flat(
        "trilu",
        f"t = Transpose<perm=[2,0,1]>(a)  u = {MS}.Trilu(t)  h = Transpose<perm=[1,2,0]>(u)",
        signature=SEQUENCE,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_half_of_every_group_equals_the_twin(row: Row) -> None:
    row.check()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_uneven_shares(row: Row, seed: int) -> None:
    check_uneven(row.model(), Granularity(), seed)


#: Operators that ONNX Runtime has no CPU kernel for: what is left of each weight, of half.
STRUCTURE = [
    (flat("bias-add", f"h = {MS}.BiasAdd(a, b, a)", "b:8"), {"b": (4,)}),
    (flat("bias-dropout", f"h, m = {MS}.BiasDropout(a, b, a)", "b:8"), {"b": (4,)}),
    (flat("gemm-gelu", f"h = {MS}.GemmFastGelu(a, w, b)", "w:8,8 b:8"), {"w": (4, 4), "b": (4,)}),
    (flat("split-gelu", f"c = MatMul(a, w)  h = {MS}.BiasSplitGelu(c, b)", "w:8,16 b:16"),
     {"w": (4, 8), "b": (8,)}),
    (flat("bias-softmax", f"h = {MS}.BiasSoftmax<axis=1>(a, b)", "b:8"), {"b": (4,)}),
    (image("group-norm", f"""t = Transpose<perm=[0,2,3,1]>(a)
     n = {MS}.GroupNorm<groups=4, activation=1>(t, g, b)  h = Transpose<perm=[0,3,1,2]>(n)""",
           "g:8 b:8", ""), {"g": (4,), "b": (4,)}),
    (image("skip-group-norm", f"""t = Transpose<perm=[0,2,3,1]>(a)
     n, s = {MS}.SkipGroupNorm<groups=4>(t, g, b, t, c)  u = Add(n, s)
     h = Transpose<perm=[0,3,1,2]>(u)""", "g:8 b:8 c:8", ""), {"g": (4,), "b": (4,), "c": (4,)}),
    (flat("swiglu", "c = MatMul(a, w)  h = SwiGLU(a, c)", "w:8,8", opset=28), {"w": (4, 4)}),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "left"), [pytest.param(row, left, id=row.name) for row, left in STRUCTURE]
)
def test_what_only_other_devices_run(row: Row, left: dict[str, tuple[int, ...]]) -> None:
    analysis = analyse(row.model())
    assert analysis.groups
    keep = analysis.everything
    for group in analysis.groups:
        keep[group.units[::2]] = False
    after = shapes(apply_keep(analysis.coupling, keep).model)
    assert {name: after[name] for name in left} == left


def test_group_norm_loses_whole_groups() -> None:
    row, _ = next(case for case in STRUCTURE if case[0].name == "group-norm")
    analysis = analyse(row.model())
    (group,) = analysis.groups
    assert (group.size, group.exact) == (4, True)
    keep = analysis.everything
    keep[group.units[:1]] = False
    model = apply_keep(analysis.coupling, keep).model
    node = next(n for n in model.graph.node if n.op_type == "GroupNorm")
    assert {a.name: a.i for a in node.attribute} == {"groups": 3, "activation": 1}


def test_the_number_of_experts_stays_and_says_why() -> None:
    row = next(r for r in ROWS if r.name == "experts")
    reasons = {(f.tensor, f.axis): f.reason for f in inspect(row.model()).frozen}
    assert reasons["wr", 1] == "MoE h chooses among the experts by number"


@pytest.mark.parametrize("scope", ["all", "exact"])
def test_whole_experts_go_where_that_is_asked_for(scope: str) -> None:
    row = next(r for r in ROWS if r.name == "experts-swiglu")
    model = row.model()
    analysis = analyse(model, granularity=Granularity(experts=True))
    (group,) = (g for g in analysis.groups if g.name == "MatMul r")
    assert (group.size, group.exact) == (3, False)
    keep = analysis.everything
    if scope == "all":
        keep[group.units[1]] = False
    keep[next(g for g in analysis.groups if g.name == "MoE h").units[::2]] = False
    pruned = apply_keep(analysis.coupling, keep).model
    left = shapes(pruned)
    assert (left["wr"], left["e2"]) == (
        ((6, 2), (2, 8, 6)) if scope == "all" else ((6, 3), (3, 8, 6))
    )
    feeds = [runtime.random_feeds(model)]
    assert verify.twin_error(analysis.coupling, keep, pruned, feeds, threads=1) <= TOLERANCE


@pytest.mark.parametrize(
    ("call", "dims"),
    [
        ("FusedMatMul<transA=1>(a, b)", {"h": (2, 3, 8, 8)}),
        ("FusedMatMul<transB=1, transBatchA=1, transBatchB=1>(a, b)", {"h": (3, 5, 2, 2)}),
        ("SkipLayerNormalization(a, b, c)", {"h": (2, 3, 5, 8), "i": (2, 3, 5, 1)}),
        ("FusedConv<pads=[1,1,1,1], strides=[2,1]>(a, e)", {"h": (2, 6, 3, 8)}),
        ("BiasSplitGelu(a, c)", {"h": (2, 3, 5, 4)}),
    ],
)
def test_shapes_of_outputs(call: str, dims: dict[str, tuple[int, ...]]) -> None:
    row = Row(
        "shapes",
        "(float[2,3,5,8] a, float[2,3,5,8] b) => (float h)",
        f"h, i = {MS}.{call}",
        "c:8 e:6,3,3,3",
        "",
    )
    found = inference.infer(Graph.of(row.model()))
    assert {name: found.dims(name) for name in dims} == dims
