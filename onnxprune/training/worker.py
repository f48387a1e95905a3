"""The training worker: a process that differentiates a graph and keeps its parameters.

It runs under the onnxruntime of the onnxruntime-training wheel, apart from the caller's. The
graph's parameters are graph inputs; they live here, in one vector, and only batches and losses
travel. Needs numpy and that wheel only, Python 3.9 or newer, so it imports nothing of onnxprune but
`wire` and `optimizer`.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, BinaryIO

import numpy as np

from onnxprune.training import optimizer, wire

ALIGN = 16  # floats: every tensor begins on a cache line


class Engine:
    """A gradient graph with its parameters, gradients and optimizer."""

    def __init__(self, head: wire.Header, arrays: wire.Arrays) -> None:
        self.layout, size = _layout(head["shapes"])
        self.params = _vector(size)
        self.grads = _vector(size)
        self.decay = _vector(size)
        self.mask: Any = None
        self.factor = self._factors(head.get("rates", {}), size)
        for name, rate in head["decay"].items():
            self.view(self.decay, name)[...] = rate
        for name in self.layout:
            self.view(self.params, name)[...] = arrays["param:" + name]
        self._set_masks(head.get("masks", []), arrays, size)
        self.accumulated: Any = None
        self.buffers = {n: arrays["buffer:" + n] for n in head.get("buffers", {})}
        self.buffer_outputs: dict[str, str] = head.get("buffers", {})
        self.optimizer = _optimizer(head["optimizer"], size)
        self.session = _session(arrays["gradient"].tobytes(), head["threads"])
        self.clip = float(head.get("clip") or 0.0)
        self.ema = float(head.get("ema") or 0.0)
        self.average: Any = self.params.copy() if self.ema else None

    def _factors(self, rates: dict[str, float], size: int) -> Any:
        """What each learning rate is multiplied with [P]; None where all are 1."""
        if not rates:
            return None
        factor = np.ones(size, np.float32)
        for name, rate in rates.items():
            self.view(factor, name)[...] = rate
        return factor

    def _set_masks(self, names: list[str], arrays: wire.Arrays, size: int) -> None:
        if names:
            self.mask = np.ones(size, np.float32)
            for name in names:
                self.view(self.mask, name)[...] = arrays["mask:" + name]

    def view(self, vector: Any, name: str) -> Any:
        """The part of a vector [P] that belongs to one parameter, in its shape."""
        begin, shape = self.layout[name]
        return vector[begin : begin + int(np.prod(shape, dtype=np.int64))].reshape(shape)

    def run(self, feeds: wire.Arrays, update_buffers: bool = False) -> float:
        """Loss of a batch; its gradients are left in `grads`."""
        binding = self.session.io_binding()
        for name in self.layout:
            _bind(binding.bind_input, name, self.view(self.params, name))
            _bind(binding.bind_output, name + "_grad", self.view(self.grads, name))
        feeds = {**feeds, **self.buffers}
        for name, array in feeds.items():
            _bind(binding.bind_input, name, array)
        loss = np.zeros((), np.float32)
        _bind(binding.bind_output, "loss", loss)
        fresh = {o: np.empty_like(self.buffers[i]) for i, o in self.buffer_outputs.items()}
        for name, array in fresh.items():
            _bind(binding.bind_output, name, array)
        self.session.run_with_iobinding(binding)
        if update_buffers:
            for source, output in self.buffer_outputs.items():
                self.buffers[source] = fresh[output]
        return float(loss)

    def accumulate(self, feeds: wire.Arrays) -> float:
        """Add a part of a batch to the gradients of the coming step."""
        loss = self.run(feeds, update_buffers=True)
        if self.accumulated is None:
            self.accumulated = self.grads.copy()
        else:
            self.accumulated += self.grads
        return loss

    def step(self, feeds: wire.Arrays, lr: float) -> tuple[float, float]:
        """Train on the last (or only) part of a batch.

        Its loss, and the norm of the whole gradient.
        """
        loss = self.run(feeds, update_buffers=True)
        if self.accumulated is not None:
            self.grads += self.accumulated
            self.accumulated = None
        norm = optimizer.clip_by_norm(self.grads, self.clip)
        if not (np.isfinite(norm) and np.isfinite(loss)):
            return loss, norm
        self.optimizer.step(self.params, self.grads, self.decay, lr, self.factor)
        if self.mask is not None:
            self.params *= self.mask
        if self.ema:
            count = self.optimizer.step_count
            optimizer.average_into(self.average, self.params, self.ema, count)
        return loss, norm

    def probe(
        self, feeds: wire.Arrays, size: float, seed: int | None, names: Any = None
    ) -> dict[str, Any]:
        """The derivative of the loss in one direction, by its gradient and by a central difference.

        The direction is random, each tensor scaled to its values; without a seed the gradient.
        Parameters other than `names` (None: all) stay.
        """
        loss = self.run(feeds)
        direction = self._direction(seed)
        for name in self.layout:
            if names is not None and name not in names:
                self.view(direction, name)[...] = 0
        slope = float(np.dot(self.grads.astype(np.float64), direction.astype(np.float64)))
        start, ends = self.params.copy(), []
        for sign in (1, -1):
            np.multiply(direction, np.float32(sign * size), out=self.params)
            self.params += start
            ends.append(self.run(feeds))
        self.params[...] = start
        return {"loss": loss, "slope": slope, "difference": (ends[0] - ends[1]) / (2 * size)}

    def _direction(self, seed: int | None) -> Any:
        weight = float(np.sqrt(np.mean(np.square(self.params)))) or 1e-2
        if seed is None:
            norm = float(np.sqrt(np.mean(np.square(self.grads)))) or 1.0
            return self.grads * np.float32(weight / norm)
        direction = np.zeros_like(self.params)
        rng = np.random.default_rng(seed)
        for name in self.layout:
            value = self.view(self.params, name)
            scale = float(np.sqrt(np.mean(np.square(value)))) or 1e-2
            self.view(direction, name)[...] = scale * rng.standard_normal(value.shape)
        return direction

    def state(self) -> tuple[wire.Header, wire.Arrays]:
        """All that a continuation needs."""
        arrays = {"params": self.params}
        arrays.update({"slot:" + n: getattr(self.optimizer, n) for n in self.optimizer.slots})
        arrays.update({"buffer:" + n: a for n, a in self.buffers.items()})
        if self.ema:
            arrays["average"] = self.average
        return {"step_count": self.optimizer.step_count}, arrays

    def restore(self, head: wire.Header, arrays: wire.Arrays) -> None:
        """Continue from what `state` gave."""
        self.params[...] = arrays["params"]
        if self.ema:
            self.average[...] = arrays["average"]
        self.optimizer.step_count = head["step_count"]
        for name in self.optimizer.slots:
            getattr(self.optimizer, name)[...] = arrays["slot:" + name]
        for name in self.buffers:
            self.buffers[name] = arrays["buffer:" + name]

    def trained(self) -> Any:
        """The parameters [P] to keep: the moving average where there is one."""
        return self.average if self.ema else self.params

    def values(self, vector: Any) -> wire.Arrays:
        """A vector [P] as one array per parameter."""
        return {name: self.view(vector, name) for name in self.layout}


def _layout(shapes: dict[str, list[int]]) -> tuple[dict[str, tuple[int, list[int]]], int]:
    """Where each parameter begins in the vector, and the vector's length."""
    layout, begin = {}, 0
    for name, shape in shapes.items():
        layout[name] = (begin, shape)
        count = int(np.prod(shape, dtype=np.int64))
        begin += -(-count // ALIGN) * ALIGN
    return layout, begin


def _vector(size: int) -> Any:
    """Zeros [size], float32, on a cache line."""
    raw = np.zeros(size + ALIGN, np.float32)
    skip = (-raw.ctypes.data // 4) % ALIGN
    return raw[skip : skip + size]


def _bind(bind: Any, name: str, array: Any) -> None:
    bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


def _optimizer(options: dict[str, Any], size: int) -> Any:
    arguments = dict(options)
    kind = {"sgd": optimizer.Sgd, "adamw": optimizer.AdamW}[arguments.pop("name")]
    return kind(size, **arguments)


def _session(gradient: bytes, threads: int) -> Any:
    """A session of a gradient graph.

    Without plans of memory: beside what the first run took they would need as much again. Without
    reuse of buffers: that of ONNX Runtime 1.19 can overwrite what gradients still need.
    """
    from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession

    options = _options()
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # threads that wait for work would burn cores that the caller (the teacher) can use
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return InferenceSession(gradient, options, ["CPUExecutionProvider"])


def _options() -> Any:
    from onnxruntime.capi import _pybind_state as binding

    binding.set_default_logger_severity(3)
    options = binding.SessionOptions()
    options.log_severity_level = 3
    return options


def differentiate(model: bytes, trained: set[str]) -> bytes:
    """The gradient graph of `loss`: of the optimized model, or of the model where that fails."""
    from onnxruntime.capi import _pybind_state as binding

    options = _options()
    try:
        return _built(binding.get_optimized_model(model, trained, options), trained, options)
    except Exception:  # of several types, for graphs that are right
        traceback.print_exc()
        return _built(model, trained, options)


def _built(model: bytes, trained: set[str], options: Any) -> bytes:
    from onnxruntime.capi import _pybind_state as binding

    builder = binding.GradientGraphBuilder(model, {"loss"}, trained, "loss", options)
    builder.build()
    return bytes(builder.get_model())


class Server:
    """Answers one message after another until the stream ends."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self.source, self.sink = source, sink
        self.engine: Any = None

    def serve(self) -> None:
        """The worker's life."""
        while True:
            try:
                head, arrays = wire.receive(self.source)
            except EOFError:
                return
            try:
                reply, answer = self.answer(head, arrays)
            except Exception as error:
                traceback.print_exc()
                reply, answer = {"error": f"{type(error).__name__}: {error}"}, {}
            wire.send(self.sink, reply, answer)

    def answer(self, head: wire.Header, arrays: wire.Arrays) -> tuple[wire.Header, wire.Arrays]:
        """Do what one message asks."""
        op = head["op"]
        if op == "hello":
            return _about(), {}
        if op == "differentiate":
            gradient = differentiate(arrays["model"].tobytes(), set(head["trained"]))
            return {}, {"gradient": np.frombuffer(gradient, np.uint8)}
        if op == "run":
            session = _session(arrays.pop("model").tobytes(), 1)
            names = [output.name for output in session.get_outputs()]
            answers = session.run(names, arrays)
            return {}, {name: answers[i] for i, name in enumerate(names)}
        if op == "build":
            self.engine = None
            self.engine = Engine(head, arrays)
            return {}, {}
        engine: Engine = self.engine
        if op == "step":
            loss, norm = engine.step(arrays, head["lr"])
            return {"loss": loss, "norm": norm}, {}
        if op == "accumulate":
            return {"loss": engine.accumulate(arrays)}, {}
        if op == "grads":
            return {"loss": engine.run(arrays)}, engine.values(engine.grads)
        if op == "probe":
            return engine.probe(arrays, head["size"], head["seed"], head.get("names")), {}
        if op == "values":
            buffers = {"buffer:" + n: a for n, a in engine.buffers.items()}
            return {}, {**engine.values(engine.trained()), **buffers}
        if op == "state":
            return engine.state()
        if op == "restore":
            engine.restore(head, arrays)
            return {}, {}
        raise ValueError(f"unknown message {op!r}")


def _about() -> wire.Header:
    """Versions, once the wheel has been imported."""
    from onnxruntime.capi import _pybind_state as binding

    return {
        "onnxruntime": binding.get_version_string(),
        "training": hasattr(binding, "GradientGraphBuilder"),
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }


def main() -> None:
    """Serve on the standard streams.

    Whatever a library prints goes to the standard error instead.
    """
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if sys.platform == "win32":
        import msvcrt

        msvcrt.setmode(0, os.O_BINARY)
        msvcrt.setmode(sink.fileno(), os.O_BINARY)
    source = os.fdopen(0, "rb", buffering=1 << 20)
    Server(source, sink).serve()
