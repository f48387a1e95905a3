"""The trained networks whose accuracy is followed through pruning, and their data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from onnxprune.progress import Progress, Silent
from onnxprune.training.augment import flip, shift

Samples = dict[str, NDArray[Any]]
#: Share of the size by which images are moved in training: two pixels of 28.
SHIFT = 1 / 14
ADAM: dict[str, Any] = {"weight_decay": 0.05, "batch_size": 128}


def jitter(batch: Batch, rng: np.random.Generator) -> Batch:
    """Half of the images mirrored, all of them moved a little."""
    return shift(flip(batch, rng), rng, SHIFT)


@dataclass(frozen=True)
class Subject:
    """A network, and how it is trained from scratch.

    Attributes:
        title: what it is called in tables.
        build: its graph.
        data: "fashion" or "languages".
        epochs: of training.
        training: the other options of `Finetune` for it.
        folded: its BatchNormalization is folded into the convolutions before anything else.
        peer: Torch-Pruning prunes it too.
    """

    title: str
    build: graphs.Builder
    data: str
    epochs: int
    training: Mapping[str, Any] = field(default_factory=dict)
    folded: bool = False
    peer: bool = True


RESNET = Subject(
    "ResNet-20-like, stem stride 2",
    graphs.fashion_resnet,
    "fashion",
    20,
    {**ADAM, "lr": 4e-3, "warmup": 0.1, "augment": jitter},
)
VGG = Subject("VGG-like, 5 convolutions", graphs.fashion_vgg, "fashion", 5, {**ADAM, "lr": 3e-3})
SUBJECTS: dict[str, Subject] = {
    "mlp": Subject("MLP, 4 layers", graphs.fashion_mlp, "fashion", 10, {**ADAM, "lr": 3e-3}),
    "resnet": RESNET,
    "resnet-folded": replace(RESNET, title="the same, folded", folded=True, peer=False),
    "vgg": VGG,
    "vgg-folded": replace(VGG, title="the same, folded", folded=True, peer=False),
    "vit": Subject(
        "ViT, 4 layers, 4 heads",
        transformer.fashion_vit,
        "fashion",
        12,
        {**ADAM, "lr": 1.5e-3, "warmup": 0.1},
    ),
    "text": Subject(
        "text CNN, 2 convolutions",
        text.language_cnn,
        "languages",
        8,
        {**ADAM, "lr": 2e-3, "batch_size": 64},
    ),
    "lstm": Subject(
        "LSTM, 96 states",
        text.language_lstm,
        "languages",
        8,
        {**ADAM, "lr": 4e-3, "batch_size": 64},
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


def trained(
    name: str,
    cache: Path,
    data: Callable[[], Samples],
    threads: int,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """The trained network: from the file of an earlier run, or trained now.

    A training that was interrupted continues after its last epoch.
    """
    subject = SUBJECTS[name]
    path = cache / f"{subject.build.__name__}_{subject.epochs}_0.onnx"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        options = {"checkpoint": unfinished, "resume": True, **subject.training}
        recipe = Recipe(subject.build, 0, {"epochs": subject.epochs, **options})
        result = train(recipe, data(), threads=threads, progress=progress or Silent())
        io.save(result.model, path)
        unfinished.unlink(missing_ok=True)
    model = onnx.load(path)
    return graphs.fold(model) if subject.folded else model
