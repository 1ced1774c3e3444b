"""What each operator makes of shards and partial sums: the rules of a split by channels.

A rule looks at where the operands lie and says where the result lies and what each part computes.
The classic chain (Megatron-LM's column- then row-parallel layers), for two parts:

    x Whole ── conv, its output channels ── relu ── conv, its input channels ── join
               Sharded: y0 | y1             Sharded   Partial: z0, z1            z0 + z1
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from streaminfer.parallel.tensor.placement import (
    Call,
    Env,
    NeedsWholeError,
    Partial,
    RefusedError,
    Sharded,
    Step,
    Take,
    Whole,
    bound,
    even,
    operator_name,
    shape_of,
    width,
)
from streaminfer.parallel.tensor.pointwise import alongside, is_pointwise, pointwise
from streaminfer.parallel.tensor.shapes import linear_step, sharded_step
from streaminfer.parallel.tensor.weighted import is_weighted, weighted

__all__ = ["step"]

_ATEN = torch.ops.aten


def step(node: fx.Node, env: Env) -> Step:
    """Apply the rule of an operator of which at least one operand lies in shards or sums.

    Or of a weighted one, which may begin a split.

    Raises:
        NeedsWholeError: it takes an operand whole.
        RealignError: it could go on with other shards.
        RefusedError: it would have to be split, and cannot.
    """
    if is_weighted(node):
        try:
            return weighted(node, env)
        except NeedsWholeError as error:
            raise RefusedError(node, str(error)) from None
    name = operator_name(node)
    if name in _RULES:
        return _RULES[name](node, env)
    if is_pointwise(node):
        return pointwise(node, env)
    places = [env[n] for n in node.all_input_nodes]
    if node.target is operator.getitem:
        return Step(places[0], (Call(node.target, node.args),) * env.parts)
    if any(isinstance(place, Partial) for place in places):
        return linear_step(node, env)
    return sharded_step(node, env)


# ---- norms ---------------------------------------------------------------------------------------


def _batch_norm(node: fx.Node, env: Env) -> Step:
    given = bound(node)
    place, names = env[given["input"]], ("weight", "bias", "running_mean", "running_var")
    if isinstance(place, Partial):
        if given["training"]:
            raise NeedsWholeError("it needs the sum of what the parts hold")
        # Affine: the scale goes to every part, the shift (and the mean) to the first.
        zeros = Call(_ATEN.zeros_like.default, (given["running_var"],))
        others = Call.of(node, bias=None, running_mean=zeros)
        return Step(place, (Call.of(node), *[others] * (env.parts - 1)))
    return _per_channel(node, env, names)


def _instance_norm(node: fx.Node, env: Env) -> Step:
    return _per_channel(node, env, ("weight", "bias", "running_mean", "running_var"))


def _per_channel(node: fx.Node, env: Env, names: tuple[str, ...]) -> Step:
    """Give each part its channels of the parameters, which have one number per channel."""
    given = bound(node)
    x = node.args[0]
    place = env[x] if isinstance(x, fx.Node) else None
    if not isinstance(place, Sharded) or place.dim != 1:
        raise NeedsWholeError("it needs all channels of its input")
    calls = []
    for ranges in place.ranges:
        taken = {n: Take(given[n], 0, ranges, own=True) for n in names if given[n] is not None}
        calls.append(Call.of(node, **taken))
    return Step(place, tuple(calls))


def _prelu(node: fx.Node, env: Env) -> Step:
    slopes = shape_of(bound(node)["weight"])
    return sharded_step(node, env) if slopes[0] == 1 else _per_channel(node, env, ("weight",))


def _group_norm(node: fx.Node, env: Env) -> Step:
    """Give each part whole groups."""
    given = bound(node)
    place, groups = env[given["input"]], given["num_groups"]
    if not isinstance(place, Sharded) or place.dim != 1 or groups < env.parts:
        raise NeedsWholeError("it needs all channels of its input")
    size = shape_of(given["input"])[1] // groups
    if any(end % size for part in place.ranges for ends in part for end in ends):
        env.realign(place, size, f"its groups of {size} channels would be parted")
    calls = _per_channel(node, env, ("weight", "bias")).parts
    counts = [width(ranges) // size for ranges in place.ranges]
    return Step(place, tuple(c.but(num_groups=n) for c, n in zip(calls, counts, strict=True)))


# ---- several inputs ------------------------------------------------------------------------------


def _cat(node: fx.Node, env: Env) -> Step:
    """Concatenate what each part has: by channels, a part then holds several ranges."""
    given = bound(node)
    values, rank = given["tensors"], len(shape_of(node))
    places = [env[n] for n in values]
    if all(isinstance(place, Partial) for place in places):
        return Step(Partial(), (Call.of(node),) * env.parts)
    sharded = [place for place in places if isinstance(place, Sharded)]
    if not sharded or any(isinstance(place, Partial) for place in places):
        raise NeedsWholeError("it needs the sum of what the parts hold")
    dim = given["dim"] % rank
    if any(place.dim != dim for place in sharded):
        return alongside(node, env)
    offset = 0
    held: list[list[tuple[int, int]]] = [[] for _ in range(env.parts)]
    pieces: list[list[object]] = [[] for _ in range(env.parts)]
    for n, place in zip(values, places, strict=True):
        size = shape_of(n)[dim]
        if isinstance(place, Whole) and size < env.parts:
            raise NeedsWholeError(f"{size} channels are too few for {env.parts} parts")
        shards = place.ranges if isinstance(place, Sharded) else even(size, env.parts)
        for i, ranges in enumerate(shards):
            held[i] += [(a + offset, b + offset) for a, b in ranges]
            pieces[i].append(n if isinstance(place, Sharded) else Take(n, dim, ranges))
        offset += size
    origins: frozenset[fx.Node] = frozenset().union(*[place.origins for place in sharded])
    moved = Sharded(dim, tuple(tuple(ranges) for ranges in held), origins)
    return Step(moved, tuple(Call.of(node, tensors=piece) for piece in pieces))


def _attention(node: fx.Node, env: Env) -> Step:
    """Give each part some heads: [N, heads, length, size] or any dimension before the last two."""
    given = bound(node)
    three = [given[name] for name in ("query", "key", "value")]
    mask = given["attn_mask"]
    unfit = mask is not None and not isinstance(env[mask], Whole)
    if unfit or any(not isinstance(env[n], Sharded) for n in three) or given["enable_gqa"]:
        raise NeedsWholeError("it needs query, key and value split by heads")
    cut = alongside(node, env)
    if isinstance(cut.placement, Sharded) and cut.placement.dim >= len(shape_of(node)) - 2:
        raise NeedsWholeError("it needs all of each head")
    return cut


_RULES: dict[str, Callable[[fx.Node, Env], Step]] = {
    "batch_norm": _batch_norm,
    "cat": _cat,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "prelu": _prelu,
    "scaled_dot_product_attention": _attention,
}
