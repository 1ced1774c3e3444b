"""What each operator makes of shards and partial sums: the rules of a split by channels.

A rule looks at where the operands lie and says where the result lies and what each part computes.
The classic chain (Megatron-LM's column- then row-parallel layers), for two parts:

    x Whole ── conv, its output channels ── relu ── conv, its input channels ── join
               Sharded: y0 | y1             Sharded   Partial: z0, z1            z0 + z1
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

from streaminfer.parallel.tensor.placement import (
    Call,
    Env,
    NeedsWholeError,
    Origin,
    Partial,
    Placement,
    RefusedError,
    Sharded,
    Share,
    Step,
    Take,
    Whole,
    bound,
    even,
    operator_name,
    shape_of,
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
            raise RefusedError(node, str(error), error.instead) from None
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
    for share in place.shares():
        taken = {n: Take(given[n], 0, share, own=True) for n in names if given[n] is not None}
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
    if place.parts_any(size):
        env.realign(place, size, f"its groups of {size} channels would be parted")
    calls = _per_channel(node, env, ("weight", "bias")).parts
    counts = [share.of(size * groups) // size for share in place.shares()]
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
        for i, share in enumerate(_shares(place, size, env)):
            blocks = range(offset, offset + size, share.size)
            held[i] += [(at + a, at + b) for at in blocks for a, b in share.ranges]
            pieces[i].append(n if isinstance(place, Sharded) else Take(n, dim, share))
        offset += size
    origins: frozenset[Origin] = frozenset().union(*[place.origins for place in sharded])
    moved = Sharded(dim, tuple(tuple(ranges) for ranges in held), origins)
    return Step(moved, tuple(Call.of(node, tensors=piece) for piece in pieces))


def _shares(place: Placement, size: object, env: Env) -> tuple[Share, ...]:
    """Return the parts' shares of what is concatenated: of what is whole, as even ones as can be.

    Raises:
        NeedsWholeError: its size follows from the number of rows, or it has too few channels.
    """
    if not isinstance(size, int):
        raise NeedsWholeError("it concatenates along the rows")
    if isinstance(place, Sharded):
        return place.shares()
    if size < env.parts:
        raise NeedsWholeError(f"{size} channels are too few for {env.parts} parts")
    return Sharded(0, even(size, env.parts)).shares()


# ---- attention -----------------------------------------------------------------------------------


def _attention(node: fx.Node, env: Env) -> Step:
    """Give each part some heads: [N, heads, length, size] or any dimension before the last two."""
    given = bound(node)
    three = [given[name] for name in ("query", "key", "value")]
    mask = given["attn_mask"]
    unfit = mask is not None and not isinstance(env[mask], Whole)
    if unfit or any(not isinstance(env[n], Sharded) for n in three) or given["enable_gqa"]:
        raise NeedsWholeError("it needs query, key and value split by heads")
    return _by_heads(node, env, three)


def _product(node: fx.Node, env: Env) -> Step:
    """Multiply matrices [..., m, k] and [..., k, n] that are split before the last two."""
    _refuse_sums(node, env)
    return _by_heads(node, env, node.all_input_nodes)


def _by_heads(node: fx.Node, env: Env, operands: Sequence[fx.Node]) -> Step:
    """Give each part whole matrices; where both factors follow from the split, equally many.

    Raises:
        NeedsWholeError: the matrices themselves are split, or there are not as many for each part.
    """
    if any(len(shape_of(n)) < 2 for n in operands):
        raise NeedsWholeError("it multiplies by a vector")
    split = [(n, place) for n in operands if isinstance(place := env[n], Sharded)]
    inside = any(place.dim >= len(shape_of(n)) - 2 for n, place in split)
    shape = shape_of(node)
    if len(split) > 1 and (not inside or len(shape) > 2):
        _refuse_uneven(_fixed(shape[-3]) if inside else split[0][1].size, env.parts)
    if inside:
        raise NeedsWholeError("it needs all of each head")
    return alongside(node, env)


def _fixed(size: object) -> int:
    """Return a size, for one row where it is a multiple of the rows: [rows · heads, …]."""
    if isinstance(size, int):
        return size
    return int(size.node.expr.as_coeff_Mul()[0])  # type: ignore[attr-defined]


def _expand_as(node: fx.Node, env: Env) -> Step:
    _refuse_sums(node, env)
    return alongside(node, env)


def _refuse_sums(node: fx.Node, env: Env) -> None:
    if any(isinstance(env[n], Partial) for n in node.all_input_nodes):
        raise NeedsWholeError("it needs the sum of what the parts hold")


def _refuse_uneven(heads: int, parts: int) -> None:
    if heads % parts:
        fit = [n for n in range(2, heads + 1) if heads % n == 0]
        nearest = ([n for n in fit if n < parts][-1:], [n for n in fit if n > parts][:1])
        why = f"{heads} heads do not divide among {parts} parts"
        raise NeedsWholeError(why, tuple(n for found in nearest for n in found))


_RULES: dict[str, Callable[[fx.Node, Env], Step]] = {
    "baddbmm": _product,
    "batch_norm": _batch_norm,
    "bmm": _product,
    "cat": _cat,
    "expand_as": _expand_as,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "matmul": _product,
    "prelu": _prelu,
    "scaled_dot_product_attention": _attention,
}
