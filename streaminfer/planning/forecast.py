"""A candidate → the scenario that its pipeline file would be → what the simulator says of it.

    Candidate ──▶ Scenario ──▶ full load: throughput, busy ──▶ LOAD of that, at random: p50, p99

`commands/simulate.py` makes the same scenario of a plan that is built and timed cell by cell; here
the times are the profile's, so that a plan is foreseen before anything is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from streaminfer.errors import ConfigError
from streaminfer.planning.calls import call_times
from streaminfer.planning.predict import LOAD, Candidate, PlacedStage, periods
from streaminfer.planning.profile import DeviceProfile, Encoding, Profile, Timing
from streaminfer.planning.simulation.measured import timed
from streaminfer.planning.simulation.simulator import (
    Arrivals,
    Report,
    Scenario,
    SimStage,
    simulate,
)
from streaminfer.topics import ANSWER, ROW_OVERHEAD, inflight

if TYPE_CHECKING:
    from streaminfer.planning.planner import Request

__all__ = ["busy_of", "forecast", "loaded", "scenario"]

SPAN = 4.0  # seconds that are counted, if that is no more than MANY samples: many commits
WARM = 2.0  # seconds before that: micro-batches may come apart slowly
MANY = 10_000
LONGER = 4  # times that a simulation of which nothing came is made twice as long
FULL = 40  # micro-batches that are counted at least
WAVES = 16  # times that all of a closed loop's samples are: they may be answered in waves
RANDOM = 2000  # samples of the load at random: 20 of them are beyond the p99


def forecast(candidate: Candidate, profile: Profile, request: Request) -> Candidate:
    """Return the candidate with the throughput, p50, p99, busy and limit of its simulation."""
    plain = scenario(candidate, profile, request)
    full = _full(plain, candidate)
    bounds = periods(candidate.stages, candidate.batch, profile, request.link, request.machine)
    most = candidate.batch / bounds["cores"] if bounds["cores"] else float("inf")
    # workers of one machine that are processes of their own share its cores all the same
    bound = request.machine.host.cores is None and full.throughput > most
    throughput = min(full.throughput, most) if bound else full.throughput
    late = simulate(loaded(plain, LOAD * throughput))
    slower = throughput / full.throughput if full.throughput else 1.0
    return replace(
        candidate,
        throughput=throughput,
        p50=late.p50,
        p99=late.p99,
        limit="cores" if bound else _limit(candidate, plain, full, bounds),
        occupied={k: v * slower for k, v in busy_of(candidate, full.busy).items()},
    )


def _full(plain: Scenario, candidate: Candidate) -> Report:
    report = simulate(plain)
    for _ in range(LONGER):
        if report.throughput:
            return report
        plain = replace(plain, seconds=2 * plain.seconds)
        report = simulate(plain)
    if not report.throughput:
        raise ConfigError(
            f"{candidate.form}: nothing would come out of it in {plain.seconds:,.1f} s, by calls "
            "that differ as much as those that were measured",
            hint="was the machine busy? profile again when it is idle",
        )
    return report


def scenario(candidate: Candidate, profile: Profile, request: Request) -> Scenario:
    """Return what a simulation, or a real run, is told of a candidate: its full load.

    Full is a closed loop in which every partition, and every worker, has two micro-batches to do.
    """
    machine, batch = request.machine, candidate.batch
    workers = [stage.replicas * stage.sides for stage in candidate.stages]
    partitions = max(machine.partitions, *(stage.replicas for stage in candidate.stages))
    window = 2 * batch * max(partitions, 1 + sum(workers))
    rate = max(candidate.throughput, 1e-6)
    span = max(min(SPAN, MANY / rate), FULL * batch / rate, WAVES * window / rate)
    warm = max(min(WARM, MANY / rate), 2 * window / rate)
    stages = _cells(candidate, profile, request)
    widest = ROW_OVERHEAD + max(stage.bytes_out for stage in stages)
    room = max(machine.memory, batch * partitions * int(widest))
    return Scenario(
        stages=stages,
        arrivals=Arrivals(window=window),
        link=machine.transit,
        host=machine.host,
        partitions=partitions,
        window=inflight(batch, partitions, room, int(widest)),
        bytes_in=float(profile.input_bytes),
        seconds=warm + span,
        warm=warm,
    )


def loaded(plain: Scenario, rate: float) -> Scenario:
    """Return the scenario with so many samples a second, that come at random times."""
    span = max(min(SPAN, MANY / rate), RANDOM / rate)
    load = Arrivals(rate, pattern="poisson")
    return replace(plain, arrivals=load, seconds=1.25 * span, warm=span / 4)


def busy_of(candidate: Candidate, busy: Mapping[str, float]) -> dict[str, float]:
    """Return how busy each stage is, given its cells: itself, or the numbered parts of it."""
    found = {}
    for stage in candidate.stages:
        cells = [
            share
            for name, share in busy.items()
            if name == stage.name or name.removeprefix(f"{stage.name}.").isdecimal()
        ]
        found[stage.name] = sum(cells) / len(cells)
    return found


def _cells(candidate: Candidate, profile: Profile, request: Request) -> list[SimStage]:
    """Return a cell for each stage, and for a split one those around and of its parts.

    What joins the parts runs in the worker of the stage behind it, what feeds them in the one
    before, as in `topology.py`.
    """
    found: list[SimStage] = []
    for k, stage in enumerate(candidate.stages):
        cell = _stage(k, candidate, profile, request)
        before = (found[-1].name,) if found else ()
        if stage.split is None:
            joined = bool(k) and candidate.stages[k - 1].split is not None
            found.append(replace(cell, reads=before, local=joined))
            continue
        parts, sent = stage.sides, stage.split.row_bytes - stage.row_bytes
        door = replace(cell, speeds=(1.0,), shares=(1.0,), threads=1)
        door = timed(door, call_times([_nothing(b) for b in cell.seconds], request.machine))
        sliced = stage.split.how.grid is not None
        if sliced or not before:
            name, out = f"{stage.name}.scatter", float(max(0, sent))
            found.append(replace(door, name=name, reads=before, local=bool(before), bytes_out=out))
            before = (name,)
        each = found[-1].bytes_out / (parts if sliced else 1)
        names = tuple(f"{stage.name}.{n}" for n in range(parts))
        found += [
            replace(
                cell, name=name, reads=before, bytes_in=(each,), speeds=(1.0,), shares=(1.0,),
                topic="" if sliced else stage.name, bytes_out=stage.row_bytes / parts,
            )
            for name in names
        ]  # fmt: skip
        whole = float(stage.row_bytes)
        found.append(replace(door, name=f"{stage.name}.gather", reads=names, bytes_out=whole))
    return found


def _stage(k: int, candidate: Candidate, profile: Profile, request: Request) -> SimStage:
    stage, machine = candidate.stages[k], request.machine
    end = k + 1 == len(candidate.stages)
    devices = [_device(name, stage, request) for name in stage.devices]
    sizes = [b for b in profile.batches() if b <= candidate.batch]
    codec = _codec(k, candidate, profile, request)
    part = _part(candidate, stage, devices)
    times = [
        call_times(
            [_layers(stage, device, b) for b in sizes],
            machine, part=part, codec=codec, begins=not k, ends=end,
            scripted=device.device == "cpu",
        )
        for device in devices
    ]  # fmt: skip
    most = max(sizes)
    raw = float(profile.output_bytes)
    answer = min(raw, float(ANSWER * machine.top_k)) if machine.top_k else raw
    cell = SimStage(
        name=stage.name,
        seconds={},
        speeds=tuple(times[0].seconds[most] / max(own.seconds[most], 1e-12) for own in times),
        batch_max=candidate.batch,
        batch_wait=machine.wait,
        bytes_out=answer if end else float(stage.row_bytes),
        threads=stage.threads,
        shares=stage.shares or (1.0,) * len(devices),
        device=stage.devices[0],
    )
    return timed(cell, times[0])


def _device(name: str, stage: PlacedStage, request: Request) -> DeviceProfile:
    """Return the profile of a stage's device: its pool's, or that of the one with all the cores."""
    pool = next(pool.profile for pool in request.pools if name in pool.names)
    wide = request.wide
    alone = wide is not None and stage.devices == (wide.device,) and stage.threads == wide.threads
    return wide if wide is not None and alone and pool.threads != wide.threads else pool


def _part(candidate: Candidate, stage: PlacedStage, devices: Sequence[DeviceProfile]) -> float:
    """Return what a part of a split stage takes, of the whole stage's time; 1 of one that is."""
    if stage.split is None:
        return 1.0
    return stage.compute / max(_compute(stage, d, candidate.batch) for d in devices)


