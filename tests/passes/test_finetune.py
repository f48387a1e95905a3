"""Fine-tuning as a whole: it learns, it repeats itself, and it keeps the model's form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxprune import runtime
from onnxprune.data import Batch, Dataset, open_data
from onnxprune.errors import InvalidDataError, InvalidRecipeError, TrainingError
from onnxprune.passes.finetune import Finetune, FinetuneResult
from onnxprune.training import Runtime
from onnxprune.training.client import Worker

Array = NDArray[Any]
MLP = """<ir_version: 8, opset_import: ["": 13], producer_name: "tests">
mlp (float[N,64] x) => (float[N,10] y) {
    h = Gemm(x, w1, b1) r = Relu(h) z = Gemm(r, w2, b2) y = Softmax(z)
}"""
SHAPES = {"w1": (64, 32), "b1": (32,), "w2": (32, 10), "b2": (10,)}


def initialized(
    text: str, shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32
) -> onnx.ModelProto:
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        scale = (2 / shape[0]) ** 0.5 if len(shape) > 1 else 0.0
        value = (rng.standard_normal(shape) * scale).astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def digits() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return (x[order] / 16).astype(np.float32), y[order]


X, Y = digits()
STUDENT = initialized(MLP, SHAPES)
TRAIN = open_data({"x": X[:1200], "y": Y[:1200]}, STUDENT)
HELD_OUT = open_data({"x": X[1200:], "y": Y[1200:]}, STUDENT)
UNLABELLED = open_data({"x": X[:1200]}, STUDENT)
QUICK = Finetune(epochs=3, batch_size=64, lr=5e-3, threads=1)


@pytest.fixture(scope="module")
def trained() -> FinetuneResult:
    """The digits, from scratch, from labels alone."""
    return Finetune(epochs=12, batch_size=32, lr=5e-3, threads=1)(STUDENT, data=TRAIN, val=HELD_OUT)


def weights(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


class Recorder:
    """A listener that keeps what it hears, and may interrupt."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.steps: list[dict[str, float]] = []
        self.stop_at = stop_at

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append((name, total))

    def step(self, done: int, **info: float) -> None:
        self.steps.append({"done": done, **info})
        if done == self.stop_at:
            raise KeyboardInterrupt


def test_it_learns_the_digits_from_scratch(trained: FinetuneResult) -> None:
    accuracies = [e.metrics["accuracy"] for e in trained.history]
    assert accuracies[0] < 0.3
    assert max(accuracies) > 0.95
    assert trained.history[trained.best_epoch].metrics["accuracy"] == max(accuracies)
    assert trained.steps == 12 * 38
    assert trained.trained == ("b1", "b2", "w1", "w2")
    assert not trained.frozen
    assert not trained.notes


def test_the_best_weights_are_those_returned(trained: FinetuneResult) -> None:
    session = runtime.session(trained.model, threads=1)
    answers = runtime.run(session, {"x": X[1200:]})["y"].argmax(axis=1)
    best = trained.history[trained.best_epoch].metrics["accuracy"]
    assert float((answers == Y[1200:]).mean()) == pytest.approx(best, abs=2e-3)


def test_only_the_values_of_weights_change(trained: FinetuneResult) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(trained.model)
    for new, old in zip(copy.graph.initializer, STUDENT.graph.initializer, strict=True):
        assert new.raw_data != old.raw_data
        new.CopyFrom(old)
    assert copy.SerializeToString() == STUDENT.SerializeToString()


def test_a_teacher_alone_teaches(trained: FinetuneResult) -> None:
    val = open_data({"x": X[1200:]}, STUDENT)
    result = dataclasses.replace(QUICK, epochs=6)(
        STUDENT, teacher=trained.model, data=UNLABELLED, val=val
    )
    assert result.history[-1].metrics["agreement"] > 0.9
    losses = [e.loss for e in result.history[1:]]
    assert None not in losses
    assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]


def test_sgd_and_both_losses(trained: FinetuneResult) -> None:
    tune = Finetune(epochs=4, batch_size=64, optimizer="sgd", lr=0.1, threads=1, alpha=0.7)
    result = tune(STUDENT, teacher=trained.model, data=TRAIN, val=HELD_OUT)
    assert result.history[-1].metrics["accuracy"] > 0.85


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = (QUICK(STUDENT, data=TRAIN).model for _ in range(2))
    assert first.SerializeToString() == second.SerializeToString()
    other = dataclasses.replace(QUICK, seed=1)(STUDENT, data=TRAIN).model
    assert other.SerializeToString() != first.SerializeToString()


