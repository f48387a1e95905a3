"""Run models with ONNX Runtime: sessions of any size, outputs by name, comparable latencies."""

from __future__ import annotations

import ctypes
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from onnxprune import io
from onnxprune.errors import InvalidDataError, InvalidModelError
from onnxprune.feeds import random_feeds

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = [
    "latencies_ms",
    "latency_ms",
    "one_blas_thread",
    "random_feeds",
    "run",
    "session",
    "working_feeds",
]

_FATAL: Final = 4  # every failure is raised as well, so ONNX Runtime need not print it
_WITHOUT_NUMPY: Final = re.compile(r"tensor\((bfloat16|float8\w+|float4\w+|u?int[24])\)")


def session(
    model: onnx.ModelProto | str | os.PathLike[str],
    *,
    threads: int | None = None,
    optimize: bool = True,
    arena: bool = True,
) -> InferenceSession:
    """A CPU session of a model or of the model at a path.

    Args:
        model: Of any size; a proto above 1.9 GB goes through a temporary folder.
        threads: Threads within an operator; None lets ONNX Runtime use the physical cores.
        optimize: False turns graph optimizations off, for results that follow the graph as written.
        arena: False gives each tensor's memory back at once: slower, and with less at the peak.

    Raises:
        InvalidModelError: ONNX Runtime cannot load the model.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)
    options = _options(threads, optimize)
    options.enable_cpu_mem_arena = options.enable_mem_pattern = arena

    def create(source: str | bytes) -> InferenceSession:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    try:
        if not isinstance(model, onnx.ModelProto):
            return create(os.fspath(model))
        if sum(map(io.tensor_bytes, io.tensors(model))) <= io.MAX_INLINE_BYTES:
            return create(model.SerializeToString())
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "model.onnx"
            io.save(model, path, external_data=True)
            return create(os.fspath(path))
    except _runtime_errors() as error:
        raise InvalidModelError(
            f"ONNX Runtime cannot load the model: {_first_line(error)}"
        ) from error


def _options(threads: int | None, optimize: bool) -> Any:
    """SessionOptions that stay silent."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    return options


def _runtime_errors() -> tuple[type[Exception], ...]:
    """Everything that ONNX Runtime raises; its classes share no base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    classes = [value for value in vars(state).values() if isinstance(value, type)]
    return (RuntimeError, ValueError, *(c for c in classes if issubclass(c, Exception)))


def _first_line(error: Exception) -> str:
    """ONNX Runtime's words on one line, without its error codes and C++ positions."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S+\.(?:cc|h):\d+ ", "", text)
    place = (
        r"Non-zero status code returned while running (\w+) node\. Name:'(.*?)' Status Message: "
    )
    text = re.sub(place, r"node '\2' (\1): ", text)
    text = re.sub(r"(?<=: )\S* ?\S+::.*? was false\. ", "", text)
    return text or type(error).__name__


def run(
    session: InferenceSession,
    feeds: Mapping[str, NDArray[Any]],
    outputs: Sequence[str] | None = None,
) -> dict[str, NDArray[Any]]:
    """Run once; the outputs by name, all of them or those asked for. Sequences come as lists.

    Raises:
        InvalidDataError: A feed is missing, unknown, or of the wrong type or shape.
        InvalidModelError: ONNX Runtime fails inside the model.
    """
    known = [output.name for output in session.get_outputs()]
    names = known if outputs is None else list(outputs)
    for name in names:
        if name not in known:
            raise InvalidDataError(f"the model has no output '{name}': its outputs are {known}")
    _check_feeds(session, feeds)
    if not names:
        return {}
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    try:
        results = _prepared(session, feeds, names)()
    except InvalidArgument as error:
        raise InvalidDataError(f"the feeds do not fit the model: {_first_line(error)}") from error
    except _runtime_errors() as error:
        raise InvalidModelError(
            f"ONNX Runtime cannot run the model: {_first_line(error)}"
        ) from error
    return dict(zip(names, results, strict=True))


def _check_feeds(session: InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> None:
    """The names of the feeds are the model's."""
    required = [i.name for i in session.get_inputs()]
    optional = [i.name for i in session.get_overridable_initializers()]
    missing = [name for name in required if name not in feeds]
    unknown = [name for name in feeds if name not in required and name not in optional]
    if missing:
        raise InvalidDataError(f"no data for the model's input '{missing[0]}': given {list(feeds)}")
    if unknown:
        raise InvalidDataError(f"the model has no input '{unknown[0]}': its inputs are {required}")


def _prepared(
    session: InferenceSession, feeds: Mapping[str, Any], names: Sequence[str]
) -> Callable[[], list[Any]]:
    """A call that runs the session; values of types that numpy lacks pass as OrtValues."""
    types = [value.type for value in (*session.get_inputs(), *session.get_outputs())]
    if not any(_WITHOUT_NUMPY.fullmatch(kind) for kind in types):
        arrays = {n: a if isinstance(a, list) else np.asarray(a) for n, a in feeds.items()}
        return lambda: list(session.run(names, arrays))
    values = {name: _ort_value(array) for name, array in feeds.items()}
    return lambda: [_array(v) for v in session.run_with_ort_values(names, values)]


def _ort_value(array: NDArray[Any]) -> Any:
    """An OrtValue, also of bfloat16 and float8."""
    from onnxruntime import OrtValue

    array = np.asarray(array)
    if array.dtype.isbuiltin == 1:
        return OrtValue.ortvalue_from_numpy(array)
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    bits = array.view(np.dtype(f"u{array.dtype.itemsize}"))
    return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)


