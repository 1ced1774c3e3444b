"""Layers → stages: where a graph may be cut, what crosses each cut, and the parts as graphs.

A cut i lies right behind node i. What lives there is what was made at or before i and is read
after it. It crosses the cut as tensors with one row per sample; whatever follows from weights, the
number of rows and the sizes of a sample alone (masks, positions) is not sent but computed again
behind the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import fx

from streaminfer.errors import CaptureError
from streaminfer.parallel.builder import Builder
from streaminfer.parallel.graph import Capture, expression, is_batched, is_rows
from streaminfer.parallel.mutation import written
from streaminfer.parallel.signature import Port, dtype_name
from streaminfer.parallel.weights import same_memory
from streaminfer.ranges import Range

__all__ = ["Cutter", "StageGraph", "port"]


@dataclass(frozen=True)
class StageGraph:
    """A stand-alone part of a model: placeholders = `inputs`, output = `outputs` in that order."""

    graph: fx.Graph
    weights: Mapping[str, torch.Tensor]  # by the name that its get_attr nodes target
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    layers: tuple[str, ...]
    origins: Mapping[str, fx.Node] = field(default_factory=dict)  # by name here: the model's node


def port(node: fx.Node, name: str = "", captured: Capture | None = None) -> Port:
    """Return the tensor that a node makes, as it crosses a cut; of `captured` sizes may vary."""
    val = node.meta["val"]
    shape = tuple(n if isinstance(n, int) else None for n in val.shape)
    dtype = dtype_name(val.dtype) or str(val.dtype)
    return Port(name or node.name, dtype, shape, _ranges(captured, val) if captured else ())


def _ranges(captured: Capture, val: torch.Tensor) -> tuple[Range | None, ...]:
    """Return what the sizes of a row lie between; of the input's own, what was declared."""
    if not any(map(captured.varies, val.shape[1:])):
        return ()
    ends = zip(captured.row(val.shape, smallest=True), captured.row(val.shape), strict=True)
    return tuple(
        (captured.sizes.get(expression(n)) or Range(low, high)) if captured.varies(n) else None
        for n, (low, high) in zip(val.shape[1:], ends, strict=True)
    )


