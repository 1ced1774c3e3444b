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
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

from streaminfer.parallel.calls import Call, Uses
from streaminfer.parallel.operators import Operator

__all__ = ["Over", "fits", "norm", "overwriting"]

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


@dataclass(frozen=True)
class Over:
    """Write over the first argument where the result fits into it."""

    pure: OpOverload
    over: OpOverload

    def __call__(self, x: object, y: object, *more: object, **named: object) -> object:
        """Compute x ∘ y."""
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and fits(x, y):
            return self.over(x, y, *more, **named)
        return self.pure(x, y, *more, **named)


# What follows is compiled as well (`script`), hence its plain style.


def fits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Say whether the result has x's type, shape and layout."""
    if x.dtype != y.dtype or x.device != y.device or not x.is_floating_point():
        return False
    if x.shape == y.shape:
        return x.stride() == y.stride()
    if y.dim() != x.dim() or not (x.is_contiguous() and y.is_contiguous()):
        return False
    for k in range(x.dim()):  # noqa: SIM110 - TorchScript has no all()
        if y.shape[k] != 1 and y.shape[k] != x.shape[k]:
            return False
    return True


def norm(  # noqa: PLR0913 - torch's arguments, by which the operator is called
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> torch.Tensor:
    """Norm with the statistics of training, as a CPU does it: one pass, number by number."""
    alike = _is_float32(x) and _is_float32(weight) and _is_float32(bias)
    alike = alike and _is_float32(running_mean) and _is_float32(running_var)
    if training or not alike or not _plain(x):
        new: torch.Tensor = torch.ops.aten.batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
        )
        return new
    torch.ops.aten.native_batch_norm(
        x, weight, bias, running_mean, running_var, False, momentum, eps,
        out=x, save_mean=x.new_empty([0]), save_invstd=x.new_empty([0]),
    )  # fmt: skip
    return x


def _is_float32(x: torch.Tensor | None) -> bool:
    return x is None or x.dtype == torch.float32


def _plain(x: torch.Tensor) -> bool:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return (x.is_contiguous() or last) and x.device.type == "cpu" and x.numel() > 0


_UNARY = ("relu", "hardtanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu")
_OVER: Mapping[Operator, Operator] = {
    **{getattr(aten, n).default: getattr(aten, f"{n}_").default for n in _UNARY},
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.gelu.default: aten.gelu_.default,
    aten.add.Tensor: Over(aten.add.Tensor, aten.add_.Tensor),
    aten.sub.Tensor: Over(aten.sub.Tensor, aten.sub_.Tensor),
    aten.mul.Tensor: Over(aten.mul.Tensor, aten.mul_.Tensor),
    aten.batch_norm.default: norm,
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
