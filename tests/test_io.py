"""Loading and saving: what comes back, what is refused in which words, what a failure leaves."""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxprune import files, io
from onnxprune.errors import InvalidModelError, OnnxPruneError


def small(opset: int = 17, domain: str = "") -> onnx.ModelProto:
    """x[N, 32] @ w[32, 16] + b[16]; w is big enough to move out of the file, b is not."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((32, 16)), "b": rng.standard_normal(16)}
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)])


def rich() -> onnx.ModelProto:
    """A model that uses every corner of the format that onnxprune itself never looks at."""
    model = small()
    model.doc_string, model.domain, model.model_version = "doc", "org.test", 7
    model.metadata_props.add(key="k", value="v")
    model.opset_import.append(helper.make_opsetid("com.unknown", 3))
    graph = model.graph
    graph.metadata_props.add(key="g", value="1")
    annotation = graph.quantization_annotation.add(tensor_name="w")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
    node = graph.node.add(op_type="Mystery", domain="com.unknown", name="m", input=["y"])
    node.output.append("z")
    node.metadata_props.add(key="n", value="2")
    blob = numpy_helper.from_array(np.arange(999, dtype=np.int64), "blob")
    node.attribute.append(helper.make_attribute("value", blob))
    node.attribute.append(helper.make_attribute("raw", b"\xff\xfe"))
    node.attribute.append(helper.make_attribute("none", [], attr_type=AttributeProto.INTS))
    function = helper.make_function(
        "org.f", "F", ["a"], ["c"], [helper.make_node("Relu", ["a"], ["c"])], model.opset_import
    )
    model.functions.append(function)
    model.training_info.add().algorithm.CopyFrom(small().graph)
    model.training_info[0].algorithm.initializer[0].name = "tw"
    values = numpy_helper.from_array(np.ones(400, np.float32), "sparse")
    indices = numpy_helper.from_array(np.arange(400, dtype=np.int64), "i")
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [800]))
    graph.initializer.append(helper.make_tensor("typed", TensorProto.FLOAT, [600], [0.5] * 600))
    graph.initializer.append(helper.make_tensor("half", TensorProto.FLOAT16, [600], [1.5] * 600))
    graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"\xff"]))
    graph.initializer.append(helper.make_tensor("i4", TensorProto.INT4, [3, 999], [1] * 2997))
    graph.initializer[0].metadata_props.add(key="t", value="3")
    graph.initializer[0].doc_string = "weights"
    return model


def values(model: onnx.ModelProto) -> list[tuple[str, int, Any]]:
    """Names, types and values of all tensors, whichever field holds them."""
    return [
        (t.name, t.data_type, numpy_helper.to_array(t).tobytes())
        for t in io.tensors(model)
        if t.data_type != TensorProto.STRING
    ]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("make", [small, rich])
def test_inline_round_trip_is_equal(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    model = make()
    io.save(model, tmp_path / "m.onnx")
    assert io.load(tmp_path / "m.onnx") == model == make()
    assert names(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("make", [small, rich])
def test_external_round_trip_keeps_everything(
    tmp_path: Path, make: Callable[[], onnx.ModelProto]
) -> None:
    model = make()
    io.save(model, tmp_path / "m.onnx", external_data=True)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert model == make()
    loaded = io.load(os.fspath(tmp_path / "m.onnx"))
    assert values(loaded) == values(model)
    for ours, theirs in zip(io.tensors(loaded), io.tensors(model), strict=True):
        for tensor in (ours, theirs):
            if tensor.data_type != TensorProto.STRING:
                tensor.ClearField("float_data")
                tensor.ClearField("int32_data")
                tensor.ClearField("raw_data")
    assert loaded == model


def test_external_file_is_read_by_onnx_and_checked(tmp_path: Path) -> None:
    io.save(small(), tmp_path / "m.onnx", external_data=True)
    onnx.checker.check_model(os.fspath(tmp_path / "m.onnx"), full_check=True)
    assert values(onnx.load(os.fspath(tmp_path / "m.onnx"))) == values(small())


def test_unknown_protobuf_fields_survive(tmp_path: Path) -> None:
    data = small().SerializeToString() + b"\xaa\x3f\x03new"  # field 1013, not in ONNX today
    (tmp_path / "m.onnx").write_bytes(data)
    io.save(io.load(tmp_path / "m.onnx"), tmp_path / "n.onnx")
    assert (tmp_path / "n.onnx").read_bytes().count(b"\xaa\x3f\x03new") == 1


@pytest.mark.parametrize("external", [True, False])
def test_saving_over_the_input_writes_a_fresh_data_file(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "m.onnx"
    io.save(small(), path, external_data=True)
    size = (tmp_path / "m.onnx.data").stat().st_size
    for _ in range(2):
        io.save(io.load(path), path, external_data=external)
        assert io.load(path) == small()
    assert (tmp_path / "m.onnx.data").stat().st_size == size


def test_large_models_go_external_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "MAX_INLINE_BYTES", 32 * 16 * 4)
    io.save(small(), tmp_path / "m.onnx")
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    monkeypatch.setattr(io, "MAX_INLINE_BYTES", 32 * 16 * 4 + 16 * 4)
    io.save(small(), tmp_path / "n.onnx")
    assert "n.onnx.data" not in names(tmp_path)


def test_tensors_are_aligned_for_memory_mapping(tmp_path: Path) -> None:
    model = rich()
    big = numpy_helper.from_array(np.zeros(5000, np.float32), "big")
    model.graph.initializer.append(big)
    io.save(model, tmp_path / "m.onnx", external_data=True)
    skeleton = onnx.load(os.fspath(tmp_path / "m.onnx"), load_external_data=False)
    entries = {e.key: e.value for e in skeleton.graph.initializer[-1].external_data}
    assert int(entries["offset"]) % 4096 == 0
    assert entries["location"] == "m.onnx.data"


def write(content: bytes) -> Callable[[Path], Path]:
    def create(folder: Path) -> Path:
        path = folder / "m.onnx"
        path.write_bytes(content)
        return path

    return create


def truncated(folder: Path) -> Path:
    return write(small().SerializeToString()[:700])(folder)


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "m.onnx", "w") as archive:
        archive.writestr("data.pkl", b"x")
    return folder / "m.onnx"


def no_nodes() -> bytes:
    model = small()
    model.graph.ClearField("node")
    return model.SerializeToString()


def no_graph() -> bytes:
    model = small()
    model.ClearField("graph")
    return model.SerializeToString()


def no_opset() -> bytes:
    model = small(3, "ai.onnx.ml")
    return model.SerializeToString()


RANDOM = np.random.default_rng(3).bytes(4000)

REFUSED: list[tuple[str, Callable[[Path], Path], str]] = [
    ("missing", lambda folder: folder / "no.onnx", r"no\.onnx does not exist: check the path"),
    ("folder", lambda folder: folder, r"is a folder: give the path of the \.onnx file in it"),
    ("empty", write(b""), r"m\.onnx is empty: export"),
    ("text", write(b"hello world, not a model\n"), r"is a text file, not an ONNX model: give a"),
    ("json", write(b'{"irVersion": "8"}'), r"is a text file, not an ONNX model"),
    ("png", write(b"\x89PNG\r\n\x1a\n" + RANDOM), r"is a PNG image, not an ONNX model"),
    ("random", write(RANDOM), r"is not an ONNX model, or is damaged: give a file"),
    ("zip", zipped, r"is a ZIP archive \(a PyTorch checkpoint\?\), not an ONNX model"),
    ("lfs", write(b"version https://git-lfs.github.com/spec/v1\n"), r"Git LFS pointer \(run"),
    ("ort", write(b"\x18\0\0\0ORTM" + RANDOM), r"own \.ort format: give the \.onnx file"),
    ("truncated", truncated, r"m\.onnx is truncated \([\d,]+ bytes are missing\): export, copy"),
    ("no graph", write(no_graph()), r"m\.onnx has no graph: it is not an ONNX model"),
    ("no nodes", write(no_nodes()), r"has a graph without nodes: there is nothing to prune"),
    ("no opset", write(no_opset()), r"names no opset of the standard ONNX operators"),
    ("opset 6", write(small(6).SerializeToString()), r"uses opset 6; onnxprune reads 7 to 28"),
    ("opset 29", write(small(29).SerializeToString()), r"opset 29; .* use onnx\.version_converter"),
]


@pytest.mark.parametrize(
    ("create", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, create: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(InvalidModelError, match=message) as caught:
        io.load(create(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", range(1, 700, 23))
def test_a_cut_at_any_byte_is_refused(tmp_path: Path, keep: int) -> None:
    data = small().SerializeToString()
    with pytest.raises(InvalidModelError):
        io.load(write(data[: len(data) * keep // 700])(tmp_path))


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_a_proto_is_given_back_as_it_is(domain: str) -> None:
    model = small(domain=domain)
    assert io.load(model) is model
    with pytest.raises(InvalidModelError, match="the model has no graph"):
        io.load(onnx.ModelProto(ir_version=8))


def external(folder: Path, **entries: str) -> Path:
    """A model whose `w` says what `entries` say about its data."""
    io.save(small(), folder / "m.onnx", external_data=True)
    model = onnx.load(os.fspath(folder / "m.onnx"), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"location": "gone.bin"},
            r"gone\.bin is missing: .*m\.onnx keeps 1 tensors there, .* 'w'",
        ),
        ({"location": "../m.onnx.data"}, r"'w' has its data at '\.\./m\.onnx\.data', outside the"),
        ({"location": "a/../../x"}, r"outside the model's folder; this is refused: keep the data"),
        ({"location": "/etc/passwd"}, r"at '/etc/passwd', outside the model's folder"),
        ({"location": ""}, r"outside the model's folder"),
        ({"location": "link"}, r"outside the model's folder"),
        ({"location": "sub"}, r"cannot read .*sub, the weights of .*m\.onnx: Is a directory"),
        ({"offset": "64"}, r"m\.onnx\.data is truncated: tensor 'w' needs bytes 64 to 2,112, the"),
        (
            {"length": "12"},
            r"'w' of shape \[32, 16\] needs 2,048 bytes, its entry in .* says 12 at",
        ),
        ({"offset": "-8"}, r"says 2,048 at offset -8: export the model again"),
        ({"offset": "x"}, r"'w' has a malformed offset or length"),
    ],
)
def test_bad_external_data_is_refused(
    tmp_path: Path, entries: dict[str, str], message: str
) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 5000)
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    path = external(folder, **entries)
    with pytest.raises(InvalidModelError, match=message) as caught:
        io.load(path)
    assert "\n" not in str(caught.value)


def test_a_model_cache_of_links_loads(tmp_path: Path) -> None:
    """Hubs keep blobs under hashes and give them names by links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    io.save(small(), snapshot / "m.onnx", external_data=True)
    for name in ("m.onnx", "m.onnx.data"):
        (snapshot / name).rename(blobs / name[::-1])
        (snapshot / name).symlink_to(blobs / name[::-1])
    assert io.load(snapshot / "m.onnx") == small()


