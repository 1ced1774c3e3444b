"""Operator → the rule by which a box of its result is computed, or why there is none."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._ops import OpOverload

from streaminfer.parallel.spatial.halo import (
    Adaptive,
    Averaged,
    Item,
    Local,
    Mirrored,
    Padded,
    Rule,
    Window,
    Windowed,
    Zoomed,
    bind,
    operator_name,
    size_of,
    source_of,
)
from streaminfer.parallel.spatial.tile import Box, Size, Tile, area, map_size

__all__ = ["Pool", "multiply_accumulates", "pool_of", "rule_of"]

aten = torch.ops.aten
ENDLESS = 2**62  # what export writes for no end is the largest integer

# Place by place, but without torch's tag for it.
_POINTWISE = {"hardswish", "log_sigmoid", "masked_fill", "threshold", "where"}
# Place by place; what else they read is per channel, or says how.
_PER_CHANNEL = {
    "_to_copy",
    "alpha_dropout",
    "batch_norm",
    "clone",
    "contiguous",
    "detach",
    "dropout",
    "feature_dropout",
    "prelu",
    "to",
    "type_as",
}
# Place by place, if they work along dimension 1.
_ALONG_CHANNELS = {
    "_log_softmax",
    "_softmax",
    "amax",
    "amin",
    "cat",
    "chunk",
    "glu",
    "index_select",
    "log_softmax",
    "mean",
    "narrow",
    "slice",
    "softmax",
    "split",
    "split_with_sizes",
    "sum",
}
_REASONS = (
    (("scaled_dot", "matmul", "bmm", "einsum", "baddbmm"), "every place looks at every other"),
    (("layer_norm", "group_norm", "instance_norm", "native_"), "it normalises over the whole map"),
    (
        ("view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze"),
        "it lays rows and columns out anew",
    ),
    (("linear",), "it reads the columns of the map as features"),
)


def _pair(value: object) -> tuple[int, int]:
    values: list[int] = list(value) if isinstance(value, list | tuple) else [value]  # type: ignore[list-item]
    return values[0], values[-1]


def _text(size: Size) -> str:
    return "x".join(map(str, size))


def rule_of(node: fx.Node) -> Rule | str:
    """Return how an operator on maps computes a box, or why it cannot."""
    name = operator_name(node)
    if node.target is operator.getitem:
        return Item()
    if not isinstance(node.target, OpOverload):
        return "it is no operator on maps"
    if torch.Tag.pointwise in node.target.tags or name in _POINTWISE:
        return Local(broadcast=True)
    if name in _MAKERS:
        return _MAKERS[name](node)
    found = (reason for prefixes, reason in _REASONS if name.startswith(prefixes))
    return next(found, "no rule says which places of the map it reads")


def _per_channel(node: fx.Node) -> Rule | str:
    if bind(node).get("training") and operator_name(node) == "batch_norm":
        return "it normalises by the statistics of the batch at hand"
    return Local(broadcast=False)


def _along_channels(node: fx.Node) -> Rule | str:
    bound = bind(node)
    dim = bound.get("dim", -1)
    dims = list(dim) if isinstance(dim, list | tuple) else [dim]
    if operator_name(node) == "slice" and _takes_all(bound):
        return Local(broadcast=False)
    if dims not in ([1], [-3]) or bound.get("keepdim") is False:
        return "it works along other dimensions than the channels"
    return Local(broadcast=operator_name(node) == "cat")


def _takes_all(bound: Mapping[str, object]) -> bool:
    """Tell whether a slice is the `:` of x[:, :3, :, :]."""
    end = bound["end"]
    endless = end is None or (isinstance(end, int) and end >= ENDLESS)
    return endless and bound["start"] in (None, 0) and bound["step"] == 1


def _axes(
    node: fx.Node, kernel: object, stride: object, before: object, dilation: object
) -> tuple[Window, Window]:
    numbers = map(_pair, (kernel, stride, before, dilation))
    rows, columns = zip(*numbers, size_of(source_of(node)), size_of(node), strict=True)
    return Window(*rows), Window(*columns)


def _convolution(node: fx.Node) -> Rule | str:
    bound = bind(node)
    weight = bound["weight"]
    assert isinstance(weight, fx.Node)  # noqa: S101 - the schema
    kernel, dilation = _pair(list(weight.meta["val"].shape[2:])), _pair(bound["dilation"])
    padding = bound["padding"]
    even = False
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        padding, even = [n // 2 for n in total], any(n % 2 for n in total)
    rows, columns = _axes(node, kernel, bound["stride"], padding, dilation)
    if even:  # one more behind than before: never the operator's own padding
        rows, columns = (replace(axis, symmetric=False) for axis in (rows, columns))
    return Windowed(rows, columns, aten.conv2d.default, 0.0)


def _max_pool(node: fx.Node) -> Rule | str:
    bound = bind(node)
    if not node.meta["val"].is_floating_point():
        return "it takes the maximum of whole numbers, which have no -inf to pad with"
    stride = bound["stride"] or bound["kernel_size"]
    axes = _axes(node, bound["kernel_size"], stride, bound["padding"], bound["dilation"])
    return Windowed(*axes, aten.max_pool2d.default, -math.inf)


def _avg_pool(node: fx.Node) -> Rule | str:
    bound = bind(node)
    stride = bound["stride"] or bound["kernel_size"]
    axes = _axes(node, bound["kernel_size"], stride, bound["padding"], 1)
    return Averaged(*axes, aten.avg_pool2d.default, 0.0)


def _adaptive_pool(node: fx.Node) -> Rule | str:
    size, result = size_of(source_of(node)), size_of(node)
    if any(n % k for n, k in zip(size, result, strict=True)):
        return f"{_text(size)} places do not divide evenly into {_text(result)}"
    steps = [n // k for n, k in zip(size, result, strict=True)]
    return Adaptive(*_axes(node, steps, steps, 0, 1), aten.avg_pool2d.default, 0.0)


def _pad(node: fx.Node) -> Rule | str:
    bound = bind(node)
    pads, mode = bound.get("pad", bound.get("padding")), bound.get("mode", "constant")
    mode = {"reflection_pad2d": "reflect", "replication_pad2d": "replicate"}.get(
        operator_name(node), str(mode)
    )
    assert isinstance(pads, list | tuple)  # noqa: S101 - the schema
    if any(pads[4:]):
        return "it pads channels"
    left, _, top, _ = [*pads[:4], 0, 0][:4]
    if mode == "constant":
        value = bound.get("value")
        return Padded((top, left), float(value) if isinstance(value, int | float) else 0.0)
    if mode not in ("reflect", "replicate") or min(pads) < 0:
        return f"it pads by {mode!r}: with places of the other end of the map"
    return Mirrored((top, left), mode)


def _zoom(node: fx.Node) -> Rule | str:
    bound, linear = bind(node), "bilinear" in operator_name(node)
    if "scale_factors" not in bound:
        return f"no rule for its form {node.target}"
    size, result = size_of(source_of(node)), size_of(node)
    factors = [m // n for n, m in zip(size, result, strict=True)]
    whole = [n * f for n, f in zip(size, factors, strict=True)] == list(result)
    scales = bound["scale_factors"] or factors
    if not whole or list(map(float, _pair(scales))) != list(map(float, factors)):
        return "it draws the map larger by no whole number"
    if linear and (bound["align_corners"] or any(f & (f - 1) for f in factors)):
        return "it is exact only without align_corners and by a power of two"
    return Zoomed((factors[0], factors[1]), linear)


_MAKERS: dict[str, Callable[[fx.Node], Rule | str]] = {
    **dict.fromkeys(_PER_CHANNEL, _per_channel),
    **dict.fromkeys(_ALONG_CHANNELS, _along_channels),
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _pad),
    **dict.fromkeys(
        ("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d"), _zoom
    ),
    "adaptive_avg_pool2d": _adaptive_pool,
    "avg_pool2d": _avg_pool,
    "conv2d": _convolution,
    "max_pool2d": _max_pool,
}


def multiply_accumulates(node: fx.Node, box: Box) -> int:
    """Return those of a convolution for a box of one sample's result; 0 of other operators."""
    if operator_name(node) != "conv2d":
        return 0
    weight = bind(node)["weight"]
    assert isinstance(weight, fx.Node)  # noqa: S101 - the schema
    return area(box) * int(math.prod(weight.meta["val"].shape))


