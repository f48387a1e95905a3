"""Task metrics from ONNX Runtime's outputs, batch by batch, in numpy alone.

Precision, recall and F1 are macro averages over the classes that occur among labels or predictions;
a class that was never predicted, or never asked for, counts 0 where its ratio has no meaning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.errors import InvalidDataError

if TYPE_CHECKING:
    import onnxruntime

    from onnxprune.data import Batch, Dataset

    Model: TypeAlias = onnx.ModelProto | str | os.PathLike[str] | onnxruntime.InferenceSession

Array = NDArray[Any]
#: How many bytes of a reference's outputs are remembered.
ROOM = 1 << 28
_IGNORED = -1  # labels below 0 (-100 by custom) stand for "do not count"


class Reference:
    """A model to compare outputs with on one data set: what it answers is remembered, up to `ROOM`.

    So a series of candidates costs one run of the original each batch, not one for each.
    """

    def __init__(self, model: Model, *, threads: int | None = None) -> None:
        self._model, self._threads = model, threads
        self._session: onnxruntime.InferenceSession | None = None
        self._known: list[dict[str, Array]] = []
        self._room = ROOM

    def outputs(self, number: int, names: list[str], batch: Batch) -> dict[str, Array]:
        """The outputs `names` on batch `number`."""
        if number < len(self._known):
            return self._known[number]
        if self._session is None:
            self._session = _session(self._model, self._threads)
        found = _run(self._session, names, batch)
        size = sum(getattr(value, "nbytes", ROOM) for value in found.values())
        if number == len(self._known) and size <= self._room:
            self._known.append(found)
            self._room -= size
        return found

    def release(self) -> None:
        """Give the session's memory back."""
        self._session = None


def evaluate(
    model: Model,
    data: Dataset,
    *,
    batch_size: int = 64,
    threads: int | None = None,
    reference: Model | Reference | None = None,
) -> dict[str, float]:
    """Metrics of `model` on all of `data`, by name.

    With class labels: accuracy, precision, recall, f1, and top5 where there are more than five
    classes. With labels that are numbers like an output: mse. With `reference`: agreement (equal
    top-1 classes), and over all outputs mse and cosine (mean over samples) against the reference's
    outputs.

    Args:
        model: a model, its path, or a session.
        data: samples with or without labels; without labels and reference there is nothing to
            measure. batch_size: samples a run, where the model's batch axis is dynamic. threads: of
            each session made here; None leaves it to ONNX Runtime. reference: the model to compare
            outputs with, by output name;
            a `Reference` is run once for all models evaluated on these data.

    Raises:
        InvalidDataError: no samples, or labels that fit no output.
    """
    session = _session(model, threads)
    other = reference
    if other is not None and not isinstance(other, Reference):
        other = Reference(other, threads=threads)
    names = [value.name for value in session.get_outputs()]
    classes, errors, likeness = Classes(), SquaredError(), Likeness()
    count = 0
    for batch in data.batches(batch_size):
        outputs = _run(session, names, batch)
        if batch.labels is not None:
            _score(outputs, batch.labels, classes, errors)
        if other is not None:
            likeness.add(outputs, other.outputs(count, names, batch))
        count += 1
    if other is not None:
        other.release()
    if not count:
        raise InvalidDataError("no samples to evaluate; give data that fills at least one batch")
    return {**errors.result(), **classes.result(), **likeness.result()}


def points_lost(old: Mapping[str, float], new: Mapping[str, float]) -> tuple[str, float] | None:
    """The task's metric, and how many points (1 is 0.01) it lost; None where there is none.

    Without labels it is the agreement with the original, which agrees with itself in full.
    """
    name = next((m for m in ("accuracy", "agreement") if m in new), None)
    return None if name is None else (name, 100 * (old.get(name, 1.0) - new[name]))


@dataclass
class Classes:
    """Counts by class, enough for accuracy, macro precision, recall and F1, and top-5."""

    right: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    predicted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    actual: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    among_five: int = 0

    def add(self, scores: Array, labels: Array) -> None:
        """Count `scores` [N, K] against class indices `labels` [N]; labels below 0 do not count.

        Raises:
            InvalidDataError: a label is no class of the scores.
        """
        known = labels > _IGNORED
        scores, labels = scores[known], labels[known]
        size = scores.shape[1]
        if labels.size and labels.max() >= size:
            raise InvalidDataError(
                f"label {labels.max()} but the model's output has {size} classes (0 to "
                f"{size - 1}); "
                "give labels as class indices in the model's order"
            )
        if not self.actual.size:
            self.right, self.predicted, self.actual = np.zeros((3, size), np.int64)
        guess = scores.argmax(axis=1)
        self.right += np.bincount(labels[guess == labels], minlength=size)
        self.predicted += np.bincount(guess, minlength=size)
        self.actual += np.bincount(labels, minlength=size)
        self.among_five += int((ranks(scores, labels) < 5).sum())

    def result(self) -> dict[str, float]:
        """The metrics by name; empty where nothing was counted."""
        total = int(self.actual.sum())
        if not total:
            return {}
        seen = (self.actual + self.predicted) > 0
        right, predicted, actual = self.right[seen], self.predicted[seen], self.actual[seen]
        metrics = {
            "accuracy": float(right.sum() / total),
            "precision": float((right / np.maximum(predicted, 1)).mean()),
            "recall": float((right / np.maximum(actual, 1)).mean()),
            "f1": float((2 * right / (predicted + actual)).mean()),
        }
        if self.actual.size > 5:
            metrics["top5"] = self.among_five / total
        return metrics


