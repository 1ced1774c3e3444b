"""Run a plan here, on the memory bus, and measure what a simulation predicts.

calibrate   what the event loop costs on this machine
drive       the load of a Scenario, sent and awaited in this process
patiently   either again, and longer, where nothing comes back
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from streaminfer.app import LocalPipeline
from streaminfer.commands.cells import cells
from streaminfer.commands.records import Input
from streaminfer.errors import StreaminferError
from streaminfer.metrics import Metrics
from streaminfer.plan import Plan
from streaminfer.planning.simulation.simulator import (
    Arrivals,
    Host,
    Scenario,
    StageTimes,
    simulate,
    summary,
)
from streaminfer.spec import PipelineSpec
from streaminfer.transport import Outgoing, Position

__all__ = [
    "Calibration",
    "Trial",
    "Unanswered",
    "calibrate",
    "device_seconds",
    "drive",
    "patiently",
]

T = TypeVar("T")

CALIBRATE = 2.0  # seconds of a run
SPARSE = 30.0  # samples a second that come one by one
QUICK = 0.001  # seconds of a device call then: whatever, it is not the loop's
PYTHON = 0.5  # of the decoders' time the interpreter's lock is held
LONGER = 3  # times that a run to which nothing came back is made twice as long
DEVICE = (
    "streaminfer_stage_compute_duration_seconds_sum",
    "streaminfer_stage_codec_duration_seconds_sum",
)
EXITS, PARTIAL = "streaminfer_stage_exits_total", "streaminfer_gather_partial_samples_total"
ROWS = "streaminfer_stage_batch_size_samples_sum"
CALLS = "streaminfer_stage_batch_size_samples_count"
PATIENCE = 30.0  # seconds without an answer after which a run counts as stuck


class Unanswered(StreaminferError):
    """Nothing came back in the time that was measured: a longer run may be answered."""


@dataclass(frozen=True)
class Calibration:
    """What two short runs say of the engine, and of who leaves at the plan's exits."""

    host: Host
    leaves: Mapping[str, float]  # 0-1, by stage: of the rows that it computed


@dataclass(frozen=True)
class Trial:
    """What a run gave, under the names that a Report has."""

    throughput: float
    p50: float
    p99: float
    mean: float
    busy: Mapping[str, float]
    batch: Mapping[str, float]  # samples in a device call, on average
    host: float  # CPU seconds per second of the event loop
    others: float  # cores that others kept busy meanwhile: processes here, guests of the host
    partial: float = 0.0  # 0-1 of the answers: without some of what a quorum can do without


def device_seconds(metrics: Metrics) -> dict[str, float]:
    """Return the seconds of each stage's device threads so far."""
    return _by_stage(metrics, *DEVICE)


async def calibrate(
    spec: PipelineSpec,
    plan: Plan,
    folder: Path,
    inputs: Sequence[Input],
    cores: float,
    *,
    seconds: float = CALIBRATE,
) -> Calibration:
    """Measure what the engine's own event loop costs here, by its thread's CPU time.

    Two short runs of this plan, with micro-batches that are full and with some of one sample,
    scale the reference costs: those by sample, and those by micro-batch. What a third run, whose
    samples come one by one, costs beyond that is what it takes to wake the loop. Neither the rate
    nor a latency of a run goes into it.
    """
    reference = Host.reference(cores)
    blank = {stage.name: StageTimes({1: 1.0}, leaves=0.5) for stage in plan.stages}
    hops = Scenario(cells(spec, plan, blank), Arrivals(window=1)).hops()
    stages, most = len(plan.stages), spec.batch_of(plan.stages[0].path).max
    exits = sum(stage.exit is not None for stage in plan.stages)
    rows, costs = [], []
    leaves: dict[str, float] = {}

    async def run(load: Scenario) -> tuple[Trial, Metrics, tuple[float, float]]:
        async with LocalPipeline(spec, plan, folder) as pipeline:
            before = _counts(pipeline.metrics)
            trial = await _Load(pipeline, load, inputs).run()
            after = _counts(pipeline.metrics)
        return trial, pipeline.metrics, (after[0] - before[0], after[1] - before[1])

    for window in (spec.kafka.partitions, 4 * most * spec.kafka.partitions):
        load = Scenario((), Arrivals(window=window), partitions=spec.kafka.partitions)
        load = replace(load, seconds=seconds, warm=seconds / 4)
        trial, metrics, (samples, envelopes) = await patiently(run, load)
        # of a micro-batch of several rows some leave at an exit and some go on
        each = envelopes / max(1.0, samples) / (1 + exits * (window > spec.kafka.partitions))
        leaves = _leaves(metrics)
        by_sample = reference.loop_seconds(1, 0, stages, hops)
        rows.append((by_sample, reference.loop_seconds(0, each, stages, hops)))
        costs.append(trial.host / trial.throughput)
    host = _fitted(reference, rows, costs)
    sparse = Scenario(
        cells(spec, plan, {stage.name: StageTimes({1: QUICK}) for stage in plan.stages}),
        Arrivals(SPARSE, pattern="poisson"),
        host=host,
        partitions=spec.kafka.partitions,
        seconds=0.75 * seconds,
        warm=seconds / 8,
    )
    (trial, _, _), foreseen = await patiently(run, sparse), simulate(sparse)
    wake = max(0.0, trial.host - foreseen.host) / max(1.0, foreseen.wakes)
    return Calibration(replace(host, wake=wake), leaves)


