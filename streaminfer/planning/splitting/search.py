"""The search for the best plan with split stages, at one batch size.

    estimates ──▶ cheapest way ──▶ its splits measured? ── no ──▶ build and time them ─┐
        ▲                                    │ yes                                     │
        └────────────────────────────────────┼─────────────────────────────────────────┘
                                             ▼
                                   placed, if all of it fits

An estimate divides time and memory evenly, which no split is better than: what was not measured
is worse than it seems, and what the search ends with is the best but for NEAR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from streaminfer.planning.partitioner import Partition, Problem, Share
from streaminfer.planning.predict import Candidate, How, PlacedStage, predict
from streaminfer.planning.splitting.cheapest import Floats, Leg, Option, cheapest, groups
from streaminfer.planning.splitting.fans import (
    Crossing,
    Figures,
    PlacedFan,
    Splitter,
    evenly,
    fan_of,
    joined,
)

if TYPE_CHECKING:
    from streaminfer.planning.planner import Request
    from streaminfer.planning.profile import Profile

__all__ = ["Known", "Search", "Setting"]

SLACK = 1.02  # of the least bottleneck: as good, so that fewer devices and less latency decide
NEAR = 1.08  # x what an estimate promises: near enough to leave that unmeasured
MEASURED = 24  # splits that are built and timed at most, where no other plan runs
FEW = 6  # where one does
AHEAD = 12  # cuts that are looked at for the first end of a stage that may be split


@dataclass(frozen=True)
class Setting:
    """One batch size: the chain and its devices, and how the planner prices and places a stage."""

    batch: int
    problem: Problem
    crossing: Crossing
    place: Callable[[Partition], list[PlacedStage]]


@dataclass
class Known:
    """What was found out about splits, for all batch sizes."""

    request: Request
    profile: Profile
    splitter: Splitter
    figures: dict[tuple[int, int, How, int], dict[int, Figures | None]] = field(
        default_factory=dict
    )  # by cuts, split and kind of device; by batch. None: it cannot be
    misfits: set[tuple[int, int, How, int]] = field(default_factory=set)  # and the batch
    masks: dict[tuple[object, ...], Floats] = field(default_factory=dict)
    measured: int = 0

    def legal(self, problem: Problem, how: How) -> Floats:
        """Return which stages [from cut, to cut] may be split so, as far as was looked: 1 or 0."""
        key = ("tiles", how) if how.grid else ("channels",)
        if key not in self.masks:
            mask = np.zeros((problem.size, problem.size))
            for a, b in self._tiled(problem, how) if how.grid else self._by_channels(problem):
                mask[a, b] = 1.0
            self.masks[key] = mask
        return self.masks[key]

    def may(self, problem: Problem, a: int, b: int, how: How) -> bool:
        """Ask whether the stage between two cuts may be split."""
        first, last = int(problem.ends[a]) + 1, int(problem.ends[b])
        return not self.splitter.problem(first, last, how)

    def _by_channels(self, problem: Problem) -> Iterator[tuple[int, int]]:
        """Yield stages that two parts can share: from each cut on, ends that follow each other."""
        for a in range(problem.size - 1):
            begun = False
            for b in range(a + 1, problem.size):
                if self.may(problem, a, b, How(2)):
                    begun = True
                    yield a, b
                elif begun or b - a > AHEAD:
                    break

    def _tiled(self, problem: Problem, how: How) -> Iterator[tuple[int, int]]:
        """Yield stages of tiles that begin with the model, or where activations are the largest.

        What can be tiled up to a cut can be up to every cut before it.
        """
        widest = int(np.searchsorted(problem.ends, int(problem.peaks.argmax()))) - 1
        for a in sorted({0, max(0, widest - 1), max(0, widest)}):
            least, most = a, problem.size - 1
            while least < most:
                middle = (least + most + 1) // 2
                if self.may(problem, a, middle, how):
                    least = middle
                else:
                    most = middle - 1
            yield from ((a, b) for b in range(a + 1, least + 1))


class Search:
    """The search of one batch size."""

    def __init__(self, setting: Setting, known: Known) -> None:
        self._setting, self._known = setting, known
        self._problem, self._batch = setting.problem, setting.batch
        self._groups = groups(tuple(kind.count for kind in self._problem.kinds))
        self._plain = [self._whole(group) for group in self._groups]
        self._estimates: list[Option] | None = None
        self._slowest = float("inf")  # period that may pass

    def plans(self, quickest: bool, floor: float, bound: float | None) -> list[Candidate]:
        """Return the best plan with a split, if there is one that may pass both bounds.

        Args:
            quickest: the least seconds of one micro-batch; else the least bottleneck.
            floor: samples a second; what cannot reach it is not looked at.
            bound: seconds; nor what takes longer for one micro-batch on idle devices.
        """
        self._slowest = self._batch / floor if floor else float("inf")
        ideal = self._solve(quickest, [*self._plain, *self._split(everywhere=True)])
        if not self._may_pass(ideal, floor, bound):
            return []
        if self._estimates is None:
            self._estimates = list(self._split())
        while True:
            best = self._solve(quickest, [*self._plain, *self._overlaid(guessing=True)])
            if not self._may_pass(best, floor, bound):
                return []
            tried = self._solve(quickest, [*self._plain, *self._overlaid(guessing=False)])
            near = tried and _value(tried, quickest) <= NEAR * _value(best, quickest)
            enough = self._known.measured >= (FEW if floor else MEASURED)
            if not near and not enough and self._measure(best):
                continue
            if not tried or not any(leg.option.how for leg in tried):
                return []
            if candidate := self._candidate(tried):
                return [candidate]

    def _may_pass(self, legs: Sequence[Leg], floor: float, bound: float | None) -> bool:
        """Tell whether a plan is predicted to be quick enough; one that has no split is not."""
        if not any(leg.option.how for leg in legs):
            return False
        if not floor and bound is None:
            return True
        found = self._predicted(legs)
        return found.throughput >= floor and (bound is None or found.p99 <= bound)

    def outline(self) -> list[How] | None:
        """Return the splits of the best plan as far as estimates go; None if there is no plan."""
        if not self._solve(False, [*self._plain, *self._split(everywhere=True)]):
            return None
        legs = self._solve(False, [*self._plain, *self._split()])
        return [leg.option.how for leg in legs if leg.option.how] if legs else None

    def _solve(self, quickest: bool, options: Sequence[Option]) -> tuple[Leg, ...]:
        stages, size = self._known.request.stages, self._problem.size
        counts = tuple(kind.count for kind in self._problem.kinds)
        if quickest:
            return cheapest(options, counts, size, stages, bound=self._slowest)
        least = cheapest(options, counts, size, stages)
        if not least:
            return ()
        bound = SLACK * _value(least, quickest=False)
        return cheapest(options, counts, size, stages, bound=bound, frugal=True)

    # ---- what a stage costs --------------------------------------------------------------------

    def _whole(self, group: tuple[int, ...]) -> Option:
        """A stage on replicas: their rates add."""
        kinds = zip(group, self._problem.kinds, strict=True)
        used = [(n, self._problem.segments(kind)) for n, kind in kinds if n]
        slowest = np.maximum.reduce([seconds for _, seconds in used])
        rate = np.add.reduce([n / np.maximum(seconds, 1e-15) for n, seconds in used])
        period = np.divide(1.0, rate, where=np.isfinite(slowest), out=np.full_like(rate, np.inf))
        return Option(group, None, period, slowest)

    def _split(self, *, everywhere: bool = False) -> Iterator[Option]:
        """Yield estimates of stages split over a group: its time and memory divided evenly.

        Only compute, memory and what each part gives are; by channels all parts take the whole.
        """
        problem, ways = self._problem, (False, True) if self._known.splitter.images else (False,)
        for group in self._groups:
            parts = sum(group)
            for tiled in ways if parts > 1 else ():
                how = How(parts, _grid(parts) if tiled else None)
                kinds = [kind for n, kind in zip(group, problem.kinds, strict=True) if n]
                seconds = np.maximum.reduce([_between(k.seconds, problem) for k in kinds]) / parts
                taken = problem.receive / parts if tiled else problem.receive
                period = seconds + taken[:, None] + problem.send[None, :] / parts
                held = _between(problem.weights, problem)
                rest = problem.memory - held
                need = (held if tiled else held / parts) + rest / parts
                fits = need <= min(kind.memory for kind in kinds)
                fits &= problem.ends[:, None] < problem.ends[None, :]
                if not everywhere:
                    fits &= self._known.legal(problem, how) > 0
                period = np.where(fits, period, np.inf)
                yield Option(group, how, period, period)

    def _overlaid(self, *, guessing: bool) -> Iterator[Option]:
        """Yield the estimates with what was measured in their place; or (not guessing) that alone.

        A split that was measured at another batch size alone gives a better guess.
        """
        for option in self._estimates or ():
            assert option.how is not None  # noqa: S101 - estimates are of splits
            blank = np.full_like(option.period, np.inf)
            period = option.period.copy() if guessing else blank.copy()
            latency = option.latency.copy() if guessing else blank
            for a, b, how, fan, exact in self._fans(option):
                if how == option.how and (guessing or exact):
                    fits = fan is not None and fan.memory <= self._memory(option.group)
                    period[a, b] = fan.period if fan and fits else np.inf
                    latency[a, b] = fan.latency if fan and fits else np.inf
            yield Option(option.group, option.how, period, latency)

    def _fans(self, option: Option) -> Iterator[tuple[int, int, How, PlacedFan | None, bool]]:
        """Yield what is known of splits on these devices: cuts, split, cost, if at this batch."""
        kinds = [k for k, n in enumerate(option.group) if n]
        seen = {(a, b, how) for a, b, how, kind in self._known.figures if kind in kinds}
        for a, b, how in seen:
            by_kind = [self._known.figures.get((a, b, how, k), {}) for k in kinds]
            exact = all(self._batch in known for known in by_kind)
            if not all(by_kind):
                continue
            found = [known.get(self._batch, next(iter(known.values()))) for known in by_kind]
            figures = [f for f in found if f is not None]
            unfit = len(figures) < len(found) or (a, b, how, self._batch) in self._known.misfits
            fan = None if unfit else self._fan(a, b, how, kinds, figures)
            yield a, b, how, fan, exact

    def _fan(
        self, a: int, b: int, how: How, kinds: Sequence[int], figures: Sequence[Figures]
    ) -> PlacedFan:
        used = [self._problem.kinds[k] for k in kinds]
        return fan_of(
            self._problem, (a, b), how, used, figures, self._batch, self._setting.crossing
        )

    def _priced(self, leg: Leg) -> PlacedFan | None:
        """Return the cost of a stage, if it is split."""
        key = leg.a, leg.b, leg.option.how
        return next((f for a, b, how, f, _ in self._fans(leg.option) if (a, b, how) == key), None)

    def _memory(self, group: tuple[int, ...]) -> float:
        return min(kind.memory for n, kind in zip(group, self._problem.kinds, strict=True) if n)

    # ---- measuring -----------------------------------------------------------------------------

    def _measure(self, legs: Sequence[Leg]) -> bool:
        """Build and time the splits that a plan rests on; False if all of them were."""
        new = False
        for leg in legs:
            if (how := leg.option.how) is None:
                continue
            first, last = int(self._problem.ends[leg.a]) + 1, int(self._problem.ends[leg.b])
            for kind, n in enumerate(leg.option.group):
                known = self._known.figures.setdefault((leg.a, leg.b, how, kind), {}) if n else {}
                if not n or self._batch in known:
                    continue
                new = True
                self._known.measured += 1
                known[self._batch] = (
                    self._known.splitter.figures(
                        first, last, how, self._batch, self._known.request.pools[kind].profile
                    )
                    if self._known.may(self._problem, leg.a, leg.b, how)
                    else None
                )
        return new

    # ---- the plan ------------------------------------------------------------------------------

    def _candidate(self, legs: Sequence[Leg]) -> Candidate | None:
        """Place a plan; None where what is joined fits nowhere: such a split is not taken again."""
        found = self._predicted(legs)
        pools = self._known.request.pools
        caps = {name: pool.memory for pool in pools for name in pool.names}
        if all(_fits(stage, caps) for stage in found.stages):
            return found
        taken = [(leg.a, leg.b, leg.option.how) for leg in legs if leg.option.how]
        self._known.misfits |= {(a, b, how, self._batch) for a, b, how in taken}
        return None

    def _predicted(self, legs: Sequence[Leg]) -> Candidate:
        """Predict what a plan does, if splits that were not measured share their work evenly."""
        shares = [
            Share(leg.a, leg.b, leg.option.group, float(leg.option.period[leg.a, leg.b]))
            for leg in legs
        ]
        stages = self._setting.place(Partition(tuple(shares), max(s.seconds for s in shares)))
        fans = {k: fan for k, leg in enumerate(legs) if (fan := self._priced(leg))}
        for k, leg in enumerate(legs):
            if leg.option.how and k not in fans:
                stages[k] = evenly(stages[k], leg.option.how)
        request, profile = self._known.request, self._known.profile
        placed = joined(stages, fans, self._batch)
        return predict(placed, self._batch, profile, request.link, request.machine)


def _fits(stage: PlacedStage, caps: Mapping[str, float]) -> bool:
    """Tell whether a stage fits its devices, and what stands alone around its parts the host."""
    alone = stage.split.memory if stage.split else 0.0
    room = caps.get("cpu", float("inf"))
    return stage.memory <= min(caps[device] for device in stage.devices) and alone <= room


def _value(legs: Sequence[Leg], quickest: bool) -> float:
    if quickest:
        return sum(float(leg.option.latency[leg.a, leg.b]) for leg in legs)
    return max(float(leg.option.period[leg.a, leg.b]) for leg in legs)


def _between(values: Floats, problem: Problem) -> Floats:
    """Return sums [from cut, to cut] of values by node."""
    total = np.concatenate([[0.0], np.cumsum(values)])[problem.ends + 1]
    return np.asarray(total[None, :] - total[:, None])


def _grid(parts: int) -> tuple[int, int]:
    """Return the tiles that are most like squares, not fewer rows than columns."""
    rows = next(r for r in range(1, parts + 1) if parts % r == 0 and r * r >= parts)
    return rows, parts // rows
