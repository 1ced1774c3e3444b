"""A model as a graph: what `capture` makes and the rest of this folder reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from streaminfer.parallel.layers import Layers
from streaminfer.parallel.mutation import Aliases
from streaminfer.ranges import Range

__all__ = ["Capture", "Varying", "expression", "is_batched", "is_rows"]

Varying = Mapping[Any, Range]  # sympy's symbols of sizes that differ from sample to sample


@dataclass(frozen=True)
class Capture:
    """A model as a graph. A position is an index into `nodes`: cut i lies right behind node i."""

    nodes: tuple[fx.Node, ...]  # what computes, in order
    inputs: tuple[fx.Node, ...]  # placeholders of tensors
    outputs: Mapping[str, fx.Node]  # by the name the model gives them; "output" if there is one
    tensors: Mapping[str, torch.Tensor]  # parameters, buffers, constants
    layers: Layers
    aliases: Aliases
    sizes: Varying = field(default_factory=dict)
    kept: fx.Node | None = None  # has sizes of the input as its shape, for what asks for them

    def row(self, shape: Sequence[int | torch.SymInt], *, smallest: bool = False) -> list[int]:
        """Return the shape of one sample of a tensor [rows, …], at the largest input.

        A size that nothing bounds counts as 1.
        """
        at = {s: given.low if smallest else given.high for s, given in self.sizes.items()}
        found = [expression(n).subs(at) for n in shape[1:]]
        return [int(n.subs(dict.fromkeys(n.free_symbols, 1))) for n in found]

    def varies(self, size: int | torch.SymInt) -> bool:
        """Tell whether a size follows from those of the sample alone."""
        symbols = expression(size).free_symbols
        return bool(symbols) and bool(symbols <= self.sizes.keys())

    @property
    def batch(self) -> torch.SymInt:
        """The symbol that stands for the number of rows."""
        size = self.inputs[0].meta["val"].shape[0]
        assert isinstance(size, torch.SymInt)  # noqa: S101 - capture() refuses the rest
        return size


def expression(size: int | torch.SymInt) -> Any:
    """Return a size as sympy's expression of the symbols that torch has for sizes of the input."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def is_batched(node: fx.Node, batch: torch.SymInt) -> bool:
    """Tell whether a node's value is a tensor with one row per sample."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dim() > 0 and _equal(val.shape[0], batch)


def is_rows(node: fx.Node, batch: torch.SymInt) -> bool:
    """Tell whether a node's value is the number of rows."""
    return _equal(node.meta.get("val"), batch)


def _equal(size: object, batch: torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr == batch.node.expr)