def _fitted(reference: Host, rows: Sequence[tuple[float, float]], costs: Sequence[float]) -> Host:
    """Scale the reference so that its seconds by sample and by micro-batch sum to the costs."""
    # relative errors count, and no cost is negative
    matrix = np.array(rows) / np.array(costs)[:, None]
    by_sample, by_batch = np.linalg.lstsq(matrix, np.ones(len(costs)), rcond=None)[0]
    if min(by_sample, by_batch) <= 0:
        by_sample = by_batch = len(costs) / float(matrix.sum())
    return replace(reference.scaled(float(by_sample), float(by_batch)), python=PYTHON)


def _leaves(metrics: Metrics) -> dict[str, float]:
    """Return the share of each stage's rows that had their answer at its exit."""
    gone, rows = _by_stage(metrics, EXITS), _by_stage(metrics, ROWS)
    return {name: gone.get(name, 0.0) / n for name, n in rows.items() if n}


def _partial(metrics: Metrics) -> float:
    """Return the samples that went on so far without some of their branches."""
    return sum(reading.value for reading in metrics.readings(PARTIAL))


def _batches(metrics: Metrics) -> dict[str, float]:
    """Return the samples of each stage's device calls, on average."""
    counts = _by_stage(metrics, CALLS)
    return {name: n / max(1.0, counts[name]) for name, n in _by_stage(metrics, ROWS).items()}


def _counts(metrics: Metrics) -> tuple[float, float]:
    """Return the samples and the envelopes that came to the sink."""
    names = ("streaminfer_stage_samples_total", "streaminfer_stage_records_consumed_total")
    samples, envelopes = (_by_stage(metrics, name).get("sink", 0.0) for name in names)
    return samples, envelopes


def _by_stage(metrics: Metrics, *names: str) -> dict[str, float]:
    """Return the sums of these metrics by stage."""
    found: dict[str, float] = {}
    for reading in metrics.readings(*names):
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
        load = _Load(pipeline, scenario, inputs, strict=strict)
        return await load.run()


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


class _Load:
    """Sends by a schedule, or as many as were answered, and notes when each answer came."""

    def __init__(
        self,
        pipeline: LocalPipeline,
        scenario: Scenario,
        inputs: Sequence[Input],
        *,
        strict: bool = False,
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
        self._span = scenario.seconds - scenario.warm
        self._acks: list[asyncio.Future[Position]] = []

    async def run(self) -> Trial:
        """Load it for the scenario's seconds."""
        scenario, transport = self._scenario, self._pipeline.transport
        output = self._pipeline.spec.output.topic
        async with transport.producer() as self._producer:
            consumer = transport.consumer([output], None, from_end=True)
            async with consumer:
                began = _now()
                reading = asyncio.create_task(self._read(consumer, began))
                sending = asyncio.create_task(self._send(began))
                failing = asyncio.create_task(self._pipeline.failed())
                try:
                    await asyncio.sleep(max(0.0, began + scenario.warm - _now()))
                    before, used = device_seconds(self._pipeline.metrics), _Used.now()
                    partial = _partial(self._pipeline.metrics)
                    await asyncio.wait(
                        [failing, reading],
                        timeout=began + scenario.seconds - _now(),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    after = device_seconds(self._pipeline.metrics)
                    used = _Used.now().since(used)
                    partial = _partial(self._pipeline.metrics) - partial
                    for task in (failing, reading):
                        if task.done():
                            task.result()
                finally:
                    for task in (reading, sending, failing):
                        task.cancel()
                    await asyncio.gather(reading, sending, failing, return_exceptions=True)
        trial = self._trial(before, after, used)
        return replace(trial, partial=partial / max(1, round(trial.throughput * self._span)))

    def _trial(self, before: Mapping[str, float], after: Mapping[str, float], used: _Used) -> Trial:
        scenario, span = self._scenario, self._span
        sent, done = np.array(self._sent), np.array(self._done)
        counts = (done >= scenario.warm) & (done <= scenario.seconds)
        if not counts.any():
            raise Unanswered("no sample was answered while it was measured: run it longer")
        throughput, p50, p99, mean = summary(sent[counts], done[counts], span)
        busy = {
            stage.name: (after.get(stage.name, 0.0) - before.get(stage.name, 0.0))
            / span
            / len(stage.speeds)
            for stage in scenario.stages
        }
        sizes = _batches(self._pipeline.metrics)
        return Trial(
            throughput,
            p50,
            p99,
            mean,
            busy,
            {stage.name: sizes.get(stage.name, 0.0) for stage in scenario.stages},
            used.loop / span,
            used.others / span,
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