def test_an_interrupted_run_continues_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    whole = QUICK(STUDENT, data=TRAIN, val=HELD_OUT)
    tune = dataclasses.replace(QUICK, checkpoint=path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        tune(STUDENT, data=TRAIN, val=HELD_OUT, progress=Recorder(stop_at=50))
    resumed = tune(STUDENT, data=TRAIN, val=HELD_OUT)
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()
    timeless = [[dataclasses.replace(e, seconds=0) for e in r.history] for r in (whole, resumed)]
    assert timeless[0] == timeless[1]
    assert resumed.steps == whole.steps
    again = tune(STUDENT, data=TRAIN, val=HELD_OUT)
    assert again.model.SerializeToString() == whole.model.SerializeToString()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    tune = Finetune(checkpoint=tmp_path / "run.npz", resume=True, threads=1)
    tune(STUDENT, data=TRAIN)
    with pytest.raises(TrainingError, match="belongs to another model or other options"):
        dataclasses.replace(tune, lr=0.5)(STUDENT, data=TRAIN)


def test_patience_ends_the_training_and_the_start_may_be_best(trained: FinetuneResult) -> None:
    tune = Finetune(epochs=50, lr=1.0, batch_size=256, patience=2, threads=1)
    result = tune(trained.model, data=TRAIN, val=HELD_OUT)
    assert result.best_epoch == 0
    assert len(result.history) == 3
    assert result.model.SerializeToString() == trained.model.SerializeToString()


def test_zeros_stay_zero_when_masked(trained: FinetuneResult) -> None:
    sparse = onnx.ModelProto()
    sparse.CopyFrom(trained.model)
    value = weights(sparse)["w1"].copy()
    value[::2] = 0
    sparse.graph.initializer[0].CopyFrom(numpy_helper.from_array(value, "w1"))
    result = dataclasses.replace(QUICK, masked=True)(sparse, data=TRAIN)
    after = weights(result.model)["w1"]
    assert not after[::2].any()
    assert (after[1::2] != value[1::2]).any()


def test_a_fixed_batch_of_one_trains_like_a_free_one() -> None:
    fixed = initialized(MLP.replace("N,", "1,"), SHAPES)
    x, y = X[:100], Y[:100]
    tune = Finetune(epochs=2, batch_size=20, optimizer="sgd", lr=0.1, threads=1)
    one = tune(fixed, data=open_data({"x": x, "y": y}, fixed))
    free = tune(STUDENT, data=open_data({"x": x, "y": y}, STUDENT))
    assert one.steps == free.steps == 10
    for name, value in weights(free.model).items():
        np.testing.assert_allclose(weights(one.model)[name], value, atol=1e-5)


def test_a_float16_model_stays_one() -> None:
    text = MLP.replace("float[", "float16[")
    student = initialized(text, SHAPES, np.float16)
    data = open_data({"x": X[:1200].astype(np.float16), "y": Y[:1200]}, student)
    result = QUICK(student, data=data)
    assert {a.dtype for a in weights(result.model).values()} == {np.dtype(np.float16)}
    session = runtime.session(result.model, threads=1)
    answers = runtime.run(session, {"x": X[1200:].astype(np.float16)})["y"].argmax(axis=1)
    assert float((answers == Y[1200:]).mean()) > 0.8


CNN = """<ir_version: 8, opset_import: ["": 17]>
cnn (float[N,1,8,8] x) => (float[N,10] y) {
    h = Conv<pads=[1,1,1,1]>(x, w) n = BatchNormalization(h, g, b, m, v) r = Relu(n)
    p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, w2, b2)
}"""


def cnn() -> onnx.ModelProto:
    model = initialized(CNN, {"w": (8, 1, 3, 3), "b": (8,), "m": (8,), "w2": (8, 10), "b2": (10,)})
    for name in ("g", "v"):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(8, np.float32), name))
    return model


@pytest.mark.parametrize("mode", ["frozen", "batch"])
def test_batchnorm_trains_in_either_mode(mode: Any) -> None:
    student, x = cnn(), X[:512].reshape(-1, 1, 8, 8)
    data = open_data({"x": x, "y": Y[:512]}, student)
    tune = Finetune(epochs=1, batch_size=512, lr=1e-6, batchnorm=mode, bn_momentum=0, threads=1)
    result = tune(student, data=data)
    assert set(result.trained) == {"w", "g", "b", "w2", "b2"}
    after = weights(result.model)
    if mode == "frozen":
        assert not after["m"].any()
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(student)
    probe.graph.output.append(onnx.helper.make_tensor_value_info("h", 1, None))
    h = runtime.run(runtime.session(probe, threads=1), {"x": x})["h"]
    np.testing.assert_allclose(after["m"], h.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["v"], h.var(axis=(0, 2, 3)), rtol=1e-4)


