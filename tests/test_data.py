"""Data sources: each kind opens, fits the model, batches and shuffles, or says why not."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxprune.data import Batch, Dataset, open_data
from onnxprune.errors import InvalidDataError

Shape = list[Any]


def model(*inputs: tuple[str, int, Shape | None]) -> onnx.ModelProto:
    """A model that has these inputs; the graph itself does not matter here."""
    values = [helper.make_tensor_value_info(*i) for i in inputs]
    return helper.make_model(helper.make_graph([], "g", values, []))


def images(shape: Shape, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A model with one input `image`."""
    return model(("image", kind, shape))


def write_npz(path: Path, **arrays: np.ndarray) -> str:
    """The arrays as a file; its path."""
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def idx_bytes(array: np.ndarray) -> bytes:
    """A uint8 array in IDX form."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def all_of(data: Dataset, size: int = 4, **kwargs: Any) -> Batch:
    """Every batch joined."""
    batches = list(data.batches(size, **kwargs))
    names = batches[0].feeds
    labels = [b.labels for b in batches if b.labels is not None]
    return Batch(
        {n: np.concatenate([b.feeds[n] for b in batches]) for n in names},
        np.concatenate(labels) if labels else None,
    )


X = np.arange(10 * 6, dtype=np.float32).reshape(10, 6)
Y = np.arange(10)
FLAT = ("image", TensorProto.FLOAT, ["N", 6])


class Loader:
    """A data loader as torch has it: iterable again and again, tensors in a tuple."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for start in range(0, 10, 3):
            yield tuple(Tensor(a[start : start + 3]) for a in self.arrays)


