"""Remove what provably does not matter: the result answers as the model did, up to rounding.

Channels that are zero or constant whatever the input, channels that nothing reads, channels that
repeat others, branches without effect, and layers that do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxprune.analysis import Analysis, analyse
from onnxprune.errors import InvalidDataError, VerificationError
from onnxprune.facts import Facts, find_facts
from onnxprune.graph import Graph
from onnxprune.liveness import Read, find_reads, living
from onnxprune.noops import remove_dead, remove_noops
from onnxprune.passes.apply import apply_keep
from onnxprune.rewriting import Mask
from onnxprune.verify import difference, structure_problems

Feeds = Mapping[str, NDArray[Any]]
#: Outputs are equal within this, relative to the largest, or within a few times what reordering
#: the sums of the original itself changes.
TOLERANCE = 1e-5
MAX_ROUNDS = 16


@dataclass(frozen=True)
class LosslessResult:
    """`channels`: how many went from the layers that make them; `layers`: how many nodes went."""

    model: onnx.ModelProto
    channels: int
    layers: int
    max_error: float
    tolerance: float

    @property
    def modified(self) -> bool:
        """Whether anything was found."""
        return self.channels + self.layers > 0


@dataclass(frozen=True)
class Lossless:
    """Remove dead, constant and repeated channels, dead branches, and layers without effect."""

    name: ClassVar[str] = "lossless"
    threads: int | None = None
    check: bool = True

    def __call__(self, model: onnx.ModelProto, feeds: Sequence[Feeds] = ()) -> LosslessResult:
        """The smaller model; the given one, untouched, where nothing was found.

        Raises:
            VerificationError: The result differs from the model, on random inputs or `feeds`.
        """
        try:
            small, channels, layers = self._shrunk(model)
            if small is model:
                return LosslessResult(model, 0, 0, 0.0, TOLERANCE)
            error, tolerance = (0.0, TOLERANCE)
            if self.check:
                error, tolerance = self._checked(model, small, feeds)
        except (ValueError, IndexError, KeyError, AssertionError) as failure:
            raise VerificationError(f"lossless: {failure}; please report this model") from failure
        return LosslessResult(small, channels, layers, error, tolerance)

    def _shrunk(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, int, int]:
        """The model without what can go, and how many channels and layers went."""
        small, channels, layers = model, 0, 0
        for _ in range(MAX_ROUNDS):
            small, nodes = _simplified(small)
            small, units = _without_dead(small)
            layers, channels = layers + nodes, channels + units
            if not units:
                break
        return small, channels, layers

    def _checked(
        self, model: onnx.ModelProto, small: onnx.ModelProto, feeds: Sequence[Feeds]
    ) -> tuple[float, float]:
        """The error and what was allowed."""
        problems = structure_problems(small, model)
        error, tolerance = compare(model, small, feeds, self.threads)
        if not error <= tolerance:
            problems.append(f"outputs differ by {error:.3g}, more than {tolerance:.3g}")
        if problems:
            raise VerificationError(
                f"lossless: {'; '.join(problems)}; please report this model, and prune without it"
            )
        return error, tolerance


def compare(
    model: onnx.ModelProto,
    small: onnx.ModelProto,
    feeds: Sequence[Feeds] = (),
    threads: int | None = None,
) -> tuple[float, float]:
    """How far `small` answers from `model`, and how far rounding may take it.

    The model itself, without the runtime's fusions, shows what rounding does.

    Raises:
        VerificationError: The model runs on none of the inputs.
    """
    from onnxprune import runtime

    try:
        made = runtime.working_feeds(model, seed=1, threads=threads)
    except InvalidDataError:  # random inputs are of no size that the model takes
        made = []
    original = runtime.session(model, threads=threads)
    plain = runtime.session(model, threads=threads, optimize=False)
    ours = runtime.session(small, threads=threads)
    error = noise = 0.0
    for case in (*made, *feeds):
        expected = list(runtime.run(original, case).values())
        error = max(error, difference(list(runtime.run(ours, case).values()), expected))
        noise = max(noise, difference(list(runtime.run(plain, case).values()), expected))
    if not made and not feeds:
        raise VerificationError(
            "lossless: the model runs on no random input, so nothing can be compared: give data"
        )
    return error, max(TOLERANCE, 4 * noise if np.isfinite(noise) else 0.0)


# -- layers ----------------------------------------------------------------------------------------


def _analysed(model: onnx.ModelProto) -> tuple[Analysis, Facts]:
    analysis = analyse(model)
    return analysis, find_facts(analysis.coupling.graph, analysis.coupling.shapes)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _simplified(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Without layers that do nothing, and what reaches no output; how many nodes went."""
    from onnxprune.analysis import normalize
    from onnxprune.shapes import infer

    copy = _copy(normalize(model))
    graph = Graph.of(copy)
    tensors = len(copy.graph.initializer)
    count = remove_noops(copy, find_facts(graph, infer(graph)))
    count += remove_dead(copy)
    changed = count or tensors > len(copy.graph.initializer)
    return (copy, count) if changed else (model, 0)


# -- channels --------------------------------------------------------------------------------------


