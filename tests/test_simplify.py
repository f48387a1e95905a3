"""`prune --simplify`: taken where the result is the same model, told where it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from onnxprune import cli, prune, runtime, verify
from onnxprune.errors import InvalidRecipeError
from onnxprune.passes import simplify
from onnxprune.passes.simplify import Simplify
from tests.graphs import build

Change = Callable[[onnx.ModelProto], onnx.ModelProto]
MODEL = build(
    "(float[N,6] x) => (float[N,4] y)",
    "i = Identity(x) h = Gemm(i, w, b) r = Relu(h) a = Gemm(r, u) y = Gemm(a, v)",
    "w:6,16 b:16 u:16,8 v:8,4",
)


@pytest.fixture(autouse=True)
def _no_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "latencies_ms", lambda runs, **_: [1.0] * len(runs))


def without_identity(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.node[0]
    model.graph.node[0].input[0] = "x"
    return model


def zeroed(model: onnx.ModelProto) -> onnx.ModelProto:
    tensor = model.graph.initializer[-1]
    tensor.raw_data = bytes(len(tensor.raw_data))
    return model


def with_vendor(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.node[2].op_type, model.graph.node[2].domain = "Gelu", "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return model


def larger(model: onnx.ModelProto) -> onnx.ModelProto:
    model.doc_string = "x" * 1000
    return model


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "z"
    return model


def broken(model: onnx.ModelProto) -> onnx.ModelProto:
    raise KeyError("no such\nnode")


def use(monkeypatch: pytest.MonkeyPatch, change: Change | None) -> None:
    """Put a library in place of onnxslim; None: it is not installed."""
    library = None if change is None else SimpleNamespace(slim=change)
    monkeypatch.setitem(sys.modules, "onnxslim", library)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_the_pruned_model_is_simplified(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, without_identity)
    plain = prune(MODEL, channels=0.5, threads=1, lossless=False)
    result = prune(MODEL, channels=0.5, threads=1, lossless=False, simplify=True)
    assert ops(plain.model) == ["Identity", "Gemm", "Relu", "Gemm", "Gemm"]
    assert ops(result.model) == ["Gemm", "Relu", "Gemm"]
    assert result.plan == plain.plan
    assert "simplified: 5 nodes became 3" in result.report.notes
    assert result.report.after.params < plain.report.after.params
    for feeds in runtime.working_feeds(MODEL, threads=1):
        ours, theirs = (
            list(runtime.run(runtime.session(m, threads=1), feeds).values())
            for m in (result.model, plain.model)
        )
        assert verify.difference(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (zeroed, "onnxslim's result is not the same model: error 1"),
        (
            with_vendor,
            "onnxslim's result is not the same model: it has operators com.microsoft.Gelu",
        ),
        (larger, "onnxslim's result is not the same model: it is larger: "),
        (renamed, "onnxslim's result is not the same model: the outputs are "),
        (broken, "onnxslim failed: 'no such"),
    ],
)
def test_another_model_is_not_taken(
    change: Change, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, change)
    found = Simplify(threads=1)(MODEL)
    assert found.model is MODEL
    assert found.problem.startswith(problem)
    assert found.note.startswith(f"not simplified: {problem}")


def test_shapes_are_recorded_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def talkative(model: onnx.ModelProto) -> onnx.ModelProto:
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "other"
        model.graph.value_info.append(onnx.helper.make_tensor_value_info("r", 1, ["N", 16]))
        return without_identity(model)

    use(monkeypatch, talkative)
    found = Simplify(threads=1)(MODEL)
    assert found.problem == ""
    assert found.model.graph.output == MODEL.graph.output
    assert not found.model.graph.value_info


def test_a_wrong_merge_costs_only_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, without_identity)

    def wrong(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return zeroed(copy), 1

    monkeypatch.setattr(simplify, "merge_layers", wrong)
    found = Simplify(threads=1)(MODEL)
    assert (found.problem, found.merged, found.nodes_after) == ("", 0, 4)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, without_identity)
    source, target = str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")
    onnx.save(MODEL, source)
    options = ["--channels", "0.5", "--simplify", "--threads", "1", "--quiet"]
    assert cli.main(["prune", source, target, *options]) == 0
    assert "Identity" not in ops(onnx.load(target))


def test_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, None)
    words = "--simplify needs onnxslim: pip install 'onnxprune[simplify]'"
    with pytest.raises(InvalidRecipeError) as caught:
        prune(MODEL, channels=0.5, simplify=True)
    assert str(caught.value) == words
    source, target = str(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    onnx.save(MODEL, source)
    assert cli.main(["prune", source, str(target), "--channels", "0.5", "--simplify"]) == 2
    assert words in capsys.readouterr().err
    assert not target.exists()


def test_the_library_itself() -> None:
    pytest.importorskip("onnxslim")
    model = build(
        "(float[N,3,8,8] x) => (float[N,4,8,8] y)",
        "i = Identity(x) h = Conv<pads=[1, 1, 1, 1]>(i, w) "
        "n = BatchNormalization(h, s, b, m, var) y = Conv(n, v)",
        "w:8,3,3,3 s:8 b:8 m:8 var:8 v:4,8,1,1",
    )
    found = Simplify(threads=1)(model)
    assert found.problem == ""
    assert ops(found.model) == ["Conv"]