def _compute(stage: PlacedStage, device: DeviceProfile, batch: int) -> float:
    return _layers(stage, device, batch).whole


def _layers(stage: PlacedStage, device: DeviceProfile, batch: int) -> Timing:
    timing = device.timing(batch)
    return timing.span(stage.first, stage.last) if timing else _nothing(batch)


def _nothing(batch: int) -> Timing:
    return Timing(batch=batch, seconds=(), whole=0.0, spread=0.0)


def _codec(k: int, candidate: Candidate, profile: Profile, request: Request) -> float:
    """Return the seconds of a sample to cast and pack what leaves a stage, and what came."""

    def at(stage: PlacedStage) -> tuple[float, Encoding]:
        edge = request.edges.get(stage.last, request.edge)
        raw = next(cut.row_bytes for cut in profile.cuts if cut.position == stage.last)
        return raw, profile.encoding(stage.last, edge.dtype, edge.codec)

    seconds = 0.0
    if k:
        raw, came = at(candidate.stages[k - 1])
        seconds += raw * came.decode
    if k + 1 < len(candidate.stages):
        raw, sent = at(candidate.stages[k])
        seconds += raw * sent.encode
    return seconds


def _limit(candidate: Candidate, plain: Scenario, full: Report, bounds: Mapping[str, float]) -> str:
    """Return what is at work most of its time at full load; waiting for the lock is no work."""
    works = {}
    for cell in plain.stages:
        size = max(1.0, full.batch[cell.name])
        each = float(np.interp(size, range(cell.batch_max + 1), cell.table())) / size
        works[cell.name] = full.throughput * each / sum(cell.speeds)
    shares = {**busy_of(candidate, works), "event loop": full.host}
    if plain.host.cores is not None:
        shares["cores"] = bounds["cores"] * full.throughput / candidate.batch
    return max(shares, key=lambda name: shares[name])