class Tensor:
    """A tensor with torch's methods and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return self.array


class Reader:
    """A calibration reader without rewind."""

    def __init__(self) -> None:
        self.left = [{"image": X[:5]}, {"image": X[5:]}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop(0) if self.left else None


class RewindingReader(Reader):
    """A calibration reader with it."""

    def rewind(self) -> None:
        Reader.__init__(self)


PYTHON_SOURCES: dict[str, Callable[[], Any]] = {
    "mapping": lambda: {"image": X, "y": Y},
    "mapping, lone x": lambda: {"x": X, "y": Y},
    "list of dicts": lambda: [{"image": X[i : i + 1], "labels": Y[i : i + 1]} for i in range(10)],
    "list of pairs": lambda: [({"image": X[:7]}, Y[:7]), ({"image": X[7:]}, Y[7:])],
    "list of array pairs": lambda: [(X[:7], Y[:7]), (X[7:], Y[7:])],
    "list of nested pairs": lambda: [((X,), Y)],
    "generator": lambda: ((X[i : i + 4], Y[i : i + 4]) for i in range(0, 10, 4)),
    "generator function": lambda: lambda: ((X[i : i + 4], Y[i : i + 4]) for i in range(0, 10, 4)),
    "function": lambda: lambda: {"image": X, "y": Y},
    "data loader": lambda: Loader(X, Y),
    "batches": lambda: [Batch({"image": X}, Y)],
    "columns of labels": lambda: [(X, Y[:, None])],
    "float64": lambda: {"image": X.astype(np.float64), "y": Y},
    "small integers": lambda: {"image": X.astype(np.uint8), "y": Y},
}


@pytest.mark.parametrize("make", PYTHON_SOURCES.values(), ids=PYTHON_SOURCES)
def test_python_sources_hold_the_same_samples(make: Callable[[], Any]) -> None:
    data = open_data(make(), model(FLAT))
    for _ in range(2):
        sizes = [len(b.feeds["image"]) for b in data.batches(4)]
        assert sizes == [4, 4, 2]
        whole = all_of(data)
        np.testing.assert_array_equal(whole.feeds["image"], X)
        assert whole.feeds["image"].dtype == np.float32
        np.testing.assert_array_equal(whole.labels, Y)


@pytest.mark.parametrize("make", PYTHON_SOURCES.values(), ids=PYTHON_SOURCES)
def test_shuffling_is_the_generators_alone(make: Callable[[], Any]) -> None:
    data = open_data(make(), model(FLAT))
    first = all_of(data, rng=np.random.default_rng(1))
    again = all_of(data, rng=np.random.default_rng(1))
    other = all_of(data, rng=np.random.default_rng(2))
    np.testing.assert_array_equal(first.labels, again.labels)
    assert list(first.labels) != list(other.labels)  # type: ignore[arg-type]
    assert sorted(first.labels) == list(Y)  # type: ignore[arg-type]
    np.testing.assert_array_equal(first.feeds["image"], X[first.labels])


@pytest.mark.parametrize("reader", [Reader, RewindingReader])
def test_calibration_readers_are_read_again(reader: type[Reader]) -> None:
    data = open_data(reader(), model(FLAT))
    for _ in range(2):
        whole = all_of(data)
        assert whole.labels is None
        np.testing.assert_array_equal(whole.feeds["image"], X)


def test_a_dataset_stays_itself() -> None:
    data = open_data({"x": X}, model(FLAT))
    assert open_data(data, model(FLAT)) is data


def test_lengths() -> None:
    assert len(open_data({"x": X}, model(FLAT))) == 10
    assert len(open_data([(X[:3],), (X[3:],)], model(FLAT))) == 10
    fixed = model(("image", TensorProto.FLOAT, [4, 6]))
    assert len(open_data({"x": X}, fixed)) == 8
    assert len(open_data([(X,)], fixed)) == 8
    stream = open_data(Loader(X), model(FLAT))
    with pytest.raises(TypeError, match="only after iterating"):
        len(stream)
    assert stream


def test_a_fixed_batch_drops_what_does_not_fill_it() -> None:
    fixed = model(("image", TensorProto.FLOAT, [4, 6]))
    for source in ({"x": X}, [(X[:3],), (X[3:],)], Loader(X)):
        got = [b.feeds["image"] for b in open_data(source, fixed).batches(64)]
        assert [len(g) for g in got] == [4, 4]
        np.testing.assert_array_equal(np.concatenate(got), X[:8])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12), st.booleans())
def test_any_feeds_become_batches_of_any_size(lengths: list[int], size: int, fixed: bool) -> None:
    whole = np.arange(sum(lengths), dtype=np.float32)
    feeds = [(part, part) for part in np.split(whole, np.cumsum(lengths)[:-1])]
    data = open_data(feeds, images([size if fixed else "N"]))
    if fixed and len(whole) < size:
        with pytest.raises(InvalidDataError, match="fewer samples"):
            list(data.batches(1))
        return
    got = list(data.batches(size))
    full = len(whole) // size
    assert [len(b.feeds["image"]) for b in got[:full]] == [size] * full
    count = full * size if fixed else len(whole)
    assert len(data) == count
    np.testing.assert_array_equal(np.concatenate([b.labels for b in got]), whole[:count])
    shuffled = list(data.batches(size, rng=np.random.default_rng(0)))
    seen = np.concatenate([b.feeds["image"] for b in shuffled])
    assert len(set(seen)) == len(seen) == count


def test_a_long_list_item_is_shuffled_whole() -> None:
    long = np.arange(1000)
    data = open_data([(long.astype(np.float32)[:, None], long)], images(["N", 1]))
    first = next(iter(data.batches(2, rng=np.random.default_rng(0))))
    assert first.labels is not None and first.labels.max() > 32


def test_sequences_of_other_lengths_are_not_joined() -> None:
    tokens = model(("ids", TensorProto.INT64, ["N", "T"]))
    feeds = [{"ids": np.ones((3, t), np.int32)} for t in (4, 4, 5)]
    shapes = [b.feeds["ids"].shape for b in open_data(feeds, tokens).batches(4)]
    assert shapes == [(4, 4), (2, 4), (3, 5)]


def test_inputs_without_a_batch_axis_are_fed_whole() -> None:
    two = model(FLAT, ("scale", TensorProto.FLOAT, []))
    data = open_data({"image": X, "scale": np.float32(2), "y": Y}, two)
    assert [(b.feeds["image"].shape, b.feeds["scale"].shape) for b in data.batches(8)] == [
        ((8, 6), ()),
        ((2, 6), ()),
    ]
    feeds = [{"image": X[:3], "scale": 1.0}, {"image": X[3:], "scale": 2.0}]
    data = open_data(feeds, two)
    assert [len(b.feeds["image"]) for b in data.batches(8)] == [3, 7]
    assert len(data) == 10


@pytest.mark.parametrize(("length", "shapes"), [(10, [8, 2]), (7, [7, 7])])
def test_batch_axes_with_names_of_their_own(length: int, shapes: list[int]) -> None:
    """torch.export names them s10 and s86; another length says that it counts something else."""
    two = model(FLAT, ("mask", TensorProto.FLOAT, ["M", 2]))
    data = open_data({"image": X, "mask": np.ones((length, 2), np.float32)}, two)
    assert [len(b.feeds["mask"]) for b in data.batches(8)] == shapes


def test_initializers_are_no_inputs_to_feed() -> None:
    proto = model(FLAT, ("weight", TensorProto.FLOAT, [6]))
    proto.graph.initializer.append(helper.make_tensor("weight", TensorProto.FLOAT, [6], [0.0] * 6))
    assert len(open_data({"x": X}, proto)) == 10


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        (["N", 1, 2, 3], (10, 2, 3)),
        (["N", 2, 3, 1], (10, 2, 3)),
        (["N", 6], (10, 2, 3)),
        (["N", 6], (10, 1, 2, 3)),
        (["N", 1, 2, 3], (10, 6)),
        (["N", 1, 6], (10, 6, 1)),
        ([None, "H", "W"], (10, 2, 3)),
        (None, (10, 2, 3)),
    ],
)
def test_samples_are_flattened_and_unflattened(wanted: Shape | None, given: Any) -> None:
    data = open_data({"x": X.reshape(given)}, images(wanted))  # type: ignore[arg-type]
    got = all_of(data).feeds["image"]
    np.testing.assert_array_equal(got.reshape(10, 6), X)
    if wanted is not None:
        assert got.ndim == len(wanted)


def test_npz_by_name(tmp_path: Path) -> None:
    two = model(FLAT, ("mask", TensorProto.BOOL, ["N"]))
    path = write_npz(tmp_path / "d.npz", mask=Y > 3, image=X, y=Y)
    whole = all_of(open_data(Path(path), two))
    np.testing.assert_array_equal(whole.feeds["mask"], Y > 3)
    np.testing.assert_array_equal(whole.labels, Y)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_stored_or_compressed(tmp_path: Path, save: Any, order: Any) -> None:
    save(tmp_path / "d.npz", x=np.asarray(X, order=order), y=Y)
    data = open_data(str(tmp_path / "d.npz"), model(FLAT))
    np.testing.assert_array_equal(all_of(data).feeds["image"], X)


def test_npy_feeds_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", X)
    np.testing.assert_array_equal(
        all_of(open_data(tmp_path / "d.npy", model(FLAT))).feeds["image"], X
    )


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder in MNIST's naming: 6 training images (gz), 4 test images (plain), 4 x 4 pixels."""
    pixels = np.arange(160, dtype=np.uint8).reshape(10, 4, 4)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pixels[:6])))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx_bytes(Y[:6].astype(np.uint8)))
    )
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(pixels[6:]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(Y[6:].astype(np.uint8)))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "labels"),
    [
        ("", Y[:6]),
        (":train", Y[:6]),
        (":test", Y[6:]),
        ("/train-images-idx3-ubyte.gz", Y[:6]),
        ("/t10k-images-idx3-ubyte", Y[6:]),
    ],
)
@pytest.mark.parametrize("shape", [["N", 1, 4, 4], ["N", 16]])
def test_idx(mnist: Path, source: str, labels: np.ndarray, shape: Shape) -> None:
    whole = all_of(open_data(f"{mnist}{source}", images(shape)))
    np.testing.assert_array_equal(whole.labels, labels)
    image = whole.feeds["image"]
    assert image.dtype == np.float32 and image.ndim == len(shape)
    first = 16 * labels[0]
    expected = np.arange(first, first + 16 * len(labels)) / 255
    np.testing.assert_allclose(image.ravel(), expected, rtol=1e-6)


