"""How a stage would lie over parts: placements propagated through its nodes, or why that fails.

Greedy, first to last: the first layer with weights begins the split, and what needs a split value
whole ends the parts. No layer with weights may come behind that end; so a stage is a chain such as
`conv, norm, relu, conv, norm, + skip` and what weighs nothing behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from streaminfer.parallel.mutation import written
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.tensor.algebra import step
from streaminfer.parallel.tensor.placement import (
    WHOLE,
    Env,
    Joined,
    NeedsWholeError,
    Partial,
    Placement,
    RealignError,
    RefusedError,
    Sharded,
    Step,
    Whole,
    label,
    shape_of,
)
from streaminfer.parallel.tensor.weighted import contracted, groups_of, is_weighted

__all__ = ["Form", "Layout", "lay_out"]

Form = Literal["auto", "in"]


@dataclass(frozen=True)
class Layout:
    """A stage over parts."""

    nodes: tuple[fx.Node, ...]  # of the stage, without what follows from the number of rows alone
    placements: Mapping[fx.Node, Placement]  # what is not in it is Whole
    steps: Mapping[fx.Node, Step]
    crossing: tuple[fx.Node, ...]  # what goes from the parts to where they are joined

    def __getitem__(self, node: fx.Node) -> Placement:
        return self.placements.get(node, WHOLE)


def lay_out(cutter: Cutter, first: int, last: int, parts: int, form: Form) -> Layout:
    """Lay nodes first to last over parts.

    Raises:
        RefusedError: the algebra forbids it.
    """
    if parts < 2:
        raise RefusedError(None, f"{parts} is no number of parts", (2,))
    nodes = tuple(n for n in cutter.captured.nodes[first : last + 1] if n not in cutter.free)
    begins = next((n for n in nodes if is_weighted(n)), None)
    if begins is None:
        raise RefusedError(None, "the stage has no convolution or linear layer to split")
    placements, steps = _propagate(cutter, first, nodes, begins, parts, form)
    if not any(isinstance(place, Sharded | Partial) for place in placements.values()):
        raise RefusedError(begins, "nothing of the stage can be split")
    crossing = _Crossing(cutter, placements)
    for node in nodes:
        if isinstance(placements.get(node), Joined):
            for source in node.all_input_nodes:
                crossing.need(source)
    for node in cutter.outputs(last).values():
        crossing.need(node)
    layout = Layout(nodes, placements, steps, tuple(crossing.found))
    _refuse_written_on_both_sides(cutter, first, last, layout, crossing.again)
    return layout


_Pass = tuple[dict[fx.Node, Placement], dict[fx.Node, Step]]


def _propagate(
    cutter: Cutter, first: int, nodes: Sequence[fx.Node], begins: fx.Node, parts: int, form: Form
) -> _Pass:
    """Find out where all values lie, with the stage's input in shards where that is asked for.

    It also is where the first layer works in groups: each part then needs its channels only.
    """
    refused: RefusedError | None = None
    if form == "in" or (contracted(begins) and groups_of(begins) > 1):
        for seed in _seeds(cutter, first, begins, parts):
            try:
                found = _settle(nodes, Env(parts, {}, {}), seed)
            except RefusedError as error:
                behind = error.node is not begins and error.node in nodes
                refused = error if behind else refused
                continue
            if isinstance(found[0].get(_input_of(begins)), Sharded):
                return found
    if form == "auto":
        return _settle(nodes, Env(parts, {}, {}))
    why = "no input of the stage gives it its input channels in shards"
    raise refused or RefusedError(begins, why)


def _input_of(layer: fx.Node) -> fx.Node:
    found = contracted(layer)
    return found[0] if found else layer


def _seeds(
    cutter: Cutter, first: int, begins: fx.Node, parts: int
) -> Iterator[tuple[fx.Node, int]]:
    """Yield an input of the stage that may become the first layer's, and where to split it."""
    inputs, seen, todo = set(cutter.inputs(first)), set(), [_input_of(begins)]
    while todo:
        node = todo.pop()
        if node in seen or node.op == "get_attr":
            continue
        seen.add(node)
        if node not in inputs:
            todo += node.all_input_nodes
            continue
        shape = shape_of(node)
        for dim in dict.fromkeys((1, len(shape) - 1)):
            # what is laid out otherwise is sent so only as a whole
            if 0 < dim < len(shape) and shape[dim] >= parts and node.meta["val"].is_contiguous():
                yield node, dim