# ---- pools over the whole map --------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """A reduction over all rows and columns: each tile reduces its share, the rest is vectors."""

    how: str  # mean | sum | amax | amin
    keepdim: bool

    def emit(self, tile: Tile, node: fx.Node, share: Box) -> fx.Node:
        """Reduce a share, weighted so that the sum (or the extreme) of all is the whole's."""
        source = source_of(node)
        cut = tile.window(source, share)
        if self.how in ("amax", "amin"):
            return tile.call(getattr(aten, self.how).default, cut, [2, 3], self.keepdim)
        named = {"dtype": dtype} if (dtype := node.kwargs.get("dtype")) else {}
        target = aten.sum.dim_IntList if self.how == "sum" else aten.mean.dim
        made = tile.call(target, cut, [2, 3], self.keepdim, **named)
        if self.how == "sum":
            return made
        return tile.call(aten.mul.Tensor, made, area(share) / math.prod(size_of(source)))

    @property
    def join(self) -> OpOverload:
        """The operator that makes two shares one."""
        extremes = {"amax": aten.maximum.default, "amin": aten.minimum.default}
        found = extremes.get(self.how, aten.add.Tensor)
        assert isinstance(found, OpOverload)  # noqa: S101 - torch's types do not say
        return found


def pool_of(node: fx.Node) -> Pool | None:
    """Return the pool over the whole map that a node is; None if it is none."""
    name = operator_name(node)
    if not isinstance(node.target, OpOverload) or not isinstance(node.args[0], fx.Node):
        return None
    size = map_size(node.args[0])
    if size is None:
        return None
    bound = bind(node)
    if name == "adaptive_avg_pool2d":
        return Pool("mean", keepdim=True) if map_size(node) == (1, 1) else None
    if name in ("avg_pool2d", "max_pool2d"):
        if _pair(bound["kernel_size"]) != size or any(_pair(bound["padding"])):
            return None
        plain = _pair(bound.get("dilation", 1)) == (1, 1) and not bound.get("divisor_override")
        return Pool("mean" if name == "avg_pool2d" else "amax", keepdim=True) if plain else None
    if name in ("mean", "sum", "amax", "amin") and isinstance(bound.get("dim"), list | tuple):
        dims = sorted(dim % 4 for dim in bound["dim"])
        return Pool(name, bool(bound["keepdim"])) if dims == [2, 3] else None
    return None