def test_protos_with_unloaded_data_are_refused(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = onnx.load(os.fspath(path), load_external_data=False)
    with pytest.raises(
        InvalidModelError, match=r"the model keeps tensor 'w' in external data that"
    ):
        io.load(model)
    with pytest.raises(InvalidModelError, match="give the model's path instead"):
        io.save(model, tmp_path / "n.onnx")
    assert "n.onnx" not in names(tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"no space left while writing .*m\.onnx: free some or write to another"),
        (errno.EDQUOT, r"no space left"),
        (errno.EACCES, r"cannot write .*m\.onnx: no permission; write to another folder"),
        (errno.EROFS, r"no permission"),
        (errno.EIO, r"cannot write .*m\.onnx: .*error; try another path"),
    ],
)
@pytest.mark.parametrize("external_data", [False, True])
def test_failed_writes_say_why_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str, external_data: bool
) -> None:
    io.save(small(), tmp_path / "m.onnx", external_data=True)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OnnxPruneError, match=message):
        io.save(rich(), tmp_path / "m.onnx", external_data=external_data)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("place", ["flush 1", "flush 2", "rename 1", "rename 2", "renamed 2"])
def test_interruption_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, fresh: bool
) -> None:
    if not fresh:
        io.save(small(), tmp_path / "m.onnx", external_data=True)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    flush, replace = os.fsync, os.replace
    seen = {"flush": 0, "rename": 0}

    def interrupt_flush(handle: int) -> None:
        seen["flush"] += 1
        if place == f"flush {seen['flush']}":
            raise KeyboardInterrupt
        flush(handle)

    def interrupt_replace(source: Path, target: Path) -> None:
        seen["rename"] += 1
        if place == f"rename {seen['rename']}":
            raise KeyboardInterrupt
        replace(source, target)
        if place == f"renamed {seen['rename']}":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt_flush)
    monkeypatch.setattr(os, "replace", interrupt_replace)
    with pytest.raises(KeyboardInterrupt):
        io.save(rich(), tmp_path / "m.onnx", external_data=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_interruption_works_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_link)
    test_interruption_leaves_what_was_there(tmp_path, monkeypatch, "rename 2", False)


