"""An ensemble's outputs as one: what the branches' gather computes.

Classes are fused as probabilities and go on as their logarithms, so that the softmax of the result
is what was fused. Raw outputs are fused as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Fuse"]


class Fuse(nn.Module):
    """Join K outputs of N rows, some of which may be missing.

    Args:
        how: "mean" (by weight), "max", or "vote" (the share of the weights whose best class it is).
        weights: one per branch.
        classes: whether the outputs are logits [N, C]; else any shape, and no vote.
    """

    def __init__(self, how: str, weights: Sequence[float], *, classes: bool) -> None:
        super().__init__()
        self.weights: Tensor
        self.how, self.classes = how, classes
        self.register_buffer("weights", torch.tensor(list(weights), dtype=torch.float32))

    def forward(self, present: Tensor, *outputs: Tensor) -> Tensor:
        """Return the fused output; `present` is 1 where a row of a branch came, else 0, [N, K]."""
        values = torch.stack([self._value(output) for output in outputs], 1)
        shape = present.shape + (1,) * (values.dim() - 2)
        if self.how == "max":
            absent = (present == 0).reshape(shape)
            fused = values.masked_fill(absent, float("-inf")).amax(1)
        else:
            share = present * self.weights
            share = (share / share.sum(1, keepdim=True)).reshape(shape)
            fused = (values * share).sum(1)
        if not self.classes:
            return fused
        return (fused / fused.sum(1, keepdim=True)).log()

    def _value(self, output: Tensor) -> Tensor:
        if not self.classes:
            return output
        chances = output.softmax(1)
        if self.how != "vote":
            return chances
        return nn.functional.one_hot(chances.argmax(1), output.shape[1]).to(chances.dtype)
