"""The options of fine-tuning: plain data, as recipes and the command line give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx

from onnxprune.errors import InvalidRecipeError
from onnxprune.training.augment import Augment, augmentation
from onnxprune.training.features import Features
from onnxprune.training.groups import ParameterGroup
from onnxprune.training.loss import COMPARISONS, Distillation
from onnxprune.training.schedule import Schedule

BatchNormMode = Literal["frozen", "batch"]
Backend = Literal["auto", "worker", "builtin"]
OptimizerName = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class FinetuneOptions:
    """How weights are trained by gradient descent, with labels, a teacher's outputs, or both.

    Loss: (1 - alpha) CE(labels) + alpha T^2 KL(teacher at T || student at T) where both are there
        (Hinton et al., 2015).
    Outputs that are no class scores are compared by their mean squared error. The rate warms up
    over a share of the steps and falls by a half cosine. With validation data the weights of the
    best epoch are kept (those before the first only if they are better by a standard error), and
    `patience` epochs without a better one end the training. Everything follows from `seed` and
    `threads`.

    Attributes:
        lr: peak learning rate; None: for adamw by the size of the weights, see
            `onnxprune.training.schedule.peak_rate`, 0.05 for sgd.
        weight_decay: decoupled, on weights only (not on biases and normalizations).
        warmup: share of the steps in which the rate rises.
        schedule: how it falls afterwards: "cosine", "linear", or "constant": not at all.
        ema: decay of a moving average of the weights, which is then what is measured and kept; 0:
            the weights themselves.
        groups: learning rates and weight decays of parameters by name.
        alpha: the teacher's share of the loss where there are labels too.
        distillation: how outputs are compared with the teacher's: "kl", "bce", "mse", "l1", "none";
            one for all, or by output name; "auto": by the last node and the shape.
        loss: a small ONNX model that computes the loss of a batch, instead of the above. Its inputs
            are called like outputs or inputs of the model, "labels", or "teacher_" and an output.
        clip: limit of the gradient's norm; 0 is none.
        patience: epochs without a better validation result before the training ends; None: never.
        checkpoint: file that holds the state after every epoch.
        resume: continue from `checkpoint` if that file exists.
        augment: changes each training batch, given a generator; or names out of "flip", "shift"
            and "mixup", for images: a tuple, or one text with commas.
        features: inner tensors that are compared with the teacher's too: "last" is what the last
            layer reads; or names that both models have, as a tuple or one text with commas.
        feature_weight: of those in the loss.
        masked: keep weights at zero that are zero at the start; None: those of matrices and kernels
            of which a fifth is zero.
        batchnorm: "frozen": BatchNormalization acts as in inference; "batch": it normalizes by the
            statistics of the batch, and running ones are collected, as in training from scratch.
        backend: "worker": onnxruntime-training in a process of its own; "builtin": gradients as
            plain ONNX operators, here; "auto": the first where it can be had and both agree about
            every tensor's gradient on a few samples.
        bn_momentum: share of the old running statistics that a batch keeps.
        every_step: where channels go in several steps: train after each, not only after the last.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"arbitrary_types_allowed": True}

    epochs: int = 1
    optimizer: OptimizerName = "adamw"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.01
    warmup: float = 0.05
    schedule: Schedule = "cosine"
    temperature: float = 4.0
    alpha: float = 0.9
    distillation: Distillation = "auto"
    loss: onnx.ModelProto | Path | None = None
    clip: float = 5.0
    batch_size: int = 64
    patience: int | None = None
    checkpoint: Path | None = None
    resume: bool = False
    augment: Augment | tuple[str, ...] | str | None = None
    features: Features = "none"
    feature_weight: float = 1.0
    masked: bool | None = None
    batchnorm: BatchNormMode = "frozen"
    bn_momentum: float = 0.9
    backend: Backend = "auto"
    ema: float = 0.0
    groups: tuple[ParameterGroup, ...] = ()
    every_step: bool = False

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        for option, fine in self._limits().items():
            if not fine:
                raise InvalidRecipeError(f"{option}={getattr(self, option)!r} is out of range")
        augmentation(self.augment)

    def _limits(self) -> dict[str, bool]:
        return {
            "epochs": self.epochs >= 1,
            "lr": self.lr is None or self.lr > 0,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": self.weight_decay >= 0,
            "warmup": 0 <= self.warmup < 1,
            "temperature": self.temperature > 0,
            "alpha": 0 <= self.alpha <= 1,
            "schedule": self.schedule in ("cosine", "linear", "constant"),
            "backend": self.backend in ("auto", "worker", "builtin"),
            "distillation": _known(self.distillation),
            "feature_weight": self.feature_weight >= 0,
            "features": isinstance(self.features, str | tuple),
            "ema": 0 <= self.ema < 1,
            "clip": self.clip >= 0,
            "batch_size": self.batch_size >= 1,
            "optimizer": self.optimizer in ("adamw", "sgd"),
            "batchnorm": self.batchnorm in ("frozen", "batch"),
            "bn_momentum": 0 <= self.bn_momentum < 1,
            "patience": self.patience is None or self.patience >= 1,
            "resume": not self.resume or self.checkpoint is not None,
        }


def _known(distillation: Distillation) -> bool:
    chosen = distillation.values() if isinstance(distillation, Mapping) else [distillation]
    return all(choice in COMPARISONS for choice in chosen)


def parse_settings(settings: Sequence[str], epochs: int) -> FinetuneOptions:
    """Options from words like "lr=3e-3", "augment=flip,shift"; a value is YAML or a text.

    Raises:
        InvalidRecipeError: a word has another form, or an option is unknown or out of range.
    """
    import yaml

    from onnxprune.validation import validated

    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InvalidRecipeError(f"--tune {setting!r}: give NAME=VALUE, as in lr=0.001")
        if name == "epochs":
            raise InvalidRecipeError(f"--tune {setting!r}: --finetune says how many epochs")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidRecipeError(f"--tune {setting!r}: the value is not YAML") from error
    try:
        found: FinetuneOptions = validated(FinetuneOptions, {**values, "epochs": epochs})
    except InvalidRecipeError as error:
        raise InvalidRecipeError(f"--tune {error}") from error
    return found
