"""Run a plan, and measure what a simulation predicts.

measure     the load of a Scenario, sent to a pipeline that is up and awaited here
drive       the same on the memory bus
patiently   either again, and longer, where nothing comes back
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from streaminfer.app import LocalPipeline
from streaminfer.commands.records import Input
from streaminfer.errors import StreaminferError
from streaminfer.metrics import Metrics, Reading
from streaminfer.plan import Plan
from streaminfer.planning.simulation.simulator import Scenario, summary
from streaminfer.spec import PipelineSpec
from streaminfer.transport import Outgoing, Transport

__all__ = [
    "ROWS",
    "Here",
    "Running",
    "Trial",
    "Unanswered",
    "by_stage",
    "device_seconds",
    "drive",
    "measure",
    "patiently",
]

T = TypeVar("T")

LONGER = 3  # times that a run to which nothing came back is made twice as long
AHEAD = 0.5  # of the warm-up: when the metrics are read first, which takes a while
DEVICE = (
    "streaminfer_stage_compute_duration_seconds_sum",
    "streaminfer_stage_codec_duration_seconds_sum",
)
PARTIAL = "streaminfer_gather_partial_samples_total"
ROWS = "streaminfer_stage_batch_size_samples_sum"
CALLS = "streaminfer_stage_batch_size_samples_count"
PATIENCE = 30.0  # seconds without an answer after which a run counts as stuck


class Unanswered(StreaminferError):
    """Nothing came back in the time that was measured: a longer run may be answered."""


@dataclass(frozen=True)
class Trial:
    """What a run gave, under the names that a Report has."""

    throughput: float
    p50: float
    p99: float
    mean: float
    busy: Mapping[str, float]
    batch: Mapping[str, float]  # samples in a device call, on average
    host: float  # CPU seconds per second of the event loop; nan: there are several
    others: float  # cores that others kept busy meanwhile: processes here, guests of the host
    partial: float = 0.0  # 0-1 of the answers: without some of what a quorum can do without

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data; null: it is not known."""
        return {**asdict(self), "host": None if math.isnan(self.host) else self.host}


class Running(Protocol):
    """A pipeline that is up."""

    spec: PipelineSpec
    alone: bool  # this process is all of it

    @property
    def transport(self) -> Transport:
        """Where its topics are."""

    async def read(self, *names: str) -> Sequence[Reading]:
        """Return what its workers' metrics of these names say now."""

    async def failed(self) -> None:
        """Wait until a worker ends by itself, and raise why."""


class Here:
    """One in this process, on the memory bus."""

    alone = True

    def __init__(self, pipeline: LocalPipeline) -> None:
        self.spec, self.transport = pipeline.spec, pipeline.transport
        self._metrics, self.failed = pipeline.metrics, pipeline.failed

    async def read(self, *names: str) -> Sequence[Reading]:
        """Return what its metrics of these names say now."""
        return self._metrics.readings(*names)


def device_seconds(metrics: Metrics) -> dict[str, float]:
    """Return the seconds of each stage's device threads so far."""
    return by_stage(metrics.readings(*DEVICE))


def by_stage(readings: Iterable[Reading]) -> dict[str, float]:
    """Return the sums of these readings by stage."""
    found: dict[str, float] = {}
    for reading in readings:
        stage = reading.labels["stage"]
        found[stage] = found.get(stage, 0.0) + reading.value
    return found


async def drive(
    spec: PipelineSpec,
    plan: Plan,
    folder: Path,
    scenario: Scenario,
    inputs: Sequence[Input],
    *,
    strict: bool = False,
) -> Trial:
    """Run a plan on the memory bus under a scenario's load, and measure what it predicts.

    Raises:
        Unanswered: nothing came while it was measured.
        StreaminferError: no answer came for 30 seconds, or what a worker raised; `strict`: an
            input was answered with something else than a prediction.
    """
    async with LocalPipeline(spec, plan, folder) as pipeline:
        return await measure(Here(pipeline), scenario, inputs, strict=strict)


async def measure(
    pipeline: Running, scenario: Scenario, inputs: Sequence[Input], *, strict: bool = False
) -> Trial:
    """Load a pipeline as a scenario has it, and measure what that predicts. Raises as `drive`."""
    return await _Load(pipeline, scenario, inputs, strict=strict).run()


async def patiently(run: Callable[[Scenario], Awaitable[T]], load: Scenario) -> T:
    """Run a load, and longer where nothing comes back: the machine may be busy.

    Raises:
        Unanswered: nothing did, in eight times as long.
    """
    for _ in range(LONGER):
        try:
            return await run(load)
        except Unanswered:
            load = replace(load, seconds=2 * load.seconds)
    return await run(load)


def _now() -> float:
    """Return the event loop's time."""
    return asyncio.get_running_loop().time()


class _Used(NamedTuple):
    """CPU seconds so far: of this thread, of this process, of the machine.

    What the host stole is counted by itself: a guest's kernel may also count it as our process's.
    """

    loop: float
    ours: float
    busy: float
    stolen: float

    @classmethod
    def now(cls) -> _Used:
        return cls(time.thread_time(), time.process_time(), *machine_seconds())

    def since(self, before: _Used) -> _Used:
        return _Used(*(now - then for now, then in zip(self, before, strict=True)))

    @property
    def others(self) -> float:
        return self.stolen + max(0.0, self.busy - self.ours)


