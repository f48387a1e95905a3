"""Bring a copy of a model into the form that the gradient builder differentiates rightly.

The builder takes some operators in one form only, and takes others wrongly without a word
(inference BatchNormalization, auto_pad, Clip of old opsets). So the copy is converted to opset 21,
constants are folded, and each node passes its rule. The model itself is never touched: trained
values go back into it by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper, version_converter

from onnxprune.errors import TrainingError
from onnxprune.training import (  # noqa: F401
    rules_conv,
    rules_math,
    rules_norm,
    rules_recurrent,
    rules_shape,
)
from onnxprune.training.draft import (
    FLOATS,
    OPSET,
    RULES,
    Draft,
    Undifferentiable,
    infer,
    inputs_of,
    is_float,
    tensor_info,
)
from onnxprune.training.fold import fold_constants
from onnxprune.training.functions import expand_function
from onnxprune.training.parameters import (
    Parameter,
    Parameters,
    constant_tensor,
    constant_value,
    find_parameters,
)
from onnxprune.training.rules_norm import merge_batchnorm, use_batch_statistics

_QUANTISED = """
QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul ConvInteger
MatMulInteger
"""
# operators the builder differentiates, in the form that the rules leave them in
_DIFFERENTIABLE = """
Abs Add BatchNormalization Cast Clip Concat Conv Cos Div Erf Exp Expand Flatten GRU Gather
GatherElements GatherND Gelu Gemm GlobalAveragePool Identity LSTM LayerNormalization LeakyRelu Log
LogSoftmax MatMul Max MaxPool Min Mul Neg Pad Pow Reciprocal ReduceL2 ReduceLogSumExp ReduceMean
ReduceSum Relu Reshape ScatterElements ScatterND Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub
Tanh Tile TopK Transpose Trilu Unsqueeze Where
"""
QUANTISED = frozenset(_QUANTISED.split())
DIFFERENTIABLE = frozenset(_DIFFERENTIABLE.split())
PASSES = 8  # of rules and function bodies: an expansion may need expanding again


@dataclass(frozen=True)
class TrainingGraph:
    """The legalised copy: its parameters to train, and why others are frozen."""

    draft: Draft
    parameters: dict[str, Parameter]
    frozen: dict[str, str]


def legalise(
    model: onnx.ModelProto,
    *,
    sizes: Mapping[str, Sequence[int]] | None = None,
    momentum: float | None = None,
    only: Collection[str] | None = None,
) -> TrainingGraph:
    """Make the training copy of a model.

    Args:
        model: it is not changed.
        sizes: shapes of inputs; all their axes but the first become fixed.
        momentum: of BatchNormalization's running statistics, which then normalizes by the
            statistics of the batch; None: it acts as in inference.
        only: the weights that may be trained; None: all that are found.

    Raises:
        TrainingError: the model is quantised, cannot be brought to opset 21, or nothing in it can
            be trained.
    """
    _refuse_quantised(model)
    found = find_parameters(_inlined(model).graph)
    if only is not None:
        found = Parameters({n: p for n, p in found.trainable.items() if n in only}, found.frozen)
    if not found.trainable:
        raise TrainingError(
            "nothing to train: the model has no float weights (only float models can be fine-tuned)"
        )
    copy = _stripped(model, found.trainable)
    _fix_sizes(copy.graph, sizes or {})
    draft = _draft(_converted(copy), found.trainable)
    if momentum is None:
        merge_batchnorm(draft)
    else:
        use_batch_statistics(draft, momentum)
    reasons = _rewrite(draft)
    blocked = _blocked(draft, reasons)
    frozen = {**found.frozen, **{n: blocked[n] for n in found.trainable if n in blocked}}
    reached = _reached(draft)
    for name in found.trainable:
        if name not in blocked and name not in reached:
            frozen[name] = "no differentiable path leads from it to a float output"
    trained = {n: p for n, p in found.trainable.items() if n not in frozen}
    if not trained:
        reason, count = Counter(frozen.values()).most_common(1)[0]
        raise TrainingError(
            f"nothing to train: all {len(frozen)} weights are frozen, {count} of them because "
            f"{reason}"
        )
    for name in frozen.keys() & draft.parameters.keys():
        draft.constants[name] = draft.parameters.pop(name)
    _separate(draft)
    return TrainingGraph(draft, trained, frozen)


def _refuse_quantised(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in QUANTISED:
            raise TrainingError(
                f"cannot fine-tune a quantised model (node {node.name or node.output[0]!r}, "
                f"{node.op_type}); "
                f"fine-tune the float model and quantise it afterwards"
            )


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions of its own."""
    if not model.functions:
        return model
    return inliner.inline_local_functions(model)


