"""Predicted against measured: plans on the memory bus, at the same arrivals, by two clocks.

The wall clock is the measure, on an idle machine. The CPU-time clock (tests/virtual.py) runs the
same engine as if every thread had a core of its own; it holds, roughly, on a busy machine, too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from streaminfer.commands.simulate import Ask, scenario_of
from streaminfer.commands.timing import inputs_of, time_decode, time_stages
from streaminfer.commands.trial import Trial, calibrate, drive
from streaminfer.planning.simulator import Report, StageTimes, simulate
from streaminfer.planning.source import ensure
from streaminfer.spec.file import load as load_spec
from tests import virtual
from tests.benchmarks.processes import ROOT
from tests.benchmarks.rows import Row, load_average, spread

__all__ = ["CPU", "WALL", "by_cpu", "by_wall"]

WALL = "simulate_vs_measured"
CPU = "simulate_vs_measured_cpu_time"
SECONDS = 8.0  # of a run, a fifth of it to warm up
THROUGHPUT, P99 = 0.10, 0.20  # how far from 1 predicted ÷ measured may be


@dataclass(frozen=True)
class Case:
    """A plan and its load: a rate a second, or (rate None) so many samples always in flight."""

    name: str
    model: str
    untils: tuple[str, ...]
    batch: int
    rate: float | None = None
    loop: int | None = None
    replicas: tuple[int, ...] = ()
    local: bool = False

    def file(self, folder: Path) -> Path:
        """Write its pipeline file."""
        names = [f"s{k}" for k in range(len(self.untils) + 1)]
        stages: list[dict[str, Any]] = [{"name": name, "threads": 1} for name in names]
        for stage, until in zip(stages, self.untils, strict=False):
            stage["until"] = until
        for stage, count in zip(stages, self.replicas, strict=False):
            stage["replicas"] = count
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
    Case("digits-1-slow", "digits", (), 8, rate=100),
    Case("digits-1-fast", "digits", (), 32, rate=400),
    Case("digits-1-full", "digits", (), 32, loop=256),
    Case("digits-2", "digits", ("early",), 16, rate=200),
    Case("digits-3", "digits", ("stem", "early"), 16, rate=150),
    Case("digits-3-full", "digits", ("stem", "early"), 64, loop=512),
    Case("digits-3-local", "digits", ("stem", "early"), 16, rate=200, local=True),
    Case("digits-2-replicas", "digits", ("early",), 16, rate=150, replicas=(1, 2)),
    Case("resnet18-1", "resnet18", (), 4, rate=15),
    Case("resnet18-1-full", "resnet18", (), 8, loop=64),
    Case("resnet18-2", "resnet18", ("layer2",), 8, rate=30),
    Case("resnet18-2-full", "resnet18", ("layer2",), 8, loop=64),
    Case("resnet18-3", "resnet18", ("layer1", "layer3"), 8, rate=30),
    Case("resnet18-4", "resnet18", ("layer1", "layer2", "layer3"), 8, rate=30),
    Case("resnet18-2-replicas", "resnet18", ("layer2",), 4, rate=25, replicas=(1, 2)),
)


async def by_wall(goals: Mapping[str, str | None]) -> list[Row]:
    """Count the plans whose throughput and p99 are predicted, by the wall clock."""
    cores = float(len(os.sched_getaffinity(0)))
    return [_row(WALL, goals[WALL], [await _measured(case, cores) for case in CASES])]


async def by_cpu(goals: Mapping[str, str | None]) -> list[Row]:
    """Count them by CPU time: every thread has a core of its own."""
    many = 64.0
    found = [await asyncio.to_thread(_virtually, _measured(case, many)) for case in CASES]
    return [_row(CPU, goals[CPU], found)]


Pair = tuple[Report, Trial]
_virtually: Callable[[Coroutine[Any, Any, Pair]], Pair] = virtual.run


async def _measured(case: Case, cores: float) -> Pair:
    """Predict a case, run it; its stages are timed before and after, as machines drift."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        spec, folder = load_spec(case.file(Path(name))), Path(name) / "plan"
        plan = ensure(spec, folder, random_weights=True)
        inputs = inputs_of(spec, plan)
        ask = Ask(rate=case.rate, concurrency=case.loop, seconds=SECONDS)
        found = await calibrate(spec, plan, folder, inputs, cores)
        host = replace(found.host, decode=time_decode(plan, inputs))
        before = await time_stages(spec, plan, folder)
        blank = {stage.name: StageTimes({1: 1.0}) for stage in plan.stages}
        measured = await drive(
            spec, plan, folder, scenario_of(spec, plan, blank, host, ask), inputs
        )
        after = await time_stages(spec, plan, folder)
        scenario = scenario_of(spec, plan, _between(before, after), host, ask)
        report = simulate(scenario)
    print(
        f"  {case.name:<20} throughput {report.throughput:7.1f} ÷ {measured.throughput:7.1f}  "
        f"p99 {report.p99 * 1e3:7.1f} ÷ {measured.p99 * 1e3:7.1f} ms  "
        f"{load_average()}",
        flush=True,
    )
    return report, measured


def _between(
    one: Mapping[str, StageTimes], other: Mapping[str, StageTimes]
) -> dict[str, StageTimes]:
    return {
        name: replace(
            times, seconds={n: (t + other[name].seconds[n]) / 2 for n, t in times.seconds.items()}
        )
        for name, times in one.items()
    }


def _row(name: str, goal: str | None, pairs: Sequence[Pair]) -> Row:
    throughput = [report.throughput / trial.throughput for report, trial in pairs]
    p99 = [report.p99 / trial.p99 for report, trial in pairs]
    right = [abs(t - 1) <= THROUGHPUT for t in throughput]
    late = [abs(t - 1) <= P99 for t in p99]
    both = sum(a and b for a, b in zip(right, late, strict=True))
    note = (
        f"of {len(pairs)} plans: throughput within 10 % {sum(right)} ({spread(throughput)}), "
        f"p99 within 20 % {sum(late)} ({spread(p99)}); {load_average()}"
    )
    return Row(name, float(both), "plans", goal, note)
