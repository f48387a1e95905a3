"""The loss.

Which outputs are compared with what, as plain ONNX nodes over numbers that the caller prepares.

Every term is a sum over elements, and what it is weighted with (mixing weight, temperature, 1 /
number of samples) is multiplied into the targets beforehand. So one graph serves hard labels, soft
labels, ignored positions and parts of batches:

* soft:   sum -target * log_softmax(z / T)      cross-entropy, and KL less its constant
* binary: sum weight * softplus(z) - target * z  cross-entropy of sigmoids
* square: sum weight * (z - target)^2
* absolute: sum weight * |z - target|
* likeness: the square of the rows of z z^T, each of length 1 (see `features`)

The constant part of KL enters as `offset`, so that the loss shown is the divergence itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxprune.errors import TrainingError
from onnxprune.training.draft import Builder, Draft, attributes, infer
from onnxprune.training.features import EPSILON, likeness

Kind = Literal["soft", "binary", "square", "absolute", "likeness"]
Final = Literal["softmax", "logsoftmax", "sigmoid", "none"]
Comparison = Literal["auto", "kl", "bce", "mse", "l1", "none"]
Distillation = Comparison | Mapping[str, Comparison]
COMPARISONS: tuple[Comparison, ...] = ("auto", "kl", "bce", "mse", "l1", "none")
Arrays = dict[str, NDArray[Any]]
SMALLEST = 1e-30


@dataclass(frozen=True)
class Term:
    """One summand.

    An output compared with labels (`teacher` False) or with the teacher's output.
    """

    key: str
    output: str
    kind: Kind
    final: Final
    axis: int
    weight: float
    temperature: float
    teacher: bool
    rank: int = 0
    classes: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class Objective:
    """The terms of the loss."""

    terms: tuple[Term, ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the teacher."""
        return any(term.teacher for term in self.terms)

    def feeds(
        self,
        labels: NDArray[Any] | None,
        teacher: Mapping[str, NDArray[Any]],
        *,
        share: float = 1.0,
    ) -> Arrays:
        """The loss graph's inputs for a batch that is this share of a step."""
        feeds: Arrays = {}
        offset = 0.0
        for full in self.terms:
            term = replace(full, weight=full.weight * share)
            if term.teacher:
                more, constant = _teacher_feeds(term, teacher[term.output])
            else:
                assert labels is not None
                more, constant = _label_feeds(term, labels), 0.0
            feeds.update(more)
            offset += constant
        feeds["onnxprune.offset"] = np.array([offset], np.float32)
        return feeds


def plan_objective(
    draft: Draft,
    outputs: Mapping[str, NDArray[Any]],
    labels: NDArray[Any] | None,
    *,
    has_teacher: bool,
    alpha: float,
    temperature: float,
    distillation: Distillation = "auto",
) -> Objective:
    """Choose the terms from what the model gives on a first batch.

    Args:
        draft: the legalised model.
        outputs: the student's outputs of the batch.
        labels: the labels of the batch, if there are any.
        has_teacher: a teacher's outputs will be there.
        alpha: the teacher's share where there are labels too.
        temperature: of the teacher's and student's distributions in KL.
        distillation: how outputs are compared with the teacher's.

    Raises:
        TrainingError: there are neither labels nor a teacher, or the labels fit no output.
    """
    floats = {n: o for n, o in outputs.items() if o.dtype.kind == "f" or o.dtype.name == "bfloat16"}
    if labels is None and not has_teacher:
        raise TrainingError("nothing to learn from: the data has no labels and there is no teacher")
    terms: list[Term] = []
    if labels is not None and not (has_teacher and alpha >= 1):
        terms.append(_label_term(draft, floats, labels, 1.0 - alpha if has_teacher else 1.0))
    if has_teacher and (alpha > 0 or labels is None):
        share = alpha if labels is not None else 1.0
        labelled = terms[0] if terms else None
        terms += _teacher_terms(draft, floats, labelled, share, temperature, distillation)
    if not terms:
        raise TrainingError("nothing to learn from: the model has no float output")
    return Objective(tuple(terms))


def feature_terms(
    kinds: Mapping[str, Kind], teacher: Mapping[str, NDArray[Any]], weight: float
) -> list[Term]:
    """Terms that compare inner tensors with the teacher's.

    Squared differences count relative to the teacher's variance.
    """
    terms = []
    for index, (name, kind) in enumerate(kinds.items()):
        scale = 1.0
        if kind == "square":
            scale = 1 / max(float(np.var(teacher[name], dtype=np.float64)), 1e-6)
        term = Term(f"feature{index}", name, kind, "none", 0, weight, 1.0, True, scale=scale)
        terms.append(term)
    return terms


