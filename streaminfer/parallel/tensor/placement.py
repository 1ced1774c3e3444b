"""The words of a split by channels: how a value lies over the parts, and what a part computes.

After Megatron-LM (Shoeybi et al., arXiv:1909.08053) and torch's DTensor (Replicate, Shard and
Partial), with shards of unequal size, and of several ranges where shards were concatenated:

    Whole     every part has it                       joined: part 0's
    Sharded   part i has its channels                 joined: concatenated in channel order
    Partial   the value is the sum of the parts'      joined: added up in part order
    Joined    no part has it: it is computed behind them, once

A split dimension is one or more blocks of equal size, and a part has the same ranges of each. So
heads stay together where query, key and value are rows of one layer (4 heads, two parts):

    rows     q0 q1 q2 q3 │ k0 k1 k2 k3 │ v0 v1 v2 v3      3 blocks
    part 0   q0 q1       │ k0 k1       │ v0 v1            the first half of each
    part 1         q2 q3 │       k2 k3 │       v2 v3      the second

and where heads are merged with rows, [rows · heads, …]: as many blocks as there are rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import torch
from torch import fx
from torch._ops import OpOverload

from streaminfer.parallel.layers import path_of
from streaminfer.parallel.operators import arguments

__all__ = [
    "WHOLE",
    "Call",
    "Env",
    "Grain",
    "Joined",
    "NeedsWholeError",
    "Origin",
    "Partial",
    "Placement",
    "Ranges",
    "RealignError",
    "RefusedError",
    "Sharded",
    "Share",
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


class Share(NamedTuple):
    """What one part has of a dimension: `ranges` of every block of `size` channels."""

    ranges: Ranges
    size: int

    def of(self, channels: int) -> int:
        """Return how many of so many channels, in whole blocks, are the part's."""
        return channels // self.size * width(self.ranges)

    def repeats(self, channels: object) -> bool:
        """Tell whether so many channels are several blocks, as a multiple of the rows is."""
        return channels != self.size if isinstance(channels, int) else True


class Origin(NamedTuple):
    """A node that chose shards, and how many channels one of its channels has become since."""

    node: fx.Node
    per: Fraction


@dataclass(frozen=True)
class Sharded:
    """Part i has `ranges[i]` of every block of `size` channels of dimension `dim`."""

    dim: int
    ranges: tuple[Ranges, ...]
    origins: frozenset[Origin] = field(default=frozenset(), compare=False)

    @property
    def size(self) -> int:
        """The channels of a block, of all parts."""
        return sum(width(ranges) for ranges in self.ranges)

    def shares(self) -> tuple[Share, ...]:
        """Return what each part has."""
        return tuple(Share(ranges, self.size) for ranges in self.ranges)

    def parts_any(self, unit: int) -> bool:
        """Tell whether a range begins or ends within a run of so many channels."""
        ends = {end for ranges in self.ranges for pair in ranges for end in pair}
        return any(end % unit for end in (*ends, self.size))

    def moved(self, dim: int) -> Sharded:
        """Return the same shards at another dimension."""
        return Sharded(dim, self.ranges, self.origins)

    def scaled(self, dim: int, by: Fraction) -> Sharded:
        """Return the shards, at `dim`, where each channel has become `by` of them.

        Below 1: so many have become one; all ranges must end at multiples of that.
        """
        ranges = tuple(tuple((int(a * by), int(b * by)) for a, b in part) for part in self.ranges)
        return Sharded(dim, ranges, frozenset(Origin(n, per * by) for n, per in self.origins))


@dataclass(frozen=True)
class Partial:
    """The value is the sum of what the parts have."""


@dataclass(frozen=True)
class Joined:
    """No part has the value, because of `cause` and the reason it gave."""

    cause: fx.Node
    why: str
    instead: tuple[int, ...] = ()  # as of `NeedsWholeError`


Placement = Whole | Sharded | Partial | Joined


