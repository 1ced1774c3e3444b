"""Operators and places: which box of its input a box of a result is made of, and the result of it.

    result            ┌──────┐              lo … hi
    input   ┌ ─ ─ ┬───┴──────┴───┐          lo·stride - before …
             padding    reads               (hi - 1)·stride - before + (kernel - 1)·dilation + 1

What is read beyond the border of the image is padding and made explicitly; what is read beyond
the border of a tile is halo and cut out of the neighbours' places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch._ops import OpOverload

from streaminfer.parallel.operators import arguments
from streaminfer.parallel.spatial.tile import Box, Size, Span, Tile, map_size

__all__ = [
    "Adaptive",
    "Averaged",
    "Item",
    "Local",
    "Mirrored",
    "Padded",
    "Rule",
    "Window",
    "Windowed",
    "Zoomed",
    "bind",
    "operator_name",
    "size_of",
    "source_of",
]

aten = torch.ops.aten


class Rule(Protocol):
    """How an operator computes a box of its result."""

    def need(self, box: Box, size: Size) -> Box:
        """Return the box of an operand, whose map has that size, that a box is made of."""
        ...

    def emit(self, tile: Tile, node: fx.Node, box: Box) -> tuple[fx.Node, Box]:
        """Add the operator to a tile; return its value and the box it holds, at least `box`."""
        ...


def operator_name(node: fx.Node) -> str:
    """Return "conv2d" for aten.conv2d.default."""
    target = node.target
    if isinstance(target, OpOverload):
        return target._schema.name.removeprefix("aten::")
    return getattr(target, "__name__", str(target))


def bind(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by name, those left out with their defaults."""
    assert isinstance(node.target, OpOverload)  # noqa: S101 - the caller knows the operator
    wanted = node.target._schema.arguments
    given = arguments(node.target, node.args, node.kwargs) or {}
    return {a.name: a.default_value for a in wanted if a.has_default_value()} | given


def source_of(node: fx.Node) -> fx.Node:
    """Return the first argument: what a window slides over."""
    source = node.args[0]
    assert isinstance(source, fx.Node)  # noqa: S101 - as the schemas of the operators here say
    return source


def size_of(node: fx.Node) -> Size:
    """Return rows and columns of a map."""
    size = map_size(node)
    assert size is not None  # noqa: S101 - the caller has seen to it
    return size


def _both(rows: Span, columns: Span) -> Box:
    return rows, columns


# ---- place by place ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Local:
    """Each place of the result is made of the same place of the maps."""

    broadcast: bool  # operands follow the rules of broadcasting, also those that are no maps

    def need(self, box: Box, size: Size) -> Box:
        """Return the same box, or all of what is broadcast."""
        rows, columns = ((0, 1) if n == 1 else span for span, n in zip(box, size, strict=True))
        return rows, columns

    def emit(self, tile: Tile, node: fx.Node, box: Box) -> tuple[fx.Node, Box]:
        """Crop the operands at joins."""

        def operand(source: fx.Node) -> fx.Node:
            size = map_size(source)
            need = box if size is None else self.need(box, size)
            if self.broadcast:
                return tile.operand(source, need, size_of(node))
            return tile.window(source, need) if source is node.args[0] else source

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operand)
        return tile.call(node.target, *args, **kwargs), box


@dataclass(frozen=True)
class Item:
    """One map of a list."""

    def need(self, box: Box, size: Size) -> Box:
        """Return the same box."""
        return box

    def emit(self, tile: Tile, node: fx.Node, box: Box) -> tuple[fx.Node, Box]:
        """Take it as large as the list has it."""
        maps = source_of(node)
        return tile.item(maps, node.args[1]), tile.box(maps)