def _label_term(
    draft: Draft, outputs: Mapping[str, NDArray[Any]], labels: NDArray[Any], weight: float
) -> Term:
    for name, output in outputs.items():
        final, axis = final_activation(draft, name, output.ndim)
        place = class_axis(output.shape, labels.shape, axis)
        if labels.dtype.kind in "iub" and place is not None:
            classes = output.shape[place]
            return Term(
                "label", name, "soft", final, place, weight, 1.0, False, output.ndim, classes
            )
        if output.size == labels.size and output.shape[0] == labels.shape[0]:
            kind: Kind = "binary" if final == "sigmoid" else "square"
            if final == "softmax":
                kind = "soft"
            return Term("label", name, kind, final, axis or 0, weight, 1.0, False, output.ndim)
    shapes = ", ".join(f"{n}{list(o.shape)}" for n, o in outputs.items())
    raise TrainingError(f"labels of shape {list(labels.shape)} fit none of the outputs: {shapes}")


def class_axis(output: Sequence[int], labels: Sequence[int], hint: int | None) -> int | None:
    """The axis of an output that integer labels choose from; None where they do not fit."""
    for axis in ([hint] if hint is not None else []) + [1, len(output) - 1]:
        rest = [*output[:axis], *output[axis + 1 :]]
        if axis < len(output) and output[axis] > 1 and _without_ones(rest) == _without_ones(labels):
            return axis
    return None


def _without_ones(shape: Sequence[int]) -> list[int]:
    """The shape less trailing axes of length 1; the batch axis stays."""
    return [size for i, size in enumerate(shape) if i == 0 or size != 1]


def _teacher_terms(
    draft: Draft,
    outputs: Mapping[str, NDArray[Any]],
    labelled: Term | None,
    share: float,
    temperature: float,
    distillation: Distillation,
) -> list[Term]:
    choices = _choices(distillation, outputs)
    terms = []
    for index, (name, output) in enumerate(outputs.items()):
        choice = choices[name]
        if choice == "none":
            continue
        final, axis = final_activation(draft, name, output.ndim)
        if labelled is not None and labelled.output == name and labelled.kind == "soft":
            axis = labelled.axis
        scores = index == 0 and output.ndim == 2 and output.shape[1] > 1
        if axis is None and (choice == "kl" or scores):
            axis = 1 if output.ndim == 2 else output.ndim - 1
        kind = _kind(choice, final, axis, name)
        scale = 1.0
        if kind in ("square", "absolute"):
            variance = max(float(np.var(output, dtype=np.float64)), 1e-6)
            scale = 1 / variance if kind == "square" else variance**-0.5
        key = f"teacher{index}"
        terms.append(Term(key, name, kind, final, axis or 0, share, temperature, True, scale=scale))
    return terms


def _choices(distillation: Distillation, outputs: Mapping[str, Any]) -> dict[str, Comparison]:
    """How each output is compared with the teacher's."""
    if not isinstance(distillation, Mapping):
        return dict.fromkeys(outputs, distillation)
    unknown = sorted(distillation.keys() - outputs.keys())
    if unknown:
        raise TrainingError(
            f"distillation: the model has no float output named {unknown[0]!r}; it has "
            f"{', '.join(outputs)}"
        )
    return {name: distillation.get(name, "auto") for name in outputs}


def _kind(choice: Comparison, final: Final, axis: int | None, name: str) -> Kind:
    if choice == "bce" and final != "sigmoid":
        raise TrainingError(f"distillation: bce needs a Sigmoid, which {name!r} does not come from")
    if choice == "kl":
        return "soft"
    if choice in ("mse", "l1"):
        return "square" if choice == "mse" else "absolute"
    if final == "sigmoid":
        return "binary"
    return "soft" if axis is not None else "square"


def final_activation(draft: Draft, output: str, rank: int) -> tuple[Final, int | None]:
    """What an output's last node is, where it is a kind of probability, and its class axis."""
    node = _producer(draft, output)
    if node is not None and node.op_type in ("Softmax", "LogSoftmax"):
        axis = attributes(node).get("axis", -1) % rank
        return ("softmax" if node.op_type == "Softmax" else "logsoftmax"), axis
    if node is not None and node.op_type == "Sigmoid":
        return "sigmoid", None
    return "none", None