def _settle(nodes: Sequence[fx.Node], env: Env, seed: tuple[fx.Node, int] | None = None) -> _Pass:
    """Propagate; where shards end in the wrong places, choose them anew.

    Smaller blocks are tried, where an operator asks for them, before it is left behind the parts:

        rows of one layer      2 parts, even        at `unbind` into q, k, v: 3 blocks
        q0 q1 │ k0 k1 │ v0 v1  q0 q1 k0 · k1 v0 v1  q0 k0 v0 · q1 k1 v1

    Raises:
        RefusedError: nothing that was tried is possible; says why the smallest blocks are not.
    """
    refused: RefusedError | None = None
    while True:
        placements: dict[fx.Node, Placement] = {}
        try:
            if seed is not None:
                node, dim = seed
                placements[node] = env.choose(node, dim, shape_of(node)[dim])
            return _run(nodes, replace(env, placements=placements), placements)
        except RefusedError as error:
            raise refused or error from None
        except RealignError as asked:
            finer = replace(env, grains={**env.grains, **asked.wanted})
            if not asked.deeper:
                env = finer
                continue
            try:
                return _settle(nodes, finer, seed)
            except RefusedError as error:
                refused = refused or error
            env = replace(env, final=env.final | asked.wanted.keys())


def _run(nodes: Sequence[fx.Node], env: Env, placements: dict[fx.Node, Placement]) -> _Pass:
    """Apply the rules, first to last. `env` reads `placements` as they are found."""
    steps: dict[fx.Node, Step] = {}
    for node in nodes:
        places = [env[n] for n in node.all_input_nodes]
        joined = next((place for place in places if isinstance(place, Joined)), None)
        if joined is not None:
            if is_weighted(node):
                why = f"the parts end before it, at {label(joined.cause)}: {joined.why}"
                raise RefusedError(node, why, joined.instead)
            placements[node] = joined
        elif is_weighted(node) or not all(isinstance(place, Whole) for place in places):
            try:
                if written(node):
                    raise NeedsWholeError("it writes in place")
                steps[node] = step(node, env)
                placements[node] = steps[node].placement
            except NeedsWholeError as error:
                placements[node] = Joined(node, str(error), error.instead)
    return placements, steps


class _Crossing:
    """Finds what goes from the parts to where they are joined."""

    def __init__(self, cutter: Cutter, placements: Mapping[fx.Node, Placement]) -> None:
        self._cutter, self._placements = cutter, placements
        self.found: dict[fx.Node, None] = {}
        self.again: set[fx.Node] = set()  # what is computed there once more, as it cannot be sent

    def need(self, node: fx.Node) -> None:
        """Take note that a value is read behind the parts.

        Raises:
            RefusedError: it cannot be sent.
        """
        place = self._placements.get(node, WHOLE)
        if isinstance(place, Joined) or node.op == "get_attr" or node in self._cutter.free:
            return
        why = self._cutter.unfit(node)
        if not why:
            self.found[node] = None
        elif isinstance(place, Whole) and node.op == "call_function":
            self.again.add(node)
            for source in node.all_input_nodes:
                self.need(source)
        else:
            raise RefusedError(
                node, f"the parts end behind it, and {node.name!r}, {why}, is no row"
            )


def _refuse_written_on_both_sides(
    cutter: Cutter, first: int, last: int, layout: Layout, again: set[fx.Node]
) -> None:
    root, memory = cutter.captured.aliases.root, cutter.written_by(first, last)
    sides: dict[fx.Node, set[bool]] = {}
    for node in layout.nodes:
        behind = isinstance(layout[node], Joined)
        for value in (node, *node.all_input_nodes):
            if root(value) in memory:
                sides.setdefault(root(value), set()).update({behind, behind or node in again})
                if len(sides[root(value)]) > 1:
                    why = "it shares memory that is written in place, and the parts end within it"
                    raise RefusedError(node, why)
