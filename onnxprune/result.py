"""What a run hands back: measured costs, the outcome of every check, the report of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx

from onnxprune.plan import Plan


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    `latency_ms` is the median of ONNX Runtime runs; metrics are by name, in [0, 1].
    """

    params: int
    macs: int
    size_bytes: int
    latency_ms: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRow:
    """One weighted node before and after; shapes are those of its main weight."""

    name: str
    op_type: str
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class CheckReport:
    """The outcome of the checks that ran.

    `structure`: the graph is valid and runs, inputs and outputs kept. `max_error`: the largest
    difference over all outputs and feeds, relative to the largest magnitude of the reference
    output; None where level 2 did not run. `agreement`: share of equal top-1 answers, None without
    a class axis. `problems`: one sentence each.
    """

    passed: bool
    structure: bool
    max_error: float | None
    tolerance: float | None
    feeds: int
    reference: str
    agreement: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    faulty: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything a run measured; `to_json` is what `--report` writes.

    `attempts`: the models tried until a promise held, see `onnxprune.loop.Trial`; empty for one.
    """

    before: Cost
    after: Cost
    layers: tuple[LayerRow, ...]
    budget: Mapping[str, Any]
    options: Mapping[str, Any]
    checks: tuple[CheckReport, ...]
    rebuild: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    attempts: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"format": "onnxprune-report", "version": 1, **asdict(self)}


@dataclass(frozen=True)
class Result:
    """A pruned model with the plan that made it and the report on it."""

    model: onnx.ModelProto
    plan: Plan
    report: Report


@dataclass(frozen=True)
class GroupRow:
    """Channels pruned alike: `units` removable pieces of `width` channels, over `tensors`."""

    name: str
    units: int
    width: int
    exact: bool
    params: int
    macs: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class FrozenRow:
    """A weight axis that cannot be pruned: the node and words that froze it, what that costs."""

    tensor: str
    axis: int
    node: str
    reason: str
    params: int
    macs: int


@dataclass(frozen=True)
class SensitivityRow:
    """The relative squared change of the outputs when a group loses its `removed` least units.

    `change` is None where it cannot be told.
    """

    group: str
    units: int
    removed: int
    change: float | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` knows of a model without changing it; `sensitivity` where data was given."""

    cost: Cost
    layers: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    frozen: tuple[FrozenRow, ...]
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sensitivity: tuple[SensitivityRow, ...] = ()
