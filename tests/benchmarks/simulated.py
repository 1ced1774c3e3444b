"""Predicted against measured: plans on the memory bus, at the same arrivals, by two clocks.

The wall clock is the measure, on an idle machine. The CPU-time clock (tests/virtual.py) runs the
same engine as if every thread had a core of its own; it holds, roughly, on a busy machine, too.

A p99 is only worth comparing if it is more than one unlucky sample: a run has 500 samples or more
where time allows, and a plan is run three times, each with arrivals of its own that are the same
for both; the median of the ratios counts. Where others disturbed a run, another process or the
machine's own host, there are more of them, and those that were disturbed least count: a pause of 20
ms is some of 500 samples' p99, and no part of the plan. The stages are timed between the runs, as
machines drift. The rate is the one at which the simulator says that the busiest of its devices, the
event loop and the cores works a share of the time, so that a plan works as hard on every machine:
at 60 % it queues, and does not drown. (The quickest work less: nobody sends more than 400 a second
one by one from the same thread.) What building a plan left behind is no part of the engine: it is
taken out of the garbage collector's sight, whose pauses are as long as a small model's p99.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml

from streaminfer.commands.calibration import calibrate
from streaminfer.commands.records import inputs_of
from streaminfer.commands.simulate import Ask, scenario_of
from streaminfer.commands.timing import time_decode, time_stages
from streaminfer.commands.trial import Trial, drive
from streaminfer.planning.simulation.simulator import (
    Arrivals,
    Host,
    Report,
    Scenario,
    StageTimes,
    simulate,
)
from streaminfer.planning.source import ensure
from streaminfer.spec.file import load as load_spec
from tests import virtual
from tests.benchmarks.processes import ROOT
from tests.benchmarks.rows import Row, load_average, spread

__all__ = ["CASES", "CPU", "P99", "SAMPLES", "THROUGHPUT", "WALL", "Case", "by_cpu", "by_wall"]

WALL = "simulate_vs_measured"
CPU = "simulate_vs_measured_cpu_time"
SAMPLES = 500  # that a run should have
FASTEST = 400.0  # samples a second: beyond it the sender's own timers take a part of the loop
SHORTEST, LONGEST = 5.0, 12.0  # seconds of a run, a fifth of it to warm up
RUNS = 5  # of a plan, with arrivals of their own: the median of the ratios counts
QUIET = 0.005  # cores that others may use during a run, their CPU time stolen from us included
PATIENT = 100.0  # seconds of a plan, after which the runs that were disturbed least count
BOUND = 2400.0  # seconds of all plans: those that don't fit in count as wrong
THROUGHPUT, P99 = 0.10, 0.20  # how far from 1 predicted ÷ measured may be


@dataclass(frozen=True)
class Case:
    """A plan, and its load: a share of its capacity, or so many samples always in flight."""

    name: str
    model: str
    untils: tuple[str, ...]
    batch: int
    share: float | None = None
    loop: int | None = None
    replicas: tuple[int, ...] = ()
    local: bool = False
    split: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # by stage

    def file(self, folder: Path) -> Path:
        """Write its pipeline file."""
        names = [f"s{k}" for k in range(len(self.untils) + 1)]
        stages: list[dict[str, Any]] = [{"name": name, "threads": 1} for name in names]
        for stage, until in zip(stages, self.untils, strict=False):
            stage["until"] = until
        for stage, count in zip(stages, self.replicas, strict=False):
            stage["replicas"] = count
        for k, split in self.split.items():
            stages[k]["split"] = dict(split)
        digits = ROOT / "stages" / "digits"
        models: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "digits": (
                {"factory": f"{digits / 'model.py'}:build", "example": [1, 8, 8]},
                {"channels": 1},
            ),
            "resnet18": (
                {"factory": "torchvision.models:resnet18", "example": [3, 64, 64]},
                {},
            ),
        }
        model, taken = models[self.model]
        raw = {
            "pipeline": self.name,
            "model": model,
            "input": taken,
            "batch": {"max": self.batch, "wait": "4ms"},
            "stages": stages,
            "edges": {"default": {"transport": "local" if self.local else "kafka"}},
            "output": {"top_k": 3},
            "kafka": {"partitions": 4},
            "metrics": {"port": 0},
        }
        file = folder / f"{self.name}.yaml"
        file.write_text(yaml.safe_dump(raw))
        return file


CASES = (
    Case("digits-1-slow", "digits", (), 8, 0.2),
    Case("digits-1", "digits", (), 32, 0.6),
    Case("digits-1-full", "digits", (), 32, loop=256),
    Case("digits-2", "digits", ("early",), 16, 0.6),
    Case("digits-3", "digits", ("stem", "early"), 16, 0.6),
    Case("digits-3-full", "digits", ("stem", "early"), 64, loop=512),
    Case("digits-3-local", "digits", ("stem", "early"), 16, 0.6, local=True),
    Case("digits-2-replicas", "digits", ("early",), 16, 0.5, replicas=(1, 2)),
    Case("digits-channels", "digits", ("stem", "early"), 16, 0.6,
         split={1: {"by": "channels", "parts": 2}}),
    Case("digits-tiles", "digits", ("down",), 16, 0.6, split={0: {"by": "tiles", "grid": [1, 2]}}),
    Case("resnet18-1", "resnet18", (), 4, 0.6),
    Case("resnet18-1-full", "resnet18", (), 8, loop=64),
    Case("resnet18-2", "resnet18", ("layer2",), 8, 0.6),
    Case("resnet18-2-full", "resnet18", ("layer2",), 8, loop=64),
    Case("resnet18-3", "resnet18", ("layer1", "layer3"), 8, 0.6),
)  # fmt: skip


async def by_wall(goals: Mapping[str, str | None]) -> list[Row]:
    """Count the plans whose throughput and p99 are predicted, by the wall clock."""
    cores = float(len(os.sched_getaffinity(0)))
    began, found, longest = time.monotonic(), list[Ratios](), 0.0
    for case in CASES:
        at = time.monotonic()
        if at + longest - began > BOUND:
            print(f"  {case.name:<20} left out: {at - began:.0f} s are over", flush=True)
            continue
        found.append(await _measured(case, cores, QUIET))
        longest = max(longest, time.monotonic() - at)
    return [_row(WALL, goals[WALL], found)]


async def by_cpu(goals: Mapping[str, str | None]) -> list[Row]:
    """Count them by CPU time: every thread has a core of its own."""
    many = 64.0
    found = [await asyncio.to_thread(_virtually, _measured(case, many)) for case in CASES]
    return [_row(CPU, goals[CPU], found)]


class Ratios(NamedTuple):
    """Predicted ÷ measured, the median of a plan's runs."""

    throughput: float
    p99: float