def test_targets_that_cannot_be_files(tmp_path: Path) -> None:
    with pytest.raises(OnnxPruneError, match=r"there is no folder .*nowhere; create it first"):
        io.save(small(), tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(OnnxPruneError, match="it is a folder; give the path of a file"):
        io.save(small(), tmp_path)
    with pytest.raises(OnnxPruneError, match="it is not a regular file"):
        io.write_text("/dev/null", "x")
    assert names(tmp_path) == []


def test_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: onnx.ModelProto) -> bytes:
        raise ValueError("exceeds 2 GiB")

    monkeypatch.setattr(onnx.ModelProto, "SerializeToString", fail)
    with pytest.raises(OnnxPruneError, match="protobuf ends at 2 GiB: save it with external data"):
        io.save(small(), tmp_path / "m.onnx", external_data=False)


def test_permissions_follow_the_target_or_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        io.write_text(tmp_path / "a", "1")
        (tmp_path / "b").touch(mode=0o600)
        io.write_text(tmp_path / "b", "2")
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert modes == [0o640, 0o600]


def test_write_text_replaces_the_content(tmp_path: Path) -> None:
    for text in ("first, and longer\n", "grün\n"):
        io.write_text(tmp_path / "plan.json", text)
        assert (tmp_path / "plan.json").read_text(encoding="utf-8") == text
    assert names(tmp_path) == ["plan.json"]


def test_temporary_names_fit_the_file_system(tmp_path: Path) -> None:
    name = "n" * 250
    io.write_text(tmp_path / name, "x")
    assert names(tmp_path) == [name]
    assert files.flush is not None


@pytest.mark.slow
def test_a_model_above_2_gib_comes_back(tmp_path: Path) -> None:
    model = small()
    block = np.arange(150_000_000, dtype=np.float32)
    for index in range(4):
        model.graph.initializer.append(numpy_helper.from_array(block, f"big{index}"))
    del block
    io.save(model, tmp_path / "m.onnx")
    del model
    assert (tmp_path / "m.onnx.data").stat().st_size > 2**31
    loaded = io.load(tmp_path / "m.onnx")
    last = np.frombuffer(loaded.graph.initializer[-1].raw_data, np.float32)
    assert last.shape == (150_000_000,)
    assert last[-1] == np.float32(149_999_999)
