"""Where to cut, and how many devices of which kind for each stage: an exact dynamic program.

    cut             0      1      2      3      4         a stage = the layers between two cuts
    layers             a      b      c      d
    state (cut 2, one of two GPUs used)  ◀── least bottleneck of all ways to place a b on one GPU
                                         ──▶ every (cut 3 or 4, group of unused devices) from here

A stage on a group of devices runs at the sum of their rates, so groups may mix kinds. Receiving
and sending are charged to the stage that does it. The bottleneck, the time between two micro-
batches that leave the slowest stage, is what the pipeline's throughput depends on.

No partition is better than the work divided among all devices to the last grain. The search begins
with a bound just above that and loosens it until it finds something: within a bound, a state is
only looked at where the devices it has used could have come that far, and the unused could do the
rest. (PipeDream's and AlpaServe's programs know equal devices only.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

__all__ = ["Kind", "Partition", "Problem", "Share", "ideal", "least_memory", "solve"]

Floats = npt.NDArray[np.float64]
Group = tuple[int, ...]  # how many of each kind
LOOSENING = (
    1.02,
    1.06,
    1.12,
    1.2,
    1.35,
    1.6,
    2.0,
    4.0,
    float("inf"),
)  # of the bound, until a partition is found
SLACK = 1.005  # a plan this close to the best is as good: fewer devices and less latency decide
EPSILON = 1e-9
IMPOSSIBLE = -1e30  # stages a second


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
    for factor in LOOSENING:
        least = search.least(np.maximum, search.ideal * factor)
        if np.isfinite(least):
            break
    else:
        return None
    shares = search.shortest(least * max(slack, 1 + EPSILON))
    return Partition(shares, max(share.seconds for share in shares))


def least_memory(problem: Problem, stages: int) -> tuple[float, int, int]:
    """Return the least factor by which all memories must grow, and the stage that needs it.

    The stage is given by its two cuts. At most `stages` stages and the problem's devices are used.
    """
    kinds = tuple(replace(kind, memory=float("inf")) for kind in problem.kinds)
    search = _Search(replace(problem, kinds=kinds), None, stages)
    search.rates = [
        _rates(np.where(problem._forward, problem.memory / kind.memory, np.inf))
        for kind in problem.kinds
    ]
    search.single = True
    least = search.least(np.maximum, float("inf"))
    shares = search.shortest(least * (1 + EPSILON))
    worst = max(shares, key=lambda share: share.seconds)
    return least, worst.first, worst.last


def _rates(seconds: Floats) -> Floats:
    """Return 1 / seconds; where a stage is impossible, so low that no group makes up for it."""
    return np.where(np.isfinite(seconds), 1.0 / np.maximum(seconds, 1e-15), IMPOSSIBLE)


class _Work:
    """The least work up to each cut, and each kind's speed: what no placement can get around.

    Each kind's whole model is work of 1, so a kind that takes t seconds for it has speed 1 / t.
    Within a bottleneck, a set of devices can do at most bottleneck x the sum of its speeds; and
    what lies between two cuts takes at least the work of the kind that it suits best.
    """

    def __init__(self, problem: Problem) -> None:
        total = np.array([max(kind.seconds.sum(), 1e-12) for kind in problem.kinds])
        starts = problem.ends[:-1] + 1
        parts = [np.add.reduceat(kind.seconds, starts) for kind in problem.kinds]
        self.parts = np.array(parts) / total[:, None]
        self.speed = 1.0 / total
        self.counts = np.array([kind.count for kind in problem.kinds])
        self._known: dict[tuple[bool, ...], Floats] = {}

    def until(self, devices: Sequence[int]) -> Floats:
        """Return the least work [cuts] of what lies before each cut, on these devices alone."""
        kinds = tuple(n > 0 for n in devices)
        if kinds not in self._known:
            least = self.parts[list(kinds)].min(axis=0) if any(kinds) else np.full(1, np.inf)
            self._known[kinds] = np.concatenate([[0.0], np.cumsum(least)])
        return self._known[kinds]

    def power(self, devices: Sequence[int]) -> float:
        """Return the sum of the devices' speeds."""
        return float(self.speed @ np.array(devices))

    def reachable(self, used: Group, bound: float) -> tuple[int, int]:
        """Return between which cuts used devices may end, so that the rest can do the rest."""
        size = self.parts.shape[1] + 1
        rest = tuple(int(n) - u for n, u in zip(self.counts, used, strict=True))
        last = np.searchsorted(
            self.until(used), bound * self.power(used) * (1 + EPSILON) + EPSILON, "right"
        )
        if not any(rest):
            return size - 1, int(last)
        ahead = self.until(rest)
        due = ahead[-1] - bound * self.power(rest) * (1 + EPSILON) - EPSILON
        return max(1, int(np.searchsorted(ahead, due, "left"))), int(last)


