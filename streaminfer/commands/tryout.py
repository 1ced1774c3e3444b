"""Short real runs of a few candidates on this machine: what they do, not what was predicted."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from streaminfer.app import LocalPipeline
from streaminfer.client import Client, Prediction
from streaminfer.commands.records import Input, inputs_of
from streaminfer.errors import StreaminferError
from streaminfer.metrics import Metrics
from streaminfer.plan import Plan
from streaminfer.planning.placement import pipeline_file
from streaminfer.planning.planner import Edge
from streaminfer.planning.predict import LOAD, Candidate, Measured
from streaminfer.planning.source import ensure
from streaminfer.planning.subject import Subject
from streaminfer.spec.file import load

__all__ = ["try_out"]

SECONDS = 3.0  # of measuring, at full load and again at LOAD of what that gave
BUSY = "streaminfer_stage_busy_seconds_total"


def try_out(
    subject: Subject,
    candidates: Sequence[Candidate],
    edges: Mapping[int, Edge],
    *,
    outputs: int,
    random_weights: bool,
    say: Callable[[str, int, int], None],
) -> list[Measured]:
    """Run each candidate on the memory bus, one after the other; in the order given."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        for k, candidate in enumerate(candidates):
            say(f"trying {candidate.form}", k, len(candidates))
            folder = Path(name) / str(k)
            folder.mkdir()
            file = folder / "pipeline.yaml"
            file.write_text(
                pipeline_file(subject, candidate, edges, (), folder.resolve(), outputs=outputs)
            )
            found.append(asyncio.run(_run(file, folder / "plan", random_weights, SECONDS)))
    return found


async def _run(file: Path, folder: Path, random_weights: bool, seconds: float) -> Measured:
    spec = load(file)
    plan = await asyncio.to_thread(ensure, spec, folder, random_weights=random_weights)
    records = inputs_of(spec, plan, 32)
    workers = 1 + sum(stage.replicas + 2 * bool(stage.split) for stage in spec.stages)
    async with LocalPipeline(spec, plan, folder) as pipeline, pipeline.client() as client:
        load_ = _Load(client, records, 2 * spec.batch.max * workers)
        await load_.run(seconds / 3, None)
        before, began = _computed(pipeline.metrics), time.perf_counter()
        done = await load_.run(seconds, None)
        passed, after = time.perf_counter() - began, _computed(pipeline.metrics)
        rate = len(done) / passed
        times = sorted(await load_.run(seconds, LOAD * rate))
    at = [times[min(len(times) - 1, int(q * len(times)))] if times else 0.0 for q in (0.5, 0.99)]
    busy = {
        stage.name: sum(after[name] - before[name] for name in names) / passed / places
        for stage in spec.stages
        for names in [_computing(plan, stage.name)]
        for places in [len(names) * stage.replicas]
    }
    return Measured(rate, at[0], at[1], busy)


def _computing(plan: Plan, path: str) -> list[str]:
    """Return what computes a declared stage: itself, or the parts of a split one."""
    return [s.name for s in plan.stages if s.path == path and s.kind in ("stage", "part")]


def _computed(metrics: Metrics) -> dict[str, float]:
    """Return the seconds that each stage has computed."""
    found: dict[str, float] = defaultdict(float)
    for name, labels, value in metrics.readings():
        if name == BUSY and labels["activity"] == "compute":
            found[labels["stage"]] += value
    return found


@dataclass
class _Load:
    """Clients that send and wait."""

    client: Client
    records: Sequence[Input]
    concurrency: int

    async def run(self, seconds: float, rate: float | None) -> list[float]:
        """Send for so long: as fast as answers come, or at a rate. Returns the answers' seconds."""
        taken: list[float] = []
        source = cycle(self.records)
        end = time.perf_counter() + seconds

        async def one() -> None:
            began = time.perf_counter()
            value, headers = next(source)
            answer = await self.client.predict(value, headers=headers)
            _ok(answer)
            taken.append(time.perf_counter() - began)

        async def loop() -> None:
            while time.perf_counter() < end:
                await one()

        if rate is None:
            await asyncio.gather(*[loop() for _ in range(self.concurrency)])
            return taken
        async with asyncio.TaskGroup() as group:
            began, k = time.perf_counter(), 0
            while time.perf_counter() < end:
                k += 1
                group.create_task(one())
                await asyncio.sleep(max(0.0, began + k / rate - time.perf_counter()))
        return taken


def _ok(answer: Prediction) -> None:
    if answer.status != "ok":
        raise StreaminferError(f"a trial's input was answered {answer.status}: {answer.error}")
