"""What counts as a piece: heads, channels inside of heads, experts, vocabulary entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune import verify
from onnxprune.analysis import analyse
from onnxprune.errors import InvalidRecipeError
from onnxprune.granularity import Granularity, parse
from onnxprune.pipeline import apply, inspect
from onnxprune.plan import Plan
from onnxprune.result import Result
from tests.graphs import TOLERANCE, build, outputs, prune, shapes

SEQUENCE = "(float[N,S,8] x) => (float[N,S,8] y)"
QKV = """q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)
q1 = Reshape(q0, heads)  k1 = Reshape(k0, heads)  v1 = Reshape(v0, heads)
q = Transpose<perm=[0,2,1,3]>(q1)  k = Transpose<perm=[0,2,3,1]>(k1)
v = Transpose<perm=[0,2,1,3]>(v1)"""
OUT = "o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, back)  y = MatMul(o2, wo)"
WEIGHTS = "wq:8,16 wk:8,16 wv:8,16 wo:16,8 heads=0,0,4,4 back=0,0,16"
ATTENTION = f"{QKV}  s = MatMul(q, k)  p = Softmax(s)  o = MatMul(p, v)  {OUT}"
ROTARY = f"""{QKV}
q8, q9 = Split<axis=3, num_outputs=2>(q)  qn = Neg(q9)  qr = Concat<axis=3>(qn, q8)
qc = Mul(q, cos)  qs = Mul(qr, sin)  qq = Add(qc, qs)  k7 = Transpose<perm=[0,1,3,2]>(k)
k8, k9 = Split<axis=3, num_outputs=2>(k7)  kn = Neg(k9)  kr = Concat<axis=3>(kn, k8)
kc = Mul(k7, cos)  ks = Mul(kr, sin)  kk = Add(kc, ks)  kt = Transpose<perm=[0,1,3,2]>(kk)
s = MatMul(qq, kt)  p = Softmax(s)  o = MatMul(p, v)  {OUT}"""
FUSED = """i0 = Constant<value_int=0>()  i1 = Constant<value_int=1>()  i2 = Constant<value_int=2>()
z = MatMul(x, w)  r = Reshape(z, five)  t = Transpose<perm=[2,0,3,1,4]>(r)
q = Gather(t, i0)  k1 = Gather(t, i1)  v = Gather(t, i2)  k = Transpose<perm=[0,1,3,2]>(k1)
s = MatMul(q, k)  p = Softmax(s)  o = MatMul(p, v)"""
EINSUM = """q1 = Einsum<equation="bse,ehd->bshd">(x, wq)
k1 = Einsum<equation="bse,ehd->bshd">(x, wk)
v1 = Einsum<equation="bse,ehd->bshd">(x, wv)  s = Einsum<equation="bqhd,bkhd->bhqk">(q1, k1)
p = Softmax(s)  o1 = Einsum<equation="bhqk,bkhd->bqhd">(p, v1)
y = Einsum<equation="bshd,hde->bse">(o1, wo)"""
HEADS = {
    "separate": (ATTENTION, WEIGHTS),
    "rotary": (ROTARY, f"{WEIGHTS} cos:1,4 sin:1,4"),
    "fused": (f"{FUSED}  {OUT}", "w:8,48 wo:16,8 five=0,0,3,4,4 back=0,0,16"),
    "einsum": (EINSUM, "wq:8,4,4 wk:8,4,4 wv:8,4,4 wo:4,4,8"),
}


def _kept(result: Result, name: str, axis: str) -> tuple[int, ...]:
    return tuple(result.plan.initializers[name].keep[axis])


@pytest.mark.parametrize("name", HEADS)
def test_head_dims_go_from_every_head_alike(name: str) -> None:
    body, weights = HEADS[name]
    model = build(SEQUENCE, body, weights)
    sizes = {g.name: (g.size, g.width) for g in analyse(model).groups}
    assert set(sizes.values()) == {(4, {"fused": 12, "einsum": 1}.get(name, 4))}
    result = prune(model, channels=0.5, granularity="head-dim")
    (check, *_) = result.report.checks
    assert check.max_error is not None
    assert check.max_error <= TOLERANCE
    after = shapes(result.model)
    if name == "einsum":
        assert after["wq"] == after["wv"] == (8, 4, 2)
        assert after["wo"] == (4, 2, 8)
        return
    assert after["wo"] == (8, 8)
    heads = np.reshape(_kept(result, "wo", "0"), (4, 2))
    assert (heads - heads[:1] == 4 * np.arange(4).reshape(4, 1)).all()


def test_queries_and_keys_lose_the_same_channels_values_others() -> None:
    result = prune(build(SEQUENCE, ATTENTION, WEIGHTS), channels=0.5, granularity="head-dim")
    assert _kept(result, "wq", "1") == _kept(result, "wk", "1")
    assert _kept(result, "wv", "1") == _kept(result, "wo", "0")
    assert len(result.plan.groups) == 2


def test_rotary_channels_go_in_pairs() -> None:
    body, weights = HEADS["rotary"]
    result = prune(build(SEQUENCE, body, weights), channels=0.5, granularity="head-dim")
    first = [i for i in _kept(result, "wq", "1") if i < 4]
    assert first in ([0, 2], [1, 3])


# -- experts ---------------------------------------------------------------------------------------

TOKENS = "(float[T,8] x) => (float[T,6] y)"
DENSE_MOE = """g0 = MatMul(x, router)  g1 = Softmax(g0)  u = Unsqueeze(x, zero)
a = MatMul(u, w1)  h = Relu(a)  b = MatMul(h, w2)
g2 = Transpose<perm=[1,0]>(g1)  g = Unsqueeze(g2, two)  m = Mul(b, g)
y = ReduceSum<keepdims=0>(m, zero)"""
EXPANDED_MOE = DENSE_MOE.replace(
    "u = Unsqueeze(x, zero)",
    "u0 = Unsqueeze(x, zero)  d = Shape(u0)  e1 = Slice(d, one, three)"
    "  e2 = Concat<axis=0>(five, e1)  u = Expand(u0, e2)",
)
EINSUM_MOE = """g0 = MatMul(x, router)  g = Softmax(g0)
a = Einsum<equation="ti,eih->teh">(x, w1)  h = Relu(a)  b = Einsum<equation="teh,eho->teo">(h, w2)
y = Einsum<equation="te,teo->to">(g, b)"""
TOP_MOE = """g0 = MatMul(x, router)  s = Softmax(g0)  v, i = TopK(s, two)
d = Shape(g0)  z = ConstantOfShape(d)  g1 = ScatterElements<axis=1>(z, i, v)
u = Unsqueeze(x, zero)  a = MatMul(u, w1)  h = Relu(a)  b = MatMul(h, w2)
g2 = Transpose<perm=[1,0]>(g1)  g = Unsqueeze(g2, two)  m = Mul(b, g)
y = ReduceSum<keepdims=0>(m, zero)"""
ONE_HOT_MOE = TOP_MOE.replace(
    "d = Shape(g0)  z = ConstantOfShape(d)  g1 = ScatterElements<axis=1>(z, i, v)",
    """c = OneHot<axis=-1>(i, depth, onoff)  v3 = Unsqueeze(v, two)  vc = Mul(c, v3)
    g1 = ReduceSum<keepdims=0>(vc, one)""",
)
PICKED_MOE = """g0 = MatMul(x, router)  s = Softmax(g0)  v, i = TopK(s, two)
p1 = Gather(w1, i)  p2 = Gather(w2, i)  u0 = Unsqueeze(x, one)  u = Unsqueeze(u0, one)
a = MatMul(u, p1)  h = Relu(a)  b0 = MatMul(h, p2)  b = Squeeze(b0, two)
v3 = Unsqueeze(v, two)  m = Mul(b, v3)  y = ReduceSum<keepdims=0>(m, one)"""
BEST_MOE = """g0 = MatMul(x, router)  i = ArgMax<axis=1, keepdims=0>(g0)
p1 = Gather(w1, i)  p2 = Gather(w2, i)  u = Unsqueeze(x, one)
a = MatMul(u, p1)  h = Relu(a)  b = MatMul(h, p2)  y = Squeeze(b, one)"""
NUMBERS = "router:8,5 w1:5,8,12 w2:5,12,6 zero=0 one=1 two=2 three=3 five=5 depth=5"
MOES = {
    "dense": DENSE_MOE,
    "expanded": EXPANDED_MOE,
    "einsum": EINSUM_MOE,
    "top-k-scatter": TOP_MOE,
    "top-k-one-hot": ONE_HOT_MOE,
    "top-k-gather": PICKED_MOE,
    "arg-max": BEST_MOE,
}


def _moe(name: str) -> onnx.ModelProto:
    used = [w for w in NUMBERS.split() if w.replace("=", ":").split(":")[0] in MOES[name]]
    model = build(TOKENS, MOES[name], " ".join(used))
    if "onoff" in MOES[name]:
        onoff = np.array([0, 1], np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(onoff, "onoff"))
    return model


@pytest.mark.parametrize("name", MOES)
def test_experts_get_narrower_and_stay(name: str) -> None:
    result = prune(_moe(name), channels=0.5)
    after = shapes(result.model)
    assert (after["router"], after["w1"], after["w2"]) == ((8, 5), (5, 8, 6), (5, 6, 6))


@pytest.mark.parametrize("name", MOES)
def test_whole_experts_go_as_a_choice(name: str) -> None:
    model = _moe(name)
    result = prune(model, channels=0.5, granularity="expert")
    (check, *_) = result.report.checks
    assert check.max_error is not None
    assert check.max_error <= TOLERANCE
    assert not result.report.notes
    after = shapes(result.model)
    left = after["w1"][0]
    assert left in (2, 3)
    assert (after["router"], after["w1"], after["w2"]) == ((8, left), (left, 8, 6), (left, 6, 6))
    again = apply(model, Plan.from_json(json.dumps(result.plan.to_json())))
    assert again.SerializeToString() == result.model.SerializeToString()


@pytest.mark.parametrize("name", ["top-k-scatter", "top-k-one-hot", "top-k-gather"])
def test_as_many_experts_stay_as_are_chosen(name: str) -> None:
    result = prune(_moe(name), channels=0.1, min_keep=0.1, granularity="expert")
    assert shapes(result.model)["w1"][0] == 2


def test_an_expert_number_in_arithmetic_freezes() -> None:
    body = BEST_MOE.replace("y = Squeeze(b, one)", "f = Cast<to=1>(i)  y0 = Squeeze(b, one)") + (
        "  f2 = Unsqueeze(f, one)  y = Add(y0, f2)"
    )
    used = [
        w for w in NUMBERS.split() if w.split(":")[0].split("=")[0] in ("router", "w1", "w2", "one")
    ]
    model = build(TOKENS, body, " ".join(used))
    result = prune(model, channels=0.5, granularity="expert")
    assert shapes(result.model)["w1"] == (5, 8, 6)


def test_the_reason_names_the_choice() -> None:
    reasons = {(r.tensor, r.axis): r.reason for r in inspect(_moe("dense")).frozen}
    assert "--granularity expert removes them" in reasons["w1", 0]


def test_blocks_of_a_split_axis_are_pruned_inside() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """a = MatMul(x, w1)  r = Reshape(a, split)  t = Transpose<perm=[1,0,2]>(r)
        b = MatMul(t, blocks)  u = Transpose<perm=[1,0,2]>(b)  m = Reshape(u, merge)
        y = MatMul(m, w2)""",
        "w1:6,8 blocks:2,4,4 w2:8,4 split=0,2,4 merge=0,8",
    )
    after = shapes(prune(model, channels=0.5).model)
    assert (after["w1"], after["blocks"], after["w2"]) == ((6, 4), (2, 2, 2), (4, 4))
    after = shapes(prune(model, channels=0.5, granularity="expert").model)
    assert (after["w1"], after["blocks"], after["w2"]) == ((6, 4), (1, 4, 4), (4, 4))


# -- vocabulary ------------------------------------------------------------------------------------

WORDS = "(int64[N,S] ids) => (float[N,S,4] y)"
EMBED = "a = Gather(table, ids)  h = Relu(a)  y = MatMul(h, w2)"
KEEP = (0, 2, 3, 7, 9)


@pytest.fixture(scope="module")
def words() -> onnx.ModelProto:
    return build(WORDS, EMBED, "table:10,6 w2:6,4")


def _answers(model: onnx.ModelProto, ids: list[int]) -> Any:
    return outputs(model, {"ids": np.array([ids], np.int64)})[0]


def test_ids_keep_their_meaning(words: onnx.ModelProto) -> None:
    result = prune(words, channels=1.0, granularity="vocab", vocab_keep=KEEP, vocab_unknown=3)
    assert shapes(result.model)["table"] == (5, 6)
    assert _kept(result, "table", "0") == KEEP
    np.testing.assert_allclose(
        _answers(result.model, [0, 2, 3, 7, 9, -1]), _answers(words, [0, 2, 3, 7, 9, -1])
    )
    gone = _answers(result.model, [1, 4, 5, 6, 8])
    np.testing.assert_allclose(gone, _answers(words, [3] * 5))
    assert verify.structure_problems(result.model, words) == []
    assert result.plan.options["vocabulary"] == {"kept": list(KEEP), "unknown": 3}


def test_a_vocabulary_plan_replays(words: onnx.ModelProto) -> None:
    result = prune(words, params=0.5, granularity="vocab", vocab_keep=KEEP)
    plan = Plan.from_json(json.dumps(result.plan.to_json()))
    assert apply(words, plan).SerializeToString() == result.model.SerializeToString()
    assert shapes(result.model)["table"][0] == 5
    assert shapes(result.model)["w2"][0] < 6


@pytest.mark.parametrize("text", ["0\n2\n3\n7\n9\n", "[9, 7, 3, 2, 0]", "0 2 3 7 9"])
def test_ids_come_from_a_file(words: onnx.ModelProto, tmp_path: Path, text: str) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(text)
    result = prune(words, channels=0.5, granularity="vocab", vocab_keep=path)
    assert _kept(result, "table", "0") == KEEP
    assert shapes(result.model)["table"] == (5, 3)


def test_two_lookups_of_one_table() -> None:
    model = build(
        "(int64[N,S] ids, int64[N,S] more) => (float[N,S,4] y)",
        """a = Gather(table, ids)  m32 = Cast<to=6>(more)  b = Gather(table, m32)  h = Add(a, b)
        p = Gather(kinds, ids2)  g = Add(h, p)  y = MatMul(g, w2)""".replace("ids2", "zeros"),
        "table:10,6 kinds:2,6 w2:6,4 zeros=0",
    )
    result = prune(model, channels=1.0, granularity="vocab", vocab_keep=KEEP)
    after = shapes(result.model)
    assert (after["table"], after["kinds"]) == ((5, 6), (2, 6))
    feeds = {name: np.array([[7, 2, 9]], np.int64) for name in ("ids", "more")}
    np.testing.assert_allclose(outputs(result.model, feeds)[0], outputs(model, feeds)[0])


def test_a_tied_output_layer_refuses() -> None:
    model = build(
        "(int64[N,S] ids) => (float[N,S,10] y)",
        "a = Gather(table, ids)  t = Transpose<perm=[1,0]>(table)  y = MatMul(a, t)",
        "table:10,6",
    )
    with pytest.raises(InvalidRecipeError, match=r"Gather a looks up must stay: axis 2 of .* 'y'"):
        prune(model, channels=0.5, granularity="vocab", vocab_keep=KEEP)


def test_no_embedding_refuses() -> None:
    model = build(SEQUENCE, ATTENTION, WEIGHTS)
    with pytest.raises(InvalidRecipeError, match="no embedding is looked up by ids that are"):
        prune(model, channels=0.5, granularity="vocab", vocab_keep=KEEP)


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"granularity": "word"}, "--granularity 'word' is unknown: choose head, head-dim, expert"),
        ({"granularity": "head,head-dim"}, "head and head-dim exclude each other"),
        ({"granularity": "vocab"}, "--granularity vocab needs --vocab-keep"),
        ({"vocab_keep": KEEP}, "--vocab-keep needs --granularity vocab"),
        ({"granularity": "vocab", "vocab_keep": [3]}, "at least two ids"),
        ({"granularity": "vocab", "vocab_keep": ["a", 3]}, "--vocab-keep must hold integers"),
        ({"granularity": "vocab", "vocab_keep": [-1, 3]}, "none of them negative"),
        ({"granularity": "vocab", "vocab_keep": [2, 3]}, "--vocab-unknown 0 must be among"),
        ({"granularity": "vocab", "vocab_keep": [0, 10]}, "id 10, but the vocabulary has 10 ent"),
        ({"granularity": "vocab", "vocab_keep": "nowhere.txt"}, "'nowhere.txt' cannot be read"),
        ({"granularity": "vocab", "vocab_keep": __file__}, "must hold ids: one a line, or a JSON"),
    ],
)
def test_mistakes(words: onnx.ModelProto, options: dict[str, Any], words_: str) -> None:
    with pytest.raises(InvalidRecipeError) as caught:
        prune(words, channels=0.5, **options)
    assert words_ in str(caught.value)


def test_json_round_trip() -> None:
    for value in (Granularity(), parse("head-dim,expert"), parse("vocab,expert", KEEP, 9)):
        assert Granularity.from_json(json.loads(json.dumps(value.to_json()))) == value


# -- a loop over experts, written out --------------------------------------------------------------


def _unrolled(scatter: str) -> onnx.ModelProto:
    """Each expert takes its tokens, computes, and adds its rows to the result."""
    lines = ["g = MatMul(x, router)  best = ArgMax<axis=1, keepdims=0>(g)", "d = Shape(x)"]
    lines += ["y0 = ConstantOfShape(d)"]
    for e in range(3):
        lines += [
            f"m{e} = Equal(best, e{e})  z{e} = NonZero(m{e})  i{e} = Squeeze(z{e}, zero)",
            f"t{e} = Gather(x, i{e})  a{e} = MatMul(t{e}, u{e})  r{e} = Relu(a{e})",
            f"b{e} = MatMul(r{e}, v{e})",
            scatter.format(e, e + 1),
        ]
    lines += ["y = MatMul(y3, w9)"]
    weights = " ".join(f"u{e}:8,12 v{e}:12,8 e{e}={e}" for e in range(3))
    model = build(TOKENS, "  ".join(lines), f"router:8,3 zero=0 one=1 w9:8,6 {weights}")
    for tensor in model.graph.initializer:
        if tensor.name.startswith("e"):
            del tensor.dims[:]
    return model


@pytest.mark.parametrize(
    "scatter",
    [
        'j{0} = Unsqueeze(i{0}, one)  y{1} = ScatterND<reduction="add">(y{0}, j{0}, b{0})',
        "s{0} = Shape(b{0})  j{0} = Unsqueeze(i{0}, one)  k{0} = Expand(j{0}, s{0})"
        '  y{1} = ScatterElements<axis=0, reduction="add">(y{0}, k{0}, b{0})',
    ],
    ids=["rows", "elements"],
)
def test_experts_in_a_loop_that_was_written_out_get_narrower(scatter: str) -> None:
    result = prune(_unrolled(scatter), channels=0.5)
    assert not result.report.notes
    after = shapes(result.model)
    for e in range(3):
        assert (after[f"u{e}"], after[f"v{e}"][0]) == ((8, 6), 6)
    assert after["router"] == (8, 3)


def test_a_wrong_table_of_ids_is_caught(
    words: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(mask: Any, unknown: int) -> Any:
        return np.zeros(mask.size, np.int64)

    monkeypatch.setattr("onnxprune.ops.indexing.remap", wrong)
    result = prune(words, channels=1.0, granularity="vocab", vocab_keep=KEEP)
    assert any("failed the check" in note for note in result.report.notes)
    assert shapes(result.model)["table"] == (10, 6)


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"granularity": "vocab", "vocabulary": {"kept": ["a", 1]}}, "must hold integers"),
        ({"granularity": "vocab", "vocabulary": {"kept": [0, 1], "unknown": "b"}}, "malformed"),
        ({"granularity": "vocab", "vocabulary": [3]}, "the plan's vocabulary is malformed"),
        ({"granularity": "heads"}, "--granularity 'heads' is unknown"),
    ],
)
def test_a_malformed_plan_of_words(
    words: onnx.ModelProto, options: dict[str, Any], words_: str
) -> None:
    plan = prune(words, channels=0.5).plan.to_json()
    with pytest.raises(InvalidRecipeError) as caught:
        apply(words, Plan.from_json({**plan, "options": options}))
    assert words_ in str(caught.value)
