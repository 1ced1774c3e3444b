"""The scans: scikit-learn's 1,797 handwritten digits as image files, half PNG and half JPEG.

Both keep the 8x8 pixels as they are: one JPEG block, so nothing is scaled and no block edge runs
through a digit. At quality 100 a JPEG pixel is off by one grey level of 255 at most.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

__all__ = ["pixels", "scans"]


def pixels() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return all scans as uint8 [1797, 8, 8] (255 = ink) and their labels [1797]."""
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # scikit-learn counts 0 to 16
    return grey, digits.target.astype(np.int64)


def scans() -> list[tuple[str, int, bytes]]:
    """Return (name, label, file content) of every scan; even ones are PNG, odd ones JPEG."""
    found = []
    for index, (grey, label) in enumerate(zip(*pixels(), strict=True)):
        kind = ("png", "jpg")[index % 2]
        found.append((f"digit-{index:04d}.{kind}", int(label), _encode(grey, kind)))
    return found


def _encode(grey: NDArray[np.uint8], kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "png":
        Image.fromarray(grey).save(file, "PNG")
    else:
        Image.fromarray(grey).save(file, "JPEG", quality=100)
    return file.getvalue()
