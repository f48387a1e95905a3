"""The same stages by Torch-Pruning, in an environment of its own.

Runs as `PYTHON peer.py JOB.json`, where PYTHON has torch, torch-pruning, onnx and numpy, and
nothing of onnxprune; without a job it prints versions. The trained weights are those of the ONNX
file: a torch module runs its graph node by node. One JSON row a stage on the standard output.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
import torch_pruning as tp
from onnx import numpy_helper
from torch import nn

BATCH = 64


class Twin(nn.Module):
    """A graph of the benchmark's operators, its weights in torch's layers."""

    def __init__(self, path: str) -> None:
        super().__init__()
        graph = onnx.load(path).graph
        self.constants = {
            t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer
        }
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.nodes = [n for n in graph.node if n.op_type != "Softmax" or n.output[0] != self.output]
        if len(self.nodes) < len(graph.node):
            self.output = self.nodes[-1].output[0]
        self.layers = nn.ModuleDict()
        self.fused: dict[str, str] = {}
        for node in self.nodes:
            layer = self._layer(node)
            if layer is not None:
                self.layers[_key(node)] = layer
        table = self.constants.get("patches.position")
        self.position = nn.Parameter(table) if table is not None else None

    def _layer(self, node: Any) -> nn.Module | None:
        w = [self.constants.get(name) for name in node.input[1:]]
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            rank = w[0].dim() - 2
            kind = nn.Conv2d if rank == 2 else nn.Conv1d
            layer = kind(
                w[0].shape[1],
                w[0].shape[0],
                tuple(w[0].shape[2:]),
                stride=tuple(options.get("strides", [1] * rank)),
                padding=tuple(options.get("pads", [0] * rank)[:rank]),
                bias=len(w) > 1,
            )
            return _filled(layer, weight=w[0], bias=w[1] if len(w) > 1 else None)
        if node.op_type == "BatchNormalization":
            layer = nn.BatchNorm2d(len(w[0]))
            layer.running_mean.copy_(w[2])
            layer.running_var.copy_(w[3])
            return _filled(layer, weight=w[0], bias=w[1])
        if node.op_type == "LayerNormalization":
            return _filled(nn.LayerNorm(len(w[0])), weight=w[0], bias=w[1])
        if node.op_type == "Gemm":
            layer = nn.Linear(w[0].shape[1], w[0].shape[0])
            return _filled(layer, weight=w[0], bias=w[1])
        if node.op_type == "MatMul" and w[0] is not None:
            layer = nn.Linear(*w[0].shape)
            add = next(n for n in self.nodes if n.op_type == "Add" and node.output[0] in n.input)
            self.fused[add.output[0]] = node.output[0]
            return _filled(layer, weight=w[0].T, bias=self.constants[add.input[1]])
        if node.op_type == "Gather":
            table = self.constants[node.input[0]]
            return _filled(nn.Embedding(*table.shape), weight=table)
        return None

    def forward(self, x: Any) -> Any:
        values = {self.input: x}
        for node in self.nodes:
            values[node.output[0]] = self._run(node, values)
        return values[self.output]

    def _run(self, node: Any, values: dict[str, Any]) -> Any:
        output = node.output[0]
        if output in self.fused:
            return values[self.fused[output]]
        source = node.input[1] if node.op_type == "Gather" else node.input[0]
        x = values[source]
        if _key(node) in self.layers:
            return self.layers[_key(node)](x)
        if node.op_type == "Add" and node.input[1] == "patches.position":
            return x + self.position
        others = [values[n] if n in values else self.constants[n] for n in node.input[1:]]
        return OPERATORS[node.op_type](x, others, node, self)


def _perm(node: Any) -> list[int]:
    return list(node.attribute[0].ints)


def _reshape(x: Any, others: list[Any], node: Any, twin: Twin) -> Any:
    """Widths follow from the present ones, since channels may have gone; heads all stay."""
    target = [int(n) for n in others[0]]
    if len(target) == 4:  # [N, T, heads, size]
        return x.reshape(len(x), target[1], target[2], -1)
    return x.flatten(2)


OPERATORS: dict[str, Any] = {
    "Relu": lambda x, o, n, t: F.relu(x),
    "Add": lambda x, o, n, t: x + o[0],
    "Mul": lambda x, o, n, t: x * o[0],
    "Div": lambda x, o, n, t: x / o[0],
    "MatMul": lambda x, o, n, t: x @ o[0],
    "Erf": lambda x, o, n, t: torch.erf(x),
    "Softmax": lambda x, o, n, t: x.softmax(-1),
    "Transpose": lambda x, o, n, t: x.permute(_perm(n)),
    "Reshape": _reshape,
    "MaxPool": lambda x, o, n, t: F.max_pool2d(x, 2),
    "GlobalAveragePool": lambda x, o, n, t: F.adaptive_avg_pool2d(x, 1),
    "GlobalMaxPool": lambda x, o, n, t: F.adaptive_max_pool1d(x, 1),
    "Flatten": lambda x, o, n, t: x.flatten(1),
    "ReduceMean": lambda x, o, n, t: x.mean(1),
}


def _key(node: Any) -> str:
    return node.output[0].replace(".", "_")


def _filled(layer: nn.Module, **values: Any) -> nn.Module:
    for name, value in values.items():
        if value is not None:
            getattr(layer, name).data = value.clone().contiguous()
    return layer


def accuracy(net: nn.Module, x: Any, y: Any) -> float:
    """Share of right answers."""
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(x[i : i + 250]).argmax(1) == y[i : i + 250]).sum())
            for i in range(0, len(x), 250)
        )
    return right / len(x)


def prune(net: Twin, example: Any, budget: float) -> float:
    """Magnitude pruning over all layers until the budget is met; the share of MACs left."""
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    heads = {
        layer: 4
        for name, layer in net.layers.items()
        if any(part in name for part in ("query", "key", "value"))
    }
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    steps = 200
    pruner = tp.pruner.BasePruner(
        net,
        example,
        importance=importance,
        global_pruning=True,
        iterative_steps=steps,
        pruning_ratio=0.95,
        max_pruning_ratio=0.95,
        ignored_layers=[last],
        num_heads=heads,
        unwrapped_parameters=[(net.position, 2)] if net.position is not None else None,
        root_module_types=[nn.Conv2d, nn.Conv1d, nn.Linear],
    )
    before, _ = tp.utils.count_ops_and_params(net, example)
    left = before
    for _ in range(steps):
        pruner.step()
        left, _ = tp.utils.count_ops_and_params(net, example)
        if left <= budget * before:
            break
    return left / before


def reestimate(net: nn.Module, x: Any) -> bool:
    """BatchNormalization statistics over the calibration samples; whether there are any."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    with torch.no_grad():
        for i in range(0, len(x), 128):
            net(x[i : i + 128])
    for norm in norms:
        norm.momentum = 0.1
    return bool(norms)


