"""A tile's graph while it is made: which box of a map each value holds, and how a box is cut out.

A box counts rows and columns of the whole map, so that all tiles speak of the same places:

    (0, 0)──────────────┐ the map, 8 rows of 12
      │    ┌───────┐    │
      │    │       │    │ ((2, 6), (4, 9)): rows 2 to 5, columns 4 to 8
      │    └───────┘    │
      └─────────────────┘ (8, 12)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload

from streaminfer.parallel.builder import Builder
from streaminfer.parallel.capture import Capture
from streaminfer.parallel.pipeline import StageGraph, port
from streaminfer.parallel.signature import Port

__all__ = [
    "Box",
    "Output",
    "Size",
    "Span",
    "Tile",
    "area",
    "crop",
    "map_size",
    "port_of_box",
    "shares",
    "union",
]

Span = tuple[int, int]  # from, to (not included)
Box = tuple[Span, Span]  # rows, columns
Size = tuple[int, int]  # rows, columns
AXES = (2, 3)  # of [samples, channels, rows, columns]

aten = torch.ops.aten


class Output(NamedTuple):
    """What a graph under construction gives: a node of it, and what it is outside."""

    made: fx.Node
    port: Port


def shares(size: int, parts: int) -> list[Span]:
    """Cut a length into parts as equal as possible."""
    edges = [size * k // parts for k in range(parts + 1)]
    return list(pairwise(edges))


def union(one: Box | None, other: Box) -> Box:
    """Return the smallest box around both."""
    if one is None:
        return other
    rows, columns = ((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one, other, strict=True))
    return rows, columns


def area(box: Box) -> int:
    """Return the places in a box."""
    (top, bottom), (left, right) = box
    return (bottom - top) * (right - left)


def map_size(node: fx.Node) -> Size | None:
    """Return rows and columns of [samples, channels, rows, columns], or a list of such; or None."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor) or value.dim() != len(AXES) + 2:
        return None
    rows, columns = value.shape[2:]
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None


def crop(graph: fx.Graph, made: fx.Node, box: Box, have: Box) -> fx.Node:
    """Cut a box out of a box, as a copy.

    What it was cut from can then be freed, and kernels find it where they want it.
    """
    view = _view(graph, made, box, have)
    layout: dict[str, Any] = {"memory_format": torch.contiguous_format}
    return made if view is made else graph.call_function(aten.clone.default, (view,), layout)


def _view(graph: fx.Graph, made: fx.Node, box: Box, have: Box) -> fx.Node:
    for axis, span, whole in zip(AXES, box, have, strict=True):
        made = _narrow(graph, made, axis, span, whole)
    return made


def _narrow(graph: fx.Graph, made: fx.Node, axis: int, span: Span, have: Span) -> fx.Node:
    if span == have:
        return made
    start, end = span[0] - have[0], span[1] - have[0]
    return graph.call_function(aten.slice.Tensor, (made, axis, start, end))


def port_of_box(node: fx.Node, name: str, box: Box) -> Port:
    """Return a box of a map as it crosses a cut."""
    (top, bottom), (left, right) = box
    whole = port(node, name)
    return whole._replace(shape=(*whole.shape[:2], bottom - top, right - left))


