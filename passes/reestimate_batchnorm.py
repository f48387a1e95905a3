"""Measure the statistics of BatchNormalization anew, for a model whose weights have changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxprune import runtime
from onnxprune.data import Batch, Dataset
from onnxprune.errors import InvalidDataError, InvalidRecipeError
from onnxprune.progress import Progress, Silent
from onnxprune.training.parameters import stored_tensors

_log = logging.getLogger(__name__)
Array = NDArray[Any]
Pair = tuple[str, str]
PREFIX = "onnxprune.bn."


@dataclass(frozen=True)
class ReestimateBatchNorm:
    """Replace the mean and variance of every BatchNormalization by those of the given data.

    Each batch is normalized by its own statistics on its way through the net, as in training, so
    that every layer is measured on inputs like those it will get, in one pass over the data.
    Over batches of n samples:  mean = E[m],  var = E[v + m^2] - E[m]^2.

    A model with a fixed batch below `MIN_BATCH` that cannot take a larger one is measured layer
    by layer instead, one pass for each depth.
    """

    name: ClassVar[str] = "reestimate-batchnorm"
    MIN_BATCH: ClassVar[int] = 16

    samples: int = 1024
    batch_size: int = 64
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        for option in ("samples", "batch_size"):
            if getattr(self, option) < 1:
                raise InvalidRecipeError(
                    f"reestimate-batchnorm: {option} is {getattr(self, option)}; "
                    "it must be at least 1"
                )

    def __call__(
        self, model: onnx.ModelProto, data: Dataset, *, progress: Progress | None = None
    ) -> onnx.ModelProto:
        """A copy of the model with new statistics; a model without any is returned as it is.

        Raises:
            InvalidDataError: there is no data.
        """
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        norms = _batchnorms(copy.graph)
        if not norms:
            _log.info("reestimate-batchnorm: the model has no BatchNormalization to measure")
            return model
        _untie(copy.graph, norms)
        listener = progress or Silent()
        batches = self._batches(data)
        first = next(iter(batches), None)
        if first is None:
            raise InvalidDataError("no data to measure BatchNormalization on: give one batch")
        if _rows(first) >= self.MIN_BATCH or _is_dynamic(copy.graph):
            self._measure(copy, norms, batches, listener, by_batch=True)
            return copy
        relaxed = _relaxed(copy)
        joined = _joined(batches, self.batch_size)
        if _takes(relaxed, joined[0], self.threads):
            self._measure(copy, norms, joined, listener, by_batch=True, source=relaxed)
            return copy
        for level in _levels(copy.graph, norms):
            self._measure(copy, level, batches, listener, by_batch=False)
        return copy

    def _batches(self, data: Dataset) -> list[Batch]:
        """The first batches that together hold `samples`."""
        taken, count = [], 0
        for batch in data.batches(self.batch_size):
            taken.append(batch)
            count += _rows(batch)
            if count >= self.samples:
                break
        return taken

    def _measure(
        self,
        model: onnx.ModelProto,
        norms: Sequence[onnx.NodeProto],
        batches: Sequence[Batch],
        progress: Progress,
        *,
        by_batch: bool,
        source: onnx.ModelProto | None = None,
    ) -> None:
        """One pass: measure `norms` and write their statistics into `model`."""
        names = {n.output[0] for n in norms}
        probe = _instrumented(source or model, names, by_batch=by_batch)
        session = runtime.session(probe, threads=self.threads)
        moments = {name: _Moments() for name in names}
        progress.stage("measure BatchNormalization", len(batches))
        for index, batch in enumerate(batches):
            outputs = runtime.run(session, batch.feeds)
            for name, moment in moments.items():
                mean, var = (outputs[f"{PREFIX}{what}.{name}"] for what in ("mean", "var"))
                moment.add(mean.reshape(-1), var.reshape(-1), _rows(batch))
            progress.step(index + 1)
        tensors = stored_tensors(model.graph)
        for node in norms:
            for name, value in zip(node.input[3:5], moments[node.output[0]].result(), strict=True):
                _store(tensors[name], value)


@dataclass
class _Moments:
    """Mean and mean square over batches, in float64."""

    weight: int = 0
    first: Array = field(default_factory=lambda: np.zeros(1))
    second: Array = field(default_factory=lambda: np.zeros(1))

    def add(self, mean: Array, var: Array, rows: int) -> None:
        mean, var = mean.astype(np.float64), var.astype(np.float64)
        self.weight += rows
        self.first = self.first + rows * mean
        self.second = self.second + rows * (var + mean**2)

    def result(self) -> tuple[Array, Array]:
        mean = self.first / self.weight
        return mean, np.maximum(self.second / self.weight - mean**2, 0)


def _batchnorms(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """BatchNormalization nodes in inference form whose statistics the graph stores."""
    stored = stored_tensors(graph)
    return [n for n in graph.node if _is_measurable(n, stored)]


def _is_measurable(node: onnx.NodeProto, stored: Mapping[str, Any]) -> bool:
    if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
        return False
    training = any(a.name == "training_mode" and a.i for a in node.attribute)
    outputs = [o for o in node.output if o]
    return not training and len(outputs) == 1 and all(n in stored for n in node.input[3:5])


def _untie(graph: onnx.GraphProto, norms: Sequence[onnx.NodeProto]) -> None:
    """Give each node statistics of its own: exporters store equal tensors once."""
    stored = stored_tensors(graph)
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for node in norms:
        for index in (3, 4):
            name = node.input[index]
            if readers[name] > 1:
                readers[name] -= 1
                own = onnx.TensorProto()
                own.CopyFrom(stored[name])
                own.name = f"{name}.{node.output[0]}"
                graph.initializer.append(own)
                node.input[index] = own.name


def _instrumented(model: onnx.ModelProto, names: set[str], *, by_batch: bool) -> onnx.ModelProto:
    """A copy that gives the moments of the inputs of the named nodes, and nothing else.

    With `by_batch` every BatchNormalization normalizes by the moments of the batch.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    stored = stored_tensors(graph)
    opset = next(i.version for i in copy.opset_import if i.domain in ("", "ai.onnx"))
    nodes: list[onnx.NodeProto] = []
    for name, value in (("axes", [0, 2]), ("flat", [0, 0, -1]), ("line", [-1])):
        graph.initializer.append(numpy_helper.from_array(np.array(value), PREFIX + name))
    for node in graph.node:
        if not _is_measurable(node, stored) or not (by_batch or node.output[0] in names):
            nodes.append(node)
            continue
        kind = stored[node.input[3]].data_type
        nodes += _moment_nodes(node, opset)
        nodes += _batch_form(node, kind) if by_batch else [node]
    outputs = [
        helper.make_tensor_value_info(f"{PREFIX}{what}.{n}", TensorProto.FLOAT, None)
        for n in sorted(names)
        for what in ("mean", "var")
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.output[:]
    graph.output.extend(outputs)
    del graph.value_info[:]
    return copy


def _moment_nodes(node: onnx.NodeProto, opset: int) -> list[onnx.NodeProto]:
    """x[N, C, *S] -> centred[N, C, S], mean[1, C, 1] and var[1, C, 1], in float32."""
    y = node.output[0]
    name = {
        part: f"{PREFIX}{part}.{y}" for part in ("cast", "flat", "mean", "centred", "sq", "var")
    }
    axes = [PREFIX + "axes"] if opset >= 18 else []
    attribute: dict[str, Any] = {} if opset >= 18 else {"axes": [0, 2]}
    return [
        helper.make_node("Cast", [node.input[0]], [name["cast"]], to=TensorProto.FLOAT),
        helper.make_node("Reshape", [name["cast"], PREFIX + "flat"], [name["flat"]]),
        helper.make_node("ReduceMean", [name["flat"], *axes], [name["mean"]], **attribute),
        helper.make_node("Sub", [name["flat"], name["mean"]], [name["centred"]]),
        helper.make_node("Mul", [name["centred"], name["centred"]], [name["sq"]]),
        helper.make_node("ReduceMean", [name["sq"], *axes], [name["var"]], **attribute),
    ]


def _batch_form(node: onnx.NodeProto, kind: int) -> list[onnx.NodeProto]:
    """Apply the node with mean 0 and the variance of the batch to the centred input."""
    y = node.output[0]
    name = {
        p: f"{PREFIX}{p}.{y}" for p in ("zero", "c", "v", "line", "y3", "shape", "centred", "var")
    }
    normal = helper.make_node(
        "BatchNormalization", [name["c"], *node.input[1:3], name["zero"], name["v"]], [name["y3"]]
    )
    normal.attribute.extend(a for a in node.attribute if a.name == "epsilon")
    return [
        helper.make_node("Cast", [name["centred"]], [name["c"]], to=kind),
        helper.make_node("Reshape", [name["var"], PREFIX + "line"], [name["line"]]),
        helper.make_node("Cast", [name["line"]], [name["v"]], to=kind),
        helper.make_node("Sub", [name["v"], name["v"]], [name["zero"]]),
        normal,
        helper.make_node("Shape", [node.input[0]], [name["shape"]]),
        helper.make_node("Reshape", [name["y3"], name["shape"]], [y]),
    ]


def _levels(
    graph: onnx.GraphProto, norms: Sequence[onnx.NodeProto]
) -> Iterator[list[onnx.NodeProto]]:
    """The nodes by the number of others that lie upstream in sequence."""
    wanted = {n.output[0] for n in norms}
    depth: dict[str, int] = {}
    groups: dict[int, list[onnx.NodeProto]] = {}
    for node in graph.node:
        above = max((depth.get(name, 0) for name in node.input), default=0)
        if node.output[0] in wanted:
            groups.setdefault(above, []).append(node)
            above += 1
        depth.update(dict.fromkeys(node.output, above))
    for level in sorted(groups):
        yield groups[level]


def _is_dynamic(graph: onnx.GraphProto) -> bool:
    stored = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in stored]
    return all(not i.type.tensor_type.shape.dim[0].dim_value for i in inputs if _rank(i))