def _producer(draft: Draft, tensor: str) -> onnx.NodeProto | None:
    node = draft.producers.get(tensor)
    while node is not None and node.op_type == "Identity":
        node = draft.producers.get(node.input[0])
    return node


def _label_feeds(term: Term, labels: NDArray[Any]) -> Arrays:
    """Targets of a label term for a whole batch."""
    key, count = f"onnxprune.{term.key}", labels.shape[0]
    if term.kind == "soft":
        if labels.dtype.kind in "iub":
            return {key: one_hot(labels, term)}
        positions = labels.size / labels.shape[term.axis]
        return {key: labels.astype(np.float32) * np.float32(term.weight / positions)}
    target = labels.astype(np.float32)
    target = target.reshape(*target.shape, *[1] * (term.rank - target.ndim))
    if term.kind == "binary":
        weight = np.float32(term.weight / count)
        return {key: target * weight, key + ".weight": np.array([weight], np.float32)}
    return {key: target, key + ".weight": np.array([term.weight / target.size], np.float32)}


def _teacher_feeds(term: Term, output: NDArray[Any]) -> tuple[Arrays, float]:
    """Targets of a teacher term for a whole batch, and the constant of its divergence."""
    key, z = f"onnxprune.{term.key}", output.astype(np.float32)
    if term.kind == "likeness":
        share = np.array([term.weight / len(z)], np.float32)
        return {key: likeness(z), key + ".weight": share}, 0.0
    if term.kind in ("square", "absolute"):
        weight = term.weight * term.scale / z.size
        return {key: z, key + ".weight": np.array([weight], np.float32)}, 0.0
    if term.kind == "binary":
        weight = term.weight / z.shape[0]
        entropy = _xlogx(z) + _xlogx(1 - z)
        feeds = {key: z * np.float32(weight), key + ".weight": np.array([weight], np.float32)}
        return feeds, float(entropy.sum(dtype=np.float64) * weight)
    soft = softmax(logits(z, term.final) / term.temperature, term.axis)
    positions = z.size / z.shape[term.axis]
    weight = term.weight * term.temperature**2 / positions
    constant = float(_xlogx(soft).sum(dtype=np.float64) * weight)
    return {key: soft * np.float32(weight)}, constant


def one_hot(labels: NDArray[Any], term: Term) -> NDArray[np.float32]:
    """Weighted one-hot targets in the shape of the output.

    Labels outside the classes are ignored.
    """
    shape = list(labels.shape)
    if len(shape) != term.rank - 1:
        shape = _without_ones(shape)
    shape += [1] * (term.rank - 1 - len(shape))
    index = labels.reshape(shape).astype(np.int64)
    valid = (index >= 0) & (index < term.classes)
    share = np.where(valid, term.weight / max(int(valid.sum()), 1), 0).astype(np.float32)
    shape.insert(term.axis, term.classes)
    target = np.zeros(shape, np.float32)
    places = np.expand_dims(np.where(valid, index, 0), term.axis)
    np.put_along_axis(target, places, np.expand_dims(share, term.axis), term.axis)
    return target


def logits(output: NDArray[Any], final: Final) -> NDArray[np.float32]:
    """Logits, up to a constant per position, from an output that may be probabilities."""
    z = output.astype(np.float32)
    return np.log(np.maximum(z, SMALLEST)) if final == "softmax" else z


def softmax(z: NDArray[Any], axis: int) -> NDArray[Any]:
    """Probabilities along an axis."""
    e: NDArray[Any] = np.exp(z - z.max(axis=axis, keepdims=True))
    p: NDArray[Any] = e / e.sum(axis=axis, keepdims=True)
    return p


def _xlogx(p: NDArray[Any]) -> NDArray[Any]:
    product: NDArray[Any] = p * np.log(np.maximum(p, SMALLEST))
    return product