def test_idx_with_mean_and_std_or_raw(mnist: Path) -> None:
    (mnist / "preprocess.json").write_text('{"mean": 0.5, "std": 0.25}')
    image = all_of(open_data(mnist, images(["N", 16]))).feeds["image"]
    np.testing.assert_allclose(image.ravel(), (np.arange(96) / 255 - 0.5) / 0.25, atol=1e-6)
    raw = all_of(open_data(mnist, images(["N", 16], TensorProto.UINT8))).feeds["image"]
    np.testing.assert_array_equal(raw.ravel(), np.arange(96))


def test_idx_without_labels(mnist: Path) -> None:
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    assert all_of(open_data(f"{mnist}:test", images(["N", 16]))).labels is None


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, cats (two images, one grey) and dogs (one), of other sizes than any model's."""
    image = pytest.importorskip("PIL.Image")
    for name, colour in {"cats/a.png": (255, 0, 0), "dogs/b.jpg": (0, 0, 255)}.items():
        (tmp_path / name).parent.mkdir()
        image.new("RGB", (20, 12), colour).save(tmp_path / name, quality=100)
    image.new("L", (6, 9), 51).save(tmp_path / "cats" / "b.PNG")
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("shape", [["N", 3, 8, 10], ["N", 8, 10, 3], ["N", 1, 8, 10]])
def test_image_folder(photos: Path, shape: Shape) -> None:
    whole = all_of(open_data(photos, images(shape)))
    image = whole.feeds["image"]
    np.testing.assert_array_equal(whole.labels, [0, 0, 1])
    assert image.shape == (3, *shape[1:]) and image.dtype == np.float32
    np.testing.assert_allclose(image[1], 0.2, atol=1e-6)
    assert image.min() >= 0 and image.max() <= 1
    if shape[1] == 3:
        np.testing.assert_allclose(image[0, :, 4, 5], [1, 0, 0], atol=1e-6)


