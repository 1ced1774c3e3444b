"""A placed cut → roughly what to expect of it: throughput, latency, memory, what limits it.

CPU time   ████ stage 0   ██████ stage 1   █ hops   █ decode, answer
cores      2
period     the slowest of: each stage on its devices; all the CPU time ÷ the cores; the event loop

It is quick and ranks what the search finds; `forecast.py` simulates the few that are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from streaminfer.planning.profile import Link, Profile
from streaminfer.planning.simulation.scenario import Host
from streaminfer.planning.simulation.scenario import Link as Transit

__all__ = [
    "BUFFERS",
    "LOAD",
    "Calls",
    "Candidate",
    "How",
    "Machine",
    "Measured",
    "PlacedStage",
    "Split",
    "periods",
    "predict",
]

LOAD = 0.7  # share of the throughput at which latency is predicted
BUFFERS = 2  # micro-batches held at a stage's door while it computes


@dataclass(frozen=True)
class Calls:
    """Seconds of a device's thread around a stage's layers, by batch: bytes to tensors and back.

    `each`: of a stage between others. `first` and `last`: of those at the pipeline's ends, where
    pixels are normalised and classes ranked. `noise`: single calls ÷ their median.
    """

    each: Mapping[int, float] = field(default_factory=dict)
    first: Mapping[int, float] = field(default_factory=dict)
    last: Mapping[int, float] = field(default_factory=dict)
    noise: tuple[float, ...] = ()

    def seconds(self, batch: int, begins: bool = False, ends: bool = False) -> float:
        """Return the seconds of a call; linear between the sizes that are known."""
        each = _at(self.each, batch)
        more = [_at(self.first, batch) - each] * begins + [_at(self.last, batch) - each] * ends
        return each + sum(max(0.0, one) for one in more)


def _at(seconds: Mapping[int, float], batch: int) -> float:
    sizes = sorted(seconds)
    return float(np.interp(batch, sizes, [seconds[n] for n in sizes])) if sizes else 0.0


@dataclass(frozen=True)
class Machine:
    """What all stages on this machine share, and what stands around them.

    Attributes:
        cores: of the CPU.
        wait: seconds that a part of a micro-batch waits for the rest.
        host: what the engine costs; with `host.cores` all workers are one process, as on the
            memory bus, and their hops take turns on its event loop.
        calls: what a device's thread does beside a stage's layers.
        after: the same in a call that comes after a pause; without it none is colder.
        transit: what a message takes between two workers.
        partitions: of the topics.
        memory: bytes of samples in flight.
        top_k: classes in an answer; 0: the outputs as they are.
    """

    cores: int
    wait: float = 0.004
    host: Host = field(default_factory=Host)
    calls: Calls = field(default_factory=Calls)
    after: Calls | None = None
    transit: Transit = field(default_factory=Transit)
    partitions: int = 8
    memory: int = 512_000_000
    top_k: int = 0


@dataclass(frozen=True)
class How:
    """A way to split a stage: in tiles of this grid, or (None) by channels."""

    parts: int
    grid: tuple[int, int] | None = None

    @property
    def short(self) -> str:
        """It in two words."""
        if self.grid is None:
            return f"channels x{self.parts}"
        return f"tiles {self.grid[0]}x{self.grid[1]}"

    def __str__(self) -> str:
        """Say it as a sentence goes on."""
        return f"split {'in' if self.grid else 'by'} {self.short}"


@dataclass(frozen=True)
class Split:
    """A stage as parts side by side, one on each of its devices, and what stands around them."""

    how: How
    scatter: float  # seconds of a worker that feeds the parts alone; 0: the stage before does it
    gather: float  # of a worker that only joins them; 0: the stage behind does it
    row_bytes: int  # of one sample, to all parts and from them, as if nothing were cast
    memory: float  # bytes of the larger of those workers
    whole: float  # bytes that the stage would need on a device if it were not split


@dataclass(frozen=True)
class PlacedStage:
    """One stage as it would run. Seconds are for one micro-batch on its slowest device."""

    name: str
    first: int  # positions of its first and last node
    last: int
    until: str | None  # the layer that ends it; None: the model's end
    devices: tuple[str, ...]  # one for each replica, or for each part of a split
    threads: int
    compute: float
    receive: float
    send: float
    period: float  # seconds between two micro-batches, all replicas together
    weight_bytes: int
    memory: float  # bytes on each device
    row_bytes: int  # bytes that leave it for one sample, as sent
    shares: tuple[float, ...] = ()  # relative speeds of replicas that are unlike
    split: Split | None = None

    @property
    def service(self) -> float:
        """Seconds that one micro-batch keeps one device busy."""
        return self.compute + self.receive + self.send

    @property
    def replicas(self) -> int:
        """How many micro-batches it works on at once: the parts of a split share one."""
        return 1 if self.split else len(self.devices)

    @property
    def sides(self) -> int:
        """How many devices a micro-batch keeps busy at once."""
        return len(self.devices) if self.split else 1

    @property
    def doors(self) -> float:
        """Seconds of the workers that stand around the parts of a split."""
        return self.split.scatter + self.split.gather if self.split else 0.0


@dataclass(frozen=True)
class Candidate:
    """One way to run the model, and what it is predicted to do."""

    stages: tuple[PlacedStage, ...]
    batch: int
    throughput: float  # samples a second
    p50: float  # seconds, at LOAD of the throughput
    p99: float
    limit: str  # what the period comes from: a stage's name, "cores" or "event loop"
    occupied: Mapping[str, float] = field(default_factory=dict)  # 0-1 of each stage, as simulated

    @property
    def form(self) -> str:
        """What kind of answer it is, in words."""
        replicas = max(stage.replicas for stage in self.stages)
        splits = [(stage.name, stage.split.how) for stage in self.stages if stage.split]
        if len(self.stages) > 1:
            copies = f", up to {replicas} replicas" if replicas > 1 else ""
            ways = "".join(f", {name} {how}" for name, how in splits)
            return f"{len(self.stages)} stages{copies}{ways}"
        if splits:
            return str(splits[0][1])
        if replicas > 1:
            return f"replicate x{replicas}"
        threads = self.stages[0].threads
        return "one device" + (f", {threads} threads" if threads > 1 else "")

    @property
    def period(self) -> float:
        """Seconds between two micro-batches."""
        return self.batch / self.throughput

    @property
    def latency_floor(self) -> float:
        """Seconds of one micro-batch through an idle pipeline."""
        return sum(stage.service + stage.doors for stage in self.stages)

    @property
    def hop_bytes(self) -> tuple[int, ...]:
        """Bytes that one sample is on each hop between stages."""
        return tuple(stage.row_bytes for stage in self.stages[:-1])

    @property
    def travels(self) -> int:
        """Bytes of one sample that are sent in all: between stages, and to and from parts."""
        total, before = sum(self.hop_bytes), True  # a scatter of its own begins the model
        for stage in self.stages:
            if stage.split and before:
                total += max(0, stage.split.row_bytes - stage.row_bytes)
            before = stage.split is not None
        last = self.stages[-1]
        return total + (last.row_bytes if last.split else 0)

    def busy(self) -> dict[str, float]:
        """Return the share of time that each stage computes at full throughput."""
        bound = {s.name: min(1.0, s.compute / s.replicas / self.period) for s in self.stages}
        return {**bound, **self.occupied}


@dataclass(frozen=True)
class Measured:
    """What a candidate did. The same figures as are predicted."""

    throughput: float  # samples a second
    p50: float  # seconds, at LOAD of it
    p99: float
    busy: Mapping[str, float]


def predict(
    stages: Sequence[PlacedStage], batch: int, profile: Profile, link: Link, machine: Machine
) -> Candidate:
    """Say what placed stages can do at most, what limits them, and about how late they answer."""
    bounds = periods(stages, batch, profile, link, machine)
    limit = max(bounds, key=lambda name: bounds[name])
    period = max(bounds[limit], 1e-12)
    p50, p99 = _latency(stages, batch, period, machine)
    return Candidate(tuple(stages), batch, batch / period, p50, p99, limit)


def _latency(
    stages: Sequence[PlacedStage], batch: int, period: float, machine: Machine
) -> tuple[float, float]:
    """Return about p50 and p99 at LOAD: forming, then in each stage a queue of fixed service.

    M/D/1: with r the load of a device and S its service, a wait is r S / 2 (1 - r) in the mean and
    its tail falls as exp(-2 (1 - r) t / r S). The stages' waits are taken as independent.
    """
    interval = period / LOAD  # between micro-batches, on average
    forming = min(machine.wait, interval * (batch - 1) / batch)
    mean, squares = forming + batch * machine.host.decode, 0.0
    for stage in stages:
        turn = stage.service / stage.replicas
        rho = min(0.99, max(turn, 1e-9) / interval)
        wait = rho * turn / (2 * (1 - rho))
        tail = max(0.0, math.log(100 * rho)) * rho * turn / (2 * (1 - rho))
        mean += stage.service + stage.doors + wait
        squares += max(0.0, tail - wait) ** 2
    return mean, mean + math.sqrt(squares)


def periods(
    stages: Sequence[PlacedStage], batch: int, profile: Profile, link: Link, machine: Machine
) -> dict[str, float]:
    """Return the seconds between two micro-batches that each thing allows, by its name."""
    host, shared = machine.host, machine.host.cores is not None
    count, rows = len(stages), sum(stage.row_bytes for stage in stages)
    cells = count + sum(s.sides + 1 for s in stages if s.split)  # with what scatters and gathers
    hops = sum(s.sides + bool(s.split) for s in stages)
    loop = host.loop_seconds(batch, 1, cells, hops) + 2 * batch * rows * host.nbyte
    work = loop
    if not shared:
        work = sum((s.receive + s.send) * s.sides + s.doors for s in stages)
        work += link.seconds(batch * profile.output_bytes)
    around = [machine.calls.seconds(batch, not k, k + 1 == count) for k in range(count)]
    cpu = sum(
        (stage.compute + more) * stage.threads * stage.sides
        for stage, more in zip(stages, around, strict=True)
        if stage.devices[0] == "cpu"
    )
    slowest = max(stages, key=lambda stage: stage.period)
    found = {slowest.name: slowest.period, "cores": (cpu + work + batch * host.decode)}
    found["cores"] /= machine.cores
    return {**found, "event loop": loop} if shared else found
