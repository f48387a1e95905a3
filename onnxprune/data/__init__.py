"""Calibration, training and validation data, from files or Python, fitted to a model's inputs.

`open_data` takes any of:

* `FILE.npz`: arrays by input name, `y` for labels; a lone array `x` goes to the only input.
  `FILE.npy` likewise;
* a folder of images, one sub-folder a class, sorted by name (needs pillow);
* IDX files (the MNIST family), plain or .gz: the file of the images, or `FOLDER`, `FOLDER:train`,
  `FOLDER:test`;
* `FILE.py:FUNCTION`, a function that returns or yields anything listed below;
* in Python: a mapping of arrays, an iterable of feeds, an onnxruntime CalibrationDataReader, a
  DataLoader, or a `Dataset`.

A feed is a dict by input name, or arrays in the model's order, alone or with labels: `(feed,
labels)`.
"""

from onnxprune.data.dataset import Batch, Dataset
from onnxprune.data.open import open_data

__all__ = ["Batch", "Dataset", "open_data"]
