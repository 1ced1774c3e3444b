"""What stands before the first stage's layers and behind the last one's, on the device.

Both are plain functions of torch tensors, so that only bytes of pixels come in (1 per value instead
of 4) and only answers go out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from streaminfer.errors import SchemaError
from streaminfer.parallel.torchscript import compiled
from streaminfer.runtime.decode import Ranges, decode_image
from streaminfer.spec import InputSpec

__all__ = ["batch_of", "batches_of", "normalise", "top_k"]


def normalise(spec: InputSpec, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function that turns pixels (uint8 [N,C,H,W], 0-255) into what the model takes.

    The result is float32 `(x / 255 - mean) / std` per channel; a float tensor passes unchanged.
    """
    shape = (1, -1, 1, 1)
    mean = torch.tensor(spec.mean or (0.0,), device=device).view(shape)
    std = torch.tensor(spec.std or (1.0,), device=device).view(shape)
    scale = (
        compiled(_scaled, mean, std)
        if device.type == "cpu"
        else partial(_scaled, mean=mean, std=std)
    )

    def run(x: Tensor) -> Tensor:
        if x.dtype != torch.uint8 or spec.decode != "image":
            return x
        return scale(x)

    return run


def _scaled(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (x.to(torch.float32) / 255 - mean) / std


def batch_of(values: Sequence[bytes], spec: InputSpec, ranges: Ranges = ()) -> Tensor:
    """Decode image files into what the model takes, float32 [N,C,H,W]. Raises DecodeError.

    `ranges`: of the sizes that the model takes; the images are of one of them.
    """
    images = [decode_image(value, None, spec, ranges) for value in values]
    return normalise(spec, torch.device("cpu"))(torch.from_numpy(np.stack(images)))


def batches_of(values: Sequence[bytes], spec: InputSpec, ranges: Ranges) -> list[Tensor]:
    """Decode image files of any sizes in `ranges`: a batch for each size. Raises DecodeError."""
    groups: dict[tuple[int, ...], list[bytes]] = {}
    for value in values:
        groups.setdefault(decode_image(value, None, spec, ranges).shape, []).append(value)
    return [batch_of(group, spec, ranges) for group in groups.values()]


def top_k(k: int, logits: str = "") -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Return the function from the model's logits [N,C] to index and score [N,k].

    `logits` is the name of that output where there are several. `index` is int32, `score` the
    softmax in float32, best first. Raises SchemaError if there is no such output of rank 2.
    """
    best = compiled(_best)

    def run(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = logits or next(iter(outputs))
        ranked = outputs.get(name)
        if ranked is None or ranked.dim() != 2 or (len(outputs) > 1 and not logits):
            shapes = {name: tuple(t.shape) for name, t in outputs.items()}
            raise SchemaError(f"output.top_k needs one output [batch, classes], found {shapes}")
        score, index = (best if ranked.device.type == "cpu" else _best)(ranked, k)
        return {"index": index, "score": score}

    return run


def _best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    score, index = logits.float().softmax(1).topk(min(k, logits.shape[1]), 1)
    return score, index.to(torch.int32)
