"""Everything that is known about a model before anything is decided, computed once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune.bodies import separate_bodies
from onnxprune.cost import WEIGHT_TYPES, CostModel, cost_model, count_params, size_bytes
from onnxprune.coupling import Coupling, couple
from onnxprune.granularity import HEADS, Granularity
from onnxprune.graph import Graph, Node
from onnxprune.groups import Group, find_groups
from onnxprune.labels import Block
from onnxprune.plan import FrozenAxis
from onnxprune.result import Cost, FrozenRow, GroupRow, Inspection, LayerRow
from onnxprune.rewriting import Mask, Rewriter
from onnxprune.shapes import infer
from onnxprune.statics import fold_statics
from onnxprune.untie import untie_vectors


@dataclass(frozen=True)
class Analysis:
    """A model's coupling, its groups, and what they cost."""

    model: onnx.ModelProto
    coupling: Coupling
    groups: tuple[Group, ...]
    cost: CostModel

    @property
    def everything(self) -> Mask:
        """The choice that removes nothing."""
        return np.ones(self.coupling.solution.units, bool)


def normalize(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its local functions inlined and names unique over all bodies.

    The same object where there are neither functions nor bodies.
    """
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    return separate_bodies(model)


def analyse(model: onnx.ModelProto, *, granularity: Granularity = HEADS) -> Analysis:
    """Interpret `model`; it is only read.

    Raises:
        InvalidModelError: the graph is cyclic.
    """
    graph = untie_vectors(fold_statics(Graph.of(normalize(model))))
    coupling = couple(graph, infer(graph), granularity=granularity)
    return Analysis(model, coupling, find_groups(coupling), cost_model(coupling))


def layer_rows(analysis: Analysis, keep: Mask) -> tuple[LayerRow, ...]:
    """One row for each weighted node, before and after `keep`."""
    coupling, rewriter = analysis.coupling, Rewriter(analysis.coupling, keep)
    before = analysis.cost.layer_macs(analysis.everything)
    after = analysis.cost.layer_macs(keep)
    rows: dict[int, LayerRow] = {}
    for layer, macs_before, macs_after in zip(coupling.layers, before, after, strict=True):
        node = coupling.graph.nodes[layer.node]
        if layer.weight < 0:
            continue
        old, new = rewriter.dims(node, layer.weight), rewriter.dims_after(node, layer.weight)
        known = rows.get(layer.node)
        rows[layer.node] = LayerRow(
            name=node.proto.name or node.outputs[0],
            op_type=node.op_type,
            shape_before=known.shape_before if known else old,
            shape_after=known.shape_after if known else new,
            params_before=int(np.prod(old))
            + (known.params_before if known else _extra(rewriter, node, False)),
            params_after=int(np.prod(new))
            + (known.params_after if known else _extra(rewriter, node, True)),
            macs_before=round(macs_before) + (known.macs_before if known else 0),
            macs_after=round(macs_after) + (known.macs_after if known else 0),
        )
    return tuple(rows.values())


def _extra(rewriter: Rewriter, node: Node, after: bool) -> int:
    """The elements of a node's bias."""
    slot = 3 if node.op_type in ("LSTM", "GRU", "RNN") else 2
    if not node.input(slot) or node.op_type == "Einsum":
        return 0
    return int(np.prod(rewriter.dims_after(node, slot) if after else rewriter.dims(node, slot)))


def frozen_axes(analysis: Analysis) -> tuple[FrozenRow, ...]:
    """Weight axes of which something cannot be pruned, with what that costs, largest first."""
    coupling = analysis.coupling
    frozen_by, reasons = coupling.solution.frozen_by, coupling.system.reasons
    macs = _macs_by_node(analysis)
    rows = []
    for name, uses in coupling.constants.items():
        constant = coupling.graph.constants[name]
        if constant.is_vector or constant.dtype not in WEIGHT_TYPES:
            continue
        (index, _), layout = next(iter(uses.items()))
        for block in layout:
            why = _reason(block, frozen_by)
            if why:
                reason = reasons[why]
                node = coupling.graph.nodes[reason.node].title if reason.node >= 0 else "model"
                rows.append(
                    FrozenRow(
                        name, block.axes[0], node, reason.words, constant.size, macs.get(index, 0)
                    )
                )
    return tuple(sorted(rows, key=lambda r: (-r.params, -r.macs, r.tensor, r.axis)))


def _reason(block: Block, frozen_by: np.ndarray) -> int:
    """The reason that froze most of the block; 0 where all of it is free."""
    why = frozen_by[np.maximum(block.labels, 0)]
    why = why[why > 0]
    return int(np.bincount(why).argmax()) if why.size else 0


def _macs_by_node(analysis: Analysis) -> dict[int, int]:
    macs = analysis.cost.layer_macs(analysis.everything)
    found: dict[int, int] = {}
    for layer, value in zip(analysis.coupling.layers, macs, strict=True):
        found[layer.node] = found.get(layer.node, 0) + round(value)
    return found


def planned_frozen(analysis: Analysis) -> tuple[FrozenAxis, ...]:
    """The frozen axes as a plan records them."""
    return tuple(FrozenAxis(r.tensor, r.axis, r.node, r.reason) for r in frozen_axes(analysis))


def group_rows(analysis: Analysis) -> tuple[GroupRow, ...]:
    """The groups with what they hold."""
    params, macs = analysis.cost.params_per_unit(), analysis.cost.macs_per_unit()
    tensors = _tensors_by_unit(analysis)
    return tuple(
        GroupRow(
            name=g.name,
            units=g.size,
            width=g.width,
            exact=g.exact,
            params=round(params[g.units].sum()),
            macs=round(macs[g.units].sum()),
            tensors=tensors.get(int(g.units[0]), ()),
        )
        for g in analysis.groups
    )


def _tensors_by_unit(analysis: Analysis) -> dict[int, tuple[str, ...]]:
    unit = analysis.coupling.solution.unit
    wanted = {int(g.units[0]) for g in analysis.groups}
    found: dict[int, list[str]] = {}
    for name, uses in analysis.coupling.constants.items():
        here = {
            int(u)
            for layout in uses.values()
            for b in layout
            for u in np.unique(unit[np.maximum(b.labels, 0)])
        }
        for u in sorted(here & wanted):
            found.setdefault(u, []).append(name)
    return {u: tuple(names) for u, names in found.items()}


def measured_cost(analysis: Analysis, model: onnx.ModelProto, keep: Mask) -> Cost:
    """Parameters and size of `model`, and the MACs that `keep` leaves."""
    return Cost(count_params(model), round(analysis.cost.macs(keep)), size_bytes(model))


def inspection(model: onnx.ModelProto) -> Inspection:
    """What can be pruned, what cannot, and why."""
    analysis = analyse(model)
    return Inspection(
        cost=measured_cost(analysis, model, analysis.everything),
        layers=layer_rows(analysis, analysis.everything),
        groups=group_rows(analysis),
        frozen=frozen_axes(analysis),
        opset=analysis.coupling.graph.opset,
        inputs=analysis.coupling.graph.inputs,
        outputs=analysis.coupling.graph.outputs,
    )
