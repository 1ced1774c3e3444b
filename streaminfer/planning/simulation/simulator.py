"""Predict a pipeline by discrete events: throughput, latency, queues, busy devices, cost.

    Scenario ──▶ workers, devices, sink in simulated time (road, events) ──▶ Report

It follows the runtime's own rules (batches, windows, budgets, order), so that a prediction is what
the engine would do with these times; `streaminfer simulate --check` shows how well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from streaminfer.planning.simulation.cores import Cores
from streaminfer.planning.simulation.device import Device, Machine
from streaminfer.planning.simulation.events import Clock
from streaminfer.planning.simulation.loop import Loop
from streaminfer.planning.simulation.road import Ingest, Inner, Outlet, Sink, Worker
from streaminfer.planning.simulation.sanity import check
from streaminfer.planning.simulation.scenario import (
    Arrivals,
    Encoded,
    Floats,
    Host,
    Link,
    Pattern,
    Scenario,
    SimStage,
    StageTimes,
)
from streaminfer.planning.simulation.tally import Lane, Tally
from streaminfer.transport.assignor import Member, assign

__all__ = [
    "Arrivals",
    "Encoded",
    "Host",
    "Link",
    "Pattern",
    "Queue",
    "Report",
    "Scenario",
    "SimStage",
    "StageTimes",
    "cost_per_million",
    "simulate",
    "summary",
]

MANY = 200_000  # samples; above it they arrive in groups
GROUP = 0.001  # seconds of such a group, and of a timer where all share one event loop


@dataclass(frozen=True)
class Queue:
    """What waits for a stage's devices, over all replicas."""

    samples: float  # on average
    samples_max: float
    nbytes: float
    nbytes_max: float


@dataclass(frozen=True)
class Report:
    """What a simulation found. Seconds; `busy` is 0-1 of the stage's devices.

    `saturated`: more arrives than is answered, so the latencies grow with the time simulated.
    """

    throughput: float  # samples a second
    p50: float
    p99: float
    mean: float
    busy: Mapping[str, float]
    batch: Mapping[str, float]  # samples in a device call, on average
    queues: Mapping[str, Queue]
    utilisation: float  # of all devices
    host: float  # 0-1: the busiest event loop
    inflight: float  # samples between arrival and answer, on average
    inflight_max: float
    saturated: bool
    bottleneck: str
    cost: float | None  # $ per million samples
    partial: float = 0.0  # 0-1 of the answers: without some of what a quorum can do without
    failed: float = 0.0  # 0-1 of them: errors, because too little came by a gather's deadline
    events: int = field(compare=False, default=0)
    wakes: float = field(compare=False, default=0.0)  # of all event loops, a second

    def to_json(self) -> dict[str, Any]:
        """Return it for programs; a latency of nothing is null."""
        nothing = {name: None for name in ("p50", "p99", "mean") if math.isnan(getattr(self, name))}
        return asdict(self) | nothing


def simulate(scenario: Scenario) -> Report:
    """Run a scenario. The same scenario gives the same report.

    Raises:
        ConfigError: what cannot run, with the remedy.
    """
    check(scenario)
    run = _Run(scenario)
    run.go()
    return run.report()


def cost_per_million(
    stages: Iterable[SimStage], throughput: float, prices: Mapping[str, float]
) -> float | None:
    """Return $ per million samples; None if a device has no price or nothing comes out."""
    stages = [stage for stage in stages if not stage.local]
    if not prices or throughput <= 0 or any(stage.device not in prices for stage in stages):
        return None
    hourly = sum(prices[stage.device] * len(stage.speeds) for stage in stages)
    return hourly / 3600 / throughput * 1e6