def test_images_are_cropped_at_the_centre(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    pixels = np.zeros((4, 8), np.uint8)
    pixels[:, 2:6] = 255
    image.fromarray(pixels).save(tmp_path / "a" / "a.png")
    got = all_of(open_data(tmp_path, images(["N", 1, 4, 4]))).feeds["image"]
    assert got.min() == 1


def test_preprocess_by_channel_and_size(photos: Path) -> None:
    (photos / "preprocess.json").write_text(
        json.dumps({"mean": [0.5, 0.25, 0], "std": [0.5, 0.25, 1], "size": [8, 6], "resize": 10})
    )
    image = all_of(open_data(photos, images(["N", 3, "H", "W"]))).feeds["image"]
    assert image.shape == (3, 3, 8, 6)
    np.testing.assert_allclose(image[0, :, 4, 3], [1, -1, 0], atol=1e-6)


def test_images_stay_bytes_for_a_uint8_input(photos: Path) -> None:
    image = all_of(open_data(photos, images([1, 8, 8, 3], TensorProto.UINT8)), 1).feeds["image"]
    assert image.dtype == np.uint8 and image[0, 0, 0, 0] == 255


SCRIPT = """
import numpy as np

X = np.arange(60, dtype=np.float32).reshape(10, 6)
Y = np.arange(10)

def train():
    for i in range(0, 10, 5):
        yield {"image": X[i:i+5]}, Y[i:i+5]

def whole():
    return {"image": X, "y": Y}

def late():
    yield X[:5], Y[:5]
    raise KeyError("lost")

def broken():
    return 1 / 0
"""


@pytest.mark.parametrize("function", ["train", "whole"])
def test_script(tmp_path: Path, function: str) -> None:
    (tmp_path / "feeds.py").write_text(SCRIPT)
    data = open_data(f"{tmp_path}/feeds.py:{function}", model(FLAT))
    for _ in range(2):
        np.testing.assert_array_equal(all_of(data).feeds["image"], X)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("", "name the function that yields the feeds"),
        (":test", "has no function 'test'; it has train, whole, late, broken"),
        (":broken", "line 19: ZeroDivisionError: division by zero"),
        (":late", "line 16: KeyError: 'lost'"),
    ],
)
def test_script_errors(tmp_path: Path, part: str, message: str) -> None:
    (tmp_path / "feeds.py").write_text(SCRIPT)
    with pytest.raises(InvalidDataError, match=message):
        list(open_data(f"{tmp_path}/feeds.py{part}", model(FLAT)).batches(4))


