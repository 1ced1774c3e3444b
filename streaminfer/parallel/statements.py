"""A call of a stage as a statement of TorchScript.

    conv2d(s0, weight) → s1        s1 = torch.ops.aten.conv2d(s0, weight=w1_0, stride=…)
    add_(s2, s0) or add(s2, s0)    if fits(s2, s0): s3 = torch.ops.aten.add_(s2, other=s0) …
    s3 * 2 → s4, of sizes          s4 = (s3 * 2)

Weights are named by the call that reads them. `script` compiles the statements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch._ops import OpOverload

from streaminfer.parallel.calls import Call, Slot
from streaminfer.parallel.inplace import Over, norm
from streaminfer.parallel.kernels import Pool
from streaminfer.parallel.operators import Operator, arguments, name_of

__all__ = ["Kinds", "Statement", "kinds_of", "name_in", "statement"]

Kinds = dict[Slot, str]  # of slots: their types in TorchScript

_KNOWN = {"Tensor": "Tensor", "List[Tensor]": "List[Tensor]", "SymInt": "int", "int": "int"}
_SIZES = {"add", "sub", "mul", "floordiv", "mod", "neg"}  # of ints: an int
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}


def kinds_of(calls: Sequence[Call], inputs: int) -> Kinds:
    """Return the TorchScript types of slots, as far as they are known."""
    kinds = {Slot(k): "Tensor" for k in range(inputs)}
    for call in calls:
        kind = _kind(call, kinds)
        if kind is not None:
            kinds[call.slot] = kind
    return kinds


def _kind(call: Call, kinds: Kinds) -> str | None:
    operator = call.operator
    if isinstance(operator, OpOverload):
        given = [str(value.type) for value in operator._schema.returns]
        if len(given) == 1:
            return _KNOWN.get(given[0])
        return f"Tuple[{', '.join(given)}]" if set(given) == {"Tensor"} else None
    name = _python_name(operator)
    read = [kinds.get(slot) for slot in call.read()]
    if name == "getitem":
        one_of = read[0] if read else None
        several = one_of is not None and one_of.startswith(("List[Tensor", "Tuple[Tensor"))
        return "Tensor" if several and isinstance(call.args[1], int) else None
    numbers = [arg for arg in call.args if not isinstance(arg, Slot)]
    whole = all(kind == "int" for kind in read) and all(type(n) is int for n in numbers)
    return "int" if name in _SIZES and whole else None


def _python_name(operator: Operator) -> str | None:
    name = name_of(operator)
    return name.removeprefix("py.") if name is not None and name.startswith("py.") else None


# ---- a statement ---------------------------------------------------------------------------------


class _NoFormError(Exception):
    """A value has no form in a script."""


class Statement(NamedTuple):
    """A call as a script has it: lines, the weights by name, and the overload it must become."""

    lines: list[str]
    weights: dict[str, torch.Tensor]
    overloads: tuple[OpOverload, ...]


def statement(call: Call, kinds: Kinds) -> Statement | None:
    """Write a call; None if it, or what it reads, has no form in a script."""
    if kinds.get(call.slot) is None or any(slot not in kinds for slot in call.read()):
        return None
    writer = _Writer(call)
    try:
        lines = writer.lines(kinds)
    except _NoFormError:
        return None
    return Statement(lines, writer.weights, tuple(writer.overloads))


class _Writer:
    """Writes one call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.weights: dict[str, torch.Tensor] = {}
        self.overloads: list[OpOverload] = []

    def lines(self, kinds: Kinds) -> list[str]:
        call, function = self._call, self._call.function
        to = name_in(call.slot)
        if isinstance(function, Over):
            if self._is_tensor(call.args[1], kinds):
                test = f"fits({self._value(call.args[0])}, {self._value(call.args[1])})"
                return self._either(to, test, self._of(function.over), self._of(function.pure))
            function = function.pure
        if isinstance(function, Pool):
            x = self._value(call.args[0])
            turned = f"apart({self._of(function.pool, first=f'together({x})')})"
            return self._either(to, f"far_apart({x})", turned, self._of(function.pool))
        if function is norm:
            return [f"{to} = norm({self._arguments(call.operator)})"]
        if isinstance(function, OpOverload):
            return [f"{to} = {self._of(function)}"]
        return [f"{to} = {self._python()}"]

    def _either(self, to: str, test: str, then: str, otherwise: str) -> list[str]:
        return [f"if {test}:", f"    {to} = {then}", "else:", f"    {to} = {otherwise}"]

    def _is_tensor(self, value: object, kinds: Kinds) -> bool:
        return isinstance(value, torch.Tensor) or (
            isinstance(value, Slot) and kinds[value] == "Tensor"
        )

    def _of(self, overload: OpOverload, *, first: str | None = None) -> str:
        self.overloads.append(overload)
        name = overload._schema.name.removeprefix("aten::")
        return f"torch.ops.aten.{name}({self._arguments(overload, first=first)})"

    def _arguments(self, overload: Operator, *, first: str | None = None) -> str:
        assert isinstance(overload, OpOverload)  # noqa: S101 - asked where it is one
        call = self._call
        bound = arguments(overload, call.args, {**call.kwargs, **dict(call.named_holes)})
        if bound is None:
            raise _NoFormError
        types = {a.name: str(a.type) for a in overload._schema.arguments}
        written = []
        for k, (name, value) in enumerate(bound.items()):
            text = first if first and not k else self._value(value, types[name])
            written.append(f"{name}={text}" if k else text)  # names tell overloads apart
        return ", ".join(written)

    def _python(self) -> str:
        name, args = _python_name(self._call.function), [self._value(a) for a in self._call.args]
        if name == "getitem":
            return f"{args[0]}[{args[1]}]"
        if name == "neg":
            return f"-{args[0]}"
        if name in _SIGNS:
            return f"({args[0]} {_SIGNS[name]} {args[1]})"
        raise _NoFormError

    def _value(self, value: object, kind: str = "") -> str:
        if kind.startswith("Optional["):
            kind = kind[len("Optional[") : -1]
        if isinstance(value, Slot):
            return name_in(value)
        if isinstance(value, torch.Tensor):
            name = f"w{self._call.slot}_{len(self.weights)}"
            self.weights[name] = value
            return name
        if isinstance(value, list):
            return self._list(value, kind)
        if isinstance(value, bool) or value is None:
            return repr(value)
        if isinstance(value, int | float):
            return _number(value, kind)
        if isinstance(value, str):
            return repr(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
            return str(value)
        raise _NoFormError

    def _list(self, values: Sequence[object], kind: str) -> str:
        inner = kind[len("List[") : -1] if kind.startswith("List[") else ""
        texts = ", ".join(self._value(value, inner) for value in values)
        inner = {"SymInt": "int"}.get(inner, inner)
        if inner not in ("int", "float", "bool", "Tensor", "Optional[Tensor]"):
            raise _NoFormError
        return f"torch.jit.annotate(List[{inner}], [{texts}])"


def name_in(slot: Slot) -> str:
    """Return a slot's variable."""
    return f"s{int(slot)}"


def _number(value: float, kind: str) -> str:
    if kind == "float":
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return f"({value!r})" if value < 0 else repr(value)
