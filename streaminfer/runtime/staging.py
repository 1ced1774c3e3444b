"""Between the host's memory and a device's: for a GPU through pages that it reads by itself.

Measured on an H200: 50 MB leave it in 1 ms, and took 30 into memory of which it knows nothing.
torch keeps such pages for the next batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

__all__ = ["off", "onto"]


def onto(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Bring rows [n, …] that lie apart in the host's memory onto a device, as one batch."""
    size = (sum(len(part) for part in parts), *parts[0].shape[1:])
    if device.type != "cuda" or 0 in size:
        return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).to(device)
    pages = torch.empty(size, dtype=parts[0].dtype, pin_memory=True)
    torch.cat(list(parts), out=pages)
    return pages.to(device, non_blocking=True)  # torch lends the pages to nobody until it is there


def off(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors in the host's memory, contiguous, once all of them are there."""
    there: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if value.device.type != "cuda" or not value.numel():
            there[name] = value.to("cpu").contiguous()
            continue
        pages = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        there[name] = pages.copy_(value.contiguous(), non_blocking=True)
    for device in {value.device for value in tensors.values() if value.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return there
