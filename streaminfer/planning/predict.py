"""A placed cut → what to expect of it: throughput, latency, bytes and memory, and what limits it.

CPU time   ████ stage 0   ██████ stage 1   █ hops   █ decode, answer
cores      2
period     the slowest of: each stage on its devices; all the CPU time ÷ the cores
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streaminfer.planning.profile import Link, Profile

__all__ = [
    "BUFFERS",
    "LOAD",
    "Candidate",
    "How",
    "Machine",
    "Measured",
    "PlacedStage",
    "Split",
    "predict",
]

LOAD = 0.7  # share of the throughput at which latency is predicted
BUFFERS = 2  # micro-batches held at a stage's door while it computes


@dataclass(frozen=True)
class Machine:
    """What all stages on this machine share."""

    cores: int
    wait: float = 0.004  # seconds that a part of a micro-batch waits for the rest
    one_loop: bool = False  # all workers in one process: their hops take turns on its event loop


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
        return {s.name: min(1.0, s.compute / s.replicas / self.period) for s in self.stages}


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
    """Predict throughput and latency of placed stages."""
    cpu = sum(s.compute * s.threads * s.sides for s in stages if s.devices[0] == "cpu")
    edges = link.seconds(batch * profile.output_bytes)
    edges += sum((s.receive + s.send) * s.sides + s.doors for s in stages)
    cpu += batch * (profile.ingest + profile.answer) + edges
    slowest = max(stages, key=lambda stage: stage.period)
    bounds = {slowest.name: slowest.period, "cores": cpu / machine.cores}
    if machine.one_loop:
        bounds["event loop"] = edges + batch * profile.answer
    limit = max(bounds, key=lambda name: bounds[name])
    period = bounds[limit]
    p50, p99 = _latency(stages, batch, period, profile, machine)
    return Candidate(tuple(stages), batch, batch / period, p50, p99, limit)


def _latency(
    stages: Sequence[PlacedStage], batch: int, period: float, profile: Profile, machine: Machine
) -> tuple[float, float]:
    """Return p50 and p99 at LOAD: forming, then in each stage a queue of fixed service (M/D/1).

    With r the load of a device and S its service, a wait is r S / 2 (1 - r) in the mean and its
    tail falls as exp(-2 (1 - r) t / r S). The stages' waits are taken as independent.
    """
    interval = period / LOAD  # between micro-batches, on average
    forming = min(machine.wait, interval * (batch - 1) / batch)
    mean, squares = forming + batch * profile.ingest + profile.answer, 0.0
    for stage in stages:
        turn = stage.service / stage.replicas
        rho = min(0.99, max(turn, 1e-9) / interval)
        wait = rho * turn / (2 * (1 - rho))
        tail = max(0.0, math.log(100 * rho)) * rho * turn / (2 * (1 - rho))
        mean += stage.service + stage.doors + wait
        squares += max(0.0, tail - wait) ** 2
    return mean, mean + math.sqrt(squares)
