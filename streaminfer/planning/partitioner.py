"""Where to cut, and how many devices of which kind for each stage: an exact dynamic program.

    cut             0      1      2      3      4         a stage = the layers between two cuts
    layers             a      b      c      d
    state (cut 2, one of two GPUs used)  ◀── least bottleneck of all ways to place a b on one GPU
                                         ──▶ every (cut 3 or 4, group of unused devices) from here

A stage on a group of devices runs at the sum of their rates, so groups may mix kinds. Receiving
and sending are charged to the stage that does it. The bottleneck, the time between two micro-
batches that leave the slowest stage, is what the pipeline's throughput depends on.

A first pass over few cuts bounds the bottleneck; in the exact pass over all cuts a state is only
looked at where the devices it has used could have come that far, and the unused could do the rest,
within the bound. (PipeDream's and AlpaServe's programs know equal devices only.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt

__all__ = ["Kind", "Partition", "Problem", "Share", "least_memory", "solve"]

Floats = npt.NDArray[np.float64]
Group = tuple[int, ...]  # how many of each kind
COARSE = 48  # cuts in the first pass
SLACK = 1.02  # a plan this close to the best is as good: fewer devices and less latency decide
EPSILON = 1e-9


@dataclass(frozen=True)
class Kind:
    """Devices that are alike."""

    count: int
    seconds: Floats  # [nodes], one micro-batch
    memory: float = float("inf")  # bytes, of each
    fixed: float = 0.0  # seconds per micro-batch, whatever the stage


@dataclass(frozen=True)
class Problem:
    """A chain of nodes to be cut, and the devices to put the parts on.

    Arrays by cut have one entry for the model's start, one per cut, one for its end.
    """

    kinds: tuple[Kind, ...]
    ends: npt.NDArray[np.int64]  # by cut: position of the last node before it; -1 at the start
    receive: Floats  # by cut: seconds that the stage behind it spends on what crosses
    send: Floats  # by cut: seconds that the stage before it spends
    held: Floats  # by cut: bytes of what crosses, while it is received or sent
    weights: Floats  # [nodes] bytes that each node is the first to read
    peaks: Floats  # [nodes] bytes of activations while a node runs
    ties: tuple[tuple[int, int, int], ...] = ()

    @property
    def size(self) -> int:
        """The number of cuts, start and end included."""
        return len(self.ends)

    def segments(self, kind: Kind) -> Floats:
        """Return seconds [from cut, to cut] of a stage on one device; infinite if it won't fit."""
        total = np.concatenate([[0.0], np.cumsum(kind.seconds)])[self.ends + 1]
        seconds = total[None, :] - total[:, None] + kind.fixed
        seconds = seconds + self.receive[:, None] + self.send[None, :]
        fits = self.memory <= kind.memory
        return np.where(fits & self._forward, seconds, np.inf)

    @cached_property
    def _forward(self) -> npt.NDArray[np.bool_]:
        return self.ends[:, None] < self.ends[None, :]

    @cached_property
    def memory(self) -> Floats:
        """Bytes [from cut, to cut]: weights (tied ones once), the largest moment, what crosses."""
        total = np.concatenate([[0.0], np.cumsum(self.weights)])[self.ends + 1]
        need = total[None, :] - total[:, None]
        for (
            a,
            b,
            nbytes,
        ) in self.ties:  # the second reader needs the weight of its own if a cut parts them
            apart = (self.ends[:, None] >= a) & (self.ends[:, None] < b)
            need = need + nbytes * (apart & (self.ends[None, :] >= b))
        most = np.maximum.reduceat(self.peaks, self.ends[:-1] + 1)
        peak = np.zeros((self.size, self.size))
        for i in range(self.size - 1):
            peak[i, i + 1 :] = np.maximum.accumulate(most[i:])
        total_need: Floats = need + peak + self.held[:, None] + self.held[None, :]
        return total_need

    def only(self, cuts: Sequence[int]) -> Problem:
        """Return the same with fewer cuts (start and end must be among them)."""
        kept = np.array(cuts)
        return replace(
            self,
            ends=self.ends[kept],
            receive=self.receive[kept],
            send=self.send[kept],
            held=self.held[kept],
        )


@dataclass(frozen=True)
class Share:
    """One stage: between which cuts, on how many devices of each kind."""

    first: int  # indices into the problem's cuts
    last: int
    group: Group
    seconds: float  # between two micro-batches, all its devices together


@dataclass(frozen=True)
class Partition:
    """A way to cut and place the model."""

    stages: tuple[Share, ...]
    bottleneck: float  # seconds between two micro-batches

    def devices(self) -> int:
        """Return how many devices it uses."""
        return sum(sum(stage.group) for stage in self.stages)


