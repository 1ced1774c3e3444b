"""Runs of operators as one call each, without Python between them: TorchScript, on a CPU.

    calls     conv2d(s0, w0) → s1     relu_(s1) → s2     add_(s2, s0) or add(s2, s0) → s3
    script    def run(s0: Tensor, w0: Tensor):
                  s1 = torch.ops.aten.conv2d(s0, w0, …)
                  s2 = torch.ops.aten.relu_(s1)
                  if fits(s2, s0): …

The same operators on the same values, so the same bits. Python takes its lock for every operator,
and another thread that has it (an event loop, another stage's) keeps it for up to 5 ms. Measured:
ResNet-18 alone takes 0.93 of the time; a stage of 23 operators that shares a process with its event
loop gives 1.17 times as many rows a second (`make bench ONLY='script_time script_rate_1'`).

What has no form here stays a call between two scripts; what TorchScript does not compile, or
compiles to another overload, stays as it was.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from threading import Lock
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch._ops import OpOverload

from streaminfer.parallel.calls import Call, Slot
from streaminfer.parallel.inplace import Over, fits, norm  # noqa: F401 - a script's `fits`
from streaminfer.parallel.kernels import Pool, apart, far_apart, together  # noqa: F401
from streaminfer.parallel.operators import Operator, arguments, name_of

__all__ = ["Script", "Scripted", "compiled", "held", "scripted"]

P = ParamSpec("P")
T = TypeVar("T")

OFTEN = 2  # runs from which on a program is worth its scripts: 20 to 300 ms
LEAST = 2  # calls that are worth a script
_MISSING = (RuntimeError, AttributeError)  # not compiled, or no TorchScript in this torch
_LOCK = Lock()  # TorchScript's compiler, and the warnings' filters, are of the whole process


Run = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]


class Scripted:
    """Runs a program on a CPU, from one thread: most of its calls in scripts.

    `plainly` runs it call by call. `inputs`: the first slots, which are tensors.
    """

    def __init__(
        self, plainly: Run, calls: Sequence[Call], inputs: int, results: Sequence[object]
    ) -> None:
        self._plainly, self._calls, self._inputs, self._results = plainly, calls, inputs, results
        self._runs = 0
        self._steps: Sequence[Call | Script] = ()
        self._free = 1 + max((call.slot for call in calls), default=inputs) - inputs  # slots

    @property
    def steps(self) -> int:
        """How often the last run went from Python into torch."""
        return len(self._steps or self._calls)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run it."""
        self._runs += 1
        if self._runs == OFTEN:
            self._steps = scripted(self._calls, self._inputs, self._results) or ()
        if not self._steps:
            return self._plainly(tensors)
        slots: list[object] = [*tensors, *[None] * self._free]
        try:
            with torch.inference_mode(), _as_written():
                for step in self._steps:
                    step.run(slots)
        except RuntimeError:  # again, for an error that says what it says without TorchScript
            return self._plainly(tensors)
        return tuple(slots[slot] for slot in self._results)  # type: ignore[call-overload]


class Script(NamedTuple):
    """Some calls, compiled."""

    function: Callable[..., Sequence[object]]
    reads: tuple[Slot, ...]
    weights: tuple[torch.Tensor, ...]
    writes: tuple[Slot, ...]
    dead: tuple[Slot, ...]
    kept: object  # `held` weights

    def run(self, slots: list[object]) -> None:
        """Call it: read slots, write slots, forget what is dead."""
        given = self.function(*[slots[slot] for slot in self.reads], *self.weights)
        for slot in self.dead:
            slots[slot] = None
        for slot, value in zip(self.writes, given, strict=True):
            slots[slot] = value


def scripted(
    calls: Sequence[Call], inputs: int, results: Sequence[object]
) -> list[Call | Script] | None:
    """Return the calls, most of them in scripts; None if there is nothing that a script can run."""
    kinds = _kinds(calls, inputs)
    written = [(call, _statement(call, kinds)) for call in calls]
    steps: list[Call | Script] = []
    at = 0
    try:
        for formed, run in groupby(written, key=lambda one: one[1] is not None):
            some = list(run)
            at += len(some)
            if formed and len(some) >= LEAST:
                steps.append(_compiled(some, kinds, _wanted(calls[at:], results)))
            else:
                steps.extend(call for call, _ in some)
    except (*_MISSING, _OtherError):
        return None
    return steps if len(steps) < len(calls) else None


class _OtherError(Exception):
    """TorchScript chose another overload."""


def _wanted(later: Sequence[Call], results: Sequence[object]) -> set[Slot]:
    read = {slot for call in later for slot in call.read()}
    return read | {slot for slot in results if isinstance(slot, Slot)}


# ---- what a slot holds ---------------------------------------------------------------------------

_KNOWN = {"Tensor": "Tensor", "List[Tensor]": "List[Tensor]", "SymInt": "int", "int": "int"}
_SIZES = {"add", "sub", "mul", "floordiv", "mod", "neg"}  # of ints: an int
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}


def _kinds(calls: Sequence[Call], inputs: int) -> dict[Slot, str]:
    """Return the TorchScript types of slots, as far as they are known."""
    kinds = {Slot(k): "Tensor" for k in range(inputs)}
    for call in calls:
        kind = _kind(call, kinds)
        if kind is not None:
            kinds[call.slot] = kind
    return kinds


