"""A folder of images by class, decoded with pillow where they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.data.dataset import Array, ColumnDataset, Rows
from onnxprune.data.inputs import Input, Inputs
from onnxprune.data.preprocess import NAME, Preprocess, read_preprocess
from onnxprune.errors import InvalidDataError

_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Layout:
    """What the model's image input wants: [N, C, H, W], or [N, H, W, C] where `last`."""

    channels: int
    height: int
    width: int
    last: bool


@dataclass(frozen=True)
class Images:
    """Image files, decoded, resized and centre-cropped to one size."""

    files: tuple[Path, ...]
    layout: Layout
    preprocess: Preprocess
    scaled: bool

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def __getitem__(self, rows: Rows, /) -> Array:
        """The images `rows`, in the model's layout."""
        order = range(*rows.indices(len(self.files))) if isinstance(rows, slice) else rows
        pixels = np.stack([self._pixels(self.files[i]) for i in order])
        if not self.layout.last:
            pixels = pixels.transpose(0, 3, 1, 2)
        return (
            self.preprocess.scale(pixels, 3 if self.layout.last else 1) if self.scaled else pixels
        )

    def _pixels(self, path: Path) -> Array:
        """uint8 [H, W, C]."""
        from PIL import Image

        height, width = self.layout.height, self.layout.width
        try:
            with Image.open(path) as file:
                image = file.convert(_MODES[self.layout.channels])
        except (OSError, ValueError, SyntaxError) as error:
            raise InvalidDataError(
                f"{path}: cannot be read as an image ({error}); repair or remove it"
            ) from error
        ratio = max(height / image.height, width / image.width)
        if self.preprocess.resize is not None:
            ratio = max(ratio, self.preprocess.resize / min(image.height, image.width))
        size = max(width, round(image.width * ratio)), max(height, round(image.height * ratio))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
        return np.asarray(image, np.uint8).reshape(height, width, self.layout.channels)


def open_images(folder: Path, inputs: Inputs) -> ColumnDataset:
    """Images in sub-folders; the sub-folders' sorted names are the classes 0, 1, 2, ...

    Raises:
        InvalidDataError: pillow is missing, there are no images, or the model takes no images.
    """
    _require_pillow(folder)
    spec = inputs.only
    if spec is None:
        raise InvalidDataError(
            f"{folder}: images feed one input; the model has {', '.join(inputs.names)}"
        )
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(file, i) for i, path in enumerate(classes) for file in _images(path)]
    if not files:
        raise InvalidDataError(
            f"{folder}: no images; expected one sub-folder a class, with images in it"
        )
    preprocess = read_preprocess(folder)
    layout = image_layout(spec, preprocess, str(folder))
    preprocess.check_channels(layout.channels, str(folder / NAME))
    paths, labels = zip(*files, strict=True)
    column = Images(paths, layout, preprocess, scaled=spec.dtype.kind in "fV")
    return ColumnDataset(inputs, {spec.name: column}, np.array(labels, np.int64), str(folder), {})


def image_layout(spec: Input, preprocess: Preprocess, where: str) -> Layout:
    """The layout that the model's input tells; open sizes come from preprocess.json."""
    shape: tuple[Any, ...] = spec.shape or ()
    size = preprocess.size or (None, None)
    if len(shape) == 4 and shape[1] in _MODES:
        channels, height, width, last = shape[1], shape[2] or size[0], shape[3] or size[1], False
    elif len(shape) == 4 and shape[3] in _MODES:
        channels, height, width, last = shape[3], shape[1] or size[0], shape[2] or size[1], True
    else:
        raise InvalidDataError(
            f"{where}: images need an input [N, C, H, W] or [N, H, W, C] with 1, 3 or 4 channels; "
            f"input {spec.name!r} takes {spec}"
        )
    if height is None or width is None:
        raise InvalidDataError(
            f"{where}: input {spec.name!r} takes {spec}, which leaves the image size open; "
            f'write {{"size": [224, 224]}} (height, width) to {NAME} in that folder'
        )
    return Layout(channels, height, width, last)


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _require_pillow(folder: Path) -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise InvalidDataError(
            f"{folder}: reading images needs pillow; install it with: pip install "
            "'onnxprune[images]'"
        ) from error
