"""Train a network in PyTorch, in turns: `PYTHON peer.py JOB.json`.

PYTHON has torch and numpy. See `turns` for what is read and written on the standard streams.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from turns import Turns


class Net(nn.Module):
    """The layers of an exported graph, run in its order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        facts = json.loads(path.read_text())
        values = {n: torch.from_numpy(a) for n, a in np.load(path.with_suffix(".npz")).items()}
        self.source, self.target = facts["input"], facts["output"]
        self.layers = nn.ModuleList()
        self.free = nn.ParameterDict()
        self.steps: list[tuple[Any, list[str], str]] = []
        for step in facts["steps"]:
            self.steps.append((self._layer(step, values), step["sources"], step["output"]))

    def _layer(self, step: dict[str, Any], values: dict[str, Any]) -> Any:
        op, options, names = step["op"], step["options"], step["inputs"]
        w = [values[n] for n in names if n in values]
        step["sources"] = [n for n in names if n not in values]
        layer: Any = None
        if op == "Conv":
            layer = nn.Conv2d(
                w[0].shape[1],
                w[0].shape[0],
                tuple(w[0].shape[2:]),
                stride=tuple(options.get("strides", [1, 1])),
                padding=tuple(options.get("pads", [0] * 4)[:2]),
                bias=len(w) > 1,
            )
        elif op == "BatchNormalization":
            layer = nn.BatchNorm2d(len(w[0]))
            layer.running_mean.copy_(w[2])
            layer.running_var.copy_(w[3])
        elif op == "LayerNormalization":
            layer = nn.LayerNorm(len(w[0]))
        elif op in ("Gemm", "Linear"):
            if not options.get("transB"):
                w[0] = w[0].T
            layer = nn.Linear(w[0].shape[1], w[0].shape[0])
        if layer is not None:
            layer.weight.data = w[0].clone().contiguous()
            if layer.bias is not None:
                layer.bias.data = w[1].clone()
            self.layers.append(layer)
            return layer
        if op == "Add" and w:
            self.free[step["output"].replace(".", "_")] = table = nn.Parameter(w[0].clone())
            return lambda x: x + table
        return FUNCTIONS[op](options, w, values)

    def forward(self, x: Any) -> Any:
        values = {self.source: x}
        for layer, sources, output in self.steps:
            values[output] = layer(*(values[n] for n in sources))
        return values[self.target]


def _reshape(options: Any, w: list[Any], values: Any) -> Any:
    shape = [int(n) for n in w[0]]
    return lambda x: x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


def _attention(options: Any, w: list[Any], values: Any) -> Any:
    scale = float(values[options["scale"]])
    return lambda q, k, v: F.scaled_dot_product_attention(q, k.transpose(-1, -2), v, scale=scale)


FUNCTIONS: dict[str, Any] = {
    "Relu": lambda o, w, v: lambda x: F.relu(x, inplace=o["inplace"]),
    "Add": lambda o, w, v: lambda x, y: x + y,
    "Gelu": lambda o, w, v: F.gelu,
    "Attention": _attention,
    "Reshape": _reshape,
    "Transpose": lambda o, w, v: lambda x: x.permute(o["perm"]),
    "MaxPool": lambda o, w, v: lambda x: F.max_pool2d(x, 2),
    "GlobalAveragePool": lambda o, w, v: lambda x: x.mean((2, 3), keepdim=True),
    "Flatten": lambda o, w, v: lambda x: x.flatten(1),
    "ReduceMean": lambda o, w, v: lambda x: x.mean(1),
    "Softmax": lambda o, w, v: lambda x: x,  # the last one: its logits are what the loss takes
}


def loss(job: dict[str, Any], logits: Any, y: Any, answers: Any) -> Any:
    """Cross-entropy, and with a teacher the divergence from its softened answers."""
    hard = F.cross_entropy(logits, y)
    if answers is None:
        return hard
    t = job["temperature"]
    soft = F.kl_div(
        F.log_softmax(logits / t, 1),
        F.log_softmax(answers / t, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - job["alpha"]) * hard + job["alpha"] * t * t * soft


def optimizer(job: dict[str, Any], net: nn.Module) -> Any:
    """The optimizer of the job, as it comes."""
    rate, decay = job["lr"], job["weight_decay"]
    if job["optimizer"] == "sgd":
        return torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(net.parameters(), rate, weight_decay=decay)


def main() -> None:
    """Train one epoch, in turns."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    count, batch = job["count"], job["batch"]
    images = np.memmap(folder / "train-images-idx3-ubyte", np.uint8, "r", 16)
    images = images.reshape(count, *job["shape"])
    labels = np.fromfile(folder / "train-labels-idx1-ubyte", np.uint8, offset=8).astype(np.int64)
    net = Net(folder / "student.json").train()
    teacher = Net(folder / "teacher.json").eval() if job["teacher"] else None
    optimiser = optimizer(job, net)
    order = np.random.default_rng(0).permutation(count)
    turns = Turns(job["steps_per_turn"])
    for begin in range(0, count, batch):
        rows = order[begin : begin + batch]
        x = torch.from_numpy(images[rows].astype(np.float32) / np.float32(255))
        y = torch.from_numpy(labels[rows])
        answers = None
        if teacher is not None:
            with torch.no_grad():
                answers = teacher(x)
        optimiser.zero_grad()
        value = loss(job, net(x), y, answers)
        value.backward()
        optimiser.step()
        value.item()
        turns.step()
    turns.end()


if __name__ == "__main__":
    main()
