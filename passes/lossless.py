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

from onnxprune.analysis import Analysis, analyse
from onnxprune.editing import Edit
from onnxprune.errors import InvalidDataError, VerificationError
from onnxprune.facts import Facts, find_facts
from onnxprune.graph import Graph
from onnxprune.liveness import Read, find_reads, living
from onnxprune.noops import remove_dead, remove_noops
from onnxprune.passes.apply import apply_keep
from onnxprune.passes.merge_channels import merged
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
            return self._result(model, feeds, merge=True)
        except VerificationError:
            return self._result(model, feeds, merge=False)

    def _result(
        self, model: onnx.ModelProto, feeds: Sequence[Feeds], *, merge: bool
    ) -> LosslessResult:
        try:
            small, channels, layers = self._shrunk(model, merge)
            if small is model:
                return LosslessResult(model, 0, 0, 0.0, TOLERANCE)
            error, tolerance = (0.0, TOLERANCE)
            if self.check:
                error, tolerance = self._checked(model, small, feeds)
        except (ValueError, IndexError, KeyError, AssertionError) as failure:
            raise VerificationError(f"lossless: {failure}; please report this model") from failure
        return LosslessResult(small, channels, layers, error, tolerance)

    def _shrunk(self, model: onnx.ModelProto, merge: bool) -> tuple[onnx.ModelProto, int, int]:
        """The model without what can go, and how many channels and layers went."""
        small, channels, layers = model, 0, 0
        for _ in range(MAX_ROUNDS):
            small, nodes = _simplified(small)
            small, units = _without_dead(small, merge)
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
    from onnxprune.analysis import normalized
    from onnxprune.shapes import infer

    copy = _copy(normalized(model).whole())
    graph = Graph.of(copy)
    tensors = len(copy.graph.initializer)
    count = remove_noops(copy, find_facts(graph, infer(graph)))
    count += remove_dead(copy)
    changed = count or tensors > len(copy.graph.initializer)
    return (copy, count) if changed else (model, 0)


# -- channels --------------------------------------------------------------------------------------


def _without_dead(model: onnx.ModelProto, merge: bool) -> tuple[onnx.ModelProto, int]:
    """Without channels that contribute nothing; how many went."""
    analysis, facts = _analysed(model)
    coupling = analysis.coupling
    reads = find_reads(coupling, facts)
    keep = living(coupling, reads)
    edited = _fold(analysis, reads, keep)
    if merge:
        edited = merged(analysis, facts, reads, keep, edited)
    if edited is not None:
        analysis, facts = _analysed(edited.model)
        coupling = analysis.coupling
        keep = living(coupling, find_reads(coupling, facts))
    if keep.all():
        return model, 0
    removed = sum(
        int((~keep[coupling.solution.unit[np.maximum(labels, 0)]]).sum())
        for _, labels in coupling.products
    )
    return apply_keep(coupling, keep).model, removed


def _fold(analysis: Analysis, reads: Sequence[Read], keep: Mask) -> Edit | None:
    """What constant channels contribute goes into biases; None where none does."""
    edit: Edit | None = None
    for read in reads:
        gone = ~keep[read.units]
        value = np.where(gone & np.isfinite(read.fixed), read.fixed, 0.0)
        if read.folds and value.any():
            edit = edit or Edit(analysis.coupling.graph.whole())
            edit.absorb(read.node.index, value)
    return edit