def _without_dead(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Without channels that contribute nothing; how many went."""
    analysis, facts = _analysed(model)
    coupling = analysis.coupling
    keep = living(coupling, find_reads(coupling, facts))
    if keep.all():
        return model, 0
    folded = _fold(analysis, find_reads(coupling, facts), keep)
    if folded is not None:
        analysis, facts = _analysed(folded)
        coupling = analysis.coupling
        keep = living(coupling, find_reads(coupling, facts))
    removed = sum(
        int((~keep[coupling.solution.unit[np.maximum(labels, 0)]]).sum())
        for _, labels in coupling.products
    )
    return apply_keep(coupling, keep).model, removed


def _fold(analysis: Analysis, reads: Sequence[Read], keep: Mask) -> onnx.ModelProto | None:
    """What constant channels contribute goes into biases; None where none does."""
    edit: Edit | None = None
    for read in reads:
        gone = ~keep[read.units]
        value = np.where(gone & np.isfinite(read.fixed), read.fixed, 0.0)
        if not read.folds or not value.any():
            continue
        edit = edit or Edit(analysis.coupling.graph.model)
        edit.absorb(read, value)
    return None if edit is None else edit.model


class Edit:
    """A copy of a model whose weights change; nodes keep their positions until one is inserted."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = _copy(model)
        self.graph = Graph.of(self.model)
        self._taken = set(self.graph.producer) | set(self.graph.constants)

    def weight(self, index: int, slot: int) -> NDArray[Any]:
        """The constant in input `slot` of node `index`."""
        name = self.graph.nodes[index].proto.input[slot]
        for tensor in self.model.graph.initializer:
            if tensor.name == name:
                return numpy_helper.to_array(tensor)
        return self.graph.constants[name].array()

    def set_weight(self, index: int, slot: int, value: NDArray[Any], kind: int) -> None:
        """Input `slot` of node `index` becomes `value`, for this node only."""
        node = self.graph.nodes[index]
        while len(node.proto.input) <= slot:
            node.proto.input.append("")
        old = node.proto.input[slot]
        alone = len(self.graph.uses.get(old, ())) == 1 and old not in self.graph.outputs
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), old)
        tensor.data_type = kind
        for initializer in self.model.graph.initializer:
            if alone and initializer.name == old:
                initializer.CopyFrom(tensor)
                return
        tensor.name = node.proto.input[slot] = self._fresh(old or f"{node.outputs[0]}_bias")
        self.model.graph.initializer.append(tensor)

    def _fresh(self, wish: str) -> str:
        name, n = wish, 1
        while name in self._taken:
            name, n = f"{wish}_{n}", n + 1
        self._taken.add(name)
        return name

    def absorb(self, read: Read, value: NDArray[Any]) -> None:
        """Channels of the known `value` are no longer read; a bias brings what they brought."""
        node = self.graph.nodes[read.node.index]
        weight = self.weight(node.index, 1)
        axis = 1 if node.op_type == "Conv" or node.attr("transB", 0) else weight.ndim - 2
        if node.op_type == "Gemm":
            axis = 1 if node.attr("transB", 0) else 0
        rows = np.moveaxis(weight, axis, 0).astype(np.float64)
        if node.op_type == "Conv":
            shift = self._conv_shift(node.attr("group", 1), weight, value)
        else:
            shift = value @ rows * node.attr("alpha", 1.0)
        kind = self.graph.constants[node.inputs[1]].dtype
        shape = [1] * weight.ndim
        if node.op_type == "Conv" and node.attr("group", 1) > 1:
            cut = self._grouped_cut(node.attr("group", 1), weight, value)
        else:
            shape[axis] = -1
            cut = np.asarray(value == 0).reshape(shape)
        self.set_weight(node.index, 1, np.where(cut, weight, 0).astype(weight.dtype), kind)
        self._add_bias(node.index, shift.astype(weight.dtype), kind)

    def _conv_shift(self, groups: int, weight: NDArray[Any], value: NDArray[Any]) -> NDArray[Any]:
        taps = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        sums = taps.astype(np.float64).sum(axis=3)
        return np.asarray((sums @ value.reshape(groups, -1, 1)).ravel())

    def _grouped_cut(self, groups: int, weight: NDArray[Any], value: NDArray[Any]) -> NDArray[Any]:
        keep = (value == 0).reshape(groups, 1, -1)
        rows = np.repeat(keep, weight.shape[0] // groups, axis=1)
        return rows.reshape(weight.shape[:2] + (1,) * (weight.ndim - 2))

    def _add_bias(self, index: int, shift: NDArray[Any], kind: int) -> None:
        node = self.graph.nodes[index]
        if node.op_type == "MatMul":
            self._insert_add(index, shift, kind)
            return
        old = self.weight(index, 2) * node.attr("beta", 1.0) if node.input(2) else 0
        if node.attr("beta", 1.0) != 1.0:
            for attribute in node.proto.attribute:
                if attribute.name == "beta":
                    attribute.f = 1.0
        self.set_weight(index, 2, (old + shift).astype(shift.dtype), kind)

    def _insert_add(self, index: int, shift: NDArray[Any], kind: int) -> None:
        """MatMul has no bias: the Add behind it takes it, or a new one."""
        node = self.graph.nodes[index]
        out = node.outputs[0]
        uses = self.graph.uses.get(out, ())
        follower = self.graph.nodes[uses[0][0]] if len(uses) == 1 else None
        if follower is not None and follower.op_type == "Add" and out not in self.graph.outputs:
            slot = 1 - uses[0][1]
            constant = self.graph.constants.get(follower.inputs[slot])
            if constant is not None and constant.dims[-1:] == shift.shape:
                bias = self.weight(follower.index, slot) + shift
                self.set_weight(follower.index, slot, bias.astype(shift.dtype), kind)
                return
        inner = self._fresh(f"{out}_unbiased")
        node.proto.output[0] = inner
        add = onnx.helper.make_node("Add", [inner, ""], [out], name=self._fresh(f"{out}_bias"))
        name = self._fresh(f"{out}_bias")
        tensor = numpy_helper.from_array(shift, name)
        tensor.data_type = kind
        self.model.graph.initializer.append(tensor)
        add.input[1] = name
        at = next(i for i, n in enumerate(self.model.graph.node) if n is node.proto)
        self.model.graph.node.insert(at + 1, add)
