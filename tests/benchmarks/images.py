"""What is sent: JPEGs cut from scikit-learn's two photos, and its handwritten digits. Seeded."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import cycle, islice

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from stages.digits.images import scans

__all__ = ["digits", "photos"]

SIDE = 256  # pixels
DISTINCT = 96


def digits(count: int) -> Iterator[bytes]:
    """Return `count` digit scans as PNG and JPEG files, from the first again at the end."""
    return islice(cycle(_scans()), count)


def photos(count: int) -> Iterator[bytes]:
    """Return `count` JPEGs of 256x256 pixels, from the first again at the end."""
    return islice(cycle(_photos()), count)


@cache
def _scans() -> Sequence[bytes]:
    return [value for _, _, value in scans()]


@cache
def _photos() -> Sequence[bytes]:
    """Crop at random places, mirror some, and add noise, so that no two are alike."""
    random = np.random.default_rng(7)
    sources = load_sample_images().images
    found = []
    for k in range(DISTINCT):
        source = sources[k % len(sources)]
        y, x = (int(random.integers(0, length - SIDE)) for length in source.shape[:2])
        crop = source[y : y + SIDE, x : x + SIDE].astype(np.int16)
        noisy = crop[:, :: -1 if k % 3 == 0 else 1] + random.normal(0, 6, crop.shape)
        file = io.BytesIO()
        pixels = np.clip(noisy, 0, 255).astype(np.uint8)
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found
