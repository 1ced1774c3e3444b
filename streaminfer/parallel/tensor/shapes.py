"""Where the split dimension goes in operators that weigh nothing: views, pools, reductions.

Most of them leave it alone as long as it is not among the dimensions they work on. A view may also
merge it with what follows (flatten: each channel becomes many), or part it (heads of attention).
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import fx

from streaminfer.parallel.tensor.placement import (
    Call,
    Env,
    NeedsWholeError,
    Partial,
    Sharded,
    Step,
    bound,
    extent,
    operator_name,
    shape_of,
    width,
)

__all__ = ["IDENTITIES", "linear_step", "sharded_step"]

IDENTITIES = {"alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "to"}
_SPATIAL = re.compile(
    r"(_?adaptive_(avg|max)_pool|avg_pool|max_pool|_?upsample_\w*?|(reflection|replication)_pad)"
    r"([123])d(_aa)?"
)
_REDUCTIONS = {"amax", "amin", "linalg_vector_norm", "mean", "sum"}
_OVER_DIM = {"softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "roll"}
_READING = _REDUCTIONS | _OVER_DIM | {"select", "unbind"}
_VIEWS = {"view": "size", "reshape": "shape", "flatten": "", "unflatten": "sizes"}
_MOVES = {"permute", "transpose", "unsqueeze", "squeeze"}
_PIECES = {"split", "split_with_sizes", "chunk", "tensor_split"}

# f(a + b) = f(a) + f(b): what may be done to each part of a sum
_LINEAR = IDENTITIES | set(_VIEWS) | _MOVES | {"mean", "narrow", "roll", "select", "slice", "sum"}
_LINEAR_SPATIAL = ("avg_pool", "upsample")


def _is_linear(node: fx.Node) -> bool:
    name = operator_name(node)
    if name in ("pad", "constant_pad_nd"):
        given = bound(node)
        return given.get("mode", "constant") == "constant" and not given["value"]
    spatial = _SPATIAL.fullmatch(name)
    return name in _LINEAR or (spatial is not None and any(s in name for s in _LINEAR_SPATIAL))


def linear_step(node: fx.Node, env: Env) -> Step:
    """Apply an operator of one input, which is Partial, to each part's share."""
    source, *others = node.all_input_nodes
    alone = source is node.args[0] and not any(
        isinstance(env[n], Sharded | Partial) for n in others
    )
    if not alone or not _is_linear(node) or node.meta["val"].dtype != source.meta["val"].dtype:
        raise NeedsWholeError("it needs the sum of what the parts hold")
    return Step(Partial(), (Call.of(node),) * env.parts)


def sharded_step(node: fx.Node, env: Env) -> Step:
    """Apply an operator of one input, which is Sharded, to each part's channels."""
    source = node.args[0]
    place = env[source] if isinstance(source, fx.Node) else None
    others = [n for n in node.all_input_nodes if n is not source]
    if not isinstance(place, Sharded) or any(isinstance(env[n], Sharded | Partial) for n in others):
        raise NeedsWholeError("it needs all channels of its input")
    name = operator_name(node)
    if name in _VIEWS:
        return _view(node, place, env)
    if name in _PIECES:
        return _pieces(node, place, env)
    if name in ("slice", "narrow"):
        return _slice(node, place, env)
    moved = _moved(node, name, place, env)
    if moved is None:
        raise NeedsWholeError("it needs all channels of its input")
    return Step(moved, (Call.of(node),) * env.parts)


def _moved(node: fx.Node, name: str, place: Sharded, env: Env) -> Sharded | None:
    """Return the shards behind an operator that treats channels alike; None where it does not."""
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    rank, given = len(shape), bound(node)
    if name in IDENTITIES:
        return place
    if name == "squeeze" and len(shape_of(node)) == rank:
        return place  # there was nothing to squeeze
    if name in _MOVES:
        return _MOVED[name](place, rank, given)
    if spatial := _SPATIAL.fullmatch(name):
        return place if place.dim < rank - int(spatial.group(4)) else None
    if name in ("pad", "constant_pad_nd"):
        return place if place.dim < rank - len(given["pad"]) // 2 else None
    if name == "layer_norm":
        return place if place.dim < rank - len(given["normalized_shape"]) else None
    return _reading(name, place, rank, given, env) if name in _READING else None


