"""LSTM, GRU and RNN: the hidden units of a cell, alike in every gate and both directions."""

from __future__ import annotations

import numpy as np

from onnxprune.coupling import Interpreter
from onnxprune.graph import Node
from onnxprune.labels import Labels
from onnxprune.ops.registry import rewrite, rule
from onnxprune.rewriting import Rewriter

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
#: Input slots of W, R, bias, initial hidden state, initial cell state, peepholes.
_W, _R, _B, _H, _C, _P = 1, 2, 3, 5, 6, 7


@rule("LSTM", "GRU", "RNN")
def cell(node: Node, c: Interpreter) -> None:
    """x[T, N, I], W[D, G*H, I], R[D, G*H, H], b[D, 2*G*H], h[D, N, H]
    -> Y[T, D, N, H], Y_h[D, N, H], Y_c"""
    gates = GATES[node.op_type]
    batch_first = bool(node.attr("layout", 0))
    hidden = c.system.fresh(c.dims(node, _R)[-1])
    directions, rows, inner = c.dims(node, _W)
    c.tie(node, c.contract(node, 0, 2), c.axis(node, _W, 2))
    c.tie(node, np.tile(hidden, gates), c.axis(node, _W, 1))
    c.tie(node, np.tile(hidden, gates), c.axis(node, _R, 1))
    c.tie(node, hidden, c.contract(node, _R, 2))
    for slot, copies in ((_B, 2 * gates), (_P, 3)):
        if node.input(slot):
            c.tie(node, np.tile(hidden, copies), c.axis(node, slot, 1))
    for slot in (_H, _C):
        if node.input(slot):
            c.tie(node, hidden, c.axis(node, slot, 2))
    c.set(node, {3: hidden})
    for index in (1, 2):
        c.set(node, {2: hidden}, index)
    _macs(node, c, batch_first, hidden, rows, inner, directions)


def _macs(
    node: Node,
    c: Interpreter,
    batch_first: bool,
    hidden: Labels,
    rows: int,
    inner: int,
    directions: int,
) -> None:
    steps, batch = c.dims(node, 0)[:2] if not batch_first else c.dims(node, 0)[1::-1]
    times = steps * batch * directions * rows
    c.produce(node, hidden)
    c.layer(node, _W, times * inner, hidden, c.axis(node, _W, 2))
    c.layer(node, _R, times * hidden.size, hidden, hidden)


@rewrite("LSTM", "GRU", "RNN")
def rewrite_cell(node: Node, r: Rewriter) -> None:
    """The number of hidden units that are left."""
    left = r.dims_after(node, _R)[-1]
    if node.attr("hidden_size") is not None and left != node.attr("hidden_size"):
        r.set_attribute(node, "hidden_size", left)
