"""The words of a split by channels: how a value lies over the parts, and what a part computes.

After Megatron-LM (Shoeybi et al., arXiv:1909.08053) and torch's DTensor (Replicate, Shard and
Partial), with shards of unequal size, and of several ranges where shards were concatenated:

    Whole     every part has it                       joined: part 0's
    Sharded   part i has its channels                 joined: concatenated in channel order
    Partial   the value is the sum of the parts'      joined: added up in part order
    Joined    no part has it: it is computed behind them, once
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload

from streaminfer.parallel.layers import path_of
from streaminfer.parallel.operators import arguments

__all__ = [
    "WHOLE",
    "Call",
    "Env",
    "Joined",
    "NeedsWholeError",
    "Partial",
    "Placement",
    "Ranges",
    "RealignError",
    "RefusedError",
    "Sharded",
    "Step",
    "Take",
    "Whole",
    "bound",
    "even",
    "extent",
    "label",
    "operator_name",
    "shape_of",
    "width",
]

_LANES = (16, 8)  # float32 in a vector register of 512 and 256 bits
Ranges = tuple[tuple[int, int], ...]  # channels [from, to) of one part, in the order it holds them


@dataclass(frozen=True)
class Whole:
    """Every part has the value."""


WHOLE = Whole()


@dataclass(frozen=True)
class Sharded:
    """Part i has `ranges[i]` of dimension `dim`. `origins`: the nodes that chose the ranges."""

    dim: int
    ranges: tuple[Ranges, ...]
    origins: frozenset[fx.Node] = field(default=frozenset(), compare=False)

    @property
    def size(self) -> int:
        """The channels of all parts."""
        return sum(width(ranges) for ranges in self.ranges)

    def scaled(self, dim: int, by: int) -> Sharded:
        """Return the same shards where each channel has become `by` of them, at `dim`."""
        ranges = tuple(tuple((a * by, b * by) for a, b in part) for part in self.ranges)
        return Sharded(dim, ranges, self.origins)


@dataclass(frozen=True)
class Partial:
    """The value is the sum of what the parts have."""


@dataclass(frozen=True)
class Joined:
    """No part has the value, because of `cause` and the reason it gave."""

    cause: fx.Node
    why: str


Placement = Whole | Sharded | Partial | Joined


@dataclass(frozen=True)
class Take:
    """Ranges of one dimension of a value that is whole; of a weight, only they are kept.

    `own`: into memory of its own, for kernels whose bits follow from where operands lie.
    """

    node: fx.Node
    dim: int
    ranges: Ranges
    own: bool = False


@dataclass(frozen=True)
class Call:
    """An operator on nodes of the captured graph, on what was taken of them, and on calls."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, node: fx.Node, /, **changes: object) -> Call:
        """Return a node's own call with arguments, by their names, replaced."""
        return cls(node.target, node.args, node.kwargs).but(**changes)

    def but(self, /, **changes: object) -> Call:
        """Return the call with arguments, by their names, replaced."""
        names = [a.name for a in self.target._schema.arguments] if changes else []
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in changes.items():
            at = names.index(name)
            if at < len(args):
                args[at] = value
            else:
                kwargs[name] = value
        return Call(self.target, tuple(args), kwargs)


class Step(NamedTuple):
    """What a rule says of one node: where its value lies, and what each part computes."""

    placement: Placement
    parts: tuple[Call, ...]


class NeedsWholeError(Exception):
    """An operator takes its input whole; the text says why. The parts end before it."""


class RefusedError(Exception):
    """The algebra forbids the split. `most`: the largest number of parts that may do; 0 if none."""

    def __init__(self, node: fx.Node | None, why: str, most: int = 0) -> None:
        super().__init__(f"{label(node)}: {why}" if node is not None else why)
        self.node, self.most = node, most


class RealignError(Exception):
    """Shards must end at multiples of `unit` channels: those that chose them choose again."""

    def __init__(self, origins: frozenset[fx.Node], unit: int) -> None:
        super().__init__(unit)
        self.origins, self.unit = origins, unit


@dataclass(frozen=True)
class Env:
    """What a rule may look at."""

    parts: int
    placements: Mapping[fx.Node, Placement]
    units: Mapping[fx.Node, int]  # channels that a node may not part

    def __getitem__(self, node: fx.Node) -> Placement:
        return self.placements.get(node, WHOLE)

    def realign(self, shards: Sharded, unit: int, why: str) -> None:
        """Ask for shards that end at multiples of `unit`.

        Raises:
            RealignError: nobody has asked for that yet.
            NeedsWholeError: it was asked for, and does not help.
        """
        if all(self.units.get(node, 1) % unit == 0 for node in shards.origins):
            raise NeedsWholeError(why)
        raise RealignError(shards.origins, unit)


def width(ranges: Ranges) -> int:
    """Return how many channels there are."""
    return sum(b - a for a, b in ranges)


def even(channels: int, parts: int, unit: int = 1) -> tuple[Ranges, ...]:
    """Split channels into ranges as equal as possible, at multiples of `unit`.

    Kernels compute channels by vectors of 8 or 16 and what is left over in another way, with other
    last bits. So shards end at such multiples, too, if none grows by more than an eighth for it.
    """
    fair = -(-channels // parts)
    for lanes in _LANES:
        block = math.lcm(unit, lanes)
        ends = [round(channels * i / parts / block) * block for i in range(parts)] + [channels]
        if all(0 < b - a <= fair * 9 / 8 for a, b in pairwise(ends)):
            return tuple(((a, b),) for a, b in pairwise(ends))
    share, rest = divmod(channels // unit, parts)
    ends = [(share * i + min(i, rest)) * unit for i in range(parts + 1)]
    return tuple(((a, b),) for a, b in pairwise(ends))


def operator_name(node: fx.Node) -> str:
    """Return an ATen operator's name without its overload; "" for others."""
    is_aten = isinstance(node.target, OpOverload)
    return node.target._schema.name.removeprefix("aten::") if is_aten else ""  # type: ignore[union-attr]


def bound(node: fx.Node) -> dict[str, Any]:
    """Return argument name → value, defaults included."""
    target = node.target
    assert isinstance(target, OpOverload)  # noqa: S101 - rules are for ATen operators
    known = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    return known | (arguments(target, node.args, node.kwargs) or {})


def label(node: fx.Node) -> str:
    """Return what an error calls a node: its layer, and its operator."""
    name = operator_name(node) or node.name
    return f"{path} ({name})" if (path := path_of(node)) else name


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the sizes of a node's tensor; () of what is none."""
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


def extent(sizes: tuple[Any, ...]) -> object:
    """Return the product of sizes in a form that compares equal whatever the order of factors."""
    return math.prod(n.node.expr if isinstance(n, torch.SymInt) else n for n in sizes)