def test_script_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "feeds.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(InvalidDataError, match=r"line 1: ModuleNotFoundError"):
        open_data(f"{tmp_path}/feeds.py:train", model(FLAT))


TWO = model(FLAT, ("mask", TensorProto.FLOAT, ["N"]))
MISFITS: dict[str, tuple[Any, onnx.ModelProto, str]] = {
    "missing name": ({"image": X}, TWO, "data: lacks 'mask'; the model's inputs are 'image', 'mas"),
    "unknown name": ({"picture": X}, model(FLAT), "lacks 'image' and has 'picture'"),
    "rank": ({"x": X[0]}, model(FLAT), r"takes float32 \[batch, 6\], not \[6\]; .*batch axis"),
    "length": ({"x": X[:, :5]}, model(FLAT), r"not \[10, 5\]; axis 1 must have length 6"),
    "channels last": (
        {"x": np.zeros((2, 8, 8, 3))},
        images(["N", 3, 8, 8]),
        "channels sit on another axis; transpose the data",
    ),
    "size": ({"x": np.zeros((2, 5, 5))}, images(["N", 1, 4, 4]), "resize or reshape"),
    "lengths": ({"image": X, "y": Y[:3]}, model(FLAT), r"samples differ \(image 10, labels 3\)"),
    "no samples": ({"x": X[:0]}, model(FLAT), "no samples"),
    "empty list": ([], model(FLAT), "no samples"),
    "too few": ({"x": X}, images([16, 6]), "fewer samples than the model's fixed batch of 16"),
    "too few, list": ([(X,)], images([16, 6]), "fewer samples than the model's fixed batch"),
    "float to int": ({"x": X}, images(["N", 6], TensorProto.INT64), "takes int64, not float32"),
    "int to bool": ({"x": Y}, images(["N"], TensorProto.BOOL), "takes bool, not int64"),
    "range": (
        {"x": Y - 5},
        images(["N"], TensorProto.UINT8),
        "values reach from -5 to -2; it holds",
    ),
    "scalar labels": ({"x": X, "y": np.array(3)}, model(FLAT), "labels 'y' are one scalar"),
    "labels of a feed": ([(X, Y[:4])], model(FLAT), r"feed 0: labels \[4\] for 10 samples"),
    "too many arrays": ([(X, X, Y)], model(FLAT), "a feed of 3 arrays, but the model has 1 inputs"),
    "feed lengths": (
        [{"image": X, "mask": X[:3, 0]}],
        TWO,
        r"batch lengths differ \(image 10, mask 3\)",
    ),
    "ragged": ([([[1.0], [2.0, 3.0]],)], model(FLAT), "is no array"),
    "objects": ([(object(),)], model(FLAT), "a object is no array of numbers or text"),
    "no source": (3, model(FLAT), "a int holds no feeds"),
    "nothing": (None, model(FLAT), "a NoneType holds no feeds"),
    "no inputs": ({"x": X}, model(), "the model has no inputs"),
    "fixed batch beside an unbatched input": (
        [{"image": X, "scale": 1.0}],
        model(("image", TensorProto.FLOAT, [4, 6]), ("scale", TensorProto.FLOAT, [])),
        "the model's batch is fixed to 4",
    ),
}