# ---- windows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A window that slides along rows or columns."""

    kernel: int
    stride: int
    before: int  # padding in front of the first place
    dilation: int
    size: int  # of the input
    result: int
    symmetric: bool = True  # the operator itself can pad so

    def native(self, span: Span) -> bool:
        """Tell whether the operator may pad by itself: the tile goes from border to border."""
        return self.symmetric and span == (0, self.result)

    def reach(self, span: Span) -> Span:
        """Return what a span of the result is made of; lies beyond the input where it is padded."""
        low = span[0] * self.stride - self.before
        last = (span[1] - 1) * self.stride - self.before
        return low, last + (self.kernel - 1) * self.dilation + 1

    def reads(self, span: Span) -> Span:
        """Return what the operator is to be given for a span."""
        return (0, self.size) if self.native(span) else self.reach(span)

    def need(self, span: Span) -> Span:
        """Return what it reads of the input: one place at least."""
        low, high = self.reads(span)
        first = min(max(low, 0), self.size - 1)
        return first, max(min(high, self.size), first + 1)

    def padding(self, span: Span) -> int:
        """Return what is left for the operator to pad."""
        return self.before if self.native(span) else 0

    def counts(self, span: Span, include_pad: bool) -> list[int]:
        """Return over how many places the mean at each place of the result is taken."""
        found = []
        for at in range(*span):
            start = at * self.stride - self.before
            end = min(start + self.kernel, self.size + self.before)
            found.append(end - start if include_pad else min(end, self.size) - max(start, 0))
        return found


@dataclass(frozen=True)
class Windowed:
    """Convolution and maximum: a window, with a fill that changes nothing beyond the border."""

    rows: Window
    columns: Window
    target: OpOverload
    fill: float

    def need(self, box: Box, size: Size) -> Box:
        """Return what the window reads within the image."""
        return self.rows.need(box[0]), self.columns.need(box[1])

    def _window(self, tile: Tile, node: fx.Node, box: Box) -> fx.Node:
        reads = self.rows.reads(box[0]), self.columns.reads(box[1])
        return tile.window(source_of(node), reads, self.fill)

    def emit(self, tile: Tile, node: fx.Node, box: Box) -> tuple[fx.Node, Box]:
        """Cut out or pad what is read, then leave to the operator what it pads itself."""
        bound = bind(node)
        first = next(iter(self.target._schema.arguments)).name
        padding = [self.rows.padding(box[0]), self.columns.padding(box[1])]
        bound |= {first: self._window(tile, node, box), "padding": padding}
        return tile.invoke(self.target, bound), box


@dataclass(frozen=True)
class Averaged(Windowed):
    """A mean over a window; what it is divided by is smaller at the border."""

    def emit(self, tile: Tile, node: fx.Node, box: Box) -> tuple[fx.Node, Box]:
        """Leave the division to the operator where it knows by what; else sum, and divide."""
        bound = bind(node)
        axes = [(self.rows, box[0]), (self.columns, box[1])]
        unpadded = all(axis.reads(span) == axis.need(span) for axis, span in axes)
        pads_count = bool(bound["count_include_pad"])
        counts = [axis.counts(span, pads_count) for axis, span in axes]
        even = [axis.kernel for axis, _ in axes] == [n for c in counts for n in set(c)]
        if unpadded or bound["divisor_override"] is not None or (even and pads_count):
            return super().emit(tile, node, box)
        reach = _both(*(axis.reach(span) for axis, span in axes))
        kernel, stride = zip(*((axis.kernel, axis.stride) for axis, _ in axes), strict=True)
        # divided by 1: a sum
        padded = tile.window(source_of(node), reach)
        total = tile.call(self.target, padded, [*kernel], [*stride], [0, 0], False, True, 1)
        divisor = torch.tensor(counts[0]).view(-1, 1) * torch.tensor(counts[1])
        name = f"{node.name}_counts_{box[0][0]}_{box[1][0]}"
        counted = tile.constant(name, divisor.to(node.meta["val"].dtype))
        return tile.call(aten.div.Tensor, total, counted), box


