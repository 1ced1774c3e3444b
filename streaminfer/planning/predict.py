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

__all__ = ["LOAD", "Candidate", "Machine", "Measured", "PlacedStage", "predict"]

LOAD = 0.7  # share of the throughput at which latency is predicted


@dataclass(frozen=True)
class Machine:
    """What all stages on this machine share."""

    cores: int
    wait: float = 0.004  # seconds that a part of a micro-batch waits for the rest
    one_loop: bool = False  # all workers in one process: their hops take turns on its event loop


@dataclass(frozen=True)
class PlacedStage:
    """One stage as it would run. Seconds are for one micro-batch on its slowest device."""

    name: str
    first: int  # positions of its first and last node
    last: int
    until: str | None  # the layer that ends it; None: the model's end
    devices: tuple[str, ...]  # one for each replica
    threads: int
    compute: float
    receive: float
    send: float
    period: float  # seconds between two micro-batches, all replicas together
    weight_bytes: int
    memory: float  # bytes on each device
    row_bytes: int  # bytes that leave it for one sample, as sent
    shares: tuple[float, ...] = ()  # relative speeds of replicas that are unlike

    @property
    def service(self) -> float:
        """Seconds that one micro-batch keeps one device busy."""
        return self.compute + self.receive + self.send


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
        replicas = max(len(stage.devices) for stage in self.stages)
        if len(self.stages) > 1:
            copies = f", up to {replicas} replicas" if replicas > 1 else ""
            return f"{len(self.stages)} stages{copies}"
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
        return sum(stage.service for stage in self.stages)

    @property
    def hop_bytes(self) -> tuple[int, ...]:
        """Bytes that one sample is on each hop between stages."""
        return tuple(stage.row_bytes for stage in self.stages[:-1])

    def busy(self) -> dict[str, float]:
        """Return the share of time that each stage computes at full throughput."""
        return {s.name: min(1.0, s.compute / len(s.devices) / self.period) for s in self.stages}


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
    cpu = sum(stage.compute * stage.threads for stage in stages if stage.devices[0] == "cpu")
    edges = link.seconds(batch * profile.output_bytes) + sum(s.receive + s.send for s in stages)
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
        turn = stage.service / len(stage.devices)
        rho = min(0.99, max(turn, 1e-9) / interval)
        wait = rho * turn / (2 * (1 - rho))
        tail = max(0.0, math.log(100 * rho)) * rho * turn / (2 * (1 - rho))
        mean += stage.service + wait
        squares += max(0.0, tail - wait) ** 2
    return mean, mean + math.sqrt(squares)
