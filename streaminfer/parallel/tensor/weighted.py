"""Layers split by channels: linear, convolution, transposed convolution, product with a matrix.

columns   x Whole     weight by output channels          Sharded
rows      x Sharded   weight by input channels           Partial; part 0 adds the bias
groups    either      weight by groups, input alike      Sharded; nothing is to be added up
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

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
    operator_name,
    shape_of,
)

__all__ = ["contracted", "groups_of", "is_weighted", "weighted"]

_ATEN = torch.ops.aten


class _Layer(NamedTuple):
    """Which arguments of a weighted operator are what, and which dimensions of the weight."""

    x: str
    weight: str
    bias: str | None
    outputs: int
    inputs: int
    channels: int  # of x and of the result


_CONV = _Layer("input", "weight", "bias", 0, 1, 1)
_TRANSPOSED = _Layer("input", "weight", "bias", 1, 0, 1)
_LAYERS = {
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "linear": _Layer("input", "weight", "bias", 0, 1, -1),
    "addmm": _Layer("mat1", "mat2", "self", 1, 0, -1),
    "mm": _Layer("self", "mat2", None, 1, 0, -1),
    "matmul": _Layer("self", "other", None, 1, 0, -1),
}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}  # every step reads all channels of the last


def _layer(node: fx.Node) -> _Layer | None:
    """Return what is what in a weighted operator; None of others, as products of activations."""
    layer = _LAYERS.get(operator_name(node))
    if layer is None or layer in (_CONV, _TRANSPOSED):
        return layer
    given = bound(node)
    weight, bias = given[layer.weight], given[layer.bias] if layer.bias else None
    is_matrix = len(shape_of(weight)) == 2 and _is_fixed(weight)
    return layer if is_matrix and (bias is None or len(shape_of(bias)) == 1) else None


def _is_fixed(node: fx.Node) -> bool:
    """Tell whether a value is a weight, or made of weights alone, as a transposed one is."""
    sources = node.all_input_nodes
    return node.op == "get_attr" or (bool(sources) and all(_is_fixed(n) for n in sources))


def is_weighted(node: fx.Node) -> bool:
    """Tell whether an operator is of those a split is for: their weights and work are large."""
    return _layer(node) is not None or operator_name(node) in _RECURRENT


def groups_of(node: fx.Node) -> int:
    """Return the groups of a convolution; 1 of other operators."""
    return int(bound(node).get("groups", 1))


def contracted(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Return the input of a weighted operator and the dimension it sums over."""
    layer = _layer(node)
    if layer is None:
        return None
    x: fx.Node = bound(node)[layer.x]
    return x, layer.channels % len(shape_of(x))


def weighted(node: fx.Node, env: Env) -> Step:
    """Split a layer by its output channels, its input channels or its groups.

    Raises:
        NeedsWholeError, RealignError, RefusedError: as rules do.
    """
    layer, given = _layer(node), bound(node)
    if layer is None:
        raise NeedsWholeError("each step of it reads all channels of the step before")
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
        raise NeedsWholeError("it scales its bias or its product")
    x, weight = given[layer.x], given[layer.weight]
    bias = given[layer.bias] if layer.bias else None
    fixed = [n for n in (weight, bias) if n is not None]
    if any(not isinstance(env[n], Whole) for n in fixed):
        raise NeedsWholeError("its weights follow from values that are split")
    place, channels = env[x], layer.channels % len(shape_of(x))
    if isinstance(place, Whole):
        return _columns(node, layer, env) if groups_of(node) == 1 else _groups(node, layer, env)
    if isinstance(place, Partial):
        raise NeedsWholeError("it needs the sum of what the parts hold")
    if not isinstance(place, Sharded) or place.dim != channels:
        raise NeedsWholeError("its input is split along another dimension than it sums over")
    if groups_of(node) > 1:
        return _groups(node, layer, env)
    return _rows(node, layer, place, env)


def _columns(node: fx.Node, layer: _Layer, env: Env) -> Step:
    """Give each part some output channels; it needs the whole input."""
    given = bound(node)
    weight, bias = given[layer.weight], given[layer.bias] if layer.bias else None
    dim = layer.channels % len(shape_of(node))
    place = env.choose(node, dim, shape_of(weight)[layer.outputs])
    calls = []
    for share in place.shares():
        taken: dict[str, object] = {layer.weight: Take(weight, layer.outputs, share, own=True)}
        if layer.bias and bias is not None:
            taken[layer.bias] = Take(bias, 0, share, own=True)
        calls.append(Call.of(node, **taken))
    return Step(place, tuple(calls))


def _rows(node: fx.Node, layer: _Layer, place: Sharded, env: Env) -> Step:
    """Give each part the input channels that it has; the results are to be added up."""
    given = bound(node)
    weight = given[layer.weight]
    calls = []
    for i, share in enumerate(place.shares()):
        taken: dict[str, object] = {layer.weight: Take(weight, layer.inputs, share, own=True)}
        if operator_name(node) == "addmm" and i:
            calls.append(Call(_ATEN.mm.default, (given["mat1"], taken["mat2"])))
            continue
        if layer.bias and i and given[layer.bias] is not None:
            taken[layer.bias] = None  # part 0 adds it, once
        calls.append(Call.of(node, **taken))
    return Step(Partial(), tuple(calls))


def _groups(node: fx.Node, layer: _Layer, env: Env) -> Step:
    """Give each part some groups of a grouped convolution: nothing is to be added up."""
    given = bound(node)
    x, weight, bias, groups = given["input"], given["weight"], given["bias"], groups_of(node)
    if groups < env.parts:
        why = f"{groups} groups are too few for {env.parts} parts"
        raise RefusedError(node, why, (groups,))
    ins, outs = shape_of(x)[1] // groups, shape_of(node)[1] // groups
    place = env[x]
    if isinstance(place, Sharded):
        held = place
        if held.parts_any(ins):
            env.realign(held, ins, f"its groups of {ins} channels would be parted")
        shards = held.scaled(1, Fraction(outs, ins))
    else:
        shards = env.choose(node, 1, groups * outs, multiple=outs)
        held = shards.scaled(1, Fraction(ins, outs))
    calls = []
    for mine, out in zip(held.shares(), shards.shares(), strict=True):
        # groups lie along dimension 0 of the weight: of the outputs, or (transposed) of the inputs
        rows = out if layer.outputs == 0 else mine
        taken: dict[str, object] = {
            "weight": Take(weight, 0, rows, own=True),
            "groups": mine.of(groups * ins) // ins,
        }
        if bias is not None:
            taken["bias"] = Take(bias, 0, out, own=True)
        if isinstance(place, Whole):
            taken["input"] = Take(x, 1, mine, own=True)
        calls.append(Call.of(node, **taken))
    return Step(shards, tuple(calls))
