"""One measurement in one process: `work.py TASK NAME PATH`, which prints one line of JSON.

TASK is `torch-pruning`, `onnxsim`, `onnxprune` (prune half of all channels), `zoo`, `torch` (write
the network to PATH), `run` (does PATH run?), `list` (the networks there are). It is a script of its
own, without imports at the top, because it runs in the peers' environment as well as in ours.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

CLASSES = 1000
KEEP = 0.5


def _peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


class Meter:
    """CPU seconds and peak memory of what happens inside of `with`."""

    def __enter__(self) -> Meter:
        self.before_mb = _peak_mb()
        self.start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s = round(time.process_time() - self.start, 4)
        self.peak_mb = _peak_mb()

    def row(self, before: int, after: int) -> dict[str, Any]:
        """What the measurement says."""
        return {
            "cpu_s": self.cpu_s,
            "loaded_mb": self.before_mb,
            "peak_mb": self.peak_mb,
            "params": before,
            "params_left": round(after / before, 4),
        }


def _torchvision() -> Any:
    """torchvision, also where its compiled detection operators do not fit the torch there is."""
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torchvision


def _network(name: str) -> tuple[Any, Any]:
    """The network in inference mode, with random weights, and an input for it."""
    import torch

    models = _torchvision().models
    extra = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if extra:
        extra["init_weights"] = False
    network = models.get_model(name, weights=None, **extra).eval()
    side = 299 if name == "inception_v3" else 224
    return network, torch.zeros(1, 3, side, side)


def torch_pruning(name: str, _: str) -> dict[str, Any]:
    """Dependency graph, L2 group magnitude, 50 % of each layer, classifier kept."""
    network, example = _network(name)
    import torch

    layers = (torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, CLASSES, 3))
    _prune(torch.nn.Sequential(*layers).eval(), torch.zeros(1, 3, 8, 8))
    before = sum(p.numel() for p in network.parameters())
    with Meter() as meter:
        _prune(network, example)
    after = sum(p.numel() for p in network.parameters())
    with torch.no_grad():
        runs = tuple(network(example).shape) == (1, CLASSES)
    return {**meter.row(before, after), "runs": runs}


def _prune(network: Any, example: Any) -> None:
    import torch_pruning as tp

    classifiers = [
        m
        for m in network.modules()
        if getattr(m, "out_features", getattr(m, "out_channels", 0)) == CLASSES
    ]
    tp.pruner.MagnitudePruner(
        network,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=KEEP,
        ignored_layers=classifiers[-1:],
    ).step()


def onnxsim(_: str, path: str) -> dict[str, Any]:
    """Its structured pruning; the result is written beside PATH."""
    import onnx
    import onnxsim as peer

    model = onnx.load(path)
    peer.apply_structured_pruning_cpp(_toy(), sparsity=KEEP)
    with Meter() as meter:
        pruned = peer.apply_structured_pruning_cpp(model, sparsity=KEEP)
    onnx.save(pruned, f"{path}.pruned")
    return meter.row(_count(model), _count(pruned))


def onnxprune(_: str, path: str) -> dict[str, Any]:
    """Analysis, scoring and slicing; the result is written beside PATH."""
    import onnx

    from benchmarks.conformance import prune

    model = onnx.load(path)
    prune(_toy(), "all")
    with Meter() as meter:
        pruned = prune(model, "all")[2].model
    onnx.save(pruned, f"{path}.pruned")
    return meter.row(_count(model), _count(pruned))


def _toy() -> Any:
    """Two convolutions: what is only done once, such as imports, is done on them."""
    import onnx
    from onnx import helper

    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["y"]),
    ]
    shapes = {"a": [8, 3, 3, 3], "b": [4, 8, 3, 3]}
    tensors = [
        helper.make_tensor(n, 1, d, [i % 7 for i in range(d[0] * d[1] * 9)])
        for n, d in shapes.items()
    ]
    x, y = helper.make_tensor_value_info("x", 1, ["N", 3, 8, 8]), onnx.ValueInfoProto(name="y")
    graph = helper.make_graph(nodes, "toy", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _count(model: Any) -> int:
    import math

    return sum(math.prod(t.dims) for t in model.graph.initializer if t.data_type == 1)


def from_zoo(name: str, path: str) -> dict[str, Any]:
    """Write the network from the conformance set, where it is there."""
    import onnx

    from models import zoo

    for exporter in ("ts", "dyn"):
        if f"tv-{name}-{exporter}" in zoo.names():
            onnx.save(zoo.load(f"tv-{name}-{exporter}"), path)
            return {"found": True}
    return {"found": False}


def from_torch(name: str, path: str) -> dict[str, Any]:
    """Write the network by torch's exporter."""
    import torch

    network, example = _network(name)
    free = {"x": {0: "N"}}
    torch.onnx.export(network, (example,), path, dynamo=False, input_names=["x"], dynamic_axes=free)
    return {"found": True}


def run(_: str, path: str) -> dict[str, Any]:
    """Whether ONNX Runtime runs the model."""
    import onnx

    from onnxprune import runtime

    model = onnx.load(path)
    outputs = runtime.run(runtime.session(model, threads=1), runtime.random_feeds(model))
    return {"runs": next(iter(outputs.values())).shape[-1] == CLASSES}


def networks(_: str, __: str) -> dict[str, Any]:
    """All classifiers of torchvision."""
    models = _torchvision().models
    return {"names": models.list_models(module=models)}


TASKS = {
    "torch-pruning": torch_pruning,
    "onnxsim": onnxsim,
    "onnxprune": onnxprune,
    "zoo": from_zoo,
    "torch": from_torch,
    "run": run,
    "list": networks,
}

if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    task, name, path = sys.argv[1:]
    try:
        result = TASKS[task](name, path)
    except Exception as error:  # whatever a peer raises is a result
        result = {"error": f"{type(error).__name__}: {error}"[:200]}
    print(json.dumps(result))
