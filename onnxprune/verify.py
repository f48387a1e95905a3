"""The three levels of checking: sound graph, equal to its masked twin, answers as before."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import io
from onnxprune.coupling import Coupling
from onnxprune.errors import OnnxPruneError, VerificationError
from onnxprune.float32 import float32_copy, needs_float32, uses_halves
from onnxprune.groups import Group, Units
from onnxprune.probes import are_telling, follow_inputs, probes, with_outputs
from onnxprune.rewriting import Mask
from onnxprune.twin import masked_twin

if TYPE_CHECKING:
    from onnxprune.passes.apply import Applied

Feeds = Mapping[str, NDArray[Any]]
Array = NDArray[Any]
#: What applying a wrong rule, or running its result, may raise.
FAILURES = (OnnxPruneError, ValueError, IndexError, KeyError, AssertionError)
_DRAWING = frozenset(
    "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike".split()
)
#: Operators that round what they measure themselves.
_ROUNDING = frozenset(("DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul"))
#: What reports add where float32 copies were compared.
FLOAT32_NOTE = (
    ", both as float32 copies: ONNX Runtime does not run the model's own types on the CPU"
)
#: Twins that are closer than this need no second look.
_CLOSE = 1e-4
_INLINE_BYTES = 1_900_000_000


def default_tolerance(model: onnx.ModelProto, as_float32: bool = False) -> float:
    """1e-4 relative to the largest output; 1e-2 in half precision, 2e-2 with rounded activations.

    Integers are summed exactly: where ONNX Runtime computes a quantized model in integers from end
    to end, the pruned model and its twin agree to the last bit. In between, floats may be summed in
    another order; a value that lies within float rounding of the middle between two steps then
    falls to the other side. Such flips are rare and one step large, 1/127 of the largest output for
    8 bits around zero: 2e-2 allows for two and a half steps.
    """
    given = {v.name for v in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:
        steps = node.op_type == "QuantizeLinear" and node.input[0] not in given
        if steps or node.op_type in _ROUNDING:
            return 2e-2
    return 1e-2 if not as_float32 and uses_halves(model) else 1e-4


def structure_problems(model: onnx.ModelProto, original: onnx.ModelProto) -> list[str]:
    """Level 1: valid ONNX with consistent shapes, and the original's inputs and outputs."""
    problems = []
    try:
        _onnx_check(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        if _passes(original):
            problems.append(f"onnx.checker refuses the graph: {str(error).strip().splitlines()[0]}")
    for kind in ("input", "output"):
        ours, theirs = _signature(model, kind), _signature(original, kind)
        if ours != theirs:
            problems.append(f"the {kind}s are {ours}, they were {theirs}")
    return problems


def require_sound(
    model: onnx.ModelProto, original: onnx.ModelProto, threads: int | None = None
) -> None:
    """Level 1 for a model about to be written: it also runs, and finite outputs stay finite.

    Raises:
        VerificationError: says what is wrong.
    """
    problems = structure_problems(model, original) or _failures(model, original, threads)
    if problems:
        raise VerificationError(
            f"the result is not sound: {problems[0]}; nothing was written; please report this model"
        )


def _failures(model: onnx.ModelProto, original: onnx.ModelProto, threads: int | None) -> list[str]:
    """What goes wrong on random inputs on which the original runs; nothing where it runs on none.

    Both models are float32 copies where ONNX Runtime lacks kernels for their own types.
    """
    from onnxprune import runtime

    try:
        if needs_float32(original, threads):
            model, original = float32_copy(model), float32_copy(original)
        target = runtime.session(original, threads=threads)
        feeds = runtime.working_feeds(original, threads=threads, target=target)[0]
        wanted = runtime.run(target, feeds)
    except OnnxPruneError:
        return []
    try:
        found = runtime.run(runtime.session(model, threads=threads), feeds)
    except OnnxPruneError as error:
        return [str(error)]
    return [
        f"output {name!r} holds numbers that are not finite"
        for name, value in wanted.items()
        if isinstance(value, np.ndarray)
        and value.dtype.kind == "f"
        and np.isfinite(value).all()
        and not np.isfinite(found[name]).all()
    ]


def _passes(model: onnx.ModelProto) -> bool:
    try:
        _onnx_check(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def _onnx_check(model: onnx.ModelProto) -> None:
    if sum(map(io.tensor_bytes, io.tensors(model))) < _INLINE_BYTES:
        onnx.checker.check_model(model, full_check=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        io.save(model, path, external_data=True)
        onnx.checker.check_model(str(path), full_check=True)


def _signature(model: onnx.ModelProto, kind: str) -> list[tuple[str, int, tuple[Any, ...]]]:
    weights = {t.name for t in model.graph.initializer}
    found = []
    for value in getattr(model.graph, kind):
        if value.name in weights and kind == "input":
            continue
        tensor = value.type.tensor_type
        dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        found.append((value.name, tensor.elem_type, dims))
    return found


def difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The largest difference relative to the largest magnitude of the reference, over all outputs.

    Infinite where shapes differ, or where one has a number and the other has none.
    """
    return max((_one_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _one_difference(a: Any, b: Any) -> float:
    if isinstance(b, list):
        return difference(a, b) if isinstance(a, list) and len(a) == len(b) else np.inf
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return np.inf
    if a.size == 0:
        return 0.0
    if a.dtype.kind == "V" and a.dtype.fields is None:  # bfloat16, float8: no number to numpy
        a, b = a.astype(np.float32), b.astype(np.float32)
    if a.dtype.kind not in "fiub":
        return 0.0 if np.array_equal(a, b) else np.inf
    a, b = a.astype(np.float64), b.astype(np.float64)
    fine = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), fine):
        return np.inf
    if not np.array_equal(np.nan_to_num(a[~fine], nan=0.5), np.nan_to_num(b[~fine], nan=0.5)):
        return np.inf
    scale = float(np.abs(b[fine]).max(initial=0.0))
    gap = float(np.abs(a[fine] - b[fine]).max(initial=0.0))
    if gap < np.finfo(np.float32).tiny:  # below the smallest normal number nothing is exact
        return 0.0
    return gap / scale if scale > 0 else gap


def deviation(ours: Sequence[Sequence[Any]], theirs: Sequence[Sequence[Any]]) -> float:
    """The squared distance of the outputs of several runs, relative to the variance of `theirs`.

    The mean over the outputs that hold floats; without such, the largest `difference`. Infinite
    where shapes differ or a result is not finite.
    """
    shares = []
    for found, wanted in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        if any(isinstance(w, list) or np.asarray(w).dtype.kind != "f" for w in wanted):
            continue
        targets = [np.asarray(w, np.float64) for w in wanted]
        if any(np.shape(f) != t.shape for f, t in zip(found, targets, strict=True)):
            return np.inf
        gap = sum(float(((f - t) ** 2).sum()) for f, t in zip(found, targets, strict=True))
        center = sum(float(t.sum()) for t in targets) / max(sum(t.size for t in targets), 1)
        spread = sum(float(((t - center) ** 2).sum()) for t in targets)
        shares.append(gap / max(spread, 1e-30))
    if not shares:
        return max((difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    mean = float(np.mean(shares))
    return mean if np.isfinite(mean) else np.inf


def model_difference(
    model: onnx.ModelProto,
    reference: onnx.ModelProto,
    feeds: Sequence[Feeds],
    threads: int | None = None,
) -> float:
    """How far the outputs of two models are apart, with or without the runtime's fusions.

    Raises:
        InvalidModelError: one of the two does not run.
        VerificationError: the outputs hold no numbers to compare.
    """
    error = np.inf
    for optimize in (True, False):
        way = _Way(threads, False, optimize)
        ours, theirs = (_outputs(m, feeds, way) for m in (model, reference))
        if not any(are_telling(outputs, integers=True) for outputs in theirs):
            raise VerificationError(
                "the model computes no finite numbers on these inputs, so nothing can be compared; "
                "give real ones with --data"
            )
        found = max((difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
        error = min(error, found)
        if error <= _CLOSE:
            break
    return error


def twin_error(
    coupling: Coupling,
    keep: Mask,
    pruned: onnx.ModelProto,
    feeds: Sequence[Feeds],
    threads: int | None = None,
    as_float32: bool = False,
) -> float:
    """Level 2: how far `pruned` is from its masked twin, or their float32 copies from each other.

    Raises:
        InvalidModelError: one of the two does not run.
        VerificationError: neither outputs nor inner tensors have numbers to compare.
    """
    models = (pruned, masked_twin(coupling, keep))
    error = _apart(coupling, keep, models, feeds, _Way(threads, as_float32))
    if error <= _CLOSE:
        return error
    as_written = _Way(threads, as_float32, optimize=False)
    return min(error, _apart(coupling, keep, models, feeds, as_written))


@dataclass(frozen=True)
class _Way:
    """How models are run.

    `optimize` is off where a fusion may be at fault: ONNX Runtime's of Transpose and MatMul gives
    wrong numbers for a vector.
    """

    threads: int | None
    as_float32: bool
    optimize: bool = True


def _apart(
    coupling: Coupling,
    keep: Mask,
    models: tuple[onnx.ModelProto, onnx.ModelProto],
    feeds: Sequence[Feeds],
    way: _Way,
) -> float:
    """How far the outputs of two models are apart; inner values where outputs tell nothing."""
    ours, theirs = (_outputs(model, feeds, way) for model in models)
    if not _tell(theirs, feeds):
        inner = probes(coupling, keep, models[0])
        names = [probe.name for probe in inner]
        ours, theirs = (_outputs(with_outputs(m, coupling, names), feeds, way) for m in models)
        count = len(theirs[0]) - len(inner)
        theirs = [
            [*x[:count], *(p.kept(v) for p, v in zip(inner, x[count:], strict=True))]
            for x in theirs
        ]
        if not any(are_telling(outputs, integers=True) for outputs in theirs):
            raise VerificationError(
                "the model computes no finite numbers on random inputs, so nothing can be "
                "compared; give real ones with --data"
            )
    return max((difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _tell(outputs: Sequence[list[Any]], feeds: Sequence[Feeds]) -> bool:
    """Whether the outputs hold numbers, and others for other inputs."""
    samples = [{np.shape(v)[0] for v in feed.values() if np.ndim(v)} for feed in feeds]
    return any(map(are_telling, outputs)) and any(
        follow_inputs(found, counts.pop() if len(counts) == 1 else 0)
        for found, counts in zip(outputs, samples, strict=True)
    )


def _seeded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, but nodes that draw random numbers draw the same ones in every model."""
    drawing = [i for i, node in enumerate(model.graph.node) if node.op_type in _DRAWING]
    if not drawing:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for i in drawing:
        node = copy.graph.node[i]
        rest = [a for a in node.attribute if a.name != "seed"]
        seed = float(zlib.crc32(node.output[0].encode()) % 1000)
        del node.attribute[:]
        node.attribute.extend([*rest, onnx.helper.make_attribute("seed", seed)])
    return copy


def _outputs(model: onnx.ModelProto, feeds: Sequence[Feeds], way: _Way) -> list[list[Any]]:
    from onnxprune import runtime

    model = float32_copy(model) if way.as_float32 else model
    arena = not any(map(runtime.are_heavy, feeds))
    seeded = _seeded(model)
    session = runtime.session(seeded, threads=way.threads, optimize=way.optimize, arena=arena)
    return [list(runtime.run(session, f).values()) for f in feeds]


def find_faulty(
    groups: Sequence[Group], keep: Mask, sound: Callable[[Mask], bool]
) -> tuple[Group, ...]:
    """Bisect: the groups without whose removals the model is sound.

    `sound(keep)` tells whether a choice passes the checks. Groups that fail only together are all
    blamed.
    """
    touched = [g for g in groups if not keep[g.units].all()]

    def choice(part: Sequence[Group]) -> Mask:
        only = np.ones_like(keep)
        for group in part:
            only[group.units] = keep[group.units]
        return only

    def search(part: Sequence[Group]) -> Iterator[Group]:
        if sound(choice(part)):
            return
        if len(part) == 1:
            yield part[0]
            return
        middle = len(part) // 2
        halves = [*search(part[:middle]), *search(part[middle:])]
        yield from halves if halves else part

    return tuple(search(touched)) if touched else ()


def units_of(groups: Sequence[Group]) -> Units:
    """The units of several groups."""
    return np.concatenate([g.units for g in groups]) if groups else np.zeros(0, np.int32)


@dataclass(frozen=True)
class Verdict:
    """What levels 1 and 2 say about one choice: no problems, no fault found."""

    applied: Applied | None
    error: float | None
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether the pruned model is valid, runs, and equals its masked twin."""
        return not self.problems


def examine(
    coupling: Coupling,
    keep: Mask,
    original: onnx.ModelProto,
    feeds: Sequence[Feeds],
    tolerance: float,
    threads: int | None = None,
    as_float32: bool = False,
) -> Verdict:
    """Apply `keep` and check the structure of the result and its equality with the masked twin."""
    from onnxprune.passes.apply import apply_keep

    applied: Applied | None = None
    error: float | None = None
    try:
        applied = apply_keep(coupling, keep)
        problems = structure_problems(applied.model, original)
        error = twin_error(coupling, keep, applied.model, feeds, threads, as_float32)
        if not error <= tolerance:
            problems.append(f"differs from its masked twin by {error:.3g}, more than {tolerance:g}")
    except FAILURES as failure:
        problems = [str(failure) or type(failure).__name__]
    return Verdict(applied, error, tuple(problems))
