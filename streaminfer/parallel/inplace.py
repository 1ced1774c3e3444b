"""Writing over what nobody reads again: the same bits, without the pages of another tensor.

    y = conv2d(x, w)     made here, by an operator that never hands out memory of its arguments
    y = batch_norm(y)    y is read once, here: written over
    y = relu(y)          again
    z = add(y, x)        again, if x has y's type and lies as y does; x stays

A cut makes every operator pure (`mutation`); within a loaded stage, what a cut cannot part any
more is written over again. Measured on ResNet-50, one thread: its norms, relus and sums take half
the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch._ops import OpOverload

from streaminfer.parallel.calls import Call, Uses
from streaminfer.parallel.operators import Operator

__all__ = ["overwriting"]

aten = torch.ops.aten

# Their results lie in memory of their own, whatever their arguments are.
_FRESH = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.linear.default,
    aten.batch_norm.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
}


def _binary(pure: OpOverload, over: OpOverload) -> Operator:
    def applied(x: object, y: object, *more: object, **named: object) -> object:
        if _fits(x, y):
            return over(x, y, *more, **named)
        return pure(x, y, *more, **named)

    return applied


def _fits(x: object, y: object) -> bool:
    """Say whether the result has x's type, shape and layout."""
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if x.dtype != y.dtype or x.device != y.device or not x.is_floating_point():
        return False
    if x.shape == y.shape:
        return x.stride() == y.stride()
    if y.dim() != x.dim() or not (x.is_contiguous() and y.is_contiguous()):
        return False
    return all(b in (1, a) for a, b in zip(x.shape, y.shape, strict=True))


def _norm(x: torch.Tensor, *rest: object, **named: object) -> object:
    """Norm with the statistics of training, as a CPU does it: one pass, number by number."""
    tensors = [t for t in rest[:4] if isinstance(t, torch.Tensor)]
    training, momentum, eps = rest[4:7] if len(rest) >= 7 else (True, 0, 0)
    alike = all(t.dtype == torch.float32 for t in (x, *tensors))
    if training or named or not alike or not _plain(x):
        return aten.batch_norm.default(x, *rest, **named)
    unused = [x.new_empty(0), x.new_empty(0)]
    aten.native_batch_norm.out(
        x, *rest[:4], False, momentum, eps, out=x, save_mean=unused[0], save_invstd=unused[1]
    )
    return x


def _plain(x: torch.Tensor) -> bool:
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=_LAST))
    return dense and x.device.type == "cpu" and x.numel() > 0


_LAST = torch.channels_last
_UNARY = ("relu", "hardtanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu")
_OVER: Mapping[Operator, Operator] = {
    **{getattr(aten, n).default: getattr(aten, f"{n}_").default for n in _UNARY},
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.gelu.default: aten.gelu_.default,
    aten.add.Tensor: _binary(aten.add.Tensor, aten.add_.Tensor),
    aten.sub.Tensor: _binary(aten.sub.Tensor, aten.sub_.Tensor),
    aten.mul.Tensor: _binary(aten.mul.Tensor, aten.mul_.Tensor),
    aten.batch_norm.default: _norm,
}


def overwriting(calls: Sequence[Call], results: Sequence[object]) -> list[Call]:
    """Return the calls; those that may write over their first argument do."""
    uses = Uses(calls, results)
    return [
        call._replace(function=_OVER[call.operator]) if _may(call, calls, uses) else call
        for call in calls
    ]


def _may(call: Call, calls: Sequence[Call], uses: Uses) -> bool:
    read = call.first()
    if call.operator not in _OVER or read is None or read not in uses.maker:
        return False
    maker = calls[uses.maker[read]].operator
    return uses.only(read) and (maker in _FRESH or maker in _OVER)