def loss_value(objective: Objective, outputs: Mapping[str, NDArray[Any]], feeds: Arrays) -> float:
    """The loss in numpy, from the outputs of an inference session.

    What the training graph must give too.
    """
    total = float(feeds["onnxprune.offset"][0])
    for term in objective.terms:
        key = f"onnxprune.{term.key}"
        z, target = outputs[term.output].astype(np.float64), feeds[key].astype(np.float64)
        if term.kind == "likeness":
            z = likeness(z).astype(np.float64)
        if term.kind in ("square", "likeness"):
            total += float(feeds[key + ".weight"][0] * np.square(z - target.reshape(z.shape)).sum())
        elif term.kind == "absolute":
            gap = np.abs(z - target.reshape(z.shape)).sum()
            total += float(feeds[key + ".weight"][0] * gap)
        elif term.kind == "binary":
            weight = float(feeds[key + ".weight"][0])
            low = np.log(np.maximum(1 - z, SMALLEST))
            ratio = np.log(np.maximum(z, SMALLEST)) - low
            total -= float((weight * low + target.reshape(z.shape) * ratio).sum())
        else:
            p = softmax(logits(z, term.final).astype(np.float64) / term.temperature, term.axis)
            total -= float((target * np.log(np.maximum(p, SMALLEST))).sum())
    return total


def append_loss(draft: Draft, objective: Objective) -> None:
    """Add the loss to the draft.

    Its only output becomes `loss`, and what nothing reads is dropped.
    """
    b = Builder(draft, helper.make_node("Loss", [], ["loss"], name="onnxprune.loss"))
    parts = [b.op("ReduceSum", _input(draft, "onnxprune.offset", [1]), keepdims=0)]
    parts += [_term_nodes(draft, b, term) for term in objective.terms]
    total = parts[0]
    for part in parts[1:]:
        total = b.op("Add", total, part)
    b.op("Identity", total, output="loss")
    draft.nodes += b.nodes
    draft.outputs = [helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])]
    _drop_unread(draft)
    infer(draft)


def _term_nodes(draft: Draft, b: Builder, term: Term) -> str:
    key = f"onnxprune.{term.key}"
    rank = len(draft.shapes.get(term.output) or ()) or None
    if term.kind == "likeness":
        rank = 2
    z = term.output
    node = _producer(draft, z)
    if (
        node is not None
        and term.kind in ("soft", "binary")
        and term.final in ("softmax", "sigmoid")
    ):
        z = node.input[0]
    target = _input(draft, key, None if rank is None else [None] * rank)
    if term.kind == "soft":
        if term.temperature != 1:
            z = b.op("Mul", z, 1 / term.temperature)
        log_p = b.op("LogSoftmax", z, axis=term.axis)
        return b.op("Neg", b.op("ReduceSum", b.op("Mul", log_p, target), keepdims=0))
    weight = _input(draft, key + ".weight", [1])
    if term.kind == "binary":
        small = b.op("Exp", b.op("Neg", b.op("Abs", z)))
        plus = b.op("Add", b.op("Relu", z), b.op("Log", b.op("Add", small, 1.0)))
        gain = b.op("Sub", b.op("Mul", plus, weight), b.op("Mul", z, target))
        return b.op("ReduceSum", gain, keepdims=0)
    if term.kind == "likeness":
        z = _likeness_nodes(b, z)
    difference = b.op("Sub", z, target)
    if term.kind == "absolute":
        size = b.op("Abs", difference)
    else:
        size = b.op("Mul", difference, difference)
    return b.op("ReduceSum", b.op("Mul", size, weight), keepdims=0)


def _likeness_nodes(b: Builder, z: str) -> str:
    """[N, ...] -> [N, N], as `features.likeness` does it."""
    flat = b.op("Flatten", z, axis=1)
    products = b.op("Gemm", flat, flat, transB=1)
    squares = b.op("ReduceSum", b.op("Mul", products, products), np.array([1]), keepdims=1)
    return b.op("Div", products, b.op("Sqrt", b.op("Add", squares, EPSILON)))


def _input(draft: Draft, name: str, shape: Sequence[int | None] | None) -> str:
    draft.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return name


def _drop_unread(draft: Draft) -> None:
    read = {o.name for o in draft.outputs}
    kept = []
    for node in reversed(draft.nodes):
        if any(o in read for o in node.output):
            kept.append(node)
            read |= set(node.input)
            for attribute in node.attribute:
                for graph in [attribute.g, *attribute.graphs]:
                    read |= {name for inner in graph.node for name in inner.input}
    draft.nodes = kept[::-1]
    draft.inputs = [i for i in draft.inputs if i.name in read]
    draft.buffers = {n: a for n, a in draft.buffers.items() if n in read}
    draft.updates = {n: o for n, o in draft.updates.items() if n in read}