def _reading(
    name: str, place: Sharded, rank: int, given: dict[str, Any], env: Env
) -> Sharded | None:
    """Return the shards behind an operator that reads all of some dimensions, if it names them.

    Raises:
        NeedsWholeError, RealignError: the split one is among them.
    """
    dims = given.get("dim", given.get("dims"))
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    if place.dim in {dim % rank for dim in dims}:
        env.deepen(place, place.size, "it needs all channels of its input")
    kept = given["keepdim"] if name in _REDUCTIONS else name not in ("select", "unbind")
    return place if kept else _without(place, rank, dims)


def _without(place: Sharded, rank: int, dims: Sequence[int]) -> Sharded:
    """Return the shards behind an operator that takes other dimensions away."""
    return place.moved(place.dim - sum(dim < place.dim for dim in {d % rank for d in dims}))


def _permute(place: Sharded, rank: int, given: dict[str, object]) -> Sharded:
    dims = [d % rank for d in given["dims"]]  # type: ignore[attr-defined]
    return place.moved(dims.index(place.dim))


def _transpose(place: Sharded, rank: int, given: dict[str, int]) -> Sharded:
    one, other = given["dim0"] % rank, given["dim1"] % rank
    return place.moved({one: other, other: one}.get(place.dim, place.dim))


def _unsqueeze(place: Sharded, rank: int, given: dict[str, int]) -> Sharded:
    return place.moved(place.dim + (given["dim"] % (rank + 1) <= place.dim))


def _squeeze(place: Sharded, rank: int, given: dict[str, int]) -> Sharded | None:
    if not isinstance(given.get("dim"), int):
        return None  # of all dimensions: a part of one channel would lose its own
    return None if given["dim"] % rank == place.dim else _without(place, rank, [given["dim"]])


_MOVED: dict[str, Callable[..., Sharded | None]] = {
    "permute": _permute,
    "transpose": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
}


# ---- pieces of a dimension -----------------------------------------------------------------------


