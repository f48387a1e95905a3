"""Inputs made up for models that come without data.

Images are random smooth textures, or smooth shapes on an empty ground. Which of them, how bright
and how strong, is chosen by what the model itself remembers of its training data: the means and
variances that its BatchNormalization recorded (the idea of Cai et al., ZeroQ, 2020, without its
gradients). Inputs that are no images are random numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune import runtime
from onnxprune.calibration.editable import Editable

Array = NDArray[Any]
Feeds = dict[str, Array]
OFFSETS = (-0.5, 0.0, 0.25, 0.5, 1.0)
SCALES = (0.1, 0.2, 0.35, 0.6, 1.0, 1.5)
#: How many BatchNormalizations the choice looks at, and on how many samples.
NORMS, SAMPLES = 6, 32
#: Pixels of all samples together, of which there are at least two.
PIXELS = 200_000
_SMALLEST_IMAGE = 8


@dataclass(frozen=True)
class Recorded:
    """What a BatchNormalization remembers of the tensor `name`: mean[C] and variance[C]."""

    name: str
    mean: Array
    var: Array


@dataclass(frozen=True)
class Style:
    """How images are made: a kind, then value * scale + offset."""

    kind: str
    offset: float
    scale: float


#: Images for models that remember nothing: of several kinds, offsets and scales.
MIXED = (
    Style("shapes", 0.25, 0.35),
    Style("smooth texture", 0.0, 1.0),
    Style("shapes", 0.0, 1.0),
    Style("texture", 0.25, 0.35),
)


@dataclass(frozen=True)
class Synthetic:
    """Made-up feeds by batch; `is_matched`: chosen by recorded statistics."""

    batches: Sequence[Feeds]
    is_matched: bool


def synthesize(
    model: onnx.ModelProto, samples: int, *, seed: int = 0, threads: int | None = None
) -> Synthetic | None:
    """Batches that together hold about `samples`; None where no input is an image."""
    editable = Editable(model)
    norms, axes = recorded(editable)[:NORMS], image_axes(model)
    if not axes:
        return None
    styles: Sequence[Style] = MIXED
    if norms:
        styles = [choose(editable, norms, axes, seed=seed, threads=threads)]
    maker = np.random.default_rng(seed)
    batches: list[Feeds] = []
    while sum(_rows(b, axes) for b in batches) < samples:
        base = runtime.random_feeds(model, seed=seed + len(batches), batch=64)
        batches.append(paint(base, axes, styles[len(batches) % len(styles)], maker))
    return Synthetic(batches, bool(norms))


def image_axes(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """The height and width axes of each input that is an image: [N, C, H, W] or [N, H, W, C]."""
    found = {}
    for name, array in runtime.random_feeds(model).items():
        if array.ndim == 4 and array.dtype.kind == "f":
            axes = (1, 2) if array.shape[3] <= 4 < array.shape[1] else (2, 3)
            if min(array.shape[a] for a in axes) >= _SMALLEST_IMAGE:
                found[name] = axes
    return found


def recorded(model: Editable) -> list[Recorded]:
    """The statistics in the file, in the order in which data meets them."""
    found = []
    for node in model.nodes:
        if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx"):
            mean, var = (model.weight(name) for name in node.input[3:5])
            if mean is not None and var is not None:
                found.append(Recorded(node.input[0], mean, var))
    return found


def choose(
    model: Editable,
    norms: Sequence[Recorded],
    axes: Mapping[str, tuple[int, int]],
    *,
    seed: int = 0,
    threads: int | None = None,
) -> Style:
    """The style whose statistics are nearest to the recorded ones."""
    base = runtime.random_feeds(model.proto, seed=seed, batch=1)
    pixels = max(base[name].size for name in axes)
    samples = int(np.clip(PIXELS // pixels, 2, SAMPLES))
    base = runtime.random_feeds(model.proto, seed=seed, batch=samples)
    last = max(model.maker[n.name] for n in norms if n.name in model.maker)
    names = [n.name for n in norms]
    part = model.part(model.nodes[: last + 1], [base], names)
    session = runtime.session(part, threads=threads)
    best: tuple[float, Style] | None = None
    for kind in KINDS:
        plain = paint(base, axes, Style(kind, 0, 1), np.random.default_rng(seed))
        for offset, scale in itertools.product(OFFSETS, SCALES):
            feeds = plain | {n: (offset + scale * plain[n]).astype(base[n].dtype) for n in axes}
            distance = divergence(runtime.run(session, feeds, names), norms)
            if best is None or distance < best[0]:
                best = (distance, Style(kind, offset, scale))
    assert best is not None
    return best[1]


def divergence(tensors: Mapping[str, Array], norms: Sequence[Recorded]) -> float:
    """Mean Kullback-Leibler divergence of normal distributions, measured from recorded."""
    total = 0.0
    for norm in norms:
        value = tensors[norm.name].astype(np.float64)
        axes = tuple(a for a in range(value.ndim) if a != 1)
        wide = np.maximum(norm.var, 1e-12)
        mean, var = value.mean(axes), value.var(axes) + 1e-6 * wide
        parts = np.log(wide / var) + (var + (mean - norm.mean) ** 2) / wide - 1
        total += 0.5 * float(parts.mean())
    return total / len(norms)


def paint(
    base: Mapping[str, Array],
    axes: Mapping[str, tuple[int, int]],
    style: Style,
    rng: np.random.Generator,
) -> Feeds:
    """The feeds of `base` with images in this style."""
    feeds = dict(base)
    for name, where in axes.items():
        shape = base[name].shape
        planes = tuple(shape[a] for a in range(4) if a not in where)
        image = KINDS[style.kind](rng, (*planes, shape[where[0]], shape[where[1]]))
        image = np.moveaxis(image, (-2, -1), where)
        feeds[name] = (style.offset + style.scale * image).astype(base[name].dtype)
    return feeds


def texture(rng: np.random.Generator, shape: tuple[int, ...], power: float) -> Array:
    """Noise with spectrum 1 / f^power over the last two axes, mean 0 and variance 1 a sample."""
    height, width = shape[-2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.normal(size=shape)) * frequency**-power
    image = np.fft.ifft2(spectrum).real
    axes = tuple(range(1, image.ndim))
    return np.asarray(image / np.maximum(image.std(axis=axes, keepdims=True), 1e-12))


def shapes(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Smooth shapes near the centre, lightly textured, on an empty ground; mean 0, variance 1."""
    across, height, width = shape[0], shape[-2], shape[-1]
    rows, columns = (np.linspace(-1.5, 1.5, n) for n in (height, width))
    centre = 3 * np.exp(-(rows**2)[:, None] - (columns**2)[None]) - 1.5
    outline = texture(rng, (across, 1, height, width), 2.5)
    sizes = (across,) + (1,) * (len(shape) - 1)
    level, strength = rng.uniform(0.2, 1, sizes), rng.uniform(0.05, 0.3, sizes)
    body = np.clip(level + strength * texture(rng, shape, 1.5), 0, 1.2)
    image = np.where(0.7 * outline + centre > 0, body, 0)
    return np.asarray((image - image.mean()) / max(float(image.std()), 1e-12))


KINDS: Mapping[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "texture": lambda rng, shape: texture(rng, shape, 1.0),
    "smooth texture": lambda rng, shape: texture(rng, shape, 2.0),
    "shapes": shapes,
}


def _rows(feeds: Mapping[str, Array], axes: Mapping[str, Any]) -> int:
    return int(feeds[next(iter(axes))].shape[0])
