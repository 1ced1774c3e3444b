"""What a loaded stage is made of: calls of operators, in order, on numbered slots.

call            function   args            holes      slot  dead
conv1           conv2d     [·, weight]     (0 ← s0)   s1    s0
relu            relu       [·]             (0 ← s1)   s2    s1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from streaminfer.parallel.operators import Operator

__all__ = ["Call", "Slot", "Uses"]


class Slot(int):
    """Where a value lies while the stage runs; in a template, a hole."""


class Call(NamedTuple):
    """One operator with its constants and weights in place."""

    name: str
    operator: Operator  # as the file says
    function: Operator  # what is called: the same, or what gives the same bits in less time
    args: list[object]
    holes: tuple[tuple[int, object], ...]  # argument → slot, or a list with slots in it
    kwargs: dict[str, object]
    named_holes: tuple[tuple[str, object], ...]
    slot: Slot
    dead: tuple[Slot, ...] = ()  # values that nobody reads after this call

    def run(self, slots: list[object]) -> None:
        """Call it: read slots, write its own, forget what is dead."""
        args = self.args.copy()
        for i, hole in self.holes:
            args[i] = slots[hole] if type(hole) is Slot else _fill(hole, slots)
        if self.named_holes:
            filled = {name: _fill(hole, slots) for name, hole in self.named_holes}
            slots[self.slot] = self.function(*args, **self.kwargs, **filled)
        else:
            slots[self.slot] = self.function(*args, **self.kwargs)
        for i in self.dead:
            slots[i] = None

    def read(self) -> Iterator[Slot]:
        """Yield the slots that it reads, each as often as it is read."""
        for _, hole in (*self.holes, *self.named_holes):
            yield from _slots(hole)

    def first(self) -> Slot | None:
        """Return the slot of its first argument, if that is one value."""
        hole = self.holes[0] if self.holes else None
        return hole[1] if hole and hole[0] == 0 and isinstance(hole[1], Slot) else None


class Uses:
    """Who makes each value, and how often it is read."""

    def __init__(self, calls: Sequence[Call], results: Sequence[object]) -> None:
        self.maker = {call.slot: i for i, call in enumerate(calls)}
        self._reader = {slot: i for i, call in enumerate(calls) for slot in call.read()}
        self._reads = Counter(slot for call in calls for slot in call.read())
        self._reads.update(slot for result in results for slot in _slots(result))

    def only(self, slot: Slot) -> bool:
        """Say whether a value is read once in all."""
        return self._reads[slot] == 1

    def reader(self, slot: Slot) -> int | None:
        """Return the one call that reads a value, if it is read once in all."""
        return self._reader.get(slot) if self.only(slot) else None


def _slots(hole: object) -> Iterator[Slot]:
    if isinstance(hole, Slot):
        yield hole
    elif isinstance(hole, list):
        for item in hole:
            yield from _slots(item)


def _fill(hole: object, slots: Sequence[object]) -> object:
    if isinstance(hole, Slot):
        return slots[hole]
    if isinstance(hole, list):
        return [_fill(item, slots) for item in hole]
    return hole
