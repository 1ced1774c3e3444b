"""More small networks for the same scans: members of an ensemble, and the head of an early exit.

image [N,1,8,8] ─▶ perceptron  ─▶ logits [N,10]       no idea of space: errs on other scans
image [N,1,8,8] ─▶ convolution ─▶ logits [N,10]       no way around its layers, no pooling
early [N,12,8,8] ─▶ exit_head  ─▶ logits [N,10]       on what the network has seen so far
"""

from __future__ import annotations

from torch import nn

__all__ = ["convolution", "exit_head", "perceptron"]


def perceptron() -> nn.Module:
    """Return two linear layers with fresh weights: float32 [N, 1, 8, 8] → logits [N, 10]."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
    )


def convolution() -> nn.Module:
    """Return a plain CNN with fresh weights: float32 [N, 1, 8, 8] → logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def exit_head() -> nn.Module:
    """Return a head for what `early` gives, fresh: float32 [N, 12, 8, 8] → logits [N, 10]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(12 * 16, 10))