def machine_seconds() -> tuple[float, float]:
    """Return CPU seconds: spent on anything, and stolen by the host (Linux; else none)."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return 0.0, 0.0
    user, nice, system, _, _, irq, soft, steal = (int(n) for n in first.split()[1:9])
    each = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft) / each, steal / each


class _Sums(NamedTuple):
    """What the metrics say so far, at a time: by stage, seconds of its devices, rows and calls."""

    at: float
    device: Mapping[str, float]
    rows: Mapping[str, float]
    calls: Mapping[str, float]
    partial: float  # samples that went on without some of their branches


class _Load:
    """Sends by a schedule, or as many as were answered, and notes when each answer came."""

    def __init__(
        self, pipeline: Running, scenario: Scenario, inputs: Sequence[Input], *, strict: bool
    ) -> None:
        self._pipeline, self._scenario, self._inputs = pipeline, scenario, inputs
        self._strict = strict
        self._topic = pipeline.spec.input.topic
        # by partition, in order: the sink answers each partition's samples in theirs
        self._waiting: list[deque[float]] = [deque() for _ in range(scenario.partitions)]
        self._sent: list[float] = []
        self._done: list[float] = []
        self._count = 0
        self._random = np.random.default_rng((scenario.seed, 1))

    async def run(self) -> Trial:
        """Load it for the scenario's seconds."""
        transport = self._pipeline.transport
        output = self._pipeline.spec.output.topic
        async with transport.producer() as self._producer:
            consumer = transport.consumer([output], None, from_end=True)
            async with consumer:
                began = _now()
                measuring = asyncio.create_task(self._measure(began))
                failing = asyncio.create_task(self._pipeline.failed())
                reading = asyncio.create_task(self._read(consumer, began))
                sending = asyncio.create_task(self._send(began))
                tasks: tuple[asyncio.Task[Any], ...] = (failing, reading, sending, measuring)
                try:
                    await asyncio.wait(
                        [failing, reading, measuring], return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in (failing, reading):
                        if task.done():
                            task.result()
                    return self._trial(*await measuring)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

    async def _measure(self, began: float) -> tuple[_Sums, _Sums, _Used]:
        scenario = self._scenario
        await asyncio.sleep(max(0.0, began + AHEAD * scenario.warm - _now()))
        before = await self._look()
        await asyncio.sleep(max(0.0, began + scenario.warm - _now()))
        used = _Used.now()
        await asyncio.sleep(max(0.0, began + scenario.seconds - _now()))
        used = _Used.now().since(used)
        return before, await self._look(), used

    async def _look(self) -> _Sums:
        readings = await self._pipeline.read(*DEVICE, PARTIAL, ROWS, CALLS)

        def named(*names: str) -> list[Reading]:
            return [one for one in readings if one.name in names]

        partial = sum(one.value for one in named(PARTIAL))
        device, rows, calls = (by_stage(named(*n)) for n in (DEVICE, (ROWS,), (CALLS,)))
        return _Sums(_now(), device, rows, calls, partial)

    def _trial(self, before: _Sums, after: _Sums, used: _Used) -> Trial:
        scenario, span = self._scenario, self._scenario.seconds - self._scenario.warm
        sent, done = np.array(self._sent), np.array(self._done)
        counts = (done >= scenario.warm) & (done <= scenario.seconds)
        if not counts.any():
            raise Unanswered("no sample was answered while it was measured: run it longer")
        throughput, p50, p99, mean = summary(sent[counts], done[counts], span)
        between, alone = after.at - before.at, self._pipeline.alone
        return Trial(
            throughput,
            p50,
            p99,
            mean,
            busy={
                stage.name: (after.device.get(stage.name, 0.0) - before.device.get(stage.name, 0.0))
                / between
                / len(stage.speeds)
                for stage in scenario.stages
            },
            batch={
                stage.name: after.rows.get(stage.name, 0.0)
                / max(1.0, after.calls.get(stage.name, 0.0))
                for stage in scenario.stages
            },
            host=used.loop / span if alone else math.nan,
            others=(used.others if alone else used.stolen) / span,
            partial=(after.partial - before.partial) / max(1, round(throughput * between)),
        )

    async def _send(self, began: float) -> None:
        scenario = self._scenario
        if scenario.arrivals.window is not None:
            await self._more(scenario.arrivals.window, 0.0)
            return
        times, where = scenario.arrivals.schedule(
            scenario.seconds, scenario.partitions, scenario.seed
        )
        for when, partition in zip(times.tolist(), where.tolist(), strict=True):
            late = _now() - began - when
            if late < 0:
                await asyncio.sleep(-late)
            await self._one(partition, when)

    async def _more(self, count: int, now: float) -> None:
        load, partitions = self._scenario.arrivals, self._scenario.partitions
        for partition in load.next_partitions(self._count, count, partitions, self._random):
            await self._one(partition, now)

    async def _one(self, partition: int, when: float) -> None:
        value, headers = self._inputs[self._count % len(self._inputs)]
        self._count += 1
        self._waiting[partition].append(when)
        await self._producer.send(Outgoing(self._topic, value, None, partition, headers))

    async def _read(self, consumer: Any, began: float) -> None:
        last = _now()
        closed = self._scenario.arrivals.window is not None
        while True:
            records = await consumer.poll(0.5)
            now = _now()
            for record in records:
                if self._strict and dict(record.headers).get("si-status") != b"ok":
                    said = bytes(record.value or b"").decode("utf-8", "replace")
                    raise StreaminferError(f"a trial's input was answered with {said}")
                self._sent.append(self._waiting[record.partition].popleft())
                self._done.append(now - began)
            if records:
                last = now
                if closed:
                    await self._more(len(records), now - began)
            elif now - last > PATIENCE and any(self._waiting):
                raise StreaminferError(f"no answer for {PATIENCE:.0f} s")