_virtually: Callable[[Coroutine[Any, Any, Ratios]], Ratios] = virtual.run


async def _measured(case: Case, cores: float, quiet: float = math.inf) -> Ratios:
    """Predict a case, run it; its stages are timed before and after each run.

    `quiet`: cores that others may use during a run, else there is another one.
    """
    torch.set_num_threads(1)
    runs: list[tuple[Report, Trial]] = []
    with TemporaryDirectory() as name:
        spec, folder = load_spec(case.file(Path(name))), Path(name) / "plan"
        plan = ensure(spec, folder, random_weights=True)
        inputs = inputs_of(spec, plan)
        with _swept():
            began = time.monotonic()
            found = await calibrate(spec, plan, folder, inputs, cores)
            host = replace(found.host, decode=time_decode(plan.input, inputs))
            first = after = await time_stages(spec, plan, folder)
            ask = _asked(case, scenario_of(spec, plan, first, host, Ask(seconds=4.0)))
            while len(runs) < RUNS or (
                sum(trial.others <= quiet for _, trial in runs) < RUNS
                and time.monotonic() - began < PATIENT
            ):
                load = scenario_of(spec, plan, after, host, replace(ask, seed=len(runs)))
                before, trial = after, await drive(spec, plan, folder, load, inputs)
                after = await time_stages(spec, plan, folder)
                times = _between(before, after)
                now = _drifted(host, first, times)
                load = scenario_of(spec, plan, times, now, replace(ask, seed=len(runs)))
                runs.append((simulate(load), trial))
    return _compared(case, sorted(runs, key=lambda run: run[1].others)[:RUNS])