@dataclass(frozen=True)
class Adaptive(Windowed):
    """A mean over windows that lie side by side: their size follows from the map's."""

    def emit(self, tile: Tile, node: fx.Node, box: Box) -> tuple[fx.Node, Box]:
        """Take the mean over windows of that size."""
        cut = self._window(tile, node, box)
        kernel = [self.rows.kernel, self.columns.kernel]
        return (cut if kernel == [1, 1] else tile.call(self.target, cut, kernel, kernel)), box


@dataclass(frozen=True)
class Mirrored:
    """Padding that repeats the image at its border."""

    before: tuple[int, int]
    mode: str  # reflect | replicate

    def _need(self, span: Span, before: int, size: int) -> Span:
        low, high = span[0] - before, span[1] - before
        first, last = min(max(low, 0), size - 1), max(min(high, size), 1)
        edge = 1 if self.mode == "reflect" else 0  # what is mirrored does not repeat the border
        if low < 0:
            first, last = 0, max(last, -low + 1 if edge else 1)
        if high > size:
            first, last = min(first, 2 * size - 1 - high if edge else size - 1), size
        return first, max(last, first + 1)

    def need(self, box: Box, size: Size) -> Box:
        """Return the box with what is mirrored into it."""
        rows, columns = map(self._need, box, self.before, size)
        return rows, columns

    def emit(self, tile: Tile, node: fx.Node, box: Box) -> tuple[fx.Node, Box]:
        """Pad at the borders of the image that the tile touches."""
        source = source_of(node)
        size = size_of(source)
        need = self.need(box, size)
        beyond = [
            (max(before - low, 0), max(high - before - n, 0))
            for (low, high), before, n in zip(box, self.before, size, strict=True)
        ]
        cut = tile.window(source, need)
        made = tile.call(aten.pad.default, cut, [*beyond[1], *beyond[0]], self.mode)
        rows, columns = (
            (low - front + before, high + back + before)
            for (low, high), (front, back), before in zip(need, beyond, self.before, strict=True)
        )
        return made, (rows, columns)


@dataclass(frozen=True)
class Padded:
    """Padding with a number; negative padding cuts off."""

    before: tuple[int, int]
    fill: float

    def need(self, box: Box, size: Size) -> Box:
        """Return what is no padding: one place at least."""
        rows, columns = (
            Window(1, 1, before, 1, n, -1).need(span)
            for span, before, n in zip(box, self.before, size, strict=True)
        )
        return rows, columns

    def emit(self, tile: Tile, node: fx.Node, box: Box) -> tuple[fx.Node, Box]:
        """Pad at the borders of the image that the tile touches."""
        rows, columns = (
            (low - before, high - before)
            for (low, high), before in zip(box, self.before, strict=True)
        )
        return tile.window(source_of(node), _both(rows, columns), self.fill), box


@dataclass(frozen=True)
class Zoomed:
    """Upsampling by whole factors."""

    factors: tuple[int, int]
    linear: bool  # between the places of the input

    def _need(self, span: Span, factor: int, size: int) -> Span:
        if not self.linear:
            return span[0] // factor, (span[1] - 1) // factor + 1
        # place i of the result lies at (i + 1/2) / factor - 1/2 of the input
        first, last = ((2 * i + 1 - factor) // (2 * factor) for i in (span[0], span[1] - 1))
        return max(first, 0), min(last + 2, size)

    def need(self, box: Box, size: Size) -> Box:
        """Return the places that are drawn larger."""
        rows, columns = map(self._need, box, self.factors, size)
        return rows, columns

    def emit(self, tile: Tile, node: fx.Node, box: Box) -> tuple[fx.Node, Box]:
        """Draw what is needed larger; it may be more than the box."""
        source = source_of(node)
        need = self.need(box, size_of(source))
        cut = tile.window(source, need)
        scales = [float(f) for f in self.factors]
        packet = getattr(aten, operator_name(node))
        shape = [None, False, scales] if self.linear else [None, scales]
        rows, columns = (
            (low * f, high * f) for (low, high), f in zip(need, self.factors, strict=True)
        )
        return tile.call(packet.vec, cut, *shape), (rows, columns)
