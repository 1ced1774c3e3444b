"""Which operators a stage may hold: ATen by a rule and two short lists, and integer arithmetic.

A stage file is data that travels to machines which never saw the model; what it can ask for is
decided here, for those who write it (`capture`) and those who load it (`program`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch._ops import OpOverload, OpOverloadPacket

__all__ = ["Operator", "arguments", "draws_random_numbers", "name_of", "resolve"]

Operator = Callable[..., object]

# The rule. An ATen overload may be used if all it takes is values (no Storage, Generator, Stream,
# Dict or Any: those are TorchScript's and the allocator's), all it gives is tensors, and its name
# is public. That leaves out `save`, `format`, `manual_seed`, `set_grad_enabled`, … by shape alone.
_VALUES = {"Tensor", "int", "float", "bool", "number", "str", "Device", "Scalar", "SymInt"}
_NUMBERS = {"item", "sym_size", "sym_numel"}  # give a number, and are needed for shapes

# Public by name, but no part of a model's arithmetic.
_DENIED = {
    "from_file",  # opens a path
    "as_strided",  # reads memory by layout, which a cut does not keep
    "as_strided_",
    "as_strided_copy",
    "as_strided_scatter",
    "set",  # rebind or resize memory under other tensors
    "set_",
    "set_data",
    "resize",
    "resize_",
    "resize_as",
    "resize_as_",
    "resize_as_sparse",
    "resize_as_sparse_",
    "record_stream",  # the allocator's business
    "pin_memory",
}
# Private by name, but what public functions of torch.nn become in an exported graph.
_PRIVATE = {
    "__and__",
    "__or__",
    "__xor__",
    "__lshift__",
    "__rshift__",
    "_adaptive_avg_pool2d",
    "_log_softmax",
    "_safe_softmax",
    "_softmax",
    "_to_copy",
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "_weight_norm",
}
_PYTHON: dict[str, Operator] = {
    "add": operator.add,
    "eq": operator.eq,
    "floordiv": operator.floordiv,
    "ge": operator.ge,
    "getitem": operator.getitem,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "mod": operator.mod,
    "mul": operator.mul,
    "ne": operator.ne,
    "neg": operator.neg,
    "sub": operator.sub,
    "truediv": operator.truediv,
    "sym_max": torch.sym_max,
    "sym_min": torch.sym_min,
    "sym_sum": torch.sym_sum,
}  # on sizes; getitem also on an operator's list of tensors
_PYTHON_NAMES = {function: name for name, function in _PYTHON.items()}


def _kind(type_name: str) -> str:
    """Return what is inside List[…] and Optional[…]."""
    while type_name.endswith("]") and type_name.startswith(("List[", "Optional[")):
        type_name = type_name[type_name.index("[") + 1 : -1]
    return type_name


def _allowed(overload: OpOverload) -> bool:
    schema = overload._schema
    name = schema.name.removeprefix("aten::")
    if name in _DENIED or (name.startswith("_") and name not in _PRIVATE):
        return False
    given = {_kind(str(r.type)) for r in schema.returns}
    required = {
        _kind(str(a.type)) for a in schema.arguments if str(a.type) != "Optional[Generator]"
    }
    return required <= _VALUES and (given == {"Tensor"} or name in _NUMBERS)


def name_of(target: object) -> str | None:
    """Return an operator's name in a stage file; None if a stage may not hold it."""
    if isinstance(target, OpOverload):
        ours = target.namespace == "aten" and _allowed(target)
        return f"{target.namespace}.{target.__name__}" if ours else None
    python = _PYTHON_NAMES.get(target) if callable(target) else None
    return f"py.{python}" if python else None


@functools.lru_cache(maxsize=4096)
def resolve(name: str) -> Operator | None:
    """Return the operator of that name; None if there is none, or a stage may not hold it."""
    namespace, _, rest = name.partition(".")
    if namespace == "py":
        return _PYTHON.get(rest)
    base, _, overload_name = rest.partition(".")
    packet = getattr(torch.ops.aten, base, None) if namespace == "aten" else None
    if not isinstance(packet, OpOverloadPacket) or not hasattr(packet, overload_name):
        return None
    overload = getattr(packet, overload_name)
    return overload if isinstance(overload, OpOverload) and _allowed(overload) else None


def arguments(
    overload: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object] | None:
    """Return argument name → value, defaults left out; None if they do not fit the schema."""
    wanted = overload._schema.arguments
    positional = [a.name for a in wanted if not a.kwarg_only]
    if len(args) > len(positional):
        return None
    bound = dict(zip(positional, args, strict=False))
    if any(k in bound or k not in {a.name for a in wanted} for k in kwargs):
        return None
    bound |= kwargs
    missing = [a for a in wanted if not a.has_default_value() and a.name not in bound]
    return None if missing else bound


def draws_random_numbers(
    target: object, args: Sequence[object], kwargs: Mapping[str, object]
) -> bool:
    """Tell whether two runs of this call may differ: a random source, or dropout left on."""
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    bound = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    bound |= arguments(target, args, kwargs) or {}
    if "dropout_p" in bound:
        return bound["dropout_p"] != 0
    return bool(bound.get("train", bound.get("training", True))) and bound.get("p", 1) != 0