def solve(
    problem: Problem, *, stages: int | None = None, devices: int | None = None, slack: float = SLACK
) -> Partition | None:
    """Return the partition with the least bottleneck; None if none fits.

    Args:
        problem: the chain and the devices.
        stages: exactly so many; None: as many as are best, 1 among them.
        devices: use at most so many.
        slack: of the partitions within this factor of the least bottleneck, take the fewest
            devices, then the least time of one micro-batch through all stages. 1.0: none but
            the least.
    """
    search = _Search(problem, stages, devices)
    bound = float("inf")
    if problem.size > 2 * COARSE:
        coarse = _coarse(problem)
        rough = _Search(problem.only(coarse), stages, devices).least(np.maximum, float("inf"))
        bound = rough * (1 + EPSILON)
    least = search.least(np.maximum, bound)
    if not np.isfinite(least):
        return None
    shares = search.shortest(least * max(slack, 1 + EPSILON))
    return Partition(shares, max(share.seconds for share in shares))


def _coarse(problem: Problem) -> list[int]:
    """Take the cut with the least to carry out of each of equal stretches of time."""
    total = np.cumsum(problem.kinds[0].seconds)
    inner = range(1, problem.size - 1)
    best: dict[int, int] = {}
    for cut in inner:
        stretch = int(total[problem.ends[cut]] / total[-1] * COARSE)
        known = best.setdefault(stretch, cut)
        if problem.receive[cut] + problem.send[cut] < problem.receive[known] + problem.send[known]:
            best[stretch] = cut
    return [0, *sorted(best.values()), problem.size - 1]


def least_memory(problem: Problem, stages: int) -> tuple[float, int, int]:
    """Return the least factor by which all memories must grow, and the stage that needs it.

    The stage is given by its two cuts. At most `stages` stages and the problem's devices are used.
    """
    kinds = tuple(replace(kind, memory=float("inf")) for kind in problem.kinds)
    search = _Search(replace(problem, kinds=kinds), None, stages)
    search.seconds = [
        np.where(problem._forward, problem.memory / kind.memory, np.inf) for kind in problem.kinds
    ]
    search.single = True
    least = search.least(np.maximum, float("inf"))
    shares = search.shortest(least * (1 + EPSILON))
    worst = max(shares, key=lambda share: share.seconds)
    return least, worst.first, worst.last


