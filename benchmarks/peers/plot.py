"""Draw the results: `plot.py RESULTS.json PLOT.png`. It runs in the peers' environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: str, target: str) -> None:
    """CPU seconds of each tool, and what it leaves, for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = json.loads(Path(source).read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(2, 1, figsize=(max(7, 0.32 * len(rows)), 7), sharex=True)
    for marker, tool in zip("osv", ("onnxprune", "torch-pruning", "onnxsim"), strict=True):
        for axis, key in zip(axes, ("cpu_s", "params_left"), strict=True):
            points = [(i, r[tool][key]) for i, r in enumerate(rows) if r[tool].get("runs")]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker, label=tool)
    axes[0].set(yscale="log", ylabel="CPU seconds", title="half of all channels; only what runs")
    axes[0].legend()
    axes[1].set(ylabel="parameters left", ylim=(0, 1.05))
    axes[1].set_xticks(range(len(rows)), [r["model"] for r in rows], rotation=90)
    figure.tight_layout()
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
