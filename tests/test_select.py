"""Budgets hold, floors and multiples are kept, and what cannot be reached says what can."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from onnxprune.analysis import analyse
from onnxprune.cost import count_params, size_bytes
from onnxprune.errors import BudgetError, InvalidRecipeError
from onnxprune.groups import matching_units
from tests.graphs import build, mlp, prune, shapes, weight

ATTENTION = """q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)
q1 = Reshape(q0, heads)  k1 = Reshape(k0, heads)  v1 = Reshape(v0, heads)
q = Transpose<perm=[0,2,1,3]>(q1)  k = Transpose<perm=[0,2,3,1]>(k1)
v = Transpose<perm=[0,2,1,3]>(v1)  s = MatMul(q, k)  p = Softmax(s)  o = MatMul(p, v)
o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, back)  y = MatMul(o2, wo)"""


@pytest.fixture(scope="module")
def convnet() -> onnx.ModelProto:
    return build(
        "(float[N,3,16,16] x) => (float[N,10] y)",
        """a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  c = Conv(r, w2, b2)  s = Relu(c)
        d = Conv(r, w3)  e = Add(s, d)  p = GlobalAveragePool(e)  f = Flatten(p)
        g = Gemm(f, w4, b4)  h = Relu(g)  y = Gemm(h, w5)""",
        "w1:32,3,3,3 b1:32 w2:48,32,3,3 b2:48 w3:48,32,3,3 w4:48,64 b4:64 w5:64,10",
    )


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9])
def test_channels_keeps_the_same_share_of_each_layer(
    convnet: onnx.ModelProto, share: float
) -> None:
    after = shapes(prune(convnet, channels=share).model)
    widths = (after["w1"][0], after["w2"][0], after["w5"][0])
    assert widths == tuple(round(share * n) for n in (32, 48, 64))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_params_are_at_most_the_asked_share(convnet: onnx.ModelProto, share: float) -> None:
    result = prune(convnet, params=share)
    before, after = count_params(convnet), count_params(result.model)
    assert share - 0.05 < after / before <= share
    assert result.report.budget["reached"] == pytest.approx(after / before)
    assert (result.report.before.params, result.report.after.params) == (before, after)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_macs_are_at_most_the_asked_share(convnet: onnx.ModelProto, share: float) -> None:
    result = prune(convnet, macs=share)
    again = analyse(result.model)
    macs = [a.cost.macs(a.everything) for a in (analyse(convnet), again)]
    assert share - 0.08 < macs[1] / macs[0] <= share
    assert result.report.after.macs == round(macs[1])


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_file_is_at_most_the_asked_size(convnet: onnx.ModelProto, share: float) -> None:
    target = share * size_bytes(convnet) / 1e6
    result = prune(convnet, size_mb=target)
    size = len(result.model.SerializeToString())
    assert 0.85 * target <= size / 1e6 <= target * 1.001


@pytest.mark.parametrize("budget", [{"channels": 0.5}, {"params": 0.6}, {"macs": 0.6}])
@pytest.mark.parametrize("step", [4, 8])
def test_widths_are_multiples(
    convnet: onnx.ModelProto, budget: dict[str, float], step: int
) -> None:
    after = shapes(prune(convnet, round_to=step, **budget).model)
    for width in (after["w1"][0], after["w2"][0], after["w5"][0]):
        assert width % step == 0


def test_a_layer_narrower_than_the_multiple_keeps_what_the_share_asks() -> None:
    result = prune(mlp(10, 5, 64, 2), channels=0.5, round_to=16)
    after = shapes(result.model)
    assert after["w0"][0] == 3
    assert after["w1"][0] == 32


@pytest.mark.parametrize("budget", [{"channels": 0.1}, {"params": 0.55}, {"macs": 0.5}])
def test_no_layer_falls_below_its_floor(convnet: onnx.ModelProto, budget: dict[str, float]) -> None:
    after = shapes(prune(convnet, min_keep=0.5, **budget).model)
    assert after["w1"][0] >= 16
    assert after["w2"][0] >= 24
    assert after["w5"][0] >= 32


def test_at_least_one_channel_is_left_without_a_floor() -> None:
    after = shapes(prune(mlp(6, 8, 4), channels=0.01, min_keep=0.0).model)
    assert after["w0"] == (1, 6)


def test_split_parts_never_end_up_empty() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """a = MatMul(x, w1)  p, q = Split<axis=1>(a, parts)  b = MatMul(p, w2)
        c = MatMul(q, w3)  y = Add(b, c)""",
        "w1:6,8 parts=1,7 w2:1,4 w3:7,4",
    )
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "w2"):
            values = weight(model, tensor.name).copy()
            values[(slice(None), 0) if tensor.name == "w1" else 0] *= 1e-3
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    after = shapes(prune(model, channels=0.5).model)
    assert after["w2"] == (1, 4)


@pytest.mark.parametrize("pattern", ["w1", "w?", "n0", "Gemm n0"])
def test_kept_layers_stay_whole(pattern: str) -> None:
    model = mlp(6, 8, 8, 4)
    for i, node in enumerate(n for n in model.graph.node if n.op_type == "Gemm"):
        node.name = f"n{i}"
    after = shapes(prune(model, channels=0.5, keep=[pattern]).model)
    assert after["w0"] == (8, 6)
    assert after["w1"][1] == 8
    assert after["w2"] == ((4, 8) if pattern in ("w?", "w1") else (4, 4))


def test_a_pattern_that_matches_nothing_is_a_mistake() -> None:
    with pytest.raises(InvalidRecipeError, match=r"--keep 'nobody\*' matches no node"):
        prune(mlp(6, 8, 4), channels=0.5, keep=["nobody*"])


def test_no_pattern_matches_no_unit() -> None:
    assert matching_units(analyse(mlp(6, 8, 4)).coupling, []).size == 0


@pytest.mark.parametrize(
    ("budget", "flag"), [({"params": 0.01}, "--params 0.01"), ({"macs": 0.01}, "--macs 0.01")]
)
def test_what_cannot_be_reached_says_what_can(
    convnet: onnx.ModelProto, budget: dict[str, float], flag: str
) -> None:
    with pytest.raises(BudgetError) as caught:
        prune(convnet, min_keep=0.5, round_to=8, scope="exact", **budget)
    words = str(caught.value)
    assert words.startswith(f"{flag} cannot be reached: the least is ")
    assert "with --min-keep 0.5 and --scope exact" in words
    for advice in ("lower --min-keep", "use --scope all", "lower --round-to"):
        assert advice in words
    least = re.search(r"the least is (\d\.\d+)", words)
    assert least is not None
    kind = next(iter(budget))
    reached = prune(
        convnet, min_keep=0.5, round_to=8, scope="exact", **{kind: float(least.group(1))}
    )
    assert reached.report.budget["reached"] <= float(least.group(1))


def test_an_impossible_size_says_the_least_size(convnet: onnx.ModelProto) -> None:
    with pytest.raises(BudgetError, match=r"--size-mb 0\.001 MB cannot .* the least is 0\.\d+ MB"):
        prune(convnet, size_mb=0.001)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one budget of channels, macs, params, size-mb; got 0"),
        ({"channels": 0.5, "macs": 0.5}, "got 2"),
        ({"channels": 0.0}, "--channels 0 is out of range"),
        ({"params": 1.1}, "--params 1.1 is out of range"),
        ({"macs": -0.5}, "--macs -0.5 is out of range"),
        ({"size_mb": 0}, "--size-mb 0 is not a size"),
        ({"channels": 0.5, "min_keep": 2}, "--min-keep 2 is out of range"),
        ({"channels": 0.5, "round_to": 0}, "--round-to 0 is out of range"),
        ({"channels": 0.5, "scope": "some"}, "--scope 'some' is unknown"),
        ({"channels": 0.5, "finetune": -1}, "--finetune -1 is out of range"),
        ({"channels": 0.5, "finetune": 1}, "--finetune needs --data"),
        ({"channels": 0.5, "criterion": "luck"}, "no criterion 'luck'"),
    ],
)
def test_options_out_of_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRecipeError) as caught:
        prune(mlp(6, 8, 4), **options)
    assert words in str(caught.value)


def test_whole_heads_go() -> None:
    model = build(
        "(float[N,S,8] x) => (float[N,S,8] y)",
        ATTENTION,
        "wq:8,16 wk:8,16 wv:8,16 wo:16,8 heads=0,0,4,4 back=0,0,16",
    )
    (group,) = analyse(model).groups
    assert (group.size, group.width) == (4, 4)
    result = prune(model, channels=0.5)
    kept = np.array(result.plan.initializers["wq"].keep["1"]).reshape(-1, 4)
    assert kept.shape == (2, 4)
    assert all((row == row[0] + np.arange(4)).all() and row[0] % 4 == 0 for row in kept)
    for name, axis in (("wk", "1"), ("wv", "1"), ("wo", "0")):
        assert result.plan.initializers[name].keep[axis] == tuple(kept.ravel())
    assert shapes(prune(model, channels=0.7, round_to=8).model)["wq"] == (8, 16)


def test_scope_exact_leaves_what_is_normalized_over() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        "a = MatMul(x, w1)  n = LayerNormalization(a, s)  b = MatMul(n, w2)  y = MatMul(b, w3)",
        "w1:6,8 s:8 w2:8,8 w3:8,4",
    )
    assert shapes(prune(model, channels=0.5, scope="exact").model)["w1"] == (6, 8)
    assert shapes(prune(model, channels=0.5, scope="exact").model)["w3"] == (4, 4)
    assert shapes(prune(model, channels=0.5).model)["w1"] == (6, 4)


def test_nothing_removed_is_said() -> None:
    model = build("(float[N,6] x) => (float[N,8] y)", "y = MatMul(x, w)", "w:6,8")
    result = prune(model, channels=0.5)
    assert result.model is model
    (note,) = result.report.notes
    assert note.startswith("nothing was removed")


def test_predicted_parameters_count_each_copy_of_a_shared_bias() -> None:
    model = build(
        "(float[N,6] x) => (float[N,4] y)",
        """a = Gemm(x, w1, b1)  c = Gemm(x, w2, b1)  r = Relu(a)  s = Relu(c)
        d = MatMul(r, w3)  e = MatMul(s, w4)  y = Add(d, e)""",
        "w1:6,8 w2:6,8 b1:8 w3:8,4 w4:8,4",
    )
    result = prune(model, params=0.5)
    reached = count_params(result.model) / count_params(model)
    assert result.report.budget["reached"] == pytest.approx(reached)