def _rank(info: onnx.ValueInfoProto) -> int:
    return len(info.type.tensor_type.shape.dim)


def _relaxed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose inputs take any batch, if the graph allows."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {t.name for t in copy.graph.initializer}
    for info in copy.graph.input:
        if info.name not in stored and _rank(info):
            info.type.tensor_type.shape.dim[0].dim_param = "batch"
    for info in copy.graph.output:
        info.type.tensor_type.ClearField("shape")
    del copy.graph.value_info[:]
    return copy


def _joined(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Neighbouring batches put together."""
    step = max(1, size // _rows(batches[0]))
    groups = [batches[i : i + step] for i in range(0, len(batches), step)]
    return [
        Batch({n: np.concatenate([b.feeds[n] for b in group]) for n in group[0].feeds})
        for group in groups
    ]


def _takes(model: onnx.ModelProto, batch: Batch, threads: int | None) -> bool:
    """Whether the model runs on the batch and treats its samples apart."""
    try:
        session = runtime.session(model, threads=threads)
        whole = runtime.run(session, batch.feeds)
        head = runtime.run(session, {n: a[:1] for n, a in batch.feeds.items()})
    except Exception:  # the runtime's errors have no common type
        return False
    rows = _rows(batch)
    return all(
        whole[n].shape[:1] == (rows,) and np.allclose(whole[n][:1], head[n], atol=1e-3, rtol=1e-3)
        for n in whole
        if whole[n].ndim
    )


def _rows(batch: Batch) -> int:
    return max((a.shape[0] for a in batch.feeds.values() if a.ndim), default=1)


def _store(tensor: onnx.TensorProto, value: Array) -> None:
    dtype = numpy_helper.to_array(tensor).dtype
    fresh = numpy_helper.from_array(value.astype(dtype), tensor.name)
    fresh.doc_string = tensor.doc_string
    tensor.CopyFrom(fresh)
