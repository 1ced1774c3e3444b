"""Replicas that are not alike, and data that are not: what shares by speed and balance bring.

weighted   12 partitions ─▶ full speed x8, half speed x4        ÷  full speed x12
balance    p0 ████████▏p1▏…▏p7 ─▶ any partition ─▶ 3 replicas   ÷  each in its own partition

The workers, steps and bus are the real ones; a stage's compute is a sleep of so long a row, so that
cores which these would fight over play no part.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import torch

from streaminfer.metrics import Metrics
from streaminfer.parallel import Program
from streaminfer.plan import Plan, StagePlan, TensorSpec
from streaminfer.runtime.forward import Forward, Stage
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.receive import Envelopes, Intake
from streaminfer.runtime.sink import Order
from streaminfer.runtime.speed import combined
from streaminfer.runtime.steps import Result, Step
from streaminfer.runtime.worker import Limits, Worker
from streaminfer.spec import BatchSpec, InputSpec
from streaminfer.topology import Route, Routes
from streaminfer.transport import Consumer, Listener, TopicSpec
from streaminfer.transport.memory import MemoryTransport
from streaminfer.wire import Envelope, Sample, pack
from tests.benchmarks.memory import Pass
from tests.benchmarks.rows import Rate, Row, alternate, spread

__all__ = ["BALANCE", "WEIGHTED", "balance", "weighted"]

WEIGHTED = "weighted_replicas"
BALANCE = "balance_gain"
ROWS = 8  # samples of a micro-batch
BATCHES = 120  # micro-batches a round
PACE = 0.004  # seconds of sleep for a row, at full speed
HOT = 10  # of so many micro-batches, all but one have the hot key
ROUNDS = 3
X = TensorSpec(name="x", dtype="F32", shape=(None, 4))
SLOW = StagePlan(name="slow", path="slow", layers=("sleep",), inputs=(X,), outputs=(X,))
PLAN = Plan(
    pipeline="uneven",
    digest="0" * 64,
    source="",
    model="sleep",
    model_version="1",
    input=InputSpec(),
    stages=(SLOW,),
    top_k=0,
)


Consume: TypeAlias = Callable[[Listener], Consumer]


class Sleep:
    """A stage's program: so many seconds a row, and no core."""

    def __init__(self, pace: float) -> None:
        self.pace = pace

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take a batch's time."""
        time.sleep(self.pace * len(inputs[0]))
        return inputs


def sleeper(pace: float, metrics: Metrics) -> Forward:
    """Make the step of a stage that sleeps; it measures its own speed when it starts."""
    stage = Stage(
        plan=SLOW,
        load=lambda: cast(Program, Sleep(pace)),
        device=torch.device("cpu"),
        threads=1,
        batch=BatchSpec(max=ROWS, wait=0.001),
    )
    return Forward(stage, metrics.stage("slow"), timed=True)


@dataclass
class Rig:
    """A bus, and workers on it: mid ─▶ slow ─▶ sink ─▶ answers."""

    partitions: int
    bus: MemoryTransport
    stack: AsyncExitStack
    metrics: Metrics

    @classmethod
    @asynccontextmanager
    async def open(cls, partitions: int) -> AsyncIterator[Rig]:
        """Create the topics; stop all workers at the end."""
        bus = MemoryTransport()
        async with AsyncExitStack() as stack:
            admin = await stack.enter_async_context(bus.admin())
            topics = ("mid", "slow", "sink", "answers")
            await admin.create([TopicSpec(name, partitions) for name in topics])
            yield cls(partitions, bus, stack, Metrics("uneven"))

    async def replica(self, pace: float, weight: float | None = None) -> None:
        """Start a replica of the slow stage, with the share that it measures or is given."""
        step = sleeper(pace, self.metrics)

        def consume(listener: Listener) -> Consumer:
            share = weight or combined([("cpu", step.speed)])
            return self.bus.consumer(["slow"], "slow", listener, weight=share)

        await self._start("slow", step, "sink", consume)

    async def middle(self, *, balanced: bool) -> None:
        """Start what feeds the slow stage."""
        await self._start("mid", Pass(), "slow", balanced=balanced)

    async def sink(self) -> None:
        """Start what puts each partition back into order."""
        await self._start("sink", Order(PLAN, "answers", self.metrics), "answers")

    async def _start(
        self,
        source: str,
        step: Step,
        target: str,
        consume: Consume | None = None,
        balanced: bool = False,
    ) -> None:
        stop, stage = asyncio.Event(), self.metrics.stage(source)
        producer = await self.stack.enter_async_context(self.bus.producer())
        intake: Intake = Envelopes(source, None, stage, max_bytes=1 << 20)

        def plain(listener: Listener) -> Consumer:
            return self.bus.consumer([source], source, listener)

        worker = Worker(
            consume or plain,
            intake,
            step,
            Outbox(
                producer,
                stage,
                Routes((Route(target, balance=balanced),), "sink"),
                partitions=self.partitions,
            ),
            stage,
            stop,
            limits=Limits(serial=source == "sink", samples=4 * ROWS),
        )
        running = asyncio.create_task(worker.run())

        async def end() -> None:
            stop.set()
            await running

        self.stack.push_async_callback(end)
        await worker.ready.wait()

    async def through(self, topic: str, envelopes: Sequence[Envelope], out: str) -> Rate:
        """Send envelopes into a topic; time them until all of them, or their rows, came out."""
        count = len(envelopes) * (ROWS if out == "answers" else 1)
        producer = await self.stack.enter_async_context(self.bus.producer())
        outbox = Outbox(producer, self.metrics.stage("load"), Routes((Route(topic),), "sink"))
        async with self.bus.consumer([out], None) as answers, asyncio.timeout(60):
            began, used = time.perf_counter(), time.process_time()
            await outbox.publish(Result(outputs=tuple(envelopes)))
            seen: dict[int, int] = {}
            while sum(seen.values()) < count:
                for record in await answers.poll(1.0):
                    seen[record.partition] = seen.get(record.partition, 0) + 1
            seconds, cpu = time.perf_counter() - began, time.process_time() - used
        assert sum(seen.values()) == count, "an answer came twice"
        rows = len(envelopes) * ROWS
        return Rate(rows / seconds, cpu / rows * 1e3)


