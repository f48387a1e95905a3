"""Second moments of a site's inputs and targets, computed by a small ONNX graph batch by batch.

For inputs p[D] (unfolded patches for convolutions) and targets z[M], over samples and positions:
A = sum p p^T, B = sum p z^T, and the sums of p, z and z^2. The graph sums in float32 over one
batch, the batches are added in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxprune import runtime
from onnxprune.calibration.sites import Site
from onnxprune.calibration.walk import value_info

Array = NDArray[Any]
#: Sums that `measure` knows: A[G, D, D], B[G, D, M], p[G, D], z[G, M], zz[G, M].
SECOND = ("A", "B", "p", "z", "zz")
FIRST = ("p", "z", "zz")
#: Multiply-adds of all sites together.
OPERATIONS = 1e12
_OPSET = 17


@dataclass
class Moments:
    """Sums over `count` rows, by name."""

    count: int = 0
    sums: dict[str, Array] = field(default_factory=dict)

    def add(self, count: int, parts: Mapping[str, Array]) -> None:
        """Add one batch."""
        self.count += count
        for name, value in parts.items():
            wide = value.astype(np.float64)
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide

    def mean(self, name: str, group: int) -> Array:
        """A sum over its rows, of one group."""
        return np.asarray(self.sums[name][group] / max(self.count, 1))


def affordable(rows: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Rows for sites with D = `widths` inputs, fewer where their A would cost too much in all.

    At least two for each input, or there is too little to solve from.
    """
    cost = sum(float(n) * d * d for n, d in zip(rows, widths, strict=True))
    share = min(1.0, OPERATIONS / max(cost, 1.0))
    return [max(int(n * share), min(n, 2 * d)) for n, d in zip(rows, widths, strict=True)]


class _Builder:
    """Collects nodes; a call adds one and says the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str | Array, **attributes: Any) -> str:
        names = [i if isinstance(i, str) else self._constant(i) for i in inputs]
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [output], **attributes))
        return output

    def _constant(self, value: Array) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(value, name))
        return name


def measure(
    site: Site,
    node: onnx.NodeProto,
    weight_shape: Sequence[int],
    cuts: Mapping[str, Mapping[int, Array]],
    feeds: Sequence[Mapping[str, Array]],
    *,
    rows: int,
    rng: np.random.Generator,
    names: Sequence[str] = SECOND,
    threads: int | None = None,
) -> tuple[Moments, Moments]:
    """Moments of the even and of the odd batches.

    Args:
        site: what is measured; `node` is its operator, `weight_shape` its weight's shape.
        cuts: for the feeds "x" and "t", per axis the indices that are read.
        feeds: by batch the tensors "x" (input), "t" (target), "o" (what is added, or absent).
        rows: about how many rows to use; positions are drawn at random where there are more.
        names: which sums.
    """
    build = _Builder()
    p, z = _operands(build, site, node, weight_shape, cuts, feeds[0])
    _sums(build, p, z, names)
    inputs = [value_info(name, [f[name] for f in feeds]) for name in feeds[0]]
    inputs.append(helper.make_tensor_value_info("index", TensorProto.INT64, ["rows"]))
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]
    graph = helper.make_graph(build.nodes, "moments", inputs, outputs, build.tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
    session = runtime.session(model, threads=threads)
    halves = (Moments(), Moments())
    for i, batch in enumerate(feeds):
        samples, positions = _positions(site, batch["t"])
        want = max(1, -(-rows // (len(feeds) * samples)))
        index = np.arange(positions)
        if want < positions:
            index = np.sort(rng.choice(positions, want, replace=False))
        result = runtime.run(session, {**batch, "index": index}, names)
        halves[i % 2].add(samples * index.size, result)
    return halves


def _positions(site: Site, target: Array) -> tuple[int, int]:
    """How many samples, and how many positions each has."""
    if site.is_conv:
        return target.shape[0], int(np.prod(target.shape[2:]))
    return 1, int(np.prod(target.shape[:-1]))


def _operands(
    build: _Builder,
    site: Site,
    node: onnx.NodeProto,
    weight_shape: Sequence[int],
    cuts: Mapping[str, Mapping[int, Array]],
    batch: Mapping[str, Array],
) -> tuple[str, str]:
    """p[G, D, R] and z[G, M, R]."""
    x, z = (_kept(build, name, cuts.get(name, {})) for name in ("x", "t"))
    if "o" in batch:
        z = build("Sub", z, build("Cast", "o", to=TensorProto.FLOAT))
    if not site.is_conv:
        return _rows(build, x, node), _rows(build, z, None)
    kept = cuts.get("x", {}).get(1)
    channels = batch["x"].shape[1] if kept is None else kept.size
    p = _unfold(build, x, node, channels, list(weight_shape[2:]))
    return _columns(build, p, site.groups), _columns(build, z, site.groups)


def _kept(build: _Builder, name: str, cuts: Mapping[int, Array]) -> str:
    value = build("Cast", name, to=TensorProto.FLOAT)
    for axis, kept in cuts.items():
        value = build("Gather", value, kept, axis=axis)
    return value


def _unfold(build: _Builder, x: str, node: onnx.NodeProto, channels: int, kernel: list[int]) -> str:
    """x[N, C, *S] -> [N, C * K, *S']: the operator itself, channel by channel, one-hot kernels."""
    taps = int(np.prod(kernel))
    one_hot = np.eye(taps, dtype=np.float32).reshape(1, taps, *kernel)
    one_hot = np.broadcast_to(one_hot, (channels, taps, *kernel))
    if node.op_type == "Conv":
        one_hot = one_hot.reshape(channels * taps, 1, *kernel)
    copy = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "group"}
    return build(node.op_type, x, np.ascontiguousarray(one_hot), group=channels, **copy)


def _columns(build: _Builder, x: str, groups: int) -> str:
    """[N, G * D, *S] -> [G, D, N * rows], only the positions in `index`."""
    flat = build("Reshape", x, np.array([0, 0, -1]))
    some = build("Gather", flat, "index", axis=2)
    flat = build("Reshape", build("Transpose", some, perm=[1, 0, 2]), np.array([0, -1]))
    length = build("Gather", build("Shape", flat), np.array([1]), axis=0)
    return build("Reshape", flat, build("Concat", np.array([groups, -1]), length, axis=0))


def _rows(build: _Builder, x: str, node: onnx.NodeProto | None) -> str:
    """[*B, D] -> [1, D, rows], only the rows in `index`; a Gemm may read x transposed."""
    if node is None or not any(a.name == "transA" and a.i for a in node.attribute):
        last = build("Gather", build("Shape", x), np.array([-1]), axis=0)
        x = build("Reshape", x, build("Concat", np.array([-1]), last, axis=0))
        x = build("Transpose", x, perm=[1, 0])
    return build("Unsqueeze", build("Gather", x, "index", axis=1), np.array([0]))


def _sums(build: _Builder, p: str, z: str, names: Sequence[str]) -> None:
    axes = np.array([2])
    forms = {
        "A": lambda: build("MatMul", p, build("Transpose", p, perm=[0, 2, 1])),
        "B": lambda: build("MatMul", p, build("Transpose", z, perm=[0, 2, 1])),
        "p": lambda: build("ReduceSum", p, axes, keepdims=0),
        "z": lambda: build("ReduceSum", z, axes, keepdims=0),
        "zz": lambda: build("ReduceSum", build("Mul", z, z), axes, keepdims=0),
    }
    for name in names:
        build.nodes.append(helper.make_node("Identity", [forms[name]()], [name]))
