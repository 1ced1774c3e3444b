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

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch._ops import OpOverload

from streaminfer.parallel.calls import Call, Slot
from streaminfer.parallel.inplace import fits, norm  # noqa: F401 - a script finds them here
from streaminfer.parallel.kernels import apart, far_apart, together  # noqa: F401
from streaminfer.parallel.statements import Kinds, Statement, kinds_of, name_in, statement
from streaminfer.parallel.torchscript import MISSING, as_written, compiling, held

__all__ = ["OFTEN", "Script", "Scripted", "Steps"]

OFTEN = 2  # runs from which on a program is worth its scripts: 20 to 300 ms
LEAST = 2  # calls that are worth a script


class Scripted:
    """Runs a program on a CPU, from one thread: most of its calls in scripts.

    `run` runs steps on tensors. `inputs`: the first slots, which are tensors.
    """

    def __init__(
        self, run: Run, calls: Sequence[Call], inputs: int, results: Sequence[object]
    ) -> None:
        self._run, self._calls, self._inputs, self._results = run, calls, inputs, results
        self._runs = 0
        self._steps: Steps = calls

    @property
    def steps(self) -> int:
        """How often a run goes from Python into torch."""
        return len(self._steps)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run it."""
        self._runs += 1
        if self._runs == OFTEN:
            self._steps = _scripted(self._calls, self._inputs, self._results)
        if self._steps is self._calls:
            return self._run(self._calls, tensors)
        try:
            with as_written():
                return self._run(self._steps, tensors)
        except RuntimeError:  # again, for an error that says what it says without TorchScript
            return self._run(self._calls, tensors)


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


Steps = Sequence[Call | Script]
Run = Callable[[Steps, Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]


def _scripted(calls: Sequence[Call], inputs: int, results: Sequence[object]) -> Steps:
    """Return the calls, most of them in scripts; the calls where no script can run any of them."""
    kinds = kinds_of(calls, inputs)
    written = [(call, statement(call, kinds)) for call in calls]
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
    except (*MISSING, _OtherError):
        return calls
    return steps if len(steps) < len(calls) else calls


class _OtherError(Exception):
    """TorchScript chose another overload."""


def _wanted(later: Sequence[Call], results: Sequence[object]) -> set[Slot]:
    read = {slot for call in later for slot in call.read()}
    return read | {slot for slot in results if isinstance(slot, Slot)}


def _compiled(
    run: Sequence[tuple[Call, Statement | None]], kinds: Kinds, wanted: set[Slot]
) -> Script:
    made: dict[Slot, None] = {}
    reads: dict[Slot, None] = {}
    weights: dict[str, torch.Tensor] = {}
    lines: list[str] = []
    overloads: list[OpOverload] = []
    for call, written in run:
        assert written is not None  # noqa: S101 - grouped by it
        reads.update(dict.fromkeys(slot for slot in call.read() if slot not in made))
        made[call.slot] = None
        weights |= written.weights
        lines += written.lines
        overloads += written.overloads
    writes = tuple(slot for slot in made if slot in wanted)
    dead = tuple(slot for call, _ in run for slot in call.dead if slot in reads)
    takes = [
        *(f"{name_in(s)}: {kinds[s]}" for s in reads),
        *(f"{name}: Tensor" for name in weights),
    ]
    gives = ", ".join(name_in(slot) for slot in writes)
    body = "\n    ".join([*lines, f"return ({gives},)" if writes else "return ()"])
    function = _compile(f"def run({', '.join(takes)}):\n    {body}\n")
    _check(function, overloads)
    given = tuple(weights.values())
    return Script(function, tuple(reads), given, writes, dead, held(given))


def _compile(source: str) -> Callable[..., Sequence[object]]:
    with compiling():
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