class Tile(Builder):
    """A graph in which a value may be a box of a map instead of all of it."""

    def __init__(self, captured: Capture) -> None:
        super().__init__(captured, (), ())
        self._boxes: dict[fx.Node, Box] = {}  # of the values that are not whole
        self._ports: list[Port] = []

    def take(self, node: fx.Node, name: str) -> fx.Node:
        """Take a whole value in."""
        made = self._placeholder(port(node, name))
        self._inputs[node] = made
        return made

    def take_box(self, node: fx.Node, name: str, box: Box) -> None:
        """Take a box of a map in."""
        made = self._placeholder(port_of_box(node, name, box))
        self._inputs.setdefault(node, made)  # it has the rows, as any input
        self.put(node, made, box)

    def take_part(self, port: Port) -> fx.Node:
        """Take in what another graph has made."""
        made = self._placeholder(port)
        self._inputs.setdefault(made, made)
        return made

    def _placeholder(self, port: Port) -> fx.Node:
        made = self._graph.placeholder(port.name)
        assert made.name == port.name  # noqa: S101 - inputs come before all else, names are unique
        self._ports.append(port)
        return made

    def put(self, node: fx.Node, made: fx.Node, box: Box | None = None) -> None:
        """Say what stands for a value from here on, and which box of it that is."""
        self._made[node] = made
        if box is not None:
            self._boxes[node] = box

    def box(self, node: fx.Node) -> Box:
        """Return the box of a map that is here."""
        return self._boxes[node]

    def value(self, node: fx.Node) -> fx.Node:
        """Return what stands for a value; copies it along if it follows from what is here."""
        return self._value(node)

    def operand(self, node: fx.Node, need: Box, size: Size) -> fx.Node:
        """Return the part of an operand that meets a box of a result of that size.

        A weight of the result's size is cropped like a map; what is broadcast stays.
        """
        value = node.meta.get("val")
        if node in self._boxes or not isinstance(value, torch.Tensor):
            if node not in self._boxes:
                return self._value(node)
            return _view(self._graph, self._made[node], need, self._boxes[node])
        made = self._value(node)
        for axis, span, whole in zip((-2, -1), need, size, strict=True):
            at = value.dim() + axis
            if at >= 0 and value.shape[at] == whole and whole > 1:
                made = _narrow(self._graph, made, at, span, (0, whole))
        return made

    def window(self, node: fx.Node, box: Box, fill: float = 0.0) -> fx.Node:
        """Return a box that may reach beyond the map, filled up there, with memory of its own."""
        have = self._boxes[node]
        pads: list[int] = []
        for (low, high), (first, last) in zip(reversed(box), reversed(have), strict=True):
            outside = low >= last or high <= first  # nothing but padding
            pads += [high - low, first - last] if outside else [first - low, high - last]
        if not any(pads):
            return self._made[node]
        if max(pads) <= 0:
            return crop(self._graph, self._made[node], box, have)
        # one copy: what is negative is cut off
        return self._graph.call_function(
            aten.constant_pad_nd.default, (self._made[node], pads, fill)
        )

    def call(self, target: object, *args: Any, **kwargs: Any) -> fx.Node:
        """Call an operator on values of the model or of this graph; arguments by the schema."""
        assert isinstance(target, OpOverload)  # noqa: S101 - the caller names it
        mine = fx.map_arg((args, kwargs), lambda n: n if n.graph is self._graph else self._value(n))
        return self._graph.call_function(target, *mine)

    def invoke(self, target: OpOverload, bound: Mapping[str, Any]) -> fx.Node:
        """Call an operator by its arguments' names."""
        schema = target._schema.arguments
        placed = [a for a in schema if not a.kwarg_only]
        while placed and placed[-1].name not in bound:
            placed.pop()
        args = [bound.get(a.name, a.default_value) for a in placed]
        named = {a.name: bound[a.name] for a in schema if a.kwarg_only and a.name in bound}
        return self.call(target, *args, **named)

    def join(self, pieces: Sequence[fx.Node], axis: int) -> fx.Node:
        """Concatenate pieces of a map."""
        if len(pieces) == 1:
            return pieces[0]
        return self._graph.call_function(aten.cat.default, (list(pieces), axis))

    def item(self, node: fx.Node, index: Any) -> fx.Node:
        """Take a map out of a list of maps."""
        return self._graph.call_function(operator.getitem, (self._made[node], index))

    def constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Add a tensor to the weights."""
        self._weights[name] = tensor
        return self._graph.create_node("get_attr", name)

    def end(self, outputs: Sequence[Output], layers: tuple[str, ...]) -> StageGraph:
        """End the graph with these outputs."""
        self._graph.output(tuple(output.made for output in outputs))
        self._graph.eliminate_dead_code()
        read = [str(node.target) for node in self._graph.nodes if node.op == "get_attr"]
        return StageGraph(
            self._graph,
            {name: self._weights[name] for name in read},
            tuple(self._ports),
            tuple(output.port for output in outputs),
            layers,
        )