async def weighted(goals: Mapping[str, str | None]) -> list[Row]:
    """Compare a full-speed and a half-speed worker, by share, with the full-speed one alone."""
    systems = {
        "both": ((PACE, None), (2 * PACE, None)),
        "equal": ((PACE, 1.0), (2 * PACE, 1.0)),
        "alone": ((PACE, None),),
    }

    async def measure(name: str) -> Rate:
        async with Rig.open(12) as rig:
            for pace, weight in systems[name]:
                await rig.replica(pace, weight)
            return await rig.through("slow", micro_batches([1] * 12), "sink")

    rounds = await alternate({name: partial(measure, name) for name in systems}, ROUNDS)
    note = (
        f"12 partitions, {BATCHES * ROWS} rows of {PACE * 1e3:.0f} ms, twice that on the slow"
        f" worker; equal shares instead: {rounds.ratio('equal', 'alone'):.2f} x (rounds"
        f" {spread(rounds.ratios('equal', 'alone'))}); {rounds.note('both', 'alone')}"
    )
    return [Row(WEIGHTED, rounds.ratio("both", "alone"), "x", goals[WEIGHTED], note)]


async def balance(goals: Mapping[str, str | None]) -> list[Row]:
    """Compare an edge that balances with one that preserves, on nine tenths of one key."""

    async def measure(*, balanced: bool) -> Rate:
        async with Rig.open(8) as rig:
            await rig.sink()
            for _ in range(3):
                await rig.replica(PACE, 1.0)
            await rig.middle(balanced=balanced)
            return await rig.through("mid", micro_batches([7 * (HOT - 1)] + [1] * 7), "answers")

    rounds = await alternate(
        {
            "balance": partial(measure, balanced=True),
            "preserve": partial(measure, balanced=False),
        },
        ROUNDS,
    )
    note = (
        f"8 partitions, {1 - 1 / HOT:.0%} of {BATCHES * ROWS} rows of {PACE * 1e3:.0f} ms on one"
        f" key, 3 replicas, in order at the sink; {rounds.note('balance', 'preserve')}"
    )
    return [Row(BALANCE, rounds.ratio("balance", "preserve"), "x", goals[BALANCE], note)]


def micro_batches(weights: Sequence[int]) -> list[Envelope]:
    """Return BATCHES micro-batches, evenly mixed, of partitions as often as their weights say."""
    made = [0] * len(weights)
    envelopes = []
    for _ in range(BATCHES):
        partition = min(range(len(weights)), key=lambda p: (made[p] + 1) / weights[p])
        first = made[partition] * ROWS
        made[partition] += 1
        samples = tuple(
            Sample(n, n, f"{partition}-{n}", None, 0) for n in range(first, first + ROWS)
        )
        tensor = pack("F32", (ROWS, 4), bytes(16 * ROWS))
        envelopes.append(Envelope(partition, samples, "0" * 64, "load", {"x": tensor}))
    return envelopes
