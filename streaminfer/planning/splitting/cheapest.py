"""The cheapest way through a chain of cuts, where each stage has several ways to run.

value[state][cut], state = (stages so far, devices used of each kind), as in `partitioner`: there a
stage runs on replicas only and a bound keeps the search short; here a stage has any options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from streaminfer.planning.predict import How

__all__ = ["MANY", "Floats", "Leg", "Option", "cheapest", "groups"]

Floats = npt.NDArray[np.float64]
Group = tuple[int, ...]  # how many devices of each kind
MANY = 40  # groups; of more, only the simplest are looked at


@dataclass(frozen=True)
class Option:
    """A way to run stages on some devices: whole (`how` None, replicas) or split. inf: it won't."""

    group: Group
    how: How | None
    period: Floats  # [from cut, to cut] seconds between two micro-batches
    latency: Floats  # seconds of one


class Leg(NamedTuple):
    """One stage of a way: between two cuts, by an option."""

    a: int
    b: int
    option: Option


class _Step(NamedTuple):
    """How each cut was reached best: from which cut, state and option."""

    cut: npt.NDArray[np.int64]
    state: npt.NDArray[np.int64]
    option: npt.NDArray[np.int64]


def groups(counts: Group) -> list[Group]:
    """Return the sets of devices that a stage may have; of many kinds, the simplest.

    Those are devices of one kind, one device each of two kinds, and all.
    """
    every = [g for g in product(*(range(n + 1) for n in counts)) if any(g)]
    if len(every) <= MANY:
        return every
    kinds = [sum(map(bool, g)) for g in every]
    return [
        g
        for g, k in zip(every, kinds, strict=True)
        if k == 1 or (k, sum(g)) == (2, 2) or g == counts
    ]


def cheapest(
    options: Sequence[Option],
    counts: Group,
    size: int,
    stages: int | None = None,
    *,
    bound: float | None = None,
    frugal: bool = False,
) -> tuple[Leg, ...]:
    """Return the stages of the best way; () if there is none.

    Args:
        options: how stages may run; its matrices are [size, size].
        counts: devices of each kind.
        size: cuts, the model's start and end included.
        stages: exactly so many; None: any number.
        bound: None: the least bottleneck. Else the least seconds of one micro-batch through all
            stages, none of which has a period above it.
        frugal: of the ways within the bound, first the fewest devices.
    """
    costs = [o.period if bound is None else np.where(o.period <= bound, o.latency, np.inf)
             for o in options]  # fmt: skip
    usable = [k for k, cost in enumerate(costs) if np.isfinite(cost).any()]
    start = np.full(size, np.inf)
    start[0] = 0.0
    rows: dict[tuple[int, Group], Floats] = {(0, (0,) * len(counts)): start}
    steps: dict[tuple[int, Group], _Step] = {}
    order: list[tuple[int, Group]] = []
    for used in sorted(product(*(range(n + 1) for n in counts)), key=sum):
        for k in range(stages or 1):
            if (k, used) not in rows:
                continue
            order.append((k, used))
            values = rows[k, used][:, None]
            for index in usable:
                after = tuple(a + b for a, b in zip(used, options[index].group, strict=True))
                if any(a > n for a, n in zip(after, counts, strict=True)):
                    continue
                reached = (np.maximum if bound is None else np.add)(values, costs[index])
                state = (k + 1 if stages else 0, after)
                _keep(rows, steps, state, reached, (len(order) - 1, index))
    ends = [
        (*((sum(used), row[-1]) if frugal else (row[-1], sum(used))), (k, used))
        for (k, used), row in rows.items()
        if np.isfinite(row[-1]) and any(used) and stages in (None, k)
    ]
    return _walk(min(ends)[2], size - 1, steps, order, options) if ends else ()


def _keep(
    rows: dict[tuple[int, Group], Floats],
    steps: dict[tuple[int, Group], _Step],
    state: tuple[int, Group],
    reached: Floats,
    origin: tuple[int, int],
) -> None:
    """Take over, cut by cut, what is better than what was known of a state."""
    size = len(reached)
    if state not in rows:
        rows[state] = np.full(size, np.inf)
        steps[state] = _Step(*(np.full(size, -1, dtype=np.int64) for _ in range(3)))
    source = reached.argmin(axis=0)
    best = reached[source, np.arange(size)]
    better = best < rows[state]
    rows[state][better] = best[better]
    for kept, value in zip(steps[state], (source, *origin), strict=True):
        kept[better] = value[better] if isinstance(value, np.ndarray) else value


def _walk(
    state: tuple[int, Group],
    cut: int,
    steps: dict[tuple[int, Group], _Step],
    order: Sequence[tuple[int, Group]],
    options: Sequence[Option],
) -> tuple[Leg, ...]:
    legs: list[Leg] = []
    while cut > 0:
        step = steps[state]
        before = int(step.cut[cut])
        legs.append(Leg(before, cut, options[int(step.option[cut])]))
        state, cut = order[int(step.state[cut])], before
    return tuple(reversed(legs))
