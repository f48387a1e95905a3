"""The cost grows with the network as it should, and memory stays near the model's own size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import FORMS, cpu_seconds

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("form", ["residual", "shapes"])
def test_four_times_the_nodes_cost_about_four_times_as_much(form: str) -> None:
    small, large = (FORMS[form](nodes) for nodes in (500, 2000))
    ratios = (cpu_seconds(large, 1) / cpu_seconds(small, 1) for _ in range(3))
    assert min(ratios) < 6


MEMORY = """
import sys
from pathlib import Path
import benchmarks.conformance
from onnxprune import io

def peak():  # not ru_maxrss: that begins with what the parent process held
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

source, target = sys.argv[1:]
benchmarks.conformance.prune(io.load("models/digits_cnn.onnx"), "all")
before = peak()
model = io.load(source)
io.save(benchmarks.conformance.prune(model, "all")[2].model, target, external_data=EXTERNAL)
print(peak() - before)
"""


def _write_large(path: Path, external: bool) -> float:
    """A network of 12 matrices of 16 MB; its size in MB."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from onnxprune import io

    rng = np.random.default_rng(0)
    width, layers = 2048, 12
    nodes, tensors, x = [], [], "x"
    for i in range(layers):
        values = rng.random((width, width), np.float32)
        tensors.append(numpy_helper.from_array(values, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
        x = f"r{i}"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name in ("x", x)
    ]
    graph = helper.make_graph(nodes, "large", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    io.save(model, path, external_data=external)
    return layers * width * width * 4 / 2**20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("external", [False, True])
def test_memory_stays_below_2_2_times_the_model(external: bool, tmp_path: Path) -> None:
    source = tmp_path / "large.onnx"
    size_mb = _write_large(source, external)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.replace("EXTERNAL", str(external)), source, source],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert float(done.stdout) < 2.2 * size_mb
    assert float(done.stdout) > size_mb  # the measurement works