def finetune(net: nn.Module, x: Any, y: Any, convolutional: bool) -> None:
    """One epoch: SGD with momentum for convolutions, AdamW for the others, one-cycle rates."""
    net.train()
    steps = -(-len(x) // BATCH)
    if convolutional:
        optimizer: Any = torch.optim.SGD(
            net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        peak = 0.05
    else:
        peak = 5e-4
        optimizer = torch.optim.AdamW(net.parameters(), lr=peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for i in range(0, len(x), BATCH):
        rows = order[i : i + BATCH]
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()


def versions() -> dict[str, str]:
    """Versions of what runs here."""
    return {name: metadata.version(name) for name in ("torch", "torch-pruning")}


def main(path: str) -> None:
    """Every stage of one job; CPU seconds count from the trained network on, measuring aside."""
    with open(path) as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    data = np.load(job["data"])
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    xt, yt = torch.from_numpy(data["xt"]), torch.from_numpy(data["yt"])
    net = Twin(job["model"])
    share, spent, begun = 1.0, 0.0, time.process_time()

    def row(stage: str) -> None:
        nonlocal spent, begun
        spent += time.process_time() - begun
        found = {"stage": stage, "accuracy": accuracy(net, xt, yt), "cpu_s": spent, "macs": share}
        print(json.dumps(found), flush=True)
        begun = time.process_time()

    row("original")
    share = prune(net, x[:1], job["budget"])
    row("pruned")
    if reestimate(net, x[: job["calibration"]]):
        row("repaired")
    kinds = {type(module) for module in net.modules()}
    convolutional = bool(kinds & {nn.Conv2d, nn.Conv1d}) and nn.LayerNorm not in kinds
    finetune(net, x, y, convolutional)
    row("fine-tuned")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        print(json.dumps(versions()))
