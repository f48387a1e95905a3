"""Second moments of a site's inputs and targets, computed by a small ONNX graph batch by batch.

For inputs p[D] (unfolded patches for convolutions) and targets z[M], over all samples and positions:
A = sum p p^T, B = sum p z^T, and the sums of p, z, z^2. The graph sums in float32 over one batch,
the batches are added in float64.
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
_OPSET = 17


@dataclass
class Moments:
    """Sums over `count` rows: A[G, D, D], B[G, D, M], p[G, D], z[G, M], zz[G, M]."""

    count: int = 0
    sums: dict[str, Array] = field(default_factory=dict)

    def add(self, count: int, parts: Mapping[str, Array]) -> None:
        """Add one batch."""
        self.count += count
        for name, value in parts.items():
            wide = value.astype(np.float64)
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.count, dict(self.sums))
        total.add(other.count, other.sums)
        return total


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str | Array, **attributes: Any) -> str:
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [output], **attributes))
        return output

    def constant(self, value: Array) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(value, name))
        return name


def measure(
    site: Site,
    node: onnx.NodeProto,
    weight_shape: Sequence[int],
    cuts: Mapping[int, Array],
    feeds: Sequence[Mapping[str, Array]],
    *,
    rows: int,
    rng: np.random.Generator,
    threads: int | None,
) -> tuple[Moments, Moments]:
    """Moments of the even and of the odd batches.

    Args:
        cuts: per axis of the original's target, the indices that were kept.
        feeds: by batch the tensors "x" (pruned), "t" (original target), "o" (residual, or absent).
        rows: about how many rows to use in all; positions are drawn at random where there are more.
    """
    probe = Probe(site, node, weight_shape, cuts, feeds, rows, rng, threads)
    return probe.moments()


class Probe:
    """Measures one site as often as needed, over the same rows."""

    def __init__(
        self,
        site: Site,
        node: onnx.NodeProto,
        weight_shape: Sequence[int],
        cuts: Mapping[int, Array],
        feeds: Sequence[Mapping[str, Array]],
        rows: int,
        rng: np.random.Generator,
        threads: int | None,
    ) -> None:
        self.site, self.node, self.shape, self.cuts = site, node, weight_shape, cuts
        self.threads = threads
        self.feeds: list[dict[str, Array]] = []
        self.counts: list[int] = []
        self._rectified: Any = None
        for batch in feeds:
            samples, positions = _positions(site, batch["t"])
            want = max(1, -(-rows // (len(feeds) * samples)))
            index = np.arange(positions)
            if want < positions:
                index = np.sort(rng.choice(positions, want, replace=False))
            self.feeds.append({**batch, "index": index})
            self.counts.append(samples * index.size)

    def moments(self) -> tuple[Moments, Moments]:
        """All moments, of the even and of the odd batches."""
        build = _Builder()
        p, z = _operands(build, self.site, self.node, self.shape, self.cuts, self.feeds[0])
        names = ["A", "B", "p", "z", "zz"]
        _moments(build, p, z, names)
        return self._sums(self._session(build, names), names, {})

    def _sums(self, session: Any, names: Sequence[str], extra: Mapping[str, Array]) -> tuple[Moments, Moments]:
        halves = (Moments(), Moments())
        for i, (batch, count) in enumerate(zip(self.feeds, self.counts, strict=True)):
            halves[i % 2].add(count, runtime.run(session, {**batch, **extra}, names))
        return halves

    def _session(self, build: _Builder, names: Sequence[str], extra: Sequence[tuple[str, int]] = ()) -> Any:
        graph = helper.make_graph(
            build.nodes,
            "moments",
            [
                *(value_info(name, a) for name, a in self.feeds[0].items()),
                *(helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * r) for n, r in extra),
            ],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names],
            build.tensors,
        )
        imports = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        return runtime.session(model, threads=self.threads)


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
    cuts: Mapping[int, Array],
    batch: Mapping[str, Array],
) -> tuple[str, str]:
    """p[G, D, R] and z[G, M, R]."""
    x, z = build("Cast", "x", to=TensorProto.FLOAT), build("Cast", "t", to=TensorProto.FLOAT)
    for axis, kept in cuts.items():
        z = build("Gather", z, kept, axis=axis)
    if "o" in batch:
        z = build("Sub", z, build("Cast", "o", to=TensorProto.FLOAT))
    if not site.is_conv:
        return _rows(build, x, node), _rows(build, z, None)
    kernel = list(weight_shape[2:])
    channels = batch["x"].shape[1]
    p = _unfold(build, x, node, channels, kernel)
    groups = site.groups
    return _columns(build, p, groups), _columns(build, z, groups)


def _unfold(
    build: _Builder, x: str, node: onnx.NodeProto, channels: int, kernel: list[int]
) -> str:
    """x[N, C, *S] -> [N, C * K, *S']: the operator itself, with one-hot kernels, channel by channel."""
    taps = int(np.prod(kernel))
    if taps == 1 and node.op_type == "Conv" and not any(a.name != "group" for a in node.attribute):
        return x
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
    moved = build("Transpose", some, perm=[1, 0, 2])
    return _grouped(build, moved, groups)


def _grouped(build: _Builder, moved: str, groups: int) -> str:
    """[G * D, N, R] -> [G, D, N * R]"""
    flat = build("Reshape", moved, np.array([0, -1]))
    length = build("Gather", build("Shape", flat), np.array([1]), axis=0)
    shape = build("Concat", np.array([groups, -1]), length, axis=0)
    return build("Reshape", flat, shape)


def _rows(build: _Builder, x: str, node: onnx.NodeProto | None) -> str:
    """[*B, D] -> [1, D, rows], only the rows in `index`; a Gemm may read x transposed."""
    transposed = node is not None and any(a.name == "transA" and a.i for a in node.attribute)
    if not transposed:
        last = build("Gather", build("Shape", x), np.array([-1]), axis=0)
        x = build("Reshape", x, build("Concat", np.array([-1]), last, axis=0))
        x = build("Transpose", x, perm=[1, 0])
    some = build("Gather", x, "index", axis=1)
    return build("Unsqueeze", some, np.array([0]))


def _moments(build: _Builder, p: str, z: str, names: Sequence[str]) -> None:
    axes = np.array([2])
    pt, zt = build("Transpose", p, perm=[0, 2, 1]), build("Transpose", z, perm=[0, 2, 1])
    results = [
        build("MatMul", p, pt),
        build("MatMul", p, zt),
        build("ReduceSum", p, axes, keepdims=0),
        build("ReduceSum", z, axes, keepdims=0),
        build("ReduceSum", build("Mul", z, z), axes, keepdims=0),
    ]
    for name, value in zip(names, results, strict=True):
        build.nodes.append(helper.make_node("Identity", [value], [name]))
