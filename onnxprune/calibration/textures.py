"""Random images: noise with the spectrum of photographs, and smooth shapes on an empty ground."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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