def _array(value: Any) -> Any:
    """The numpy array of an OrtValue, also of types that ONNX Runtime cannot convert itself."""
    if not value.is_tensor() or not _WITHOUT_NUMPY.fullmatch(value.data_type()):
        return value.numpy()
    tensor = TensorProto(data_type=value.element_type(), dims=value.shape())
    tensor.raw_data = ctypes.string_at(value.data_ptr(), io.tensor_bytes(tensor))
    return numpy_helper.to_array(tensor)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Linear algebra of numpy and scipy in one thread: between small solves others only spin."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


#: (batch, scale) of the feeds that are tried on a model: some need longer signals or larger images.
_TRIED: Final[Sequence[tuple[int, int]]] = (
    (2, 1),
    (1, 1),
    (2, 4),
    (1, 4),
    (1, 16),
    (1, 32),
    (1, 64),
    (1, 1024),
)
#: Feeds of more elements than this (video, large images) are run with care for the memory.
HEAVY: Final = 1 << 22


def working_feeds(
    model: onnx.ModelProto,
    *,
    seed: int = 0,
    threads: int | None = None,
    target: InferenceSession | None = None,
) -> list[dict[str, NDArray[Any]]]:
    """Random feeds on which the model runs, and others of another batch size where it runs on them.

    `target` is a session of the model, where there is one.

    Raises:
        InvalidModelError, InvalidDataError: the model runs on none of the sizes that are tried.
    """
    heavy = are_heavy(random_feeds(model))
    target = target or session(model, threads=threads, arena=not heavy)
    failure: InvalidDataError | InvalidModelError | None = None
    tried = _TRIED[::-1] if dies_on_empty(model) else _TRIED
    if heavy:
        tried = sorted(tried, key=lambda size: size != (1, 1))
    for second, (batch, scale) in product((False, True), tried):
        make = partial(random_feeds, model, scale=scale, batch_second=second)
        feeds = make(seed=seed, batch=batch)
        try:
            run(target, feeds)
        except (InvalidDataError, InvalidModelError) as error:
            failure = failure or error
            continue
        return [feeds, *_others(target, feeds, make(seed=seed + 1, batch=batch + 1))]
    raise InvalidDataError(
        f"the model does not run on random inputs, so nothing can be checked: {failure}; "
        "give inputs with --data"
    ) from failure


def are_heavy(feeds: Mapping[str, Any]) -> bool:
    """Whether a run on these feeds may fill the memory."""
    return sum(np.size(value) for value in feeds.values()) > HEAVY


def dies_on_empty(model: onnx.ModelProto) -> bool:
    """Whether too short an input ends the process: ONNX Runtime divides by zero in such a Scan."""
    return any(
        attribute.name == "scan_input_axes" and any(attribute.ints)
        for node in model.graph.node
        if node.op_type == "Scan"
        for attribute in node.attribute
    )


def _others(
    target: InferenceSession, first: Mapping[str, Any], other: dict[str, NDArray[Any]]
) -> list[dict[str, NDArray[Any]]]:
    if all(np.shape(other[name]) == np.shape(value) for name, value in first.items()):
        return []
    try:
        run(target, other)
    except (InvalidDataError, InvalidModelError):
        return []
    return [other]


def latency_ms(
    session: InferenceSession,
    feeds: Mapping[str, NDArray[Any]],
    *,
    budget_s: float = 0.5,
    min_runs: int = 5,
) -> float:
    """The median time of a run in ms, after two runs to warm up.

    Args:
        session: The model to measure.
        feeds: One set of inputs, fed again in each run.
        budget_s: Stop after this time, once `min_runs` are done.
        min_runs: The least number of runs.
    """
    return latencies_ms([(session, feeds)], budget_s=budget_s, min_runs=min_runs)[0]


def latencies_ms(
    runs: Sequence[tuple[InferenceSession, Mapping[str, NDArray[Any]]]],
    *,
    budget_s: float = 0.5,
    min_runs: int = 5,
) -> list[float]:
    """The median time in ms of each of several models, run in turns so that drift hits all alike.

    Args:
        runs: Sessions with their feeds.
        budget_s: Time per model; the measurement stops then, once `min_runs` are done.
        min_runs: The least number of runs of each model.
    """
    calls: list[Callable[[], object]] = []
    for of_session, feeds in runs:
        _check_feeds(of_session, feeds)
        calls.append(_prepared(of_session, feeds, [o.name for o in of_session.get_outputs()]))
    for call in (*calls, *calls):
        call()
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    end = time.perf_counter() + budget_s * len(calls)
    while len(times[0]) < min_runs or time.perf_counter() < end:
        for index in order:
            start = time.perf_counter()
            calls[index]()
            times[index].append((time.perf_counter() - start) * 1e3)
        order.reverse()
    return [statistics.median(of_model) for of_model in times]
