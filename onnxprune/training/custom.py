"""A loss that the user gives as a small ONNX model.

Its inputs are called like what they take: an output or input of the student, "teacher_" and the
name of an output, or "labels". Its only output is one number, the loss of a batch (a mean over the
samples, so that parts of a batch add up by their share).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, version_converter

from onnxprune.errors import TrainingError
from onnxprune.training.draft import Draft
from onnxprune.training.loss import Arrays, Objective, Term

TEACHER, LABELS, SHARE = "teacher_", "labels", "onnxprune.share"
PREFIX = "onnxprune.loss."


@dataclass(frozen=True)
class CustomObjective(Objective):
    """The loss of a model; its terms tell the teacher's outputs that it reads, no more."""

    model: onnx.ModelProto | None = None
    reads_labels: bool = False

    def feeds(
        self,
        labels: NDArray[Any] | None,
        teacher: Mapping[str, NDArray[Any]],
        *,
        share: float = 1.0,
    ) -> Arrays:
        """The loss model's own inputs for a batch that is this share of a step."""
        feeds: Arrays = {PREFIX + TEACHER + t.output: teacher[t.output] for t in self.terms}
        if self.reads_labels:
            if labels is None:
                raise TrainingError("the loss reads labels, and the data has none")
            feeds[PREFIX + LABELS] = labels
        return {**feeds, SHARE: np.array([share], np.float32)}


def custom_objective(
    model: onnx.ModelProto, student: onnx.ModelProto, *, has_teacher: bool
) -> CustomObjective:
    """What a loss model reads.

    Raises:
        TrainingError: an input is none of the above, or there is not one output.
    """
    known = {v.name for v in [*student.graph.output, *student.graph.input]}
    terms, labels = [], False
    for info in model.graph.input:
        name = info.name.removeprefix(TEACHER)
        if info.name in known:
            continue
        if info.name != name and has_teacher:
            terms.append(Term(info.name, name, "square", "none", 0, 1.0, 1.0, True))
        elif info.name == LABELS:
            labels = True
        else:
            raise TrainingError(
                f"the loss reads {info.name!r}, which is no output or input of the model, nor "
                f"'labels', nor {TEACHER!r} and an output's name with a teacher given"
            )
    if len(model.graph.output) != 1:
        raise TrainingError(f"a loss has one output; this one has {len(model.graph.output)}")
    return CustomObjective(tuple(terms), model, labels)


def joined(student: onnx.ModelProto, objective: CustomObjective) -> onnx.ModelProto:
    """The student with the loss behind it, whose output is the only one."""
    assert objective.model is not None
    loss, student = _same_opset(objective.model, student)
    names = {v.name for v in [*student.graph.output, *student.graph.input]}
    fed = {i.name for i in loss.graph.input}
    loss = compose.add_prefix(loss, PREFIX)
    result = onnx.ModelProto()
    result.CopyFrom(student)
    for name in sorted(names & fed):
        result.graph.node.append(helper.make_node("Identity", [name], [PREFIX + name]))
    result.graph.node.extend(loss.graph.node)
    result.graph.initializer.extend(loss.graph.initializer)
    result.graph.input.extend(
        i for i in loss.graph.input if i.name.removeprefix(PREFIX) not in names
    )
    del result.graph.output[:]
    result.graph.output.extend(loss.graph.output)
    return result


def _same_opset(a: onnx.ModelProto, b: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Both in the newer one's version of the standard operators."""
    versions = [
        next((i.version for i in m.opset_import if i.domain in ("", "ai.onnx")), 1) for m in (a, b)
    ]
    newest = max(versions)
    try:
        first, second = (
            m if own == newest else version_converter.convert_version(m, newest)
            for m, own in zip((a, b), versions, strict=True)
        )
    except Exception as error:  # the converter's own errors have no common type
        raise TrainingError(
            f"the loss is of opset {versions[0]}, the model of {versions[1]}, and they cannot be "
            f"brought together: {str(error).strip().splitlines()[0]}"
        ) from error
    return first, second


def finish(draft: Draft) -> None:
    """Scale the loss by the share of the batch, and call it `loss`."""
    (output,) = draft.outputs
    draft.inputs.append(helper.make_tensor_value_info(SHARE, TensorProto.FLOAT, [1]))
    part, scaled = draft.name("part"), draft.name("scaled")
    draft.nodes += [
        helper.make_node("ReduceSum", [output.name], [part], name=part, keepdims=0),
        helper.make_node("Mul", [part, SHARE], [scaled], name=scaled),
        helper.make_node("ReduceSum", [scaled], ["loss"], name="onnxprune.total", keepdims=0),
    ]
    draft.outputs = [helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])]


def custom_value(
    objective: CustomObjective, values: Mapping[str, NDArray[Any]], feeds: Arrays
) -> float:
    """The loss by inference, from the student's inputs and outputs."""
    from onnxprune import runtime

    assert objective.model is not None
    wanted = {i.name for i in objective.model.graph.input}
    given = {n: a for n, a in values.items() if n in wanted}
    given |= {n: feeds[PREFIX + n] for n in wanted if PREFIX + n in feeds}
    (loss,) = runtime.run(runtime.session(objective.model, threads=1), given).values()
    return float(np.sum(loss)) * float(feeds[SHARE][0])
