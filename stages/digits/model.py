"""A small residual network for handwritten digits: 8x8 grey pixels in, ten logits out.

    image [N,1,8,8] ─▶ stem ─▶ [N,12,8,8] ─▶ early ─▶ [N,12,8,8] ─▶ down ─▶ [N,24,4,4] ─▶ late
                                                     ─▶ [N,24,4,4] ─▶ head ─▶ [N,10]

Nothing in it knows that it will be cut: the names of its layers are all that a pipeline needs.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

__all__ = ["Block", "build"]


class Block(nn.Module):
    """Two convolutions and a way around them. [N, C, H, W] → [N, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=4, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add to `x` what the convolutions find in it."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def build() -> nn.Module:
    """Return the network with fresh weights: float32 [N, 1, 8, 8] → logits [N, 10]."""
    return nn.Sequential(
        OrderedDict(
            stem=_convolution(1, 12, stride=1),
            early=Block(12),
            down=_convolution(12, 24, stride=2),
            late=Block(24),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24 * 4, 10)),
        )
    )
