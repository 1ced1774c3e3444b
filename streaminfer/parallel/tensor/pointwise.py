"""Operators that work element by element, on shards and on sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from streaminfer.parallel.tensor.placement import (
    Call,
    Env,
    NeedsWholeError,
    Partial,
    Sharded,
    Share,
    Step,
    Take,
    Whole,
    bound,
    operator_name,
    shape_of,
)
from streaminfer.parallel.tensor.shapes import linear_step

__all__ = ["alongside", "is_pointwise", "pointwise"]

_ATEN = torch.ops.aten
_UNTAGGED = {"hardswish", "log_sigmoid"}  # torch does not tag them as such


def is_pointwise(node: fx.Node) -> bool:
    """Tell whether an operator is pure and works element by element."""
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in target.tags or operator_name(node) in _UNTAGGED


def pointwise(node: fx.Node, env: Env) -> Step:
    """Compute a part's channels, or, of sums, what adds up to the result.

    Raises:
        NeedsWholeError, RealignError: as rules do.
    """
    places = [env[n] for n in node.all_input_nodes]
    if any(isinstance(place, Partial) for place in places):
        rule = _LINEAR_IN_TWO.get(operator_name(node))
        if rule is None:
            raise NeedsWholeError("it needs the sum of what the parts hold")
        return rule(node, env)
    return alongside(node, env)


def alongside(node: fx.Node, env: Env) -> Step:
    """Apply an operator that keeps the split dimension to what each part has of its operands."""
    place = _common(node, env)

    def of_part(share: Share) -> Call:
        def taken(leaf: object) -> Any:
            return _cut(leaf, place.dim, share, node, env) if isinstance(leaf, fx.Node) else leaf

        args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), taken)
        return Call(node.target, args, kwargs)

    return Step(place, tuple(of_part(share) for share in place.shares()))


def _common(node: fx.Node, env: Env) -> Sharded:
    """Return the shards that all Sharded operands have, as dimensions of the result."""
    rank = len(shape_of(node))
    found = [
        place.moved(place.dim + rank - len(shape_of(n)))
        for n in node.all_input_nodes
        if isinstance(place := env[n], Sharded)
    ]
    first = found[0]
    if any(other.dim != first.dim for other in found):
        raise NeedsWholeError("its operands are split along different dimensions")
    common = Sharded(first.dim, first.ranges, frozenset().union(*[f.origins for f in found]))
    if any(other.ranges != first.ranges for other in found):
        why = "its operands are split unlike each other"
        size = math.gcd(*[f.size for f in found])
        for other in found:
            if other.size != size:
                env.deepen(other, other.size // size, why)
        env.realign(common, env.unit(common), why)
    return common


def _cut(n: fx.Node, at: int, share: Share, node: fx.Node, env: Env) -> object:
    """Return an operand for one part: what is whole is cut where it has the split dimension."""
    shape = shape_of(n)
    dim = at - (len(shape_of(node)) - len(shape))
    if (
        not isinstance(env[n], Whole)
        or dim < 0
        or not shape
        or (isinstance(shape[dim], int) and shape[dim] == 1)
    ):
        return n
    return Take(n, dim, share)


def _scale(node: fx.Node, env: Env) -> Step:
    """Multiply or divide a sum by what is whole: each part does."""
    factors = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
    partial = [n for n in factors if isinstance(env[n], Partial)]
    divides = operator_name(node) == "div" and (
        node.args[0] not in partial or "rounding_mode" in node.kwargs
    )
    whole = all(isinstance(env[n], Whole) for n in factors if n not in partial)
    if len(partial) != 1 or not whole or divides or not _same_dtype(node, partial[0]):
        raise NeedsWholeError("it needs the sum of what the parts hold")
    return Step(Partial(), (Call.of(node),) * env.parts)


def _add(node: fx.Node, env: Env) -> Step:
    """Add up sums with sums, with shards (filled up with zeros) and, in part 0, with the rest."""
    names = [a.name for a in node.target._schema.arguments[:2]]  # type: ignore[union-attr]
    operands = node.args[:2]
    summed = [isinstance(n, fx.Node) and isinstance(env[n], Partial) for n in operands]
    for n, is_sum in zip(operands, summed, strict=True):
        if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor):
            fits = shape_of(n) == shape_of(node) or not is_sum
            if not fits or not _same_dtype(node, n):
                raise NeedsWholeError("it needs the sum of what the parts hold")
    calls = []
    for i in range(env.parts):
        filled = {
            name: _filled(n, place, i)
            for name, n in zip(names, operands, strict=True)
            if isinstance(n, fx.Node) and isinstance(place := env[n], Sharded)
        }
        alone = i > 0 and not filled and not all(summed)
        calls.append(_only_sum(node, summed.index(True)) if alone else Call.of(node, **filled))
    return Step(Partial(), tuple(calls))


def _only_sum(node: fx.Node, at: int) -> Call:
    """Return what remains of an addition in a part that has nothing to add to its sum."""
    factor = bound(node).get("alpha", 1) * (-1 if operator_name(node) == "sub" else 1)
    if at == 0 or factor == 1:
        return Call(_ATEN.alias.default, (node.args[at],))
    return Call(_ATEN.mul.Scalar, (node.args[at], factor))


def _filled(n: fx.Node, place: Sharded, part: int) -> Call:
    """Return one part's channels in a tensor of all channels, the others zero."""
    size = shape_of(n)[place.dim]
    if len(place.ranges[part]) > 1 or place.shares()[0].repeats(size):
        raise NeedsWholeError("its operands are split unlike each other")
    ((start, end),) = place.ranges[part]
    behind = len(shape_of(n)) - 1 - place.dim
    return Call(_ATEN.constant_pad_nd.default, (n, [0, 0] * behind + [start, place.size - end]))


def _negate(node: fx.Node, env: Env) -> Step:
    return Step(Partial(), (Call.of(node),) * env.parts)


def _same_dtype(node: fx.Node, operand: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == operand.meta["val"].dtype)


_LINEAR_IN_TWO: dict[str, Callable[[fx.Node, Env], Step]] = {
    "add": _add,
    "sub": _add,
    "mul": _scale,
    "div": _scale,
    "neg": _negate,
    "clone": linear_step,
}