def _stripped(model: onnx.ModelProto, parameters: dict[str, Parameter]) -> onnx.ModelProto:
    """A float32 copy whose parameters are graph inputs.

    So that it is small whatever the model weighs.
    """
    source = _inlined(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    graph = copy.graph
    constants = [t for t in graph.initializer if t.name not in parameters]
    nodes = []
    for node in graph.node:
        tensor = constant_tensor(node)
        if tensor is None:
            nodes.append(node)
        elif node.output[0] not in parameters:
            constants.append(_renamed(tensor, node.output[0]))
    names = {t.name for t in constants} | parameters.keys()
    inputs = [i for i in graph.input if i.name not in names]
    inputs += [tensor_info(n, p.value) for n, p in parameters.items()]
    fresh = helper.make_graph(
        [_float32_node(n) for n in nodes], "training", inputs, list(graph.output)
    )
    fresh.initializer.extend(_float32_tensor(t) for t in constants)
    for info in [*fresh.input, *fresh.output]:
        if info.type.tensor_type.elem_type in FLOATS:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    result = helper.make_model(fresh, opset_imports=list(source.opset_import))
    result.ir_version = 10
    return result


def _fix_sizes(graph: onnx.GraphProto, sizes: Mapping[str, Sequence[int]]) -> None:
    for info in graph.input:
        dims = info.type.tensor_type.shape.dim
        for dim, size in list(zip(dims, sizes.get(info.name, ()), strict=False))[1:]:
            dim.dim_value = size


def _renamed(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _float32_tensor(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_type not in FLOATS or tensor.data_type == TensorProto.FLOAT:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _float32_node(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node with its float types replaced: Cast targets, and tensors in attributes."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in FLOATS:
            attribute.i = TensorProto.FLOAT
        if attribute.type == onnx.AttributeProto.TENSOR:
            attribute.t.CopyFrom(_float32_tensor(attribute.t))
    return copy


def _converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at opset 21."""
    version = next((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), OPSET)
    if version == OPSET:
        return model
    if version > OPSET:
        return _lowered(model, version)
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter's own errors have no common type
        first = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"cannot fine-tune: conversion from opset {version} to {OPSET} failed: {first}"
        ) from error


def _lowered(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """Opset 22 and later only added types and a few operators: expand those, keep the rest."""
    nodes = list(model.graph.node)
    for _ in range(PASSES):
        newer = [n for n in nodes if _is_newer(n)]
        if not newer:
            break
        inferred = onnx.shape_inference.infer_shapes(_with_nodes(model, nodes, version))
        expanded: list[onnx.NodeProto] = []
        for node in nodes:
            body = expand_function(node, inferred.graph, version) if _is_newer(node) else None
            expanded.extend(body or [node])
        nodes = expanded
    left = next((n for n in nodes if _is_newer(n)), None)
    if left is not None:
        raise TrainingError(
            f"cannot fine-tune: {left.op_type} of opset {version} has no form in opset {OPSET}"
        )
    return _with_nodes(model, nodes, OPSET)


def _is_newer(node: onnx.NodeProto) -> bool:
    """Whether opset 21 lacks the operator."""
    if node.domain not in ("", "ai.onnx"):
        return False
    return not onnx.defs.has(node.op_type) or not _known(node.op_type)


def _known(op_type: str) -> bool:
    try:
        onnx.defs.get_schema(op_type, OPSET)
    except onnx.defs.SchemaError:
        return False
    return True


def _with_nodes(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], version: int
) -> onnx.ModelProto:
    """A copy of the model with these nodes and this opset."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    for entry in copy.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = version
    return copy


def _draft(model: onnx.ModelProto, parameters: dict[str, Parameter]) -> Draft:
    """The converted copy as a draft with folded constants."""
    graph = model.graph
    draft = Draft(
        nodes=list(graph.node),
        inputs=[i for i in graph.input if i.name not in parameters],
        outputs=list(graph.output),
        parameters={n: p.value for n, p in parameters.items()},
        constants={t.name: numpy_helper.to_array(t) for t in graph.initializer},
    )
    _absorb_constants(draft)
    infer(draft)
    fold_constants(draft)
    return draft


def _rewrite(draft: Draft) -> dict[str, str]:
    """Apply rules and function bodies until nothing changes.

    First output of a node -> why it has no gradient.
    """
    reasons: dict[str, str] = {}
    settled: set[str] = set()
    for _ in range(PASSES):
        infer(draft)
        changed = False
        nodes: list[onnx.NodeProto] = []
        on_path = _on_path(draft)
        for node in draft.nodes:
            key = _key(node)
            if key in settled or key not in on_path:
                nodes.append(node)
                continue
            fresh, reason = _replacement(node, draft)
            if fresh is None:
                settled.add(key)
            if reason:
                reasons[key] = reason
            changed |= fresh is not None
            nodes.extend([node] if fresh is None else fresh)
        draft.nodes = nodes
        if not changed:
            break
        _absorb_constants(draft)
        infer(draft)
        fold_constants(draft)
    infer(draft)
    return reasons


def _separate(draft: Draft) -> None:
    """Give each Concat and LayerNormalization untrained inputs of its own.

    The builder names gradients after their tensors, makes those of these operators' inputs whether
    they are needed or not, and sums only the needed ones: two would have one name.
    """
    infer(draft)
    needed = draft.trained
    nodes: list[onnx.NodeProto] = []
    for node in draft.nodes:
        if node.op_type in ("Concat", "LayerNormalization") and any(
            o in needed for o in node.output
        ):
            for index, name in enumerate(node.input):
                if not name or name in needed or not is_float(draft, name):
                    continue
                if name in draft.constants:
                    node.input[index] = draft.constant(draft.constants[name])
                else:
                    copy = draft.name("separate")
                    nodes.append(helper.make_node("Identity", [name], [copy], name=copy))
                    node.input[index] = copy
        nodes.append(node)
    draft.nodes = nodes
    infer(draft)


def _absorb_constants(draft: Draft) -> None:
    """Make constants of Constant nodes, which function bodies and the opset converter bring."""
    nodes = []
    for node in draft.nodes:
        if node.op_type == "Constant" and not node.domain:
            draft.constants[node.output[0]] = constant_value(node)
        else:
            nodes.append(node)
    draft.nodes = nodes


def _replacement(
    node: onnx.NodeProto, draft: Draft
) -> tuple[list[onnx.NodeProto] | None, str | None]:
    """What replaces a node (None: it stays), and why it has no gradient if so."""
    where = f"{node.op_type} ({node.name or node.output[0]})"
    if node.domain not in ("", "ai.onnx"):
        return None, f"{where} of domain {node.domain} has no gradient"
    if any(
        a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute
    ):
        return None, f"{where} has a subgraph, which has no gradient"
    if node.op_type in RULES:
        try:
            fresh = RULES[node.op_type](node, draft)
        except Undifferentiable as reason:
            return None, f"{reason} (node {node.name or node.output[0]!r})"
        if fresh is not None:
            return fresh, None
    if node.op_type in DIFFERENTIABLE:
        return None, None
    body = expand_function(node, draft, OPSET)
    return (body, None) if body is not None else (None, f"{where} has no gradient")


def _key(node: onnx.NodeProto) -> str:
    return str(next(output for output in node.output if output))


def _on_path(draft: Draft) -> set[str]:
    """Keys of the nodes between a parameter and an output, along float tensors."""
    backward = {o.name for o in draft.outputs}
    path: set[str] = set()
    for node in reversed(draft.nodes):
        if any(o in backward for o in node.output):
            backward |= set(inputs_of(node))
            if any(o in draft.trained for o in node.output):
                path.add(_key(node))
    return path


def _blocked(draft: Draft, reasons: dict[str, str]) -> dict[str, str]:
    """Tensor name -> the reason of the first node downstream of it that has no gradient."""
    blocked: dict[str, str] = {}
    for node in reversed(draft.nodes):
        reason: Any = reasons.get(_key(node))
        if reason is None:
            reason = next(
                (blocked[o] for o in node.output if o in blocked and is_float(draft, o)), None
            )
        if reason is not None:
            for name in inputs_of(node):
                if is_float(draft, name):
                    blocked.setdefault(name, reason)
    return blocked


def _reached(draft: Draft) -> set[str]:
    """Tensors from which a path of float tensors leads to a float output."""
    reached = {o.name for o in draft.outputs if is_float(draft, o.name)}
    for node in reversed(draft.nodes):
        if any(o in reached for o in node.output):
            reached |= {name for name in node.input if is_float(draft, name)}
    return reached
