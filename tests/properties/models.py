"""Random valid models from the grammar, and what is removed from them at random."""

from __future__ import annotations

import random

import numpy as np
import onnx

from onnxprune.analysis import Analysis
from onnxprune.rewriting import Mask
from tests.graphs import build
from tests.properties import elementwise, quantized, rare, sequences, spatial, structure
from tests.properties.elementwise import dense
from tests.properties.registry import PRODUCTIONS
from tests.properties.writer import SIDE, Kind, Value, Writer
from tests.quantized import weights as quantized_weights

FAMILIES = (elementwise, quantized, rare, sequences, spatial, structure)
OPSETS = (12, 13, 18, 21, 24, 26)
INPUTS: tuple[Kind, ...] = ("image", "tokens", "flat")
CHANNELS = 3
VOCABULARY = 7


def random_model(seed: int, productions: int) -> onnx.ModelProto:
    """A model with one to three inputs and one to three outputs.

    The same seed with fewer productions gives the beginning of the same graph.
    """
    rng = random.Random(seed)
    batch = rng.choice(("N", "N", "2"))
    g = Writer(rng, rng.choice(OPSETS))
    signature, table = [], ""
    for kind in rng.sample((*INPUTS, "words"), rng.randint(1, 3)):
        if kind == "words":
            table = g.weight(VOCABULARY, 6, kind="table")
            signature.append(f"int64[{batch},S] words")
            g.put("tokens", 6, f"Gather({table}, words)")
        else:
            value = Value(f"x_{kind}", kind, CHANNELS)
            signature.append(f"float[{_dims(value, batch)}] {value}")
            dense(g, value, g.width())
            if g.flip():
                g.live.append(value)
    for _ in range(productions):
        g.choose(PRODUCTIONS)(g)
    g.rng = random.Random(seed + 1)
    outputs = _outputs(g, batch, table)
    text = "\n".join(line.replace("[N,", f"[{batch},") for line in g.lines)
    model = build(
        f"({', '.join(signature)}) => ({', '.join(outputs)})",
        text,
        " ".join(g.weights),
        opset=g.opset,
        ir=13 if g.opset > 24 else 10,
    )
    model.graph.initializer.extend(quantized_weights(" ".join(g.quantized), seed))
    return model


def _dims(value: Value, batch: str) -> str:
    rest = {"image": f"{value.channels},{SIDE},{SIDE}", "tokens": f"S,{value.channels}"}
    rest["patches"] = f"{SIDE * SIDE},{value.channels}"
    return f"{batch},{rest.get(value.kind, value.channels)}"


def _outputs(g: Writer, batch: str, table: str) -> list[str]:
    """A layer behind everything that nothing reads, and sometimes values as they are."""
    ends = [dense(g, leaf, 2) for leaf in g.leaves() or g.live[-1:]]
    for _ in range(g.integer(-2, 2)):
        value = g.pick()
        assert value is not None
        ends.append(g.put(value.kind, value.channels, f"Identity({value})"))
    if table and g.flip():
        words = g.pick("tokens", channels=6)
        if words is not None:
            scores = f"MatMul({words}, Transpose({table}))"
            ends.append(g.put("tokens", VOCABULARY, scores))
    return [f"float[{_dims(v, batch)}] {v}" for v in dict.fromkeys(ends)]


def random_keep(analysis: Analysis, seed: int) -> Mask:
    """Each group loses an arbitrary part of its units, never all; no part of a split is emptied."""
    rng = np.random.default_rng(seed)
    keep = analysis.everything
    for group in analysis.groups:
        keep[rng.permutation(group.units)[: rng.integers(0, group.size)]] = False
    unit = analysis.coupling.solution.unit
    for labels in analysis.coupling.keepers:
        members = unit[np.maximum(labels, 0)]
        if members.size and not keep[members].any():
            keep[rng.choice(members)] = True
    return keep
