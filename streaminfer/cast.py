"""What an edge's dtype makes of tensors on their way, on the devices at both ends. Pure torch.

    float16, bfloat16    x ──▶ x in 16 bits ──▶ x
    int8                 x ──▶ x  I8  [N, C, H, W]        x ≈ q · scale, at most half a step off
                         x@scale  F32 [N, C]  ──▶ x       scale = largest value ÷ 127

Quantisation is symmetric, and dynamic: a scale comes from the values that it covers, which are all
of one row, so a row is the same whatever stands beside it in a batch. Whole numbers and bools
travel as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from streaminfer.errors import SchemaError
from streaminfer.parallel import DTYPES
from streaminfer.plan import CAST, scaled
from streaminfer.wire import SCALE

__all__ = ["cast", "uncast"]

LEVELS = 127  # on either side of zero
TINY = torch.finfo(torch.float32).tiny  # below it a step is no longer exact, and nothing is lost


def cast(tensors: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Return what travels on an edge of this dtype, scales under the name and `@scale`.

    A scale covers one row and, of rank 3 and more, one index of dimension 1 (a channel of
    [N, C, H, W], a token of [N, T, C]), if that is 8 values or more. What int8 would not make
    smaller stays as it is. A channel with what is no finite number becomes NaN altogether.
    """
    sent: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        wire = CAST[dtype] if tensor.is_floating_point() else None
        if wire != "I8":
            sent[name] = tensor.to(DTYPES[wire]) if wire else tensor
        elif dims := scaled(tensor.shape, tensor.element_size()):
            sent[name], sent[name + SCALE] = _quantised(tensor, dims)
        else:
            sent[name] = tensor
    return sent


def uncast(name: str, sent: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as the stage takes it, if it takes floating-point numbers.

    Raises SchemaError if it came with scales that are not of it.
    """
    tensor = sent[name]
    if not dtype.is_floating_point:
        return tensor
    if (scale := sent.get(name + SCALE)) is not None:
        return _restored(name, tensor, scale).to(dtype)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _quantised(tensor: torch.Tensor, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = tensor.reshape(*tensor.shape[:dims], -1).float()
    scale = flat.abs().amax(-1) / LEVELS
    scale = torch.where(scale < TINY, 1.0, scale)
    steps = (flat / scale[..., None]).nan_to_num(0.0).round().clamp(-LEVELS, LEVELS)
    return steps.to(torch.int8).view(tensor.shape), scale


def _restored(name: str, tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    dims = scale.dim()
    kinds = (tensor.dtype, scale.dtype)
    if kinds != (torch.int8, torch.float32) or scale.shape != tensor.shape[:dims]:
        raise SchemaError(
            f"tensor {name!r}: {tensor.dtype} {list(tensor.shape)} with scales {scale.dtype} "
            f"{list(scale.shape)}; scales are float32 of the first dimensions of an int8 tensor"
        )
    return tensor.float() * scale.view(*scale.shape, *[1] * (tensor.dim() - dims))
