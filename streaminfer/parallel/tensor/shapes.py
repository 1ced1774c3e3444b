"""Where the split dimension goes in operators that weigh nothing: views, pools, reductions.

Most of them leave it alone as long as it is not among the dimensions they work on. A view may also
merge it with what follows (flatten: each channel becomes many), or part it (heads of attention).
"""

from __future__ import annotations

import re
from collections.abc import Callable

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
_REDUCTIONS = {"amax", "amin", "mean", "sum"}
_OVER_DIM = {"softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum"}
_VIEWS = {"view": "size", "reshape": "shape", "flatten": "", "unflatten": "sizes"}
_MOVES = {"permute", "transpose", "unsqueeze", "squeeze", "slice", "select"}

# f(a + b) = f(a) + f(b): what may be done to each part of a sum
_LINEAR = IDENTITIES | set(_VIEWS) | _MOVES | {"mean", "sum"}
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
    moved = _moved(node, name, place)
    if moved is None:
        raise NeedsWholeError("it needs all channels of its input")
    return Step(moved, (Call.of(node),) * env.parts)


def _moved(node: fx.Node, name: str, place: Sharded) -> Sharded | None:
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
    if name in _OVER_DIM:
        return place if given["dim"] % rank != place.dim else None
    if name in _REDUCTIONS and given.get("dim"):
        return _reduced(place, rank, given["dim"], given["keepdim"])
    return None


def _reduced(place: Sharded, rank: int, dims: list[int], keepdim: bool) -> Sharded | None:
    gone = {dim % rank for dim in dims}
    if place.dim in gone:
        return None
    return place if keepdim else place.scaled(place.dim - sum(d < place.dim for d in gone), 1)


def _permute(place: Sharded, rank: int, given: dict[str, object]) -> Sharded:
    dims = [d % rank for d in given["dims"]]  # type: ignore[attr-defined]
    return place.scaled(dims.index(place.dim), 1)


def _transpose(place: Sharded, rank: int, given: dict[str, int]) -> Sharded:
    one, other = given["dim0"] % rank, given["dim1"] % rank
    return place.scaled({one: other, other: one}.get(place.dim, place.dim), 1)


def _unsqueeze(place: Sharded, rank: int, given: dict[str, int]) -> Sharded:
    return place.scaled(place.dim + (given["dim"] % (rank + 1) <= place.dim), 1)


def _squeeze(place: Sharded, rank: int, given: dict[str, int]) -> Sharded | None:
    if not isinstance(given.get("dim"), int):
        return None  # of all dimensions: a part of one channel would lose its own
    dim = given["dim"] % rank
    return place.scaled(place.dim - (dim < place.dim), 1) if dim != place.dim else None


def _slice(place: Sharded, rank: int, given: dict[str, int]) -> Sharded | None:
    return place if given["dim"] % rank != place.dim else None


def _select(place: Sharded, rank: int, given: dict[str, int]) -> Sharded | None:
    dim = given["dim"] % rank
    return place.scaled(place.dim - (dim < place.dim), 1) if dim != place.dim else None


_MOVED: dict[str, Callable[..., Sharded | None]] = {
    "permute": _permute,
    "transpose": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "slice": _slice,
    "select": _select,
}


def _view(node: fx.Node, place: Sharded, env: Env) -> Step:
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    dim, by = _viewed(before, after, place.dim)
    if by > 0:
        moved = place.scaled(dim, by)
    else:
        unit = -by
        ends = {end for part in place.ranges for ends in part for end in ends}
        if any(end % unit for end in ends):
            env.realign(place, unit, f"it parts the channels into blocks of {unit}")
        ranges = tuple(tuple((a // unit, b // unit) for a, b in p) for p in place.ranges)
        moved = Sharded(dim, ranges, place.origins)
    name = operator_name(node)
    argument, given = _VIEWS[name], bound(node)
    if not argument or argument not in given:
        return Step(moved, (Call.of(node),) * env.parts)
    at = dim - (given["dim"] % len(before) if name == "unflatten" else 0)
    sizes = list(given[argument])
    if not 0 <= at < len(sizes) or sizes[at] == -1:
        return Step(moved, (Call.of(node),) * env.parts)
    sizes_of = [[*sizes[:at], width(ranges), *sizes[at + 1 :]] for ranges in moved.ranges]
    return Step(moved, tuple(Call.of(node, **{argument: s}) for s in sizes_of))


def _viewed(before: tuple[object, ...], after: tuple[object, ...], dim: int) -> tuple[int, int]:
    """Return where a view puts a dimension, and how many each of its channels has become.

    A negative number: so many have become one (the rest of the split lies behind it).
    """
    channels, ahead = before[dim], extent(before[:dim])
    assert isinstance(channels, int)  # noqa: S101 - shards have fixed sizes
    found = [j for j in range(len(after)) if extent(after[:j]) == ahead]
    sized = [(j, n) for j in found if isinstance(n := after[j], int) and n > 1]
    for j, size in sized:
        if size == channels:
            return j, 1
    for j, size in sized:
        merged = [extent(before[dim : dim + m]) for m in range(2, len(before) - dim + 1)]
        if size in merged:
            return j, size // channels
        parted = [extent(after[j : j + m]) for m in range(2, len(after) - j + 1)]
        if channels in parted:
            return j, -(channels // size)
    raise NeedsWholeError("it lays the channels out anew")
