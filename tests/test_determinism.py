"""The same bytes from the same run, however strings hash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RECIPE = """
data: DATA
seed: 3
steps:
  - lossless
  - prune-layers: {layers: 1, samples: 64}
  - prune: {params: 0.7}
  - prune-weights: {sparsity: 0.5, pattern: "2:4", samples: 64}
"""


def test_the_order_of_hashes_does_not_matter(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("DATA", str(root / "models" / "digits_test.npz")))
    found = []
    for seed in ("1", "2"):
        target, plan = tmp_path / f"{seed}.onnx", tmp_path / f"{seed}.json"
        files = [recipe, root / "models" / "digits_cnn.onnx", target, "--plan", plan]
        subprocess.run(
            [sys.executable, "-m", "onnxprune", "run", *map(str, files), "-q"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=root,
            check=True,
            capture_output=True,
        )
        found.append((target.read_bytes(), plan.read_text(encoding="utf-8")))
    assert found[0] == found[1]
    assert str(tmp_path).encode() not in found[0][0]
