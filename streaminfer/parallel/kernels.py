"""Quicker ways to the same bits: what a loaded stage runs on the CPU for some operators.

torch pools float32 [N, C, H, W] on the CPU one number at a time if the channels lie far apart, and
many at once if they lie together: measured 2 to 10 times as fast, the two transpositions included,
for activations of up to 32 MB. A window's numbers are compared, or summed, in the same order either
way; only a NaN's sign may differ.

A network's stem is quicker still if its channels lie together from its convolution on:

    conv2d (≤ 4 channels in) → batch_norm → relu → max_pool2d      ResNet-50, 4 images, one thread:
    └──────────── channels last ────────────────────────────┘      50 ms → 23 ms

Whether a convolution sums in the same order then is up to the kernels of this machine, so it is
tried out on noise before the first real batch of a shape, and left to torch where one bit differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

from streaminfer.parallel.calls import Call, Uses
from streaminfer.parallel.operators import Operator

__all__ = ["Pool", "apart", "far_apart", "quicker", "together", "with_quick_stem"]

CHANNELS = 8  # with fewer a vector stays empty: as slow as it was
LARGEST = 32 << 20  # bytes: beyond, fresh pages for the transposed copy cost what is won
COLOURS = 4  # channels of what is an image, and not yet features
IMAGES = 4  # dimensions of a batch of them
LAST = torch.channels_last

aten = torch.ops.aten
_POOLS = (aten.max_pool2d.default, aten.avg_pool2d.default)
# Done number by number, or moving numbers only (what a tile adds at the image's edge).
_POINTWISE = {
    aten.batch_norm.default,
    aten.relu.default,
    aten.hardtanh.default,
    aten.silu.default,
    aten.constant_pad_nd.default,
}


def quicker(function: Operator, device: torch.device) -> Operator:
    """Return what gives the same bits in less time on this device: mostly the operator itself."""
    return _ON_CPU.get(function, function) if device.type == "cpu" else function


@dataclass(frozen=True)
class Pool:
    """Pool with the channels together, if they are far apart."""

    pool: OpOverload

    def __call__(self, x: torch.Tensor, *window: object, **more: object) -> torch.Tensor:
        """Pool images."""
        if not far_apart(x):
            return self.pool(x, *window, **more)  # type: ignore[no-any-return]
        return apart(self.pool(together(x), *window, **more))


# These three are compiled as well (`script`).


def far_apart(x: torch.Tensor, most: int = LARGEST, least: int = CHANNELS) -> bool:
    """Say whether the channels are many and not neighbours in memory, and a copy is cheap."""
    if x.dtype != torch.float32 or x.dim() != 4 or 4 * x.numel() > most:
        return False
    return x.shape[1] >= least and x.is_contiguous()


def together(x: torch.Tensor) -> torch.Tensor:
    """Return the same images, their channels neighbours in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def apart(x: torch.Tensor) -> torch.Tensor:
    """Return the same images, channel by channel."""
    return x.contiguous()


_ON_CPU: Mapping[Operator, Operator] = {pool: Pool(pool) for pool in _POOLS}


# ---- a stem --------------------------------------------------------------------------------------


def with_quick_stem(
    calls: Sequence[Call], results: Sequence[object], device: torch.device
) -> list[Call]:
    """Return the calls; convolutions of images whose results are pooled keep channels together."""
    quick = list(calls)
    if device.type != "cpu":
        return quick
    uses = Uses(calls, results)
    for start, call in enumerate(calls):
        end = _pool_behind(start, calls, uses) if _is_of_images(call) else None
        if end is not None:
            stem = _Stem(call.args[1], calls[end].function)
            quick[start] = call._replace(function=stem.convolve)
            quick[end] = calls[end]._replace(function=stem.pool)
    return quick


def _is_of_images(call: Call) -> bool:
    """Say whether it convolves few channels into many, by weights that are here."""
    if call.operator is not aten.conv2d.default or call.first() is None or call.kwargs:
        return False
    weight = call.args[1]
    if not isinstance(weight, torch.Tensor) or weight.dtype != torch.float32:
        return False
    return weight.shape[1] <= COLOURS and weight.shape[0] >= CHANNELS


def _pool_behind(start: int, calls: Sequence[Call], uses: Uses) -> int | None:
    """Return which call pools the result, after nothing but what is done number by number."""
    at = start
    while (after := uses.reader(calls[at].slot)) is not None:
        if calls[after].first() != calls[at].slot:
            return None
        if calls[after].operator in _POOLS:
            return after
        if calls[after].operator not in _POINTWISE:
            return None
        at = after
    return None


class _Stem:
    """A convolution and a pool, between which channels lie together if that gives the same bits."""

    def __init__(self, weight: object, pool: Operator) -> None:
        assert isinstance(weight, torch.Tensor)  # noqa: S101 - _is_of_images
        self._weight, self._pool = weight.contiguous(memory_format=LAST), pool
        self._same: dict[tuple[int, ...], bool] = {}  # by the shape of an image
        self._turned = False

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        """Convolve images [N, C, H, W]."""
        self._turned = self._may_turn(x, weight, rest)
        if self._turned:
            return self._together(x, rest)
        return aten.conv2d.default(x, weight, *rest)  # type: ignore[no-any-return]

    def pool(self, x: torch.Tensor, *window: object, **more: object) -> object:
        """Pool what became of them, and put the channels where they were."""
        pooled = self._pool(x, *window, **more)
        assert isinstance(pooled, torch.Tensor)  # noqa: S101 - a pool's
        return pooled.contiguous() if self._turned else pooled

    def _may_turn(self, x: torch.Tensor, weight: torch.Tensor, rest: Sequence[object]) -> bool:
        if x.dtype != torch.float32 or x.dim() != IMAGES or not x.is_contiguous():
            return False
        shape = tuple(x.shape[1:])
        if shape not in self._same:
            noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
            wanted = aten.conv2d.default(noise, weight, *rest)
            self._same[shape] = torch.equal(wanted, self._together(noise, rest))
        return self._same[shape]

    def _together(self, x: torch.Tensor, rest: Sequence[object]) -> torch.Tensor:
        last = x.contiguous(memory_format=LAST)
        return aten.conv2d.default(last, self._weight, *rest)  # type: ignore[no-any-return]