def ideal(problem: Problem) -> float:
    """Return a bottleneck that no partition can be better than: no bytes, no grain, no memory."""
    work = _Work(problem)
    counts = [kind.count for kind in problem.kinds]
    return float(work.until(counts)[-1]) / work.power(counts)


@lru_cache(maxsize=8)
def _groups(counts: Group, most: int) -> tuple[Group, ...]:
    """Return all sets of at most so many devices, by how many there are of each kind."""
    return tuple(g for g in product(*(range(n + 1) for n in counts)) if 0 < sum(g) <= most)


@lru_cache(maxsize=8)
def _larger(
    counts: Group, most: int, groups: tuple[Group, ...]
) -> tuple[tuple[Group, tuple[tuple[Group, Group], ...]], ...]:
    """For all devices used, fewest first: the groups that are left, and what is used then.

    It is the same for all batch sizes and bounds; of eight kinds, making it takes longest of all.
    """
    found = []
    for used in sorted(product(*(range(n + 1) for n in counts)), key=sum):
        left = [n - u for n, u in zip(counts, used, strict=True)]
        spare = most - sum(used)
        free = (
            g
            for g in groups
            if sum(g) <= spare and all(a <= b for a, b in zip(g, left, strict=True))
        )
        larger = ((g, tuple(a + b for a, b in zip(used, g, strict=True))) for g in free)
        found.append((used, tuple(larger)))
    return tuple(found)


class _Search:
    """One table: value[state][cut], a state = (stages so far, devices used of each kind)."""

    def __init__(self, problem: Problem, stages: int | None, devices: int | None) -> None:
        self.problem, self.stages = problem, stages
        self.counts = tuple(kind.count for kind in problem.kinds)
        self.most = min(devices or sum(self.counts), sum(self.counts))
        self.rates = [_rates(problem.segments(kind)) for kind in problem.kinds]
        self.single = False  # a group is one device
        self._latency = False  # values are sums of times, not the largest
        self.work = _Work(problem)
        self.ideal = ideal(problem)
        self._windows: dict[tuple[Group, float], tuple[int, int]] = {}

    def groups(self) -> tuple[Group, ...]:
        return _groups(self.counts, 1 if self.single else self.most)

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
        start = np.full(self.problem.size, np.inf)
        start[0] = 0.0
        self.table: dict[tuple[int, Group], Floats] = {(0, (0,) * len(self.counts)): start}
        for used, larger in _larger(self.counts, self.most, self.groups()):
            for k in range(self.stages) if self.stages else (0,):
                row = self.table.get((k, used))
                if row is not None:
                    self._reach(row, k, used, larger, combine, bound)

    def _reach(
        self,
        row: Floats,
        k: int,
        used: Group,
        larger: Sequence[tuple[Group, Group]],
        combine: Callable[..., Floats],
        bound: float,
    ) -> None:
        """Put the best of one more stage into the rows of all states that it leads to."""
        a, b = self._window(used, bound)
        there = np.nonzero(np.isfinite(row[a:b]))[0]
        if not len(there):
            return
        a, b = a + int(there[0]), a + int(there[-1]) + 1
        values = row[a:b, None]
        ends = self.stages is not None and k + 1 == self.stages  # the last stage ends the model
        for group, after in larger:
            c, d = self._window(after, bound)
            c = max(c, a + 1, self.problem.size - 1 if ends else 0)
            if c >= d:
                continue
            seconds = self._group_seconds(group, slice(a, b), slice(c, d))
            reached = combine(values, self._cost(seconds, group))
            best = np.where(seconds <= bound, reached, np.inf).min(axis=0)
            state = (k + 1 if self.stages else 0, after)
            target = self.table.get(state)
            if target is None:
                target = self.table[state] = np.full(self.problem.size, np.inf)
            np.minimum(target[c:d], best, out=target[c:d])

    def _cost(self, seconds: Floats, group: Group) -> Floats:
        """Return what a micro-batch spends in the stage, while its other devices work on others."""
        return seconds * sum(group) if self._latency else seconds

    def _window(self, used: Group, bound: float) -> tuple[int, int]:
        """Return the cuts that a state may stand at if no stage is slower than the bound."""
        known = self._windows.get((used, bound))
        if known is None:
            known = self._windows[used, bound] = self._reachable(used, bound)
        return known

    def _reachable(self, used: Group, bound: float) -> tuple[int, int]:
        size = self.problem.size
        if not any(used):
            return 0, 1
        if not np.isfinite(bound) or self.single:
            return 1, size
        return self.work.reachable(used, bound)

    def _group_seconds(self, group: Group, rows: slice, columns: slice) -> Floats:
        """Return seconds between micro-batches of a stage on a group: rates add."""
        rate: Floats | None = None
        for kind, n in enumerate(group):
            if n:
                part = self.rates[kind][rows, columns]
                part = part * n if n > 1 else part
                rate = part if rate is None else rate + part
        assert rate is not None  # noqa: S101 - a group has a device
        with np.errstate(divide="ignore"):
            return np.where(rate > 0, 1.0 / rate, np.inf)

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