class _Run:
    """One simulation."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._clock = Clock()
        self._tally = Tally(self._clock, len(scenario.stages), scenario.warm)
        self._cores = Cores(self._clock, scenario.host.cores)
        decoders = 1 if scenario.host.cores is None else max(1, int(scenario.host.cores) // 2)
        self._machine = Machine(
            self._clock, self._cores, scenario.host, scenario.link, self._tally, decoders,
            np.random.default_rng((scenario.seed, 2)), np.random.default_rng((scenario.seed, 3)),
        )  # fmt: skip
        self._loops = [Loop(self._clock, self._cores, scenario.host.wake)]
        self._lanes = [Lane(n) for n in range(scenario.partitions)]
        self._tally.lanes = self._lanes
        self._random = np.random.default_rng((scenario.seed, 1))
        self._ingests: list[Ingest] = []
        self._owners: list[Ingest] = []  # of each partition
        self._sent = 0  # samples that were sent
        self._outlets: list[dict[str, Outlet]] = [{} for _ in scenario.stages]  # by topic
        self._build()

    # ---- the workers ---------------------------------------------------------------------------

    def _build(self) -> None:
        stages, sources = self._scenario.stages, self._scenario.sources()
        groups, workers = self._scenario.groups(), list[Worker]()
        for group in groups:
            members = [(k, stages[k]) for k in group]
            first = members[0][1]
            owned = self._shares(first.shares or first.speeds)
            here: Sequence[Worker]
            if sources[group[0]]:
                here = inner = [Inner(self._machine, self._loop(), members) for _ in owned]
                self._feed(inner, owned, sources[group[0]], first)
            else:
                self._first(members, owned)
                here = self._ingests
            following = _following(group, sources)
            for r, worker in enumerate(here):
                worker.outlets, worker.following = dict(enumerate(self._outlets)), following
                worker.devices = [
                    Device(self._machine, k, s, s.speeds[r % len(s.speeds)], worker.loop)
                    for k, s in members
                ]
            workers += here
        inside = {k for group in groups for k in group[:-1]}
        ends = [k for k, out in enumerate(self._outlets) if not out and k not in inside]
        sinks = [Sink(self._machine, self._loop(), ()) for _ in range(self._scenario.sinks)]
        dealt = self._shares((1.0,) * len(sinks))
        owners = self._feed(sinks, dealt, ends, SimStage("", {}, topic="sink"))
        leaving = Outlet(max(stages[k].bytes_out for k in ends), len(self._lanes))
        leaving.groups.append(owners)
        for worker in workers:
            worker.exit = leaving

    def _first(
        self, members: Sequence[tuple[int, SimStage]], owned: Sequence[Sequence[int]]
    ) -> None:
        window = self._scenario.window
        owner: dict[int, Ingest] = {}
        for numbers in owned:
            lanes = [self._lanes[n] for n in numbers]
            ingest = Ingest(self._machine, self._loop(), members, lanes, window)
            self._ingests.append(ingest)
            owner |= dict.fromkeys(numbers, ingest)
        self._owners = [owner[n] for n in range(len(self._lanes))]

    def _feed(
        self,
        workers: Sequence[Inner],
        owned: Sequence[Sequence[int]],
        reads: Sequence[int],
        first: SimStage,
    ) -> Sequence[Inner]:
        """Let workers read these stages, each its own partitions; return each one's owner."""
        stages, count = self._scenario.stages, len(self._lanes)
        sizes = first.bytes_in or [stages[k].bytes_out for k in reads]
        owner: dict[int, Inner] = {}
        for worker, numbers in zip(workers, owned, strict=True):
            worker.reads(sum(sizes), len(reads))
            owner |= dict.fromkeys(numbers, worker)
        owners = [owner[n] for n in range(count)]
        for k, nbytes in zip(reads, sizes, strict=True):
            made = Outlet(nbytes, count, balance=first.balance)
            self._outlets[k].setdefault(first.topic or first.name, made).groups.append(owners)
        return owners

    def _shares(self, weights: Sequence[float]) -> list[list[int]]:
        """Deal the partitions to replicas as a consumer group does."""
        members = {f"{k:06d}": Member(w, ("topic",)) for k, w in enumerate(weights)}
        dealt = assign(members, {"topic": len(self._lanes)})
        return [[tp.partition for tp in dealt[name]] for name in members]

    def _loop(self) -> Loop:
        """Return the event loop of one more worker."""
        if self._scenario.host.cores is None:
            self._loops.append(Loop(self._clock, self._cores, self._scenario.host.wake))
        return self._loops[-1]

    # ---- the load ------------------------------------------------------------------------------

    def go(self) -> None:
        """Run it."""
        scenario, host = self._scenario, self._scenario.host
        if scenario.arrivals.window is not None:
            self._tally.again = self._again
            self._clock.at(0.0, self._again, scenario.arrivals.window)
        else:
            self._times, self._where = scenario.arrivals.schedule(
                scenario.seconds, scenario.partitions, scenario.seed
            )
            shared = host.cores is not None
            self._group = GROUP if shared or len(self._times) > MANY else 0.0
            self._clock.at(float(self._times[0]) if len(self._times) else 0.0, self._arrive)
        phase = float(self._random.random())
        self._clock.at(phase * host.look, self._look)
        self._clock.at(float(self._random.random()) * host.commit, self._commit)
        self._clock.run(scenario.seconds)

    def _arrive(self) -> None:
        """Let all samples arrive that are due, and come again for the next ones."""
        times, first, now = self._times, self._sent, self._clock.now
        last = self._sent = int(np.searchsorted(times, now, side="right"))
        self._send(times[first:last].tolist(), self._where[first:last].tolist())
        if last < len(times):
            self._clock.at(max(float(times[last]), now + self._group), self._arrive)

    def _again(self, count: int) -> None:
        """Send as many as were answered: a closed loop."""
        load, lanes = self._scenario.arrivals, len(self._lanes)
        where = load.next_partitions(self._sent, count, lanes, self._random)
        self._sent += count
        self._send([self._clock.now] * count, where)

    def _send(self, times: Sequence[float], where: Sequence[int]) -> None:
        if not times:
            return
        self._tally.inflight.add(len(times))
        self._tally.enter(0, len(times))
        cost = len(times) * self._scenario.host.client / 2
        self._loops[0].do(cost, self._cross, times, where)

    def _cross(self, times: Sequence[float], where: Sequence[int]) -> None:
        """Let them cross the link to the input topic."""
        if alpha := self._scenario.link.alpha:
            self._clock.at(self._clock.now + alpha, self._append, times, where)
        else:
            self._append(times, where)

    def _append(self, times: Sequence[float], where: Sequence[int]) -> None:
        found: dict[int, list[float]] = {}
        for when, partition in zip(times, where, strict=True):
            found.setdefault(partition, []).append(when)
        for partition, some in found.items():
            self._owners[partition].add(self._lanes[partition], some)

    def _commit(self) -> None:
        for lane in self._lanes:
            lane.committed = lane.answered
        self._clock.at(self._clock.now + self._scenario.host.commit, self._commit)

    def _look(self) -> None:
        for ingest in self._ingests:
            ingest.look()
        self._clock.at(self._clock.now + self._scenario.host.look, self._look)

    # ---- the report ----------------------------------------------------------------------------

    def report(self) -> Report:
        """Sum up."""
        scenario, tally = self._scenario, self._tally
        span = scenario.seconds - scenario.warm
        sent = np.array([t for times in tally.sent for t in times], dtype=np.float64)
        counts = [count for _, count in tally.done]
        done = np.repeat(np.array([at for at, _ in tally.done]), counts) if counts else sent
        throughput, p50, p99, mean = summary(sent, done, span)
        stages = scenario.stages
        busy = {s.name: tally.busy[k] / span / len(s.speeds) for k, s in enumerate(stages)}
        devices = sum(len(s.speeds) for s in stages)
        sizes = [
            sum(s.bytes_in or [stages[r].bytes_out for r in reads]) if reads else scenario.bytes_in
            for s, reads in zip(stages, scenario.sources(), strict=True)
        ]
        queues = {
            s.name: _queue(gauge.mean(), gauge.largest, nbytes)
            for s, gauge, nbytes in zip(stages, tally.queues, sizes, strict=True)
        }
        return Report(
            throughput=throughput,
            p50=p50,
            p99=p99,
            mean=mean,
            busy=busy,
            batch={s.name: tally.rows[k] / max(1, tally.calls[k]) for k, s in enumerate(stages)},
            queues=queues,
            utilisation=sum(tally.busy) / span / devices,
            host=min(1.0, max(loop.busy for loop in self._loops) / scenario.seconds),
            inflight=tally.inflight.mean(),
            inflight_max=tally.inflight.largest,
            saturated=self._grows(len(done)),
            bottleneck=scenario.bottleneck(),
            cost=cost_per_million(stages, throughput, scenario.prices),
            partial=min(1.0, tally.partial / max(1, len(done))),
            failed=min(1.0, tally.failed / max(1, len(done))),
            events=self._clock.events,
            wakes=sum(loop.wakes for loop in self._loops) / scenario.seconds,
        )

    def _grows(self, answered: int) -> bool:
        """Whether more came than was answered, beyond what chance does to what is in flight."""
        if self._scenario.arrivals.rate is None:
            return False
        arrived = int(np.count_nonzero(self._times >= self._scenario.warm))
        chance = 3 * math.sqrt(self._tally.inflight.mean())
        return arrived - answered > 0.03 * arrived + chance


def _following(
    group: Sequence[int], sources: Sequence[Sequence[int]]
) -> dict[int, list[tuple[int, int]]]:
    """Return, for each stage of a worker, the places of those that read it, and their parts."""
    found: dict[int, list[tuple[int, int]]] = {}
    for place, k in enumerate(group[1:], 1):
        for source in sources[k]:
            found.setdefault(source, []).append((place, len(sources[k])))
    return found


def summary(sent: Floats, done: Floats, span: float) -> tuple[float, float, float, float]:
    """Return samples a second, p50, p99 and mean seconds of what was answered within `span`."""
    if not len(done):
        return 0.0, float("nan"), float("nan"), float("nan")
    took = done - sent
    p50, p99 = np.percentile(took, [50, 99])
    return len(done) / span, float(p50), float(p99), float(took.mean())


def _queue(mean: float, most: float, nbytes: float) -> Queue:
    return Queue(mean, most, mean * nbytes, most * nbytes)
