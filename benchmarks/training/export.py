"""A network as plain data for PyTorch: no ONNX is needed there, so none weighs on its memory.

Chains that have one operator in PyTorch become that operator, as they would be written there:
Gelu, attention, and a MatMul with its bias.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Step = dict[str, Any]
OVERWRITTEN = ("Conv", "BatchNormalization", "Add", "Gemm")  # whose outputs no gradient needs


def export(model: onnx.ModelProto, path: Path) -> None:
    """Write the graph as JSON to `path`, and its constants beside it as .npz."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    steps: list[Step] = [
        {
            "op": node.op_type,
            "inputs": list(node.input),
            "output": node.output[0],
            "options": {a.name: _plain(a) for a in node.attribute},
        }
        for node in model.graph.node
    ]
    by_output = {step["output"]: step for step in steps}
    readers = {name: step for step in steps for name in step["inputs"]}
    for step in steps:
        if step["op"] == "Erf":
            _gelu(step, by_output, readers)
        elif step["op"] == "Softmax" and readers.get(step["output"], {}).get("op") == "MatMul":
            _attention(step, by_output, readers)
        elif step["op"] == "MatMul" and step["inputs"][1] in constants:
            _linear(step, readers[step["output"]])
        elif step["op"] == "Relu":
            source = by_output.get(step["inputs"][0], {"op": ""})
            step["options"]["inplace"] = source["op"] in OVERWRITTEN
    facts = {
        "steps": [step for step in steps if step["op"]],
        "input": model.graph.input[0].name,
        "output": model.graph.output[0].name,
    }
    path.write_text(json.dumps(facts))
    np.savez(path.with_suffix(".npz"), **constants)


def _plain(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if hasattr(value, "__len__") and not isinstance(value, str) else value


def _gelu(erf: Step, by_output: dict[str, Step], readers: dict[str, Step]) -> None:
    """x / 2 (1 + erf(x / sqrt 2)): five nodes become the last one."""
    scaled = by_output[erf["inputs"][0]]
    shifted = readers[erf["output"]]
    gated = readers[shifted["output"]]
    last = readers[gated["output"]]
    last.update(op="Gelu", inputs=scaled["inputs"][:1])
    for step in (scaled, erf, shifted, gated):
        step["op"] = ""


def _attention(softmax: Step, by_output: dict[str, Step], readers: dict[str, Step]) -> None:
    """softmax(s q k^T) v: four nodes become the last one."""
    scaled = by_output[softmax["inputs"][0]]
    scores = by_output[scaled["inputs"][0]]
    mixed = readers[softmax["output"]]
    mixed.update(
        op="Attention",
        inputs=[*scores["inputs"], mixed["inputs"][1]],
        options={"scale": scaled["inputs"][1]},
    )
    for step in (scaled, scores, softmax):
        step["op"] = ""


def _linear(product: Step, add: Step) -> None:
    """x W + b."""
    bias = next(name for name in add["inputs"] if name != product["output"])
    add.update(op="Linear", inputs=[*product["inputs"], bias], options={"transB": 0})
    product["op"] = ""
