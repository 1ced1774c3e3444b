"""Rows of an envelope as torch tensors and back: views where bytes allow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from streaminfer.parallel import DTYPES
from streaminfer.parallel.weights import aligned
from streaminfer.wire import Envelope, Tensor, decompress

__all__ = ["DTYPES", "NAMES", "as_bytes", "select", "view"]

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def view(tensor: Tensor) -> torch.Tensor:
    """Read bytes as a tensor, without a copy where they are writable and lie as kernels want."""
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    data = tensor.data if not tensor.data.readonly else memoryview(bytearray(tensor.data))
    return aligned(torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(tensor.shape))


def as_bytes(value: torch.Tensor) -> memoryview:
    """See a contiguous CPU tensor as bytes (numpy has no bfloat16, hence the detour by uint8)."""
    if not value.numel():
        return memoryview(b"")
    return value.reshape(-1).view(torch.uint8).numpy().data


def select(envelope: Envelope, rows: Sequence[int]) -> Envelope:
    """Return the envelope with only these rows (contiguous ones are not copied)."""
    span = isinstance(rows, range)
    tensors = {}
    for name, packed in envelope.tensors.items():
        tensor = decompress(packed)
        size = len(tensor.data) // max(1, tensor.shape[0])
        shape = (len(rows), *tensor.shape[1:])
        if span and rows:
            data = tensor.data[rows[0] * size : (rows[-1] + 1) * size]
        else:
            data = memoryview(b"".join(tensor.data[r * size : (r + 1) * size] for r in rows))
        tensors[name] = Tensor(tensor.dtype, shape, data)
    return replace(envelope, samples=tuple(envelope.samples[r] for r in rows), tensors=tensors)
