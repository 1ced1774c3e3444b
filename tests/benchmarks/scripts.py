"""Operators in scripts against call by call: a call alone, and full pipelines on the memory bus.

In a pipeline each operator waits for Python's lock while the event loop works; a script takes it
once. The network is that of stages/digits, so that the engine is as busy as the devices are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision

from streaminfer.commands.records import Input, inputs_of
from streaminfer.commands.trial import drive
from streaminfer.parallel import Program, load, script
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import dump
from streaminfer.plan import Plan
from streaminfer.planning.simulation.simulator import Arrivals, Scenario
from streaminfer.planning.source import ensure
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load as load_spec
from tests.benchmarks.rows import Row, load_average, spread
from tests.benchmarks.simulated import CASES

__all__ = ["RATES", "TIME", "measure"]

TIME = "script_time"
RATES = {"script_rate_1": "digits-1-full", "script_rate_3": "digits-3-full"}  # by plan
ROUNDS, SECONDS = 7, 3.0
CALLS = 60  # of ResNet-18, by turns
IMAGES = (4, 3, 64, 64)


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Run both by turns."""
    torch.set_num_threads(1)
    rows = []
    for name, goal in goals.items():
        ratios = _times() if name == TIME else await _rates(RATES[name])
        note = f"{spread(ratios)} over {len(ratios)} rounds; {load_average()}"
        rows.append(Row(name, statistics.median(ratios), "x", goal, note))
    return rows


def _times() -> list[float]:
    scripted, plain = _program(), _program()
    x = torch.randn(IMAGES)
    for _ in range(3):
        scripted(x)
        with _call_by_call():
            plain(x)
    ratios = []
    for k in range(CALLS):
        took = {}
        for program in (scripted, plain) if k % 2 else (plain, scripted):
            began = time.thread_time()
            program(x)
            took[program] = time.thread_time() - began
        ratios.append(took[scripted] / took[plain])
    return ratios


def _program() -> Program:
    model = torchvision.models.resnet18(weights=None).eval()
    (stage,) = Cutter(capture(model, (torch.randn(2, *IMAGES[1:]),))).split([])
    return load(dump(stage), stage.weights)


async def _rates(plan_name: str) -> list[float]:
    (case,) = (case for case in CASES if case.name == plan_name)
    assert case.loop is not None
    with TemporaryDirectory() as name:
        spec, folder = load_spec(case.file(Path(name))), Path(name) / "plan"
        plan = ensure(spec, folder, random_weights=True)
        inputs = inputs_of(spec, plan)
        ratios = []
        for k in range(ROUNDS):
            rates = {}
            for scripts in (True, False) if k % 2 else (False, True):
                rates[scripts] = await _rate(spec, plan, folder, inputs, case.loop, scripts=scripts)
            ratios.append(rates[True] / rates[False])
    return ratios


async def _rate(
    spec: PipelineSpec,
    plan: Plan,
    folder: Path,
    inputs: Sequence[Input],
    window: int,
    *,
    scripts: bool,
) -> float:
    closed = Scenario((), Arrivals(window=window), partitions=spec.kafka.partitions)
    closed = replace(closed, seconds=SECONDS, warm=SECONDS / 4)
    with nullcontext() if scripts else _call_by_call():
        return (await drive(spec, plan, folder, closed, inputs)).throughput


@contextmanager
def _call_by_call() -> Iterator[None]:
    """Let programs that run for the first time now have no scripts."""
    before = script.OFTEN
    script.OFTEN = -1
    try:
        yield
    finally:
        script.OFTEN = before
