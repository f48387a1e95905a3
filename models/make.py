"""Make every trained model of this folder again: `python -m models.make`.

The data is scikit-learn's digits; the training is onnxprune's own worker (run `onnxprune
setup-training` once). On one machine the files come out bit-identical; on another, sums may round
otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from models import digits, graphs
from onnxprune import io
from onnxprune.data import open_data
from onnxprune.metrics import evaluate
from onnxprune.passes.finetune import Finetune, FinetuneResult
from onnxprune.passes.reestimate_batchnorm import ReestimateBatchNorm
from onnxprune.progress import Progress, Silent

FOLDER = Path(__file__).resolve().parent
MANIFEST = FOLDER / "manifest.json"


@dataclass(frozen=True)
class Recipe:
    """How one network is trained: builder, seed, and the options of `Finetune`."""

    build: graphs.Builder
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)


RECIPES = {
    "digits_mlp": Recipe(
        graphs.digits_mlp, 0, {"epochs": 60, "lr": 3e-3, "weight_decay": 0.2, "batch_size": 64}
    ),
    "digits_cnn": Recipe(
        graphs.digits_cnn, 0, {"epochs": 20, "lr": 4e-3, "weight_decay": 0.05, "batch_size": 64}
    ),
}


def train(
    recipe: Recipe, data: Any, *, threads: int = 1, progress: Progress | None = None
) -> FinetuneResult:
    """The network trained from scratch, in inference form, and the history of its training.

    It trains with batch statistics; those of inference are averages over all of the data.
    """
    draft = recipe.build(recipe.seed, training=True)
    finetune = Finetune(seed=recipe.seed, threads=threads, **recipe.options)
    source = open_data(data, draft)
    result = finetune(draft, teacher=None, data=source, progress=progress or Silent())
    model = graphs.to_inference(recipe.build, result.model, recipe.seed)
    if graphs.has_norm(model):
        source = open_data(data, model)
        measure = ReestimateBatchNorm(samples=len(source), batch_size=256, threads=threads)
        model = measure(model, source)
    return replace(result, model=model)


def entry(path: Path, recipe: Recipe, made_of: str) -> dict[str, Any]:
    """What the manifest tells of one file."""
    model = onnx.load(path)
    metrics = evaluate(model, open_data(digits.test(), model), threads=1)
    return {
        "name": path.stem,
        "file": path.name,
        "made_of": made_of,
        "script": "python -m models.make",
        "data": "scikit-learn digits: digits_train.npz (1,297), digits_test.npz (500 held out)",
        "seed": recipe.seed,
        "training": dict(recipe.options),
        "accuracy": round(metrics["accuracy"], 6),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def make(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Write data, models and manifest to `folder`; the manifest's entries."""
    digits.write(folder)
    entries = []
    for name, recipe in RECIPES.items():
        model = train(recipe, digits.train()).model
        variants = {name: model}
        if name == "digits_cnn":
            variants["digits_cnn_folded"] = graphs.fold(model)
        for variant, proto in variants.items():
            path = folder / f"{variant}.onnx"
            io.save(proto, path)
            made_of = f"graphs.{recipe.build.__name__}"
            entries.append(entry(path, recipe, made_of if variant == name else f"{name}, folded"))
    text = json.dumps({"models": entries}, indent=2) + "\n"
    io.write_text(folder / MANIFEST.name, text)
    return entries


def main() -> None:
    """Make everything, and say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m models.make")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for made in make(folder):
        print(f"{made['file']}: held-out accuracy {made['accuracy']:.4f}, {made['bytes']} bytes")


if __name__ == "__main__":
    main()
