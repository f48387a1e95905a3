"""The handwritten digits that ship with scikit-learn: 1,797 images of 8 x 8 pixels, ten classes.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998
(test part).

The split is fixed: 500 images are held out, 1,297 train. Both parts also lie beside this file as
digits_train.npz and digits_test.npz, so that nothing but numpy is needed to read them:

    onnxprune prune digits_cnn.onnx small.onnx --macs 0.5 --data models/digits_train.npz

or, from scikit-learn's own copy, `--data models/digits.py:train`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).resolve().parent
HELD_OUT = 500
SEED = 20


def train() -> dict[str, NDArray[Any]]:
    """The training images x [1297, 1, 8, 8] in [0, 1] and labels y [1297]."""
    return _part(slice(HELD_OUT, None))


def test() -> dict[str, NDArray[Any]]:
    """The held-out images x [500, 1, 8, 8] in [0, 1] and labels y [500]."""
    return _part(slice(HELD_OUT))


def write(folder: Path = FOLDER) -> None:
    """Write both parts as .npz files."""
    for name, part in (("digits_train.npz", train()), ("digits_test.npz", test())):
        np.savez_compressed(folder / name, x=part["x"], y=part["y"])


def _part(rows: slice) -> dict[str, NDArray[Any]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(labels))[rows]
    pixels = images[order].reshape(-1, 1, 8, 8).astype(np.float32) / 16
    return {"x": pixels, "y": labels[order].astype(np.int64)}
