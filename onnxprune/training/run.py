"""One training run: batches, teacher, steps, measurements, checkpoints."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import io, runtime
from onnxprune.data import Batch, Dataset
from onnxprune.errors import InvalidDataError, TrainingError
from onnxprune.progress import Progress
from onnxprune.training.augment import augmentation
from onnxprune.training.autodiff.local import LocalWorker
from onnxprune.training.backend import Gradients, WorkerTrainer
from onnxprune.training.checkpoint import (
    Checkpoint,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from onnxprune.training.crosscheck import described, doubted
from onnxprune.training.custom import (
    CustomObjective,
    custom_objective,
    custom_value,
    finish,
    joined,
)
from onnxprune.training.features import chosen, kinds, with_outputs
from onnxprune.training.legalise import TrainingGraph, legalise
from onnxprune.training.loss import (
    Objective,
    append_loss,
    feature_terms,
    loss_value,
    plan_objective,
)
from onnxprune.training.parameters import find_parameters, still_zero, write_back
from onnxprune.training.pieces import cut, piece_rows, separable
from onnxprune.training.schedule import SGD_RATE, peak_rate, rate_at
from onnxprune.training.teacher import Teacher

if TYPE_CHECKING:
    from onnxprune.passes.finetune import Finetune

Array = NDArray[Any]
CHECK_SAMPLES = 8
PLAN_SAMPLES = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave; epoch 0 is the model as it came, without a loss.

    `metrics` are those of the validation data.
    """

    epoch: int
    loss: float | None
    rate: float
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FinetuneResult:
    """The trained model.

    `best_epoch` is the epoch whose weights it has. `frozen` names the weights that were not
    trained, with the reason. `lr` is the peak learning rate.
    """

    model: onnx.ModelProto
    history: tuple[Epoch, ...]
    best_epoch: int
    trained: tuple[str, ...]
    frozen: Mapping[str, str]
    steps: int
    seconds: float
    notes: tuple[str, ...] = ()
    lr: float = 0.0


