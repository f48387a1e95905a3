"""Prune the digits CNN to half of its multiply-adds, fine-tune it, check it, and judge the result.

Run by `make demo`. Exit code 0: at most half of the multiply-adds, at most 1.0 point of accuracy
lost on held-out digits, and a lower latency.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from onnxprune import cli

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
MACS, MAX_DROP, EPOCHS = 0.5, 1.0, 15


def main() -> int:
    """Run the command as a user would, then read its report."""
    OUT.mkdir(exist_ok=True)
    report = OUT / "demo.json"
    report.unlink(missing_ok=True)
    command = [
        "prune",
        str(ROOT / "models" / "digits_cnn.onnx"),
        str(OUT / "digits_cnn_small.onnx"),
        f"--macs={MACS}",
        f"--data={ROOT / 'models' / 'digits_train.npz'}",
        f"--val={ROOT / 'models' / 'digits_test.npz'}",
        "--round-to=8",
        "--threads=1",
        f"--finetune={EPOCHS}",
        f"--max-drop={MAX_DROP}",
        f"--plan={OUT / 'demo_plan.json'}",
        f"--report={report}",
        "--layers",
    ]
    print(f"$ {shlex.join(['onnxprune', *command])}\n", flush=True)
    code = cli.main(command)
    if code:
        return code
    return judge(json.loads(report.read_text(encoding="utf-8")))


def judge(report: dict[str, dict[str, float]]) -> int:
    """Print whether each promise is kept; 1 if one is not."""
    before, after = report["before"], report["after"]
    macs = after["macs"] / before["macs"]
    drop = 100 * (accuracy(before) - accuracy(after))
    speed = before["latency_ms"] / after["latency_ms"]
    promises = (
        (f"multiply-adds left: {macs:.3f} (at most {MACS})", macs <= MACS),
        (f"accuracy lost: {drop:.2f} points (at most {MAX_DROP})", drop <= MAX_DROP),
        (f"speed-up: {speed:.2f} (above 1)", speed > 1),
    )
    print()
    for text, kept in promises:
        print(f"{'kept  ' if kept else 'BROKEN'}  {text}")
    return 0 if all(kept for _, kept in promises) else 1


def accuracy(cost: dict[str, object]) -> float:
    """The accuracy on held-out digits."""
    metrics = cost["metrics"]
    assert isinstance(metrics, dict)
    return float(metrics["accuracy"])


if __name__ == "__main__":
    sys.exit(main())
