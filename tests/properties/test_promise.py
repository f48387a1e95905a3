"""Whatever is asked: a model that `--max-drop` wrote keeps the promise, measured by other code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxprune.cli import main

ASKED = st.fixed_dictionaries(
    {
        "--max-drop": st.sampled_from(["0", "0.3", "1", "5", "20"]),
        "--repair": st.sampled_from(["none", "auto", "bias"]),
        "--val": st.sampled_from(["digits_test.npz", "images.npz"]),
    },
    optional={
        "--data": st.just("digits_train.npz"),
        "--min-keep": st.sampled_from(["0.05", "0.3"]),
        "--round-to": st.sampled_from(["2", "8"]),
        "--scope": st.just("exact"),
    },
)
BUDGETS = st.sampled_from(
    [
        [],
        *(["--channels", share] for share in ("0.1", "0.4", "0.8", "1")),
        *(["--macs", share] for share in ("0.05", "0.3", "0.9")),
        ["--params", "0.2"],
        ["--size-mb", "0.015"],
    ]
)


@given(asked=ASKED, budget=BUDGETS, model=st.sampled_from(["digits_mlp.onnx", "digits_cnn.onnx"]))
@settings(
    max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
def test_what_is_written_keeps_the_promise(
    models_dir: Path, asked: dict[str, str], budget: list[str], model: str
) -> None:
    with np.load(models_dir / "digits_test.npz") as data:
        images = {name: data[name] for name in data.files if name != "y"}
        labels = data["y"]
    with tempfile.TemporaryDirectory() as folder:
        unlabelled = Path(folder, "images.npz")
        np.savez(unlabelled, **images)
        places = {"images.npz": str(unlabelled)}
        names = {"digits_test.npz", "digits_train.npz"}
        options = [
            places.get(v) or (str(models_dir / v) if v in names else v)
            for pair in asked.items()
            for v in pair
        ]
        source, written = models_dir / model, Path(folder, "out.onnx")
        code = main(["prune", str(source), str(written), *budget, *options, "--threads", "1"])
        assert code in (0, 1)
        assert written.exists() == (code == 0)
        if code == 0:
            before, after = (_classes(path, images) for path in (source, written))
            wanted = labels if asked["--val"] == "digits_test.npz" else before
            lost = (before == wanted).mean() - (after == wanted).mean()
            assert 100 * lost <= float(asked["--max-drop"]) + 1e-6


def _classes(path: Path, feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """The class that the model at `path` finds for each image."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.get_inputs()[0]
    images = next(iter(feeds.values()))
    if len(wanted.shape) == 2:
        images = images.reshape(len(images), -1)
    scores: NDArray[Any] = session.run(None, {wanted.name: images})[0]
    return scores.argmax(axis=1)
