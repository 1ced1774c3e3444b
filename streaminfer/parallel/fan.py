"""A stage as parts that run side by side: what each gets, what each does, how it comes together.

    stage inputs ──▶ scatter ──▶ part 0 ──▶ gather ──▶ stage outputs
                            └──▶ part 1 ──┘

Every way of splitting a stage gives a Fan: its algebra stands in graphs (slices, concatenations,
sums), so that whoever runs it only moves tensors by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streaminfer.parallel.pipeline import StageGraph
from streaminfer.parallel.signature import Port

__all__ = ["Fan"]


@dataclass(frozen=True)
class Fan:
    """A split stage. Names of tensors are what joins its graphs.

    A part's inputs are outputs of `scatter`, or inputs of the stage where there is no `scatter`;
    the same tensor may go to many parts. No two parts have an output of the same name. The inputs
    of `gather` are outputs of parts; its outputs are the stage's, in order and by name. What the
    stage only passes on (a skip connection over it) goes through part 0.
    """

    scatter: StageGraph | None
    parts: tuple[StageGraph, ...]
    gather: StageGraph

    def inputs(self) -> Sequence[Port]:
        """Return what all parts read, without repeats, in the order of the parts."""
        return tuple({port.name: port for part in self.parts for port in part.inputs}.values())
