"""Everything that is known about a model before anything is decided, computed once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.bodies import separate_bodies
from onnxprune.cost import WEIGHT_TYPES, CostModel, cost_model, count_params, size_bytes
from onnxprune.coupling import Coupling, couple
from onnxprune.granularity import HEADS, Granularity
from onnxprune.graph import Graph, Node, head
from onnxprune.groups import Group, find_groups
from onnxprune.labels import Block
from onnxprune.pause import collection_paused
from onnxprune.plan import FrozenAxis
from onnxprune.result import Cost, FrozenRow, GroupRow, Inspection, LayerRow
from onnxprune.rewriting import Mask, Rewriter
from onnxprune.shapes import infer
from onnxprune.statics import fold_statics
from onnxprune.unroll import unroll_sequences
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


def normalized(model: onnx.ModelProto) -> Graph:
    """The index of `model`, its local functions inlined, names unique over all bodies, no
    loop that builds a sequence a fixed number of times.

    No weight outside of functions and bodies is copied.
    """
    if not model.functions:
        return unroll_sequences(separate_bodies(Graph.of(model)))
    from onnx import inliner

    skeleton = head(model)
    skeleton.graph.node.extend(model.graph.node)
    names = (TensorProto(name=tensor.name) for tensor in model.graph.initializer)
    skeleton.graph.initializer.extend(names)  # what functions define must not be called so
    inlined = inliner.inline_local_functions(skeleton)
    graph = Graph.of(inlined, model.graph.initializer)
    whole = separate_bodies(graph.with_nodes(node.proto for node in graph.top))
    return unroll_sequences(whole)


@collection_paused()
def analyse(model: onnx.ModelProto, *, granularity: Granularity = HEADS) -> Analysis:
    """Interpret `model`; it is only read.

    Raises:
        InvalidModelError: the graph is cyclic.
    """
    graph = untie_vectors(fold_statics(normalized(model)))
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
    """Weight axes of which something cannot be pruned, with what that costs, largest first.

    An axis costs its weight's parameters and multiply-adds, times the share of its indices that
    stay; several frozen axes of one weight share them evenly, so that costs add up.
    """
    coupling = analysis.coupling
    macs = _macs_by_use(analysis)
    rows: list[FrozenRow] = []
    for name, uses in coupling.constants.items():
        constant = coupling.graph.constants[name]
        if constant.is_vector or constant.dtype not in WEIGHT_TYPES:
            continue
        blocks = [b for b in next(iter(uses.values())) if _frozen_share(coupling, b)]
        whole = sum(macs.get(use, 0.0) for use in uses)
        for block in blocks:
            share = _frozen_share(coupling, block) / len(blocks)
            row = _frozen_row(coupling, name, block, share * constant.size, share * whole)
            rows.append(row)
    return tuple(sorted(rows, key=lambda r: (-r.params, -r.macs, r.tensor, r.axis)))


def _frozen_share(coupling: Coupling, block: Block) -> float:
    """The share of the indices of a block that stay for a reason."""
    return float((coupling.solution.frozen_by[np.maximum(block.labels, 0)] > 0).mean())


def _frozen_row(
    coupling: Coupling, name: str, block: Block, params: float, macs: float
) -> FrozenRow:
    """A row with the reason that froze most of the block."""
    why = coupling.solution.frozen_by[np.maximum(block.labels, 0)]
    reason = coupling.system.reasons[int(np.bincount(why[why > 0]).argmax())]
    node = coupling.graph.nodes[reason.node].title if reason.node >= 0 else "model"
    return FrozenRow(name, block.axes[0], node, reason.words, round(params), round(macs))


def _macs_by_use(analysis: Analysis) -> dict[tuple[int, int], float]:
    """Multiply-adds by node and input slot of the weight."""
    macs = analysis.cost.layer_macs(analysis.everything)
    found: dict[tuple[int, int], float] = {}
    for layer, value in zip(analysis.coupling.layers, macs, strict=True):
        use = (layer.node, layer.weight)
        found[use] = found.get(use, 0.0) + float(value)
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


def inspection(analysis: Analysis) -> Inspection:
    """What can be pruned, what cannot, and why."""
    return Inspection(
        cost=measured_cost(analysis, analysis.model, analysis.everything),
        layers=layer_rows(analysis, analysis.everything),
        groups=group_rows(analysis),
        frozen=frozen_axes(analysis),
        opset=analysis.coupling.graph.opset,
        inputs=analysis.coupling.graph.inputs,
        outputs=analysis.coupling.graph.outputs,
    )
