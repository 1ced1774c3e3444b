"""A model as a graph: what `capture` makes and the rest of this folder reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from streaminfer.parallel.layers import Layers
from streaminfer.parallel.mutation import Aliases

__all__ = ["Capture", "is_batched", "is_rows"]


@dataclass(frozen=True)
class Capture:
    """A model as a graph. A position is an index into `nodes`: cut i lies right behind node i."""

    nodes: tuple[fx.Node, ...]  # what computes, in order
    inputs: tuple[fx.Node, ...]  # placeholders of tensors
    outputs: Mapping[str, fx.Node]  # by the name the model gives them; "output" if there is one
    tensors: Mapping[str, torch.Tensor]  # parameters, buffers, constants
    layers: Layers
    aliases: Aliases

    @property
    def batch(self) -> torch.SymInt:
        """The symbol that stands for the number of rows."""
        size = self.inputs[0].meta["val"].shape[0]
        assert isinstance(size, torch.SymInt)  # noqa: S101 - capture() refuses the rest
        return size


def is_batched(node: fx.Node, batch: torch.SymInt) -> bool:
    """Tell whether a node's value is a tensor with one row per sample."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dim() > 0 and _equal(val.shape[0], batch)


def is_rows(node: fx.Node, batch: torch.SymInt) -> bool:
    """Tell whether a node's value is the number of rows."""
    return _equal(node.meta.get("val"), batch)


def _equal(size: object, batch: torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr == batch.node.expr)
