"""Train a model's weights on data: labels, the outputs of a teacher model, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx

from onnxprune.data import Dataset
from onnxprune.errors import TrainingError
from onnxprune.progress import Progress, Silent
from onnxprune.training import ensure_training
from onnxprune.training.augment import Augment
from onnxprune.training.autodiff.local import LocalWorker
from onnxprune.training.client import Worker
from onnxprune.training.groups import ParameterGroup
from onnxprune.training.options import FinetuneOptions
from onnxprune.training.run import Epoch, FinetuneResult, Run

__all__ = ["Augment", "Epoch", "Finetune", "FinetuneOptions", "FinetuneResult", "ParameterGroup"]


@dataclass(frozen=True)
class Finetune(FinetuneOptions):
    """Train the weights of a model; the options and their meaning are `FinetuneOptions`'.

    Attributes:
        seed: of the order of the samples, and of what changes them.
        threads: of the training worker; None: all cores.
    """

    name: ClassVar[str] = "finetune"

    seed: int = 0
    threads: int | None = None

    def __call__(
        self,
        student: onnx.ModelProto,
        *,
        teacher: onnx.ModelProto | None = None,
        data: Dataset,
        val: Dataset | None = None,
        progress: Progress | None = None,
    ) -> FinetuneResult:
        """Train `student`; it and `teacher` are left as they are.

        Raises:
            TrainingError: there is no training runtime, the model cannot be differentiated, the
                worker failed, or the training diverged.
            InvalidDataError: the data is empty or does not fit the model.
        """
        listener = progress or Silent()
        worker, notes = self._gradients(listener)
        with worker:
            return Run(self, student, teacher, data, val, listener, worker, notes).result()

    def _gradients(self, progress: Progress) -> tuple[Worker | LocalWorker, list[str]]:
        """Where gradients come from, and why from there."""
        if self.backend == "builtin":
            return LocalWorker(), []
        try:
            return Worker(ensure_training(progress)), []
        except TrainingError as error:
            if self.backend == "worker":
                raise
            return LocalWorker(), [f"gradients are computed by plain ONNX operators: {error}"]
