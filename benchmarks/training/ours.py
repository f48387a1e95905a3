"""Fine-tune a network with onnxprune, in turns: `PYTHON -m benchmarks.training.ours JOB.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx

from benchmarks.training.turns import Turns
from onnxprune.data import open_data
from onnxprune.passes.finetune import Finetune


class Watch:
    """Waits for its turn where the training reports a step."""

    def __init__(self, steps_per_turn: int) -> None:
        self._size = steps_per_turn
        self.turns: Turns | None = None

    def stage(self, name: str, total: int | None = None) -> None:
        """The first step is next."""
        if name == "fine-tune":
            self.turns = Turns(self._size)

    def step(self, done: int, **info: float) -> None:
        """A step is done."""
        if self.turns is not None:
            self.turns.step()


def main() -> None:
    """Train one epoch, in turns."""
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    student = onnx.load(folder / "student.onnx")
    teacher = onnx.load(folder / "teacher.onnx") if job["teacher"] else None
    tune = Finetune(
        epochs=1,
        threads=1,
        batch_size=job["batch"],
        clip=0.0,
        backend=sys.argv[2],  # type: ignore[arg-type]
        **{n: job[n] for n in ("optimizer", "lr", "weight_decay", "alpha", "temperature")},
    )
    watch = Watch(job["steps_per_turn"])
    tune(student, teacher=teacher, data=open_data(f"{folder}:train", student), progress=watch)
    assert watch.turns is not None
    watch.turns.end()


if __name__ == "__main__":
    main()