@dataclass
class SquaredError:
    """The mean squared error over all numbers seen."""

    total: float = 0.0
    count: int = 0

    def add(self, output: Array, wanted: Array) -> None:
        """Count the differences of two arrays of one shape."""
        difference = np.subtract(output, wanted, dtype=np.float64)
        self.total += float(np.vdot(difference, difference))
        self.count += difference.size

    def result(self) -> dict[str, float]:
        """The metric by name; empty where nothing was counted."""
        return {"mse": self.total / self.count} if self.count else {}


@dataclass
class Likeness:
    """How alike two models' outputs are."""

    errors: SquaredError = field(default_factory=SquaredError)
    cosine: float = 0.0
    samples: int = 0
    agreed: int = 0
    answers: int = 0

    def add(self, outputs: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
        """Count one batch of outputs, by name."""
        for name, output in outputs.items():
            target = wanted[name]
            if output.shape != target.shape:
                raise InvalidDataError(
                    f"output {name!r} has shape {list(output.shape)}, the reference's has "
                    f"{list(target.shape)}; compare models of one task"
                )
            if not _is_float(output) or not output.size:
                continue
            self.errors.add(output, target)
            rows = len(output) if output.ndim else 1
            cosine = cosines(output.reshape(rows, -1), target.reshape(rows, -1))
            self.cosine += float(cosine.sum())
            self.samples += rows
        self._add_answers(outputs, wanted)

    def _add_answers(self, outputs: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
        found = next(((n, a) for n, o in outputs.items() if (a := class_axis(o)) is not None), None)
        if found is not None:
            name, axis = found
            same = outputs[name].argmax(axis) == wanted[name].argmax(axis)
            self.agreed += int(same.sum())
            self.answers += same.size

    def result(self) -> dict[str, float]:
        """The metrics by name; empty where nothing was counted."""
        metrics = self.errors.result()
        if self.samples:
            metrics["cosine"] = self.cosine / self.samples
        if self.answers:
            metrics["agreement"] = self.agreed / self.answers
        return metrics


def ranks(scores: Array, labels: Array) -> NDArray[np.int64]:
    """How many classes score above the label's, [N]; ties go to the lower index, as in argmax.

    A score that is not a number puts its sample last: a broken model is never right.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    above: NDArray[np.int64] = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    above[np.isnan(scores).any(axis=1)] = scores.shape[1]
    return above


def cosines(a: Array, b: Array) -> NDArray[np.float64]:
    """Cosine of the angle between rows of a and b [N, D]; 1 where both are zero, 0 where one is."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    safe = np.where(lengths == 0, 1.0, lengths)
    return np.where(both_zero, 1.0, np.einsum("nd,nd->n", a, b) / safe)


def class_axis(output: Array, labels: Array | None = None) -> int | None:
    """The axis of class scores: the last of [N, K] and [N, T, K], the second of [N, K, H, W].

    With labels, the axis that they lack. None where the output is no classification.
    """
    if not _is_float(output) or output.ndim < 2:
        return None
    usual = 1 if output.ndim >= 4 or output.ndim == 2 else output.ndim - 1
    candidates = [usual] if labels is None else [usual, 1, output.ndim - 1]
    for axis in candidates:
        rest = output.shape[:axis] + output.shape[axis + 1 :]
        if output.shape[axis] > 1 and (
            labels is None or _squeezed(rest) == _squeezed(labels.shape)
        ):
            return axis
    return None


def _score(
    outputs: Mapping[str, Array], labels: Array, classes: Classes, errors: SquaredError
) -> None:
    """Count one batch against the first output that its labels fit: as classes, or as numbers."""
    for output in outputs.values():
        if labels.dtype.kind in "iub":
            axis = class_axis(output, labels)
            if axis is not None:
                scores = np.moveaxis(output, axis, -1).reshape(-1, output.shape[axis])
                return classes.add(scores, labels.reshape(-1).astype(np.int64))
        elif labels.dtype.kind == "f" and _is_float(output) and output.size == labels.size:
            return errors.add(output.reshape(labels.shape), labels)
    told = ", ".join(f"{name!r} {list(o.shape)}" for name, o in outputs.items())
    raise InvalidDataError(
        f"labels {labels.dtype} {list(labels.shape)} fit no output of the model ({told}); give "
        "class indices "
        "(integers, one a sample), or floats in an output's shape"
    )


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without axes of length 1 behind the first: [N, 1, 1] is as good as [N]."""
    return (*shape[:1], *(n for n in shape[1:] if n != 1))


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f"


def _session(model: Model, threads: int | None) -> onnxruntime.InferenceSession:
    if not isinstance(model, onnx.ModelProto | str | os.PathLike):
        return model
    from onnxprune.runtime import session

    return session(model, threads=threads)


def _run(session: onnxruntime.InferenceSession, names: list[str], batch: Batch) -> dict[str, Array]:
    return dict(zip(names, session.run(names, dict(batch.feeds)), strict=True))