class Cutter:
    """One captured model, and all ways to cut it."""

    def __init__(self, captured: Capture) -> None:
        self.captured = captured
        self._position = {node: i for i, node in enumerate(captured.nodes)}
        self._last_use = {node: self._last(node) for node in (*captured.inputs, *captured.nodes)}
        self._written: dict[fx.Node, list[int]] = {}  # alias class → where it is written
        for i, node in enumerate(captured.nodes):
            for value in written(node):
                self._written.setdefault(captured.aliases.root(value), []).append(i)
        self.free: set[fx.Node] = set()  # what follows from weights, the number of rows and sizes
        for node in captured.nodes:
            if self._is_free(node):
                self.free.add(node)
        if captured.kept is not None:
            self._last_use[captured.kept] = self._reach(captured.kept)

    def _last(self, node: fx.Node) -> int:
        end = len(self.captured.nodes)
        return max((self._position.get(user, end) for user in node.users), default=-1)

    def _is_free(self, node: fx.Node) -> bool:
        """Tell whether a value follows from weights, the number of rows and sizes alone."""
        if is_rows(node, self.captured.batch) or self._is_size(node):
            return True
        if self.captured.aliases.root(node) in self._written:
            return False  # what is written into it may be data
        return all(
            source.op == "get_attr" or source in self.free for source in node.all_input_nodes
        )

    def _is_size(self, node: fx.Node) -> bool:
        kept = self.captured.kept
        return kept is not None and kept in node.all_input_nodes

    def _reach(self, node: fx.Node) -> int:
        """Return the last use of a value, through what is computed of it anew behind a cut."""
        ends = [self._reach(user) for user in node.users if user in self.free]
        uses = [user for user in node.users if user not in self.free]
        end = len(self.captured.nodes)
        return max((*ends, *(self._position.get(user, end) for user in uses)), default=-1)

    def live(self, cut: int) -> list[fx.Node]:
        """Return what crosses a cut, in the order in which it was made."""
        made = (*self.captured.inputs, *self.captured.nodes[: cut + 1])
        return [n for n in made if self._last_use[n] > cut and n not in self.free]

    def valued(self, cut: int) -> list[fx.Node]:
        """Return what crosses a cut and has values: sizes of the input travel as a shape alone."""
        return [node for node in self.live(cut) if node is not self.captured.kept]

    def problem(self, cut: int) -> str:
        """Say why the graph may not be cut here; "" if it may."""
        live = self.live(cut)
        found = (f"{n.name!r} would cross, {why}" for n in live if (why := self.unfit(n)))
        return next(found, "" if live else "nothing crosses")

    def unfit(self, node: fx.Node) -> str:
        """Say why a value may not cross; "" if it may."""
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return "which is no tensor but a number or a list"
        if not is_batched(node, self.captured.batch):
            mixed = not any(isinstance(n, torch.SymInt) for n in val.shape)
            return f"whose shape {list(val.shape)} has no row per sample" + (
                ": it depends on the whole batch, and workers merge batches" if mixed else ""
            )
        if dtype_name(val.dtype) is None or val.layout != torch.strided:
            return f"whose type {val.dtype} cannot be sent"
        symbols = {symbol for n in val.shape[1:] for symbol in expression(n).free_symbols}
        if symbols - self.captured.sizes.keys():
            return "whose size per sample is not fixed"
        return ""

    @cached_property
    def legal(self) -> tuple[int, ...]:
        """All positions behind which the graph may be cut."""
        last = len(self.captured.nodes) - 1
        return tuple(i for i in range(last) if not self.problem(i) and self._keeps_writes(i))

    def _keeps_writes(self, cut: int) -> bool:
        """Tell whether no two tensors part here that share memory which is written later."""
        root = self.captured.aliases.root
        roots = [root(node) for node in self.live(cut)]
        return not any(
            roots.count(r) > 1 and any(at > cut for at in self._written.get(r, ())) for r in roots
        )

    def cuts(self, untils: Sequence[str]) -> list[int]:
        """Return the positions of cuts behind these layers, inclusive.

        Raises:
            CaptureError: an unknown layer, layers out of order, or a cut that is not possible;
                names what is.
        """
        found: list[int] = []
        for i, until in enumerate(untils):
            cut = self.captured.layers.find(until).last
            if found and cut <= found[-1]:
                raise CaptureError(
                    f"layer {until!r} does not end after {untils[i - 1]!r}, whose stage is earlier",
                    hint="stages follow the order of the model: streaminfer cut shows it",
                )
            if cut not in self.legal:
                raise CaptureError(
                    f"no cut behind {until!r}: {self._reason(cut)}", hint=self._near(cut)
                )
            found.append(cut)
        return found

    def _reason(self, cut: int) -> str:
        if cut >= len(self.captured.nodes) - 1:
            return "it ends the model, so no stage would follow"
        return (
            self.problem(cut) or "two tensors would part that share memory which is written later"
        )

    def _near(self, cut: int) -> str:
        ends = {
            y.last: y.path for y in reversed(list(self.captured.layers)) if y.last in self.legal
        }
        before = [path for last, path in sorted(ends.items()) if last < cut][-1:]
        after = [path for last, path in sorted(ends.items()) if last > cut][:1]
        names = [f"{p} (before)" for p in before] + [f"{p} (behind)" for p in after]
        return f"nearest layers to cut at: {', '.join(names)}" if names else "do not cut this model"

    def row_bytes(self, cut: int) -> int:
        """Return the bytes that cross a cut for one sample, of the largest size."""
        values, row = [node.meta["val"] for node in self.live(cut)], self.captured.row
        return sum(math.prod(row(v.shape)) * v.element_size() for v in values)

    def weights_before(self) -> list[int]:
        """Return, per position, the bytes of the weights that are read at or before it."""
        read: dict[tuple[object, ...], int] = {}
        totals: list[int] = []
        for node in self.captured.nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    tensor = self.captured.tensors[str(source.target)]
                    read[same_memory(tensor)] = tensor.nbytes
            totals.append(sum(read.values()))
        return totals

    def split(self, cuts: Iterable[int]) -> list[StageGraph]:
        """Cut the graph; the stages in order. Every cut must be one of `legal`."""
        edges = [-1, *sorted(cuts), len(self.captured.nodes) - 1]
        return [self.stage(first + 1, last) for first, last in pairwise(edges)]

    def inputs(self, first: int) -> list[fx.Node]:
        """Return what a stage that begins with this node reads."""
        return self.live(first - 1) if first else list(self.captured.inputs)

    def outputs(self, last: int) -> dict[str, fx.Node]:
        """Return what a stage that ends with this node gives, by name."""
        final = last == len(self.captured.nodes) - 1
        return dict(self.captured.outputs) if final else {n.name: n for n in self.live(last)}

    def written_by(self, first: int, last: int) -> set[fx.Node]:
        """Return the representatives of memory that these nodes write."""
        return {root for root, at in self._written.items() if any(first <= i <= last for i in at)}

    def stage(self, first: int, last: int) -> StageGraph:
        """Return nodes first to last as a stage; what crosses before and behind must be legal."""
        captured = self.captured
        inputs, outputs = self.inputs(first), self.outputs(last)
        written_here = self.written_by(first, last)
        copied = {node for node in inputs if captured.aliases.root(node) in written_here}
        builder = Builder(captured, inputs, copied)
        for node in captured.nodes[first : last + 1]:
            builder.copy(node)
        graph, weights = builder.finish(outputs.values())
        return StageGraph(
            graph,
            weights,
            tuple(port(node, "", captured) for node in inputs),
            tuple(port(node, name, captured) for name, node in outputs.items()),
            captured.layers.within(first, last),
            builder.origins(),
        )