class _Search:
    """One table: value[state][cut], a state = (stages so far, devices used of each kind)."""

    def __init__(self, problem: Problem, stages: int | None, devices: int | None) -> None:
        self.problem, self.stages = problem, stages
        self.counts = tuple(kind.count for kind in problem.kinds)
        self.most = min(devices or sum(self.counts), sum(self.counts))
        self.seconds = [problem.segments(kind) for kind in problem.kinds]
        self.single = False  # a group is one device
        self._latency = False  # values are sums of times, not the largest
        total = np.array([max(kind.seconds.sum(), 1e-12) for kind in problem.kinds])
        # The least work that reaching a cut takes, each kind's whole model being 1 / speed: a set
        # of devices with speeds y can't have done more than bottleneck x sum(y).
        work = np.min([k.seconds / t for k, t in zip(problem.kinds, total, strict=True)], axis=0)
        self.work = np.concatenate([[0.0], np.cumsum(work)])[problem.ends + 1]
        self.speed = 1.0 / total

    def groups(self) -> list[Group]:
        found = [
            g for g in product(*(range(n + 1) for n in self.counts)) if 0 < sum(g) <= self.most
        ]
        return [g for g in found if sum(g) == 1] if self.single else found

    def least(self, combine: Callable[..., Floats], bound: float) -> float:
        """Fill the table and return the least value at the end."""
        self._fill(combine, bound)
        return min((float(row[-1]) for _, row in self._ends()), default=float("inf"))

    def shortest(self, bound: float) -> tuple[Share, ...]:
        """Return the stages within the bound: fewest devices, then least time in all stages."""
        self._latency = True
        self._fill(np.add, bound)
        final = [
            (sum(used), float(row[-1]), (k, used)) for (k, used), row in self._ends()
            if np.isfinite(row[-1])
        ]  # fmt: skip
        _, _, state = min(final)
        return self._walk(state, bound)

    def _ends(self) -> Iterator[tuple[tuple[int, Group], Floats]]:
        for (k, used), row in self.table.items():
            if any(used) and self.stages in (None, k):
                yield (k, used), row

    def _fill(self, combine: Callable[..., Floats], bound: float) -> None:
        """Go through states in the order of devices used; each reaches out to larger ones."""
        size, groups = self.problem.size, self.groups()
        start = np.full(size, np.inf)
        start[0] = 0.0
        zero = (0,) * len(self.counts)
        self.table: dict[tuple[int, Group], Floats] = {(0, zero): start}
        order = sorted(product(*(range(n + 1) for n in self.counts)), key=sum)
        for used in order:
            for k in range(self.stages or 1) if self.stages else (0,):
                row = self.table.get((k, used))
                if row is None:
                    continue
                for group in groups:
                    after = tuple(a + b for a, b in zip(used, group, strict=True))
                    fits = all(a <= n for a, n in zip(after, self.counts, strict=True))
                    if fits and sum(after) <= self.most:
                        state = (k + 1 if self.stages else 0, after)
                        self._reach(row, used, group, state, combine, bound)

    def _reach(
        self,
        row: Floats,
        used: Group,
        group: Group,
        state: tuple[int, Group],
        combine: Callable[..., Floats],
        bound: float,
    ) -> None:
        """Put the best of one more stage on `group` into the row of `state`."""
        (a, b), (c, d) = self._window(used, bound), self._window(state[1], bound)
        c = max(c, a + 1)
        if self.stages is not None and state[0] == self.stages:
            c = max(c, self.problem.size - 1)  # the last stage ends the model
        if a >= b or c >= d:
            return
        seconds = self._group_seconds(group, slice(a, b), slice(c, d))
        values = combine(row[a:b, None], self._cost(seconds, group))
        best = np.where(seconds <= bound, values, np.inf).min(axis=0)
        target = self.table.setdefault(state, np.full(self.problem.size, np.inf))
        np.minimum(target[c:d], best, out=target[c:d])

    def _cost(self, seconds: Floats, group: Group) -> Floats:
        """Return what a micro-batch spends in the stage, while its other devices work on others."""
        return seconds * sum(group) if self._latency else seconds

    def _window(self, used: Group, bound: float) -> tuple[int, int]:
        """Return the cuts that a state may stand at if no stage is slower than the bound."""
        size = self.problem.size
        if not any(used):
            return 0, 1
        if not np.isfinite(bound) or self.single:
            return 1, size
        mine = sum(n * s for n, s in zip(used, self.speed, strict=True))
        left = [n - u for n, u in zip(self.counts, used, strict=True)]
        rest = sum(n * s for n, s in zip(left, self.speed, strict=True))
        done = bound * mine * (1 + EPSILON) + EPSILON
        due = self.work[-1] - bound * rest * (1 + EPSILON) - EPSILON
        first = int(np.searchsorted(self.work, due, "left"))
        return max(1, first), int(np.searchsorted(self.work, done, "right"))

    def _group_seconds(self, group: Group, rows: slice, columns: slice) -> Floats:
        """Return seconds between micro-batches of a stage on a group: rates add."""
        parts = [(n, self.seconds[kind][rows, columns]) for kind, n in enumerate(group) if n]
        if len(parts) == 1:
            n, seconds = parts[0]
            return seconds / n
        rate = sum(n / np.maximum(seconds, 1e-15) for n, seconds in parts)
        slowest = np.maximum.reduce([seconds for _, seconds in parts])
        with np.errstate(divide="ignore"):
            return np.where(np.isfinite(slowest), 1.0 / rate, np.inf)

    def _walk(self, state: tuple[int, Group], bound: float) -> tuple[Share, ...]:
        """Go back from the end: find a stage and a state before it that give the value here."""
        shares: list[Share] = []
        cut = self.problem.size - 1
        while cut > 0:
            share, state = self._step_back(state, cut, bound)
            shares.append(share)
            cut = share.first
        return tuple(reversed(shares))

    def _step_back(
        self, state: tuple[int, Group], cut: int, bound: float
    ) -> tuple[Share, tuple[int, Group]]:
        k, after = state
        value = self.table[state][cut]
        for group in self.groups():
            used = tuple(a - b for a, b in zip(after, group, strict=True))
            row = self.table.get((k - 1 if self.stages else 0, used))
            if min(used) < 0 or row is None:
                continue
            seconds = self._group_seconds(group, slice(0, cut), slice(cut, cut + 1))[:, 0]
            values = np.where(seconds <= bound, row[:cut] + self._cost(seconds, group), np.inf)
            first = int(values.argmin())
            if values[first] <= value * (1 + 1e-12):
                return Share(first, cut, group, float(seconds[first])), (
                    k - 1 if self.stages else 0,
                    used,
                )
        raise AssertionError("the table holds a value that nothing gives")