@dataclass(frozen=True)
class Take:
    """A share of one dimension of a value that is whole; of a weight, only that is kept.

    `own`: into memory of its own, for kernels whose bits follow from where operands lie.
    """

    node: fx.Node
    dim: int
    share: Share
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
    """An operator takes its input whole; the text says why. The parts end before it.

    `instead`: numbers of parts that may do, the nearest first.
    """

    def __init__(self, why: str, instead: tuple[int, ...] = ()) -> None:
        super().__init__(why)
        self.instead = instead


class RefusedError(Exception):
    """The algebra forbids the split. `instead`: as of `NeedsWholeError`."""

    def __init__(self, node: fx.Node | None, why: str, instead: tuple[int, ...] = ()) -> None:
        super().__init__(f"{label(node)}: {why}" if node is not None else why)
        self.node, self.instead = node, instead


class Grain(NamedTuple):
    """How a node's channels may be shared out: block by block, at multiples of `unit`."""

    blocks: int = 1
    unit: int = 1


class RealignError(Exception):
    """Nodes that chose shards are to choose again.

    `deeper`: within smaller blocks. The other way is to have the operator that asks take its input
    whole; without it, there is no other.
    """

    def __init__(self, wanted: Mapping[fx.Node, Grain], *, deeper: bool) -> None:
        super().__init__(wanted)
        self.wanted, self.deeper = wanted, deeper


@dataclass(frozen=True)
class Env:
    """What a rule may look at."""

    parts: int
    placements: Mapping[fx.Node, Placement]
    grains: Mapping[fx.Node, Grain]
    final: frozenset[fx.Node] = frozenset()  # nodes whose blocks stay as they are

    def __getitem__(self, node: fx.Node) -> Placement:
        return self.placements.get(node, WHOLE)

    def grain(self, node: fx.Node) -> Grain:
        """Return how a node's channels may be shared out."""
        return self.grains.get(node, Grain())

    def choose(self, node: fx.Node, dim: int, channels: int, multiple: int = 1) -> Sharded:
        """Share out a node's channels, at multiples of a number.

        Raises:
            RefusedError: there are fewer, or fewer multiples that must stay whole, than parts.
        """
        blocks, unit = self.grain(node)
        size, unit = channels // blocks, math.lcm(unit, multiple)
        units = size // unit if size % unit == 0 else 0
        if units < self.parts:
            what = f"{size} channels" + (f" in blocks of {unit}" if unit > 1 else "")
            raise RefusedError(node, f"{what} are too few for {self.parts} parts", (units,))
        ranges = even(size, self.parts, unit)
        return Sharded(dim, ranges, frozenset({Origin(node, Fraction(1))}))

    def realign(self, shards: Sharded, unit: int, why: str) -> None:
        """Ask for shards that end at multiples of `unit`.

        Raises:
            RealignError: nobody has asked for that yet.
            NeedsWholeError: it was asked for, and does not help.
        """
        wanted: dict[fx.Node, Grain] = {}
        for node, per in shards.origins:
            blocks, known = self.grain(node)
            asked = math.lcm(known, (unit / per).numerator)
            if asked != known:
                wanted[node] = Grain(blocks, asked)
        if not wanted or shards.size % unit:
            raise NeedsWholeError(why)
        raise RealignError(wanted, deeper=False)

    def unit(self, shards: Sharded) -> int:
        """Return the number at whose multiples shards were asked to end."""
        return math.lcm(*[int(self.grain(n).unit * per) or 1 for n, per in shards.origins])

    def divides(self, shards: Sharded, by: int) -> bool:
        """Tell whether blocks may become so many smaller ones, with channels for all parts."""
        inner = [Fraction(shards.size, by) / per for _, per in shards.origins] if by > 1 else []
        return bool(inner) and all(
            n.denominator == 1 and n >= self.parts and node not in self.final
            for n, (node, _) in zip(inner, shards.origins, strict=True)
        )

    def deepen(self, shards: Sharded, by: int, why: str) -> NoReturn:
        """Ask for shards within blocks that are smaller by a factor.

        Raises:
            RealignError: they are possible.
            NeedsWholeError: they are not.
        """
        if not self.divides(shards, by):
            raise NeedsWholeError(why)
        wanted = {node: Grain(self.grain(node).blocks * by) for node, _ in shards.origins}
        raise RealignError(wanted, deeper=True)


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