def _slice(node: fx.Node, place: Sharded, env: Env) -> Step:
    """Give each part its channels of a slice, which must begin and end with blocks."""
    given, shape = bound(node), shape_of(node.args[0])  # type: ignore[arg-type]
    size = shape[place.dim]
    if given["dim"] % len(shape) != place.dim:
        return Step(place, (Call.of(node),) * env.parts)
    narrow, step = "length" in given, given.get("step", 1)
    start, end = given["start"] or 0, given.get("end")
    end = start + given["length"] if narrow else sys.maxsize if end is None else end
    if start == 0 and end == sys.maxsize and step == 1:
        return Step(place, (Call.of(node),) * env.parts)
    why = "it takes some channels of all"
    if step != 1 or not all(isinstance(n, int) for n in (start, end, size)):
        raise NeedsWholeError(why)
    start, end, _ = slice(start, end).indices(size)
    smaller = math.gcd(place.size, start, end)
    if smaller != place.size:
        env.deepen(place, place.size // smaller, why)
    calls = []
    for share in place.shares():
        first, last = share.of(start), share.of(end)
        ends = {"length": last - first} if narrow else {"end": last}
        calls.append(Call.of(node, start=first, **ends))
    return Step(place, tuple(calls))


def _pieces(node: fx.Node, place: Sharded, env: Env) -> Step:
    """Take a dimension apart: `placement` is that of the pieces, which `getitem` takes.

    The split dimension must be whole blocks in every piece: [q │ k │ v] in three, say.
    """
    shape, dim = shape_of(node.args[0]), bound(node)["dim"]  # type: ignore[arg-type]
    dim %= len(shape)
    if dim != place.dim:
        return Step(place, (Call.of(node),) * env.parts)
    sizes, why = [piece.shape[dim] for piece in node.meta["val"]], "it takes the channels apart"
    if not all(isinstance(n, int) for n in sizes):
        raise NeedsWholeError(why)
    smaller = math.gcd(place.size, *sizes)
    if smaller != place.size:
        env.deepen(place, place.size // smaller, why)
    apart, source = torch.ops.aten.split_with_sizes.default, node.args[0]
    shares = [[share.of(n) for n in sizes] for share in place.shares()]
    return Step(place, tuple(Call(apart, (source, of, dim)) for of in shares))


# ---- views ---------------------------------------------------------------------------------------


class _Home(NamedTuple):
    """A dimension of a view that shards could lie along."""

    dim: int
    by: Fraction  # how many of its channels one channel has become
    entries: Fraction  # how many of its channels a block has become
    smaller: int  # by this factor blocks must become smaller before


def _view(node: fx.Node, place: Sharded, env: Env) -> Step:
    home = _home(node, place, env)
    unit = home.by.denominator
    if place.parts_any(unit):
        env.realign(place, unit, f"it parts the channels into blocks of {unit}")
    moved = place.scaled(home.dim, home.by)
    name, given = operator_name(node), bound(node)
    argument = _VIEWS[name]
    if argument not in given:
        return Step(moved, (Call.of(node),) * env.parts)
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    at = home.dim - (given["dim"] % rank if name == "unflatten" else 0)
    sizes = list(given[argument])
    if not 0 <= at < len(sizes) or sizes[at] == -1:
        return Step(moved, (Call.of(node),) * env.parts)
    calls = []
    for share in moved.shares():
        size: object = -1
        if isinstance(sizes[at], int):
            size = share.of(sizes[at])
        elif -1 in sizes:
            blocks = Call(operator.floordiv, (sizes[at], share.size))
            size = Call(operator.mul, (blocks, width(share.ranges)))
        calls.append(Call.of(node, **{argument: [*sizes[:at], size, *sizes[at + 1 :]]}))
    return Step(moved, tuple(calls))


def _home(node: fx.Node, place: Sharded, env: Env) -> _Home:
    """Choose the dimension of a view that shards go on along: the first that has enough for all.

    Raises:
        NeedsWholeError: there is none.
        RealignError: there is one within smaller blocks.
    """
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    homes = [home for home in _homes(before, after, place) if home.entries > home.smaller]
    enough = [home for home in homes if home.entries / home.smaller >= env.parts]
    for home in sorted(enough, key=lambda home: home.smaller):
        if home.smaller == 1:
            return home
        if env.divides(place, home.smaller):
            env.deepen(place, home.smaller, "")
    for home in homes:
        if home.smaller == 1:
            return (
                home  # it is asked for, and whoever chose the shards says what there is too few of
            )
    raise NeedsWholeError("it lays the channels out anew")


def _homes(
    before: tuple[object, ...], after: tuple[object, ...], place: Sharded
) -> Iterator[_Home]:
    """Yield the dimensions of a view that shards could lie along, outermost first.

    A view keeps the order of numbers: [ahead, blocks · size, behind] remains blocks of size times
    behind numbers, and a dimension fits that is whole blocks and either made of whole channels

        [N, 6, 9, 9] → [N, 486]      each channel has become 81
        [N, 24] → [N, 4, 6]          six channels have become one

    or would be with smaller blocks ([N, 3 · 24] → [N, 3, 4, 6]: the 4, of blocks of 24).
    """
    for j, n in enumerate(after):
        stride = _ratio(after[j + 1 :], before[place.dim + 1 :])  # in channels
        if stride is None or 1 not in (stride.numerator, stride.denominator):
            continue
        entries = place.size / stride
        blocks = _blocks(n, entries)
        if blocks is None:
            continue
        if blocks.denominator == 1 and entries.denominator == 1:
            yield _Home(j, 1 / stride, entries, 1)
        elif blocks.numerator == 1:
            yield _Home(j, 1 / stride, entries, blocks.denominator)


def _ratio(one: tuple[object, ...], other: tuple[object, ...]) -> Fraction | None:
    """Return the quotient of two products of sizes; None if it follows from the number of rows."""
    numbers, divisor = extent(one), extent(other)
    if isinstance(numbers, int) and isinstance(divisor, int):
        return Fraction(numbers, divisor)
    found = numbers / divisor  # type: ignore[operator]
    return Fraction(int(found.p), int(found.q)) if found.is_Rational else None


def _blocks(size: object, entries: Fraction) -> Fraction | None:
    """Return how many blocks a dimension is: 1 of a multiple of the rows, None if none fits."""
    if isinstance(size, int):
        return size / entries
    whole = extent((size,)) * entries.denominator / entries.numerator  # type: ignore[operator]
    return Fraction(1) if whole.is_integer is True else None  # type: ignore[comparison-overlap]