def _kind(call: Call, kinds: dict[Slot, str]) -> str | None:
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


class _Statement(NamedTuple):
    """A call as a script has it: lines, the weights by name, and the overload it must become."""

    lines: list[str]
    weights: dict[str, torch.Tensor]
    overloads: tuple[OpOverload, ...]


def _statement(call: Call, kinds: dict[Slot, str]) -> _Statement | None:
    if kinds.get(call.slot) is None or any(slot not in kinds for slot in call.read()):
        return None
    writer = _Writer(call)
    try:
        lines = writer.lines(kinds)
    except _NoFormError:
        return None
    return _Statement(lines, writer.weights, tuple(writer.overloads))


class _Writer:
    """Writes one call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.weights: dict[str, torch.Tensor] = {}
        self.overloads: list[OpOverload] = []

    def lines(self, kinds: dict[Slot, str]) -> list[str]:
        call, function = self._call, self._call.function
        to = _name(call.slot)
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

    def _is_tensor(self, value: object, kinds: dict[Slot, str]) -> bool:
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
            return _name(value)
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


def _name(slot: Slot) -> str:
    return f"s{int(slot)}"


def _number(value: float, kind: str) -> str:
    if kind == "float":
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return f"({value!r})" if value < 0 else repr(value)


# ---- compiled ------------------------------------------------------------------------------------


def _compiled(
    run: Sequence[tuple[Call, _Statement | None]], kinds: dict[Slot, str], wanted: set[Slot]
) -> Script:
    made: dict[Slot, None] = {}
    reads: dict[Slot, None] = {}
    weights: dict[str, torch.Tensor] = {}
    lines: list[str] = []
    overloads: list[OpOverload] = []
    for call, statement in run:
        assert statement is not None  # noqa: S101 - grouped by it
        reads.update(dict.fromkeys(slot for slot in call.read() if slot not in made))
        made[call.slot] = None
        weights |= statement.weights
        lines += statement.lines
        overloads += statement.overloads
    writes = tuple(slot for slot in made if slot in wanted)
    dead = tuple(slot for call, _ in run for slot in call.dead if slot in reads)
    takes = [*(f"{_name(s)}: {kinds[s]}" for s in reads), *(f"{name}: Tensor" for name in weights)]
    gives = ", ".join(_name(slot) for slot in writes)
    body = "\n    ".join([*lines, f"return ({gives},)" if writes else "return ()"])
    function = _compile(f"def run({', '.join(takes)}):\n    {body}\n")
    _check(function, overloads)
    given = tuple(weights.values())
    return Script(function, tuple(reads), given, writes, dead, held(given))


def _as_written() -> AbstractContextManager[None]:
    """Let TorchScript do what a script says, and watch, fuse and specialise nothing."""
    optimized: Callable[[bool], AbstractContextManager[None]] = torch.jit.optimized_execution  # type: ignore[attr-defined]
    return optimized(False)


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Compile a plain function of tensors, for a CPU; without TorchScript it stays as it is."""
    try:
        with _compiling():
            script: Callable[P, T] = torch.jit.script(function)
    except _MISSING:
        return function

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with _as_written():
            return script(*args, **kwargs)

    return run


def held(tensors: Sequence[torch.Tensor]) -> object:
    """Return what holds tensors without Python.

    Where Python alone has a tensor, its lock is taken whenever torch lets go of it: 17 of the 28
    times that a call of a network of 23 operators took it.
    """
    if not tensors:
        return None
    try:
        with _compiling():
            return torch.jit.script(list(tensors))
    except _MISSING:
        return tensors


@contextmanager
def _compiling() -> Iterator[None]:
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what becomes of TorchScript
        yield


def _compile(source: str) -> Callable[..., Sequence[object]]:
    with _compiling():
        unit = torch.jit.CompilationUnit(source)  # it finds this module's `fits` and the others
    return unit.run  # type: ignore[no-any-return]


def _check(function: Callable[..., object], wanted: Sequence[OpOverload]) -> None:
    """Raise _OtherError unless the operators of the script are those of the calls, in order."""
    names = {overload._schema.name for overload in wanted}
    found = [name for name, kind in _operators(function.graph) if kind in names]  # type: ignore[attr-defined]
    for name, overload in zip(found, wanted, strict=False):
        schema = overload._schema
        mine = f"{schema.name}.{schema.overload_name}".removesuffix(".")
        if name != mine and name != mine.replace(".Tensor", ".Scalar"):  # a number, as it is
            raise _OtherError(f"{mine} became {name}")
    if len(found) != len(wanted):
        raise _OtherError(f"{len(wanted)} operators became {len(found)}")


def _operators(block: torch.Block | torch.Graph) -> Iterator[tuple[str, str]]:
    """Yield the overloads' and operators' names of what gives tensors or sizes, in order."""
    for node in block.nodes():
        for inner in node.blocks():
            yield from _operators(inner)
        kind, given = node.kind(), [value.type().kind() for value in node.outputs()]
        sizes = given == ["IntType"] and "sym_" not in kind  # Python's arithmetic
        if kind.startswith("aten::") and not sizes:
            yield node.schema().partition("(")[0], kind
