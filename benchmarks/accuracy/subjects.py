"""The trained networks whose accuracy is followed through pruning, and their data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.accuracy.languages import languages
from models import graphs, text, transformer
from models.make import Recipe, train
from onnxprune import io
from onnxprune.data import Batch

Samples = dict[str, NDArray[Any]]
ADAM: dict[str, Any] = {"weight_decay": 0.05, "batch_size": 128}


def flip(batch: Batch, rng: np.random.Generator) -> Batch:
    """Half of the images mirrored."""
    feeds = {}
    for name, images in batch.feeds.items():
        turned = images.copy()
        chosen = rng.random(len(images)) < 0.5
        turned[chosen] = turned[chosen][..., ::-1]
        feeds[name] = turned
    return Batch(feeds, batch.labels)


@dataclass(frozen=True)
class Subject:
    """A network, how it is trained from scratch, and how its pruned forms are fine-tuned.

    `peer` tells whether Torch-Pruning runs it too; `folded` whether its BatchNormalization is
    folded into the convolutions before anything else.
    """

    build: graphs.Builder
    data: str
    epochs: int
    training: Mapping[str, Any] = field(default_factory=dict)
    finetuning: Mapping[str, Any] = field(default_factory=dict)
    folded: bool = False
    peer: bool = True


FINETUNING: dict[str, Any] = {
    "batch_size": 64,
    "weight_decay": 0.01,
    "alpha": 0.9,
    "temperature": 4.0,
}
CONV = {**FINETUNING, "lr": 2e-3}
RESNET = Subject(
    graphs.fashion_resnet,
    "fashion",
    12,
    {**ADAM, "lr": 4e-3, "warmup": 0.1, "augment": flip},
    {**FINETUNING, "lr": 3e-3},
)
VGG = Subject(graphs.fashion_vgg, "fashion", 5, {**ADAM, "lr": 3e-3}, CONV)
SUBJECTS: dict[str, Subject] = {
    "mlp": Subject(
        graphs.fashion_mlp,
        "fashion",
        10,
        {**ADAM, "lr": 3e-3},
        {**FINETUNING, "lr": 2e-3, "temperature": 2.0},
    ),
    "resnet": RESNET,
    "resnet-folded": Subject(
        RESNET.build, "fashion", 12, RESNET.training, RESNET.finetuning, folded=True, peer=False
    ),
    "vgg": VGG,
    "vgg-folded": Subject(
        VGG.build, "fashion", 5, VGG.training, VGG.finetuning, folded=True, peer=False
    ),
    "vit": Subject(
        transformer.fashion_vit,
        "fashion",
        12,
        {**ADAM, "lr": 1.5e-3, "warmup": 0.1},
        {**FINETUNING, "lr": 1e-3},
    ),
    "text": Subject(
        text.language_cnn, "languages", 8, {**ADAM, "lr": 2e-3, "batch_size": 64}, CONV
    ),
    "lstm": Subject(
        text.language_lstm,
        "languages",
        8,
        {**ADAM, "lr": 4e-3, "batch_size": 64},
        {**FINETUNING, "lr": 2e-3},
        peer=False,
    ),
}


def samples(subject: Subject, part: str, fashion: Path, cache: Path) -> Samples:
    """Inputs by name and labels `y` of "train" or "test", as the network takes them."""
    if subject.data == "languages":
        return languages(cache, part)
    from onnxprune.data import open_data

    model = subject.build(0)
    (batch,) = open_data(f"{fashion}:{part}", model).batches(60_000)
    assert batch.labels is not None
    return {**{n: np.asarray(a) for n, a in batch.feeds.items()}, "y": batch.labels}


def trained(name: str, cache: Path, data: Callable[[], Samples], threads: int) -> onnx.ModelProto:
    """The trained network: from the file of an earlier run, or trained now."""
    subject = SUBJECTS[name]
    stem = subject.build.__name__
    path = cache / f"{stem}_{subject.epochs}_0.onnx"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        recipe = Recipe(subject.build, 0, {"epochs": subject.epochs, **subject.training})
        io.save(train(recipe, data(), threads=threads).model, path)
    model = onnx.load(path)
    return graphs.fold(model) if subject.folded else model
