"""A stage split by channels: each part holds its slices of the weights (tensor parallelism).

                    ┌─▶ conv1.weight.0of2 ─ relu ─ conv2.weight.0of2 ─▶ z_0of2 ─┐
    stage inputs ──▶┤                                                           ├─▶ z ─ relu ──▶
                    └─▶ conv1.weight.1of2 ─ relu ─ conv2.weight.1of2 ─▶ z_1of2 ─┘
    (scatter, form "in")             parts                                        gather

Numbers: shards of output channels have the bits of the whole wherever a kernel computes a channel
alike for any number of them; sums are within rounding, and always added in the order of the parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from streaminfer.errors import CaptureError
from streaminfer.parallel.builder import Builder
from streaminfer.parallel.capture import Capture
from streaminfer.parallel.fan import Fan
from streaminfer.parallel.layers import path_of
from streaminfer.parallel.pipeline import Cutter, StageGraph, port
from streaminfer.parallel.signature import Port
from streaminfer.parallel.tensor.layout import Form, Layout, lay_out
from streaminfer.parallel.tensor.placement import (
    Call,
    Joined,
    Partial,
    RefusedError,
    Sharded,
    Share,
    Take,
    Whole,
    shape_of,
    width,
)
from streaminfer.parallel.weights import aligned, same_memory

__all__ = ["channels_problem", "split_channels"]

_ATEN = torch.ops.aten
_TRIES = 40  # layers that are looked at for one at which the split would work


def split_channels(cutter: Cutter, first: int, last: int, parts: int, form: Form = "auto") -> Fan:
    """Split the stage of nodes first to last by channels.

    Args:
        cutter: of the model.
        first: position of the stage's first node; the cut before it must be legal.
        last: of its last, inclusive; the cut behind it must be legal.
        parts: how many, at least 2. Channels go to them as equally as possible.
        form: "auto" gives each part output channels of the first layer, "in" input channels: then
            the stage's input is scattered, and each part is sent its channels only.

    Raises:
        CaptureError: the algebra forbids it; names the layer, why, and the nearest that works.
    """
    try:
        layout = lay_out(cutter, first, last, parts, form)
    except RefusedError as refused:
        stage = ", ".join(cutter.captured.layers.within(first, last))
        raise CaptureError(
            f"the stage of {stage} cannot be split by channels: {refused}",
            hint=_remedy(cutter, (first, last), parts, form, refused),
        ) from None
    return _Weaver(cutter, first, last, parts, layout).fan()


def channels_problem(cutter: Cutter, first: int, last: int, parts: int, form: Form = "auto") -> str:
    """Say why a stage may not be split by channels; "" if it may. Costs a pass over its nodes."""
    try:
        lay_out(cutter, first, last, parts, form)
    except RefusedError as refused:
        return str(refused)
    return ""


def _remedy(
    cutter: Cutter, span: tuple[int, int], parts: int, form: Form, refused: RefusedError
) -> str:
    """Name what was tried and works: fewer parts, another end, another form."""
    tried = [n for n in refused.instead if n > 1 and not channels_problem(cutter, *span, n, form)]
    if tried:
        return ", or ".join(f"parts: {n}" for n in tried)
    end, begin = _nearest(cutter, *span, max(parts, 2), form)
    other = "form: auto" if form == "in" and not channels_problem(cutter, *span, parts) else ""
    found = ", or ".join(filter(None, (end, other, begin)))
    return found or "no stage near it can be split so: replicas share its work by samples"


def _nearest(cutter: Cutter, first: int, last: int, parts: int, form: Form) -> tuple[str, str]:
    """Say where the stage could end, and where begin, to be split; "" for what was not found."""
    final = len(cutter.captured.nodes) - 1
    names: dict[int, str] = {}  # of layers that end at one point, the outermost
    for layer in cutter.captured.layers:
        if layer.last in cutter.legal or layer.last == final:
            known = names.setdefault(layer.last, layer.path)
            names[layer.last] = min(known, layer.path, key=len)
    earlier = [end for end in sorted(names, reverse=True) if first <= end < last]
    ends = [*earlier, *(end for end in sorted(names) if end > last)][:_TRIES]
    begins = [cut for cut in sorted(names) if first <= cut < last][:_TRIES]
    end = next((n for n in ends if not channels_problem(cutter, first, n, parts, form)), None)
    cut = next((n for n in begins if not channels_problem(cutter, n + 1, last, parts, form)), None)
    return (
        "" if end is None else f"end the stage at {names[end]}",
        "" if cut is None else f"begin the stage behind {names[cut]}",
    )


class _Weaver:
    """Makes the graphs of one layout."""

    def __init__(self, cutter: Cutter, first: int, last: int, parts: int, layout: Layout) -> None:
        self._captured, self._layout, self._parts = cutter.captured, layout, parts
        self._inputs, self._outputs = cutter.inputs(first), cutter.outputs(last)
        self._layers = cutter.captured.layers.within(first, last)
        root, memory = cutter.captured.aliases.root, cutter.written_by(first, last)
        self._writes = bool(memory)
        self._copied = {n for n in (*self._inputs, *layout.crossing) if root(n) in memory}

    def fan(self) -> Fan:
        parts = tuple(self._part(i) for i in range(self._parts))
        scattered = any(isinstance(self._layout[n], Sharded) for n in self._inputs)
        return Fan(self._scatter(parts) if scattered else None, parts, self._gather())

    def _port(self, node: fx.Node, part: int) -> Port:
        """Return what a part is sent or gives of a value."""
        place, whole = self._layout[node], port(node, "", self._captured)
        if isinstance(place, Whole):
            return whole
        shape = list(whole.shape)
        if isinstance(place, Sharded):
            size = shape[place.dim]
            shape[place.dim] = None if size is None else place.shares()[part].of(size)
        return whole._replace(name=f"{node.name}_{part}of{self._parts}", shape=tuple(shape))

    def _given(self, part: int) -> list[fx.Node]:
        """Return what a part gives: what all of them have comes from the first."""
        whole = {n for n in self._layout.crossing if isinstance(self._layout[n], Whole)}
        return [n for n in self._layout.crossing if part == 0 or n not in whole]

    def _part(self, part: int) -> StageGraph:
        layout = self._layout
        sent = {node: self._port(node, part) for node in self._inputs}
        shards = {n for n in self._inputs if isinstance(layout[n], Sharded)}
        builder = _PartBuilder(self._captured, sent, shards, self._copied, (part, self._parts))
        for node in layout.nodes:
            if node in layout.steps:
                builder.put(node, layout.steps[node].parts[part])
            elif self._writes and isinstance(layout[node], Whole):
                builder.copy(node)  # else it is made when it is read, by the parts that read it
        given = self._given(part)
        graph, weights = builder.finish(given)
        for node in graph.find_nodes(op="placeholder"):
            if not node.users:
                graph.erase_node(node)
        read = {node.name for node in graph.find_nodes(op="placeholder")}
        return StageGraph(
            graph,
            weights,
            tuple(p for p in sent.values() if p.name in read),
            tuple(self._port(node, part) for node in given),
            self._layers,
        )

    def _scatter(self, parts: Sequence[StageGraph]) -> StageGraph:
        """Slice the inputs that go to the parts in shards; the others go on as they are."""
        graph = fx.Graph()
        made: dict[str, fx.Node] = {}
        for node in self._inputs:
            sent, place = graph.placeholder(node.name), self._layout[node]
            if isinstance(place, Whole):
                made[node.name] = sent
                continue
            assert isinstance(place, Sharded)  # noqa: S101 - inputs are nothing else
            for i, share in enumerate(place.shares()):
                blocked = share.repeats(shape_of(node)[place.dim])
                taken = _taken(graph, sent, place.dim, share, own=True, blocked=blocked)
                made[self._port(node, i).name] = taken
        read = {p.name: p for part in parts for p in part.inputs}
        graph.output(tuple(made[name] for name in read))
        graph.eliminate_dead_code()
        inputs = tuple(port(node, "", self._captured) for node in self._inputs)
        return StageGraph(graph, {}, inputs, tuple(read.values()), ())

    def _gather(self) -> StageGraph:
        """Join what the parts give, and compute what they could not."""
        crossing = self._layout.crossing
        tail = Builder(self._captured, crossing, self._copied)
        behind = [n for n in self._layout.nodes if isinstance(self._layout[n], Joined)]
        for node in behind:
            tail.copy(node)
        rest, weights = tail.finish(self._outputs.values())
        graph = fx.Graph()
        given = [(i, node) for i in range(self._parts) for node in self._given(i)]
        sent = {(i, n): graph.placeholder(self._port(n, i).name) for i, n in given}
        values: dict[fx.Node, Any] = {}
        for node, inner in zip(crossing, rest.find_nodes(op="placeholder"), strict=True):
            pieces = [sent[i, node] for i in range(self._parts) if (i, node) in sent]
            values[inner] = self._join(graph, node, pieces)
        graph.output(graph.graph_copy(rest, values))
        return StageGraph(
            graph,
            weights,
            tuple(self._port(n, i) for i, n in given),
            tuple(port(node, name, self._captured) for name, node in self._outputs.items()),
            tuple(dict.fromkeys(path for n in behind if (path := path_of(n)))),
        )

    def _join(self, graph: fx.Graph, node: fx.Node, pieces: Sequence[fx.Node]) -> fx.Node:
        place = self._layout[node]
        if isinstance(place, Partial):
            total = pieces[0]
            for piece in pieces[1:]:
                total = graph.call_function(_ATEN.add.Tensor, (total, piece))
            return total
        if isinstance(place, Sharded):
            blocked = place.shares()[0].repeats(shape_of(node)[place.dim])
            return _concatenated(graph, place, pieces, blocked=blocked)
        return pieces[0]


def _concatenated(
    graph: fx.Graph, place: Sharded, pieces: Sequence[fx.Node], *, blocked: bool
) -> fx.Node:
    """Put shards together in channel order, block by block where there are several."""
    dim, found = place.dim, list[tuple[int, fx.Node]]()
    for piece, ranges in zip(pieces, place.ranges, strict=True):
        if blocked:
            piece = _blocks(graph, piece, dim, width(ranges))
        at = 0
        for start, end in ranges:
            span = (at, at + end - start)
            at = span[1]
            taken = piece if len(ranges) == 1 else _slice(graph, piece, dim + blocked, span)
            found.append((start, taken))
    ordered = [piece for _, piece in sorted(found, key=lambda item: item[0])]
    whole = graph.call_function(_ATEN.cat.default, (ordered, dim + blocked))
    return _merged(graph, whole, dim) if blocked else whole


def _taken(
    graph: fx.Graph, value: fx.Node, dim: int, share: Share, *, own: bool, blocked: bool
) -> fx.Node:
    """Take a share of a dimension, of each of its blocks where there are several."""
    source = _blocks(graph, value, dim, share.size) if blocked else value
    pieces = [_slice(graph, source, dim + blocked, span) for span in share.ranges]
    if len(pieces) > 1:
        taken = graph.call_function(_ATEN.cat.default, (pieces, dim + blocked))
    else:
        taken = graph.call_function(_ATEN.clone.default, (pieces[0],)) if own else pieces[0]
    return _merged(graph, taken, dim) if blocked else taken


def _slice(graph: fx.Graph, value: fx.Node, dim: int, span: tuple[int, int]) -> fx.Node:
    return graph.call_function(_ATEN.slice.Tensor, (value, dim, *span))


def _blocks(graph: fx.Graph, value: fx.Node, dim: int, size: int) -> fx.Node:
    return graph.call_function(_ATEN.unflatten.int, (value, dim, [-1, size]))


def _merged(graph: fx.Graph, value: fx.Node, dim: int) -> fx.Node:
    return graph.call_function(_ATEN.flatten.using_ints, (value, dim, dim + 1))


class _PartBuilder(Builder):
    """Builds one part: copies what is whole, computes its share of the rest."""

    def __init__(
        self,
        captured: Capture,
        sent: Mapping[fx.Node, Port],
        shards: Collection[fx.Node],
        written: Collection[fx.Node],
        part: tuple[int, int],
    ) -> None:
        super().__init__(captured, (), written)
        self._shards, self._suffix = shards, "{}of{}".format(*part)
        self._inputs = {n: self._graph.placeholder(port.name) for n, port in sent.items()}
        self._slices: dict[tuple[object, ...], fx.Node] = {}

    def put(self, node: fx.Node, call: Call) -> None:
        """Compute a part's share of a node."""
        self._made[node] = self._called(call, node.name)

    def _called(self, call: Call, name: str | None = None) -> fx.Node:
        args, kwargs = fx.node.map_aggregate((call.args, dict(call.kwargs)), self._realised)
        return self._graph.create_node("call_function", call.target, args, kwargs, name)

    def _realised(self, leaf: object) -> Any:
        if isinstance(leaf, fx.Node):
            return self._value(leaf)
        if isinstance(leaf, Call):
            return self._called(leaf)
        return self._take(leaf) if isinstance(leaf, Take) else leaf

    def _take(self, take: Take) -> fx.Node:
        if take.node.op != "get_attr":
            blocked = take.share.repeats(shape_of(take.node)[take.dim])
            value = self._value(take.node)
            return _taken(self._graph, value, take.dim, take.share, own=take.own, blocked=blocked)
        target = str(take.node.target)
        tensor = self._captured.tensors[target]
        key = (*same_memory(tensor), take.dim, take.share)
        if key not in self._slices:
            name = f"{target}.{self._suffix}"
            while name in self._weights:
                name += "_"  # tied weights that are sliced in two ways
            self._weights[name] = aligned(_sliced(tensor, take.dim, take.share).contiguous())
            self._slices[key] = self._graph.create_node("get_attr", name)
        return self._slices[key]

    def _input(self, node: fx.Node) -> fx.Node:
        return self._inputs[node] if node in self._shards else super()._input(node)

    def _rows(self) -> fx.Node:
        """Ask an input that is read anyway: one that is not would be sent for its rows alone."""
        inputs = list(self._inputs.values())
        first = next((node for node in inputs if node.users), inputs[0])
        return self._graph.call_function(_ATEN.sym_size.int, (first, 0))


def _sliced(tensor: torch.Tensor, dim: int, share: Share) -> torch.Tensor:
    """Return a share of a dimension of a weight."""
    blocks = _ATEN.unflatten.int(tensor, dim, [-1, share.size])
    pieces = [blocks.narrow(dim + 1, a, b - a) for a, b in share.ranges]
    held = torch.cat(pieces, dim + 1) if len(pieces) > 1 else pieces[0]
    return held.flatten(dim, dim + 1)