class Run:
    """One training run: what it needs, and what it has so far."""

    def __init__(
        self,
        options: Finetune,
        student: onnx.ModelProto,
        teacher: onnx.ModelProto | None,
        data: Dataset,
        val: Dataset | None,
        progress: Progress,
        worker: Gradients,
        notes: Sequence[str] = (),
    ) -> None:
        self.options, self.student, self.teacher_model = options, student, teacher
        self.data, self.val, self.progress = data, val, progress
        self.notes = list(notes)
        self.threads = options.threads or os.cpu_count() or 1
        first = next(iter(data.batches(options.batch_size)), None)
        if first is None:
            raise InvalidDataError("no training data: give at least one batch")
        rows = _rows(first)
        self.parts = max(1, options.batch_size // rows)
        self.steps_per_epoch = _count_steps(data, options.batch_size, rows, self.parts)
        self.sparse: str | None = None
        self.custom = self._custom_loss()
        self.features = self._choose_features()
        self.exposed = with_outputs(student, self.features)
        self.graph = self._differentiable(first)
        self.peak = options.lr or self._peak()
        self.objective = self.custom or self._plan(first)
        self.teacher = self._make_teacher()
        classes = [t.classes for t in self.objective.terms if t.key == "label" and t.classes]
        self.augment = augmentation(options.augment, classes[0] if classes else None)
        self._append_loss()
        self.piece = self._piece_rows()
        self.worker = worker
        self.trainer = self._make_trainer()
        self._check(first)
        if options.batchnorm == "batch":
            self._use_batch_statistics(first)
        self.history: list[Epoch] = []
        self.best_score = -math.inf
        self.best_epoch = 0
        self.best: Mapping[str, Array] = {}
        self.done_steps = 0
        self.training_s = 0.0

    def _peak(self) -> float:
        """The peak learning rate where none was given."""
        if self.options.optimizer == "sgd":
            return SGD_RATE
        return peak_rate(p.value for p in self.graph.parameters.values() if p.decay)

    def _custom_loss(self) -> CustomObjective | None:
        """The user's loss, where there is one."""
        if self.options.loss is None:
            return None
        model = io.load(self.options.loss)
        return custom_objective(model, self.student, has_teacher=self.teacher_model is not None)

    def _differentiable(self, first: Batch, *, momentum: float | None = None) -> TrainingGraph:
        """The training copy of the student, with the user's loss behind it if there is one."""
        if self.custom is None:
            return differentiable(self.exposed, first, momentum=momentum)
        own = set(find_parameters(self.student.graph).trainable)
        return differentiable(joined(self.student, self.custom), first, momentum=momentum, only=own)

    def _append_loss(self) -> None:
        if self.custom is None:
            append_loss(self.graph.draft, self.objective)
        else:
            finish(self.graph.draft)

    def _choose_features(self) -> list[str]:
        """The inner tensors to compare, of which there are none without a teacher."""
        if self.teacher_model is None or not self.options.feature_weight or self.custom:
            return []
        return chosen(self.options.features, self.student, self.teacher_model)

    def _piece_rows(self) -> int | None:
        """The samples of a batch that run at a time; None: all."""
        if self.custom or self.options.batchnorm == "batch" or not separable(self.objective):
            return None
        return piece_rows(self.graph.draft)

    def _plan(self, whole: Batch) -> Objective:
        """Choose the loss from the first batch."""
        first = _head(whole, PLAN_SAMPLES, self.student)
        session = runtime.session(self.exposed, threads=self.threads)
        outputs = runtime.run(session, first.feeds)
        plan = plan_objective(
            self.graph.draft,
            {n: o for n, o in outputs.items() if n not in self.features},
            first.labels,
            has_teacher=self.teacher_model is not None,
            alpha=self.options.alpha,
            temperature=self.options.temperature,
            distillation=self.options.distillation,
        )
        if not self.features or self.teacher_model is None:
            return plan
        answers = Teacher(
            with_outputs(self.teacher_model, self.features), self.features, threads=self.threads
        )(first.feeds)
        compared = kinds(outputs, answers, self.features)
        more = feature_terms(compared, answers, self.options.feature_weight)
        return Objective((*plan.terms, *more))

    def _make_teacher(self) -> Teacher | None:
        if self.teacher_model is None or not self.objective.needs_teacher:
            return None
        model = with_outputs(self.teacher_model, self.features)
        outputs = sorted({t.output for t in self.objective.terms if t.teacher})
        missing = set(outputs) - {o.name for o in model.graph.output}
        if missing:
            raise TrainingError(f"the teacher has no output named {', '.join(sorted(missing))}")
        again = self.options.augment is None and self.options.epochs > 1
        return Teacher(model, outputs, threads=self.threads, remember=again)

    def _make_trainer(self) -> WorkerTrainer:
        options = self.options
        constants = {"momentum": options.momentum} if options.optimizer == "sgd" else {}
        masks = still_zero(self.graph.parameters, options.masked)
        if masks and options.masked is None:
            self.sparse = f"zeros stay zero in {len(masks)} weights (masked: false trains them)"
        return WorkerTrainer(
            self.worker,
            self.graph,
            optimizer={"name": options.optimizer, **constants},
            weight_decay=options.weight_decay,
            groups=options.groups,
            ema=options.ema,
            clip=options.clip,
            threads=self.threads,
            masks=masks,
        )

    def _check(self, first: Batch) -> None:
        """The start-up self-check on a few samples."""
        batch = _head(first, CHECK_SAMPLES, self.student)
        feeds = self._feeds(batch, 1)
        self._compare(feeds)
        session = runtime.session(self.exposed, threads=self.threads)
        outputs = runtime.run(session, batch.feeds)
        if self.custom is None:
            expected = loss_value(self.objective, outputs, feeds)
        else:
            expected = custom_value(self.custom, {**batch.feeds, **outputs}, feeds)
        self._note(self.trainer.check(feeds, expected, seed=self.options.seed))

    def _compare(self, feeds: Mapping[str, Array]) -> None:
        """Leave a worker whose gradients are wrong."""
        if isinstance(self.worker, LocalWorker):
            return
        seed = self.options.seed
        wrong = doubted(self.trainer, self.graph, feeds, threads=self.threads, seed=seed)
        if not wrong:
            return
        if self.options.backend == "worker":
            raise TrainingError(f"{described(wrong)}; use the backend 'builtin' or 'auto'")
        self.worker.close()
        self.worker = LocalWorker()
        self.trainer = self._make_trainer()
        self._note(f"gradients are computed by plain ONNX operators: {described(wrong)}")

    def _use_batch_statistics(self, first: Batch) -> None:
        """Train another form of the graph than the one that has been compared with inference."""
        self.graph = self._differentiable(first, momentum=self.options.bn_momentum)
        self._append_loss()
        self.trainer = self._make_trainer()
        self._compare(self._feeds(_head(first, CHECK_SAMPLES, self.student), 1))
        self._note(self.trainer.check(self._feeds(first, 1), None, seed=self.options.seed))

    def _note(self, text: str | None) -> None:
        if text is not None:
            self.notes.append(text)
            _log.warning("finetune: %s", text)

    def _feeds(self, batch: Batch, share: float) -> dict[str, Array]:
        """All inputs of the training graph, for a batch that is this share of a step."""
        answers = self.teacher(batch.feeds) if self.teacher is not None else {}
        targets = self.objective.feeds(batch.labels, answers, share=share)
        return {**batch.feeds, **targets}

    def result(self) -> FinetuneResult:
        """Train to the end."""
        begun = time.perf_counter()
        first_epoch = self._resumed() + 1
        if first_epoch == 1:
            self._finish_epoch(0, None, 0.0, begun)
        self.progress.stage("fine-tune", self.options.epochs * self.steps_per_epoch)
        for epoch in range(first_epoch, self.options.epochs + 1):
            if self._exhausted():
                break
            start = time.perf_counter()
            loss, rate = self._epoch(epoch)
            self.training_s += time.perf_counter() - start
            self._finish_epoch(epoch, loss, rate, start)
            self._save()
        return self._finish(time.perf_counter() - begun)

    def _exhausted(self) -> bool:
        patience = self.options.patience
        return patience is not None and len(self.history) - 1 - self.best_epoch >= patience

    def _epoch(self, epoch: int) -> tuple[float, float]:
        """Mean loss of an epoch's steps, and the last rate."""
        options = self.options
        total = options.epochs * self.steps_per_epoch
        losses: list[float] = []
        rate = 0.0
        begun = time.perf_counter()
        for step, parts in enumerate(self._steps(epoch)):
            place = (epoch - 1) * self.steps_per_epoch + step
            rate = rate_at(
                place, total, self.peak, warmup=options.warmup, schedule=options.schedule
            )
            losses.append(self._step(parts, rate))
            pace = (time.perf_counter() - begun) / (step + 1)
            left = max(0, total - place - 1) * pace
            shown = self.history[-1].metrics if self.history else {}
            metric = {n: shown[n] for n in ("accuracy", "agreement") if n in shown}
            self.progress.step(place + 1, loss=float(np.mean(losses[-20:])), eta_s=left, **metric)
        if not losses:
            raise InvalidDataError(
                f"no training data in epoch {epoch}: the source cannot be read twice"
            )
        self.done_steps += len(losses)
        return float(np.mean(losses)), rate

    def _step(self, parts: list[Batch], rate: float) -> float:
        """One optimizer step over the parts of a batch, which may be cut into smaller ones."""
        pieces = [(part, 1.0) for part in parts]
        if self.piece is not None:
            pieces = [piece for part in parts for piece in cut(part, self.piece, self.objective)]
        *rest, (piece, share) = pieces
        loss = sum(self.trainer.accumulate(self._feeds(p, s / len(parts))) for p, s in rest)
        last, _ = self.trainer.step(self._feeds(piece, share / len(parts)), rate)
        return loss + last

    def _steps(self, epoch: int) -> Iterator[list[Batch]]:
        """The batches of an epoch, each as the parts that the model can take.

        A pure function of seed and epoch.
        """
        rng = np.random.default_rng([self.options.seed, epoch])
        noise = np.random.default_rng([self.options.seed, epoch, 1])
        parts: list[Batch] = []
        for batch in self.data.batches(self.options.batch_size, rng=rng):
            parts.append(batch if self.augment is None else self.augment(batch, noise))
            if len(parts) == self.parts:
                yield parts
                parts = []
        if parts:
            yield parts

    def _finish_epoch(self, epoch: int, loss: float | None, rate: float, start: float) -> None:
        """Measure, and keep the weights if they are the best so far.

        Without validation data the last ones are the best. Those that the model came with are the
        best only if they are by more than a standard error.
        """
        values = self.trainer.values()
        metrics = self._measure(values)
        score = _score(metrics, epoch)
        if epoch == 0 and self.val is not None:
            score -= self._noise(metrics)
        if score > self.best_score:
            self.best_score, self.best_epoch, self.best = score, epoch, values
        self.history.append(Epoch(epoch, loss, rate, time.perf_counter() - start, metrics))

    def _noise(self, metrics: Mapping[str, float]) -> float:
        """The standard error of a share that was measured on the validation data."""
        share = metrics.get("accuracy", metrics.get("agreement"))
        if share is None or self.val is None:
            return 0.0
        count = sum(_rows(batch) for batch in self.val.batches(self.options.batch_size))
        share = (share * count + 1) / (count + 2)  # never sure: 0 of 10 is not 0
        return math.sqrt(share * (1 - share) / count)

    def _measure(self, values: Mapping[str, Array]) -> dict[str, float]:
        if self.val is None:
            return {}
        from onnxprune import metrics

        first = next(iter(self.val.batches(1)), None)
        labelled = first is not None and first.labels is not None
        if not labelled and self.teacher_model is None:
            return {}
        return metrics.evaluate(
            write_back(self.student, values),
            self.val,
            batch_size=self.options.batch_size,
            threads=self.threads,
            reference=None if labelled else self.teacher_model,
        )

    def _save(self) -> None:
        path = self.options.checkpoint
        if path is None:
            return
        head, arrays = self.trainer.state()
        facts = {
            "fingerprint": self._fingerprint(),
            "state": head,
            "history": [asdict(e) for e in self.history],
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "steps": self.done_steps,
        }
        best = {"best:" + n: a for n, a in self.best.items()}
        save_checkpoint(path, Checkpoint(facts, {**arrays, **best}))

    def _resumed(self) -> int:
        """Load the checkpoint if there is one to continue: the epochs it has."""
        path = self.options.checkpoint
        if path is None or not self.options.resume or not path.exists():
            return 0
        saved = load_checkpoint(path)
        if saved.facts["fingerprint"] != self._fingerprint():
            raise TrainingError(
                f"the checkpoint {path} belongs to another model or other options; remove it or "
                f"do not resume"
            )
        state = {n: a for n, a in saved.arrays.items() if not n.startswith("best:")}
        self.trainer.restore(saved.facts["state"], state)
        self.history = [Epoch(**e) for e in saved.facts["history"]]
        self.best = {n[5:]: a for n, a in saved.arrays.items() if n.startswith("best:")}
        self.best_epoch, self.best_score = saved.facts["best_epoch"], saved.facts["best_score"]
        self.done_steps = saved.facts["steps"]
        return self.history[-1].epoch

    def _fingerprint(self) -> str:
        ignored = {"checkpoint", "resume", "augment", "patience"}
        options = {n: v for n, v in vars(self.options).items() if n not in ignored}
        return fingerprint({n: p.value for n, p in self.graph.parameters.items()}, options)

    def _finish(self, seconds: float) -> FinetuneResult:
        return FinetuneResult(
            model=write_back(self.student, self.best),
            history=tuple(self.history),
            best_epoch=self.best_epoch,
            trained=tuple(sorted(self.graph.parameters)),
            frozen=self.graph.frozen,
            steps=self.done_steps,
            seconds=seconds,
            notes=tuple(self.notes if self.sparse is None else (*self.notes, self.sparse)),
            lr=self.peak,
        )


def differentiable(
    student: onnx.ModelProto,
    first: Batch,
    *,
    momentum: float | None = None,
    only: Collection[str] | None = None,
) -> TrainingGraph:
    """The training copy, with the sizes of the data fixed where that lets more weights train."""
    graph = legalise(student, momentum=momentum, only=only)
    if not any("not fixed" in reason for reason in graph.frozen.values()):
        return graph
    sizes = {name: array.shape for name, array in first.feeds.items()}
    fixed = legalise(student, sizes=sizes, momentum=momentum, only=only)
    return fixed if len(fixed.frozen) < len(graph.frozen) else graph


def _score(metrics: Mapping[str, float], epoch: int) -> float:
    """What is to be as large as possible."""
    for name, sign in (("accuracy", 1.0), ("agreement", 1.0), ("mse", -1.0)):
        if name in metrics:
            return sign * metrics[name]
    return float(epoch)


def _rows(batch: Batch) -> int:
    """The number of samples."""
    if batch.labels is not None and batch.labels.ndim:
        return int(batch.labels.shape[0])
    return max((int(a.shape[0]) for a in batch.feeds.values() if a.ndim), default=1)


def _head(batch: Batch, count: int, model: onnx.ModelProto) -> Batch:
    """The first samples of a batch; all where the model takes no other number."""
    rows = _rows(batch)
    for info in model.graph.input:
        dims = info.type.tensor_type.shape.dim
        if info.name in batch.feeds and dims and dims[0].dim_value == rows:
            return batch
    feeds = {n: a[:count] if a.ndim and a.shape[0] == rows else a for n, a in batch.feeds.items()}
    return Batch(feeds, None if batch.labels is None else batch.labels[:count])


def _count_steps(data: Dataset, batch_size: int, rows: int, parts: int) -> int:
    """Steps in an epoch; a stream of unknown length is read once to count."""
    try:
        batches = -(-len(data) // (rows if parts > 1 else batch_size))
    except TypeError:
        batches = sum(1 for _ in data.batches(batch_size))
    return max(1, -(-batches // parts))
