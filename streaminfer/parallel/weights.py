"""Each stage's own weights, in and out of safetensors (memory-mapped), and their digest.

Weights lie at multiples of 64 bytes where the file allows it: on some processors a matrix product
sums in another order when its operands start elsewhere, and then a stage is not the model.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from streaminfer.errors import PlanError
from streaminfer.parallel.signature import dtype_name

__all__ = ["aligned", "digest", "read", "same_memory", "write"]

ALIGN = 64
KERNELS = 16  # what kernels ask of an operand's address; MKL gives other bits below that
LENGTH = struct.Struct("<Q")  # of the header, which safetensors begins with


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy where kernels see the difference in how its memory lies."""
    return tensor if tensor.data_ptr() % KERNELS == 0 else tensor.clone()


def same_memory(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a key that is equal for tensors which are one: tied weights are kept once."""
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write tensors, contiguous and each with memory of its own; return their bytes."""
    own: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu()
        # A view of a larger tensor would drag all of it along, one of a neighbour's is refused.
        whole = kept.is_contiguous() and kept.untyped_storage().nbytes() == kept.nbytes
        if not whole or kept.data_ptr() in taken:
            kept = kept.clone(memory_format=torch.contiguous_format)
        taken.add(kept.data_ptr())
        own[name] = kept
    file = save(own)
    (length,) = LENGTH.unpack_from(file)
    # spaces behind the header's JSON belong to the format
    pad = -(LENGTH.size + length) % ALIGN
    with path.open("wb") as stream:
        stream.write(LENGTH.pack(length + pad) + file[LENGTH.size : LENGTH.size + length])
        stream.write(b" " * pad)
        stream.write(memoryview(file)[LENGTH.size + length :])
    return sum(t.nbytes for t in own.values())


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file; on the CPU they are its pages, read when touched.

    Raises:
        PlanError: there is no such file, or it is damaged.
    """
    try:
        return {name: aligned(tensor) for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise PlanError(
            f"cannot read weights: {error}", where=str(path), hint="build the plan again"
        ) from None


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        kind = dtype_name(tensor.dtype) or str(tensor.dtype)
        total.update(f"{name}\0{kind}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