@pytest.mark.parametrize(("source", "proto", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits_say_what_and_where(source: Any, proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(InvalidDataError, match=message):
        list(open_data(source, proto).batches(4))


def test_inputs_that_are_no_tensors() -> None:
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    proto = helper.make_model(helper.make_graph([], "g", [sequence], []))
    with pytest.raises(InvalidDataError, match="input 's' of the model is sequence_type"):
        open_data({"s": X}, proto)


def test_batches_of_nothing_are_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="at least one sample, not 0"):
        next(iter(open_data({"x": X}, model(FLAT)).batches(0)))


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "npz": ("a.npz", b"PK\3\4 cut short", "cannot be read as numpy data"),
    "npy": ("a.npy", b"\x93NUMPY", "cannot be read as numpy data"),
    "other": ("a.csv", b"1,2,3", "not a known kind of data; give .npz"),
    "idx cut": ("a-images-idx3-ubyte", idx_bytes(np.zeros((2, 4, 4), np.uint8))[:-1], "truncated"),
    "idx labels": ("a-labels", idx_bytes(np.zeros(3, np.uint8)), "holds labels, not images"),
    "idx size": ("a-images", idx_bytes(np.zeros((2, 5, 5), np.uint8)), "resize or reshape"),
    "gz": ("a-images.gz", b"\x1f\x8b\x08 no gzip", "not a known kind"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidDataError, match=message):
        open_data(tmp_path / name, images(["N", 1, 4, 4]))


def test_a_gz_file_cut_short(mnist: Path) -> None:
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InvalidDataError, match=r"cannot be read .*fetch it again"):
        open_data(path, images(["N", 16]))


def test_an_npz_of_objects(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz", x=np.array([{}], dtype=object))
    with pytest.raises(InvalidDataError, match="array 'x' holds Python objects"):
        open_data(path, model(FLAT))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.npz", "no file or folder 'nowhere.npz'; data is .npz"),
        ("nowhere:train", "no file or folder 'nowhere'"),
        (".:train", "expected one IDX file of train images"),
        (".:validation", "the parts of a folder of IDX files are 'train' and 'test'"),
        (".", "no images; expected one sub-folder a class"),
    ],
)
def test_missing_sources(workdir: Path, source: str, message: str) -> None:
    with pytest.raises(InvalidDataError, match=message):
        open_data(source, images(["N", 1, 4, 4]))


def test_a_part_of_a_file(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz", x=X)
    with pytest.raises(InvalidDataError, match="':test' means something only after"):
        open_data(path + ":test", model(FLAT))


def test_files_for_models_with_two_inputs(mnist: Path, photos: Path) -> None:
    (photos / "only").mkdir()
    with pytest.raises(InvalidDataError, match="IDX files feed one input; the model has image, m"):
        open_data(f"{mnist}:test", TWO)


@pytest.mark.parametrize(
    ("shape", "content", "message"),
    [
        (["N", 6], "{}", "images need an input"),
        (["N", 3, "H", "W"], "{}", 'leaves the image size open; write {"size"'),
        (["N", 3, 8, 8], "{", "cannot be read as JSON"),
        (["N", 3, 8, 8], '{"means": 1}', "keys among mean, std, size, resize"),
        (["N", 3, 8, 8], '{"std": 0}', "'std' above 0"),
        (["N", 3, 8, 8], '{"mean": "grey"}', "could not convert string to float"),
        (["N", 3, 8, 8], '{"size": [3]}', r"'size' is \[height, width\]"),
        (["N", 3, 8, 8], '{"mean": [0, 0]}', "'mean' has 2 values, the images have 3 channels"),
    ],
)
def test_image_folder_errors(photos: Path, shape: Shape, content: str, message: str) -> None:
    (photos / "preprocess.json").write_text(content)
    with pytest.raises(InvalidDataError, match=message):
        open_data(photos, images(shape))


def test_a_broken_image(photos: Path) -> None:
    (photos / "dogs" / "b.jpg").write_bytes(b"no jpeg")
    with pytest.raises(InvalidDataError, match=r"b\.jpg: cannot be read as an image"):
        all_of(open_data(photos, images(["N", 3, 8, 8])))


def test_images_without_pillow(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(InvalidDataError, match=r"pip install 'onnxprune\[images\]'"):
        open_data(photos, images(["N", 3, 8, 8]))