def _drifted(host: Host, before: Mapping[str, StageTimes], now: Mapping[str, StageTimes]) -> Host:
    """Return the event loop's costs on a machine that has become slower or faster since."""
    drifts = [
        now[name].seconds[n] / seconds
        for name, times in before.items()
        for n, seconds in times.seconds.items()
    ]
    by = statistics.geometric_mean(drifts)
    return replace(host.scaled(by, by), wake=host.wake * by, decode=host.decode * by)


def _compared(case: Case, runs: Sequence[tuple[Report, Trial]]) -> Ratios:
    throughput = [report.throughput / trial.throughput for report, trial in runs]
    p99 = [report.p99 / trial.p99 for report, trial in runs]
    report, trial = runs[0]
    print(
        f"  {case.name:<20} throughput {report.throughput:7.1f} ÷ {trial.throughput:7.1f} /s, "
        f"{spread(throughput)}   p99 {report.p99 * 1e3:6.1f} ÷ {trial.p99 * 1e3:6.1f} ms, "
        f"{spread(p99)}   others {max(t.others for _, t in runs):.3f} cores",
        flush=True,
    )
    return Ratios(statistics.median(throughput), statistics.median(p99))


def _asked(case: Case, closed: Scenario) -> Ask:
    """Return a load that a plan can carry, and a run that is long enough for a p99."""
    if case.share is None:
        return Ask(concurrency=case.loop, seconds=SHORTEST + 1)
    rate = min(FASTEST, case.share * simulate(closed).throughput)
    for seed in range(6):  # small micro-batches cost more than the full ones of a closed loop
        open_loop = Arrivals(rate, pattern="poisson")
        used = _used(replace(closed, arrivals=open_loop, seconds=3.0, warm=0.5, seed=seed))
        if used <= 1.1 * case.share:
            break
        rate *= max(0.5, case.share / used)
    seconds = min(LONGEST, max(SHORTEST, 1.25 * SAMPLES / rate))
    return Ask(rate=rate, seconds=seconds)


def _used(scenario: Scenario) -> float:
    """Return how much of its time what works most does: a device, the event loop, the cores."""
    report, cores = simulate(scenario), scenario.host.cores or 1.0
    devices = sum(report.busy[s.name] * len(s.speeds) * s.threads for s in scenario.stages)
    return max(report.host, *report.busy.values(), (report.host + devices) / cores)


@contextmanager
def _swept() -> Iterator[None]:
    """Take what there is now out of the garbage collector's sight."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _between(
    one: Mapping[str, StageTimes], other: Mapping[str, StageTimes]
) -> dict[str, StageTimes]:
    return {
        name: replace(
            times,
            seconds={n: (t + other[name].seconds[n]) / 2 for n, t in times.seconds.items()},
            cold={n: (t + other[name].cold[n]) / 2 for n, t in times.cold.items()},
        )
        for name, times in one.items()
    }


def _row(name: str, goal: str | None, found: Sequence[Ratios]) -> Row:
    right = [abs(one.throughput - 1) <= THROUGHPUT for one in found]
    late = [abs(one.p99 - 1) <= P99 for one in found]
    both = sum(a and b for a, b in zip(right, late, strict=True))
    note = (
        f"of {len(CASES)} plans {len(found)} were run, {RUNS} times each: "
        f"throughput within 10 % {sum(right)} ({spread([one.throughput for one in found])}), "
        f"p99 within 20 % {sum(late)} ({spread([one.p99 for one in found])}); {load_average()}"
    )
    return Row(name, float(both), "plans", goal, note)