def test_what_is_frozen_is_reported() -> None:
    text = MLP.replace("z = Gemm(r,", "f = Floor(r) z = Gemm(f,")
    result = QUICK(initialized(text, SHAPES), data=TRAIN)
    assert set(result.frozen) == {"w1", "b1"}
    assert "Floor" in result.frozen["w1"]
    np.testing.assert_array_equal(weights(result.model)["w1"], weights(STUDENT)["w1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("y = Softmax(z)", "y = Round(z)"), r"nothing to train: all .* frozen.*Round \(y\)"),
        (("r = Relu(h)", "r = Relu(h) s = Floor(b2)"), None),
    ],
    ids=["unsupported", "unsupported beside the path"],
)
def test_what_cannot_be_differentiated(change: tuple[str, str], message: str | None) -> None:
    student = initialized(MLP.replace(*change), SHAPES)
    if message is None:
        assert not dataclasses.replace(QUICK, epochs=1)(student, data=TRAIN).frozen
        return
    with pytest.raises(TrainingError, match=message):
        QUICK(student, data=TRAIN)


def test_without_labels_or_teacher_nothing_can_be_learned() -> None:
    with pytest.raises(TrainingError, match="the data has no labels and there is no teacher"):
        QUICK(STUDENT, data=UNLABELLED)


def test_a_worker_that_dies_ends_the_training_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Worker] = []

    class Watched(Worker):
        def __init__(self, runtime: Runtime) -> None:
            super().__init__(runtime)
            started.append(self)

    class Killer(Recorder):
        def step(self, done: int, **info: float) -> None:
            started[0]._process.kill()

    monkeypatch.setattr("onnxprune.passes.finetune.Worker", Watched)
    with pytest.raises(
        TrainingError, match=r"ended \(exit status -9\), perhaps for want of memory"
    ):
        QUICK(STUDENT, data=TRAIN, progress=Killer())
    assert not started[0].alive


def test_progress_tells_loss_metric_and_time() -> None:
    heard = Recorder()
    QUICK(STUDENT, data=TRAIN, val=HELD_OUT, progress=heard)
    assert heard.stages == [("fine-tune", 57)]
    assert [s["done"] for s in heard.steps] == list(range(1, 58))
    assert heard.steps[-1].keys() == {"done", "loss", "eta_s", "accuracy"}
    assert heard.steps[-1]["eta_s"] == 0
    assert heard.steps[-1]["loss"] < heard.steps[0]["loss"]


def test_augmentation_sees_every_batch() -> None:
    seen: list[float] = []

    def jitter(batch: Batch, rng: np.random.Generator) -> Batch:
        seen.append(float(rng.random()))
        return Batch({n: a + np.float32(0.01) for n, a in batch.feeds.items()}, batch.labels)

    dataclasses.replace(QUICK, epochs=2, augment=jitter)(STUDENT, data=TRAIN)
    assert len(set(seen)) == 38


class Stream:
    """Data of unknown length."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def batches(self, size: int, *, rng: np.random.Generator | None = None) -> Iterator[Batch]:
        return self.data.batches(size, rng=rng)

    def __len__(self) -> int:
        raise TypeError("unknown")


def test_a_stream_of_unknown_length_is_counted() -> None:
    assert dataclasses.replace(QUICK, epochs=1)(STUDENT, data=Stream(TRAIN)).steps == 19


class Nothing(Stream):
    def batches(self, size: int, *, rng: np.random.Generator | None = None) -> Iterator[Batch]:
        return iter(())


def test_no_data_is_an_error() -> None:
    with pytest.raises(InvalidDataError, match="no training data"):
        QUICK(STUDENT, data=Nothing(TRAIN))


def test_a_teacher_must_have_the_students_outputs() -> None:
    teacher = initialized(MLP.replace(" y)", " other)").replace("y =", "other ="), SHAPES)
    with pytest.raises(TrainingError, match="the teacher has no output named y"):
        QUICK(STUDENT, teacher=teacher, data=TRAIN)


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", 0), ("lr", -1.0), ("alpha", 1.5), ("temperature", 0.0), ("optimizer", "lion")],
)
def test_options_are_checked(option: str, value: Any) -> None:
    with pytest.raises(InvalidRecipeError, match=f"^{option}={value!r} is out of range"):
        Finetune(**{option: value})


def test_resuming_needs_a_checkpoint() -> None:
    with pytest.raises(InvalidRecipeError, match="resume=True"):
        Finetune(resume=True)
