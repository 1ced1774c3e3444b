"""A gather in its worker: what waits only for time, and what is held when partitions move on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from streaminfer.metrics import Metrics
from streaminfer.runtime.flow import Trimmer
from streaminfer.runtime.gather import Gather, Patience
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.receive import Envelopes
from streaminfer.runtime.steps import Item, Plain, Result, Settled, Step
from streaminfer.runtime.worker import Upkeep, Worker
from streaminfer.topology import Route, Routes
from streaminfer.transport import Outgoing, TopicPartition, TopicSpec
from streaminfer.transport.memory import MemoryTransport
from streaminfer.wire import Envelope, records
from tests.unit.runtime.test_gather import gather_plan, of_part

PARTITIONS = 3


class Road:
    """The topics before and behind a gather; everything sent is of the same input partition."""

    def __init__(self) -> None:
        self.bus = MemoryTransport()
        self.metrics = Metrics("p")
        self.seen: list[Envelope] = []

    async def open(self) -> None:
        async with self.bus.admin() as admin:
            await admin.create([TopicSpec(name, PARTITIONS) for name in ("parts", "sink")])

    async def send(self, part: int, offsets: list[int], partition: int = 1) -> None:
        async with self.bus.producer() as producer:
            for headers, value in records(of_part(part, offsets), 1 << 20):
                await (await producer.send(Outgoing("parts", value, None, partition, headers)))

    @asynccontextmanager
    async def worker(
        self, patience: Patience, group: str = "g", step: Step | None = None, sharers: str = ""
    ) -> AsyncIterator[None]:
        """Run a worker inside the block, then stop it as SIGTERM would."""
        stop, stage = asyncio.Event(), self.metrics.stage("t.gather")
        made = step or Gather(gather_plan(2), patience, stage)
        async with self.bus.producer() as producer, self.bus.admin() as admin:
            worker = Worker(
                lambda listener: self.bus.consumer(["parts"], group, listener),
                Envelopes("t.gather", "d" * 64, stage, max_bytes=1 << 20),
                made,
                Outbox(producer, stage, Routes((Route("sink"),), "sink")),
                stage,
                stop,
                upkeep=Upkeep(Trimmer(admin, 0.0, 0, sharers.split())),
            )
            running = asyncio.create_task(worker.run())
            try:
                await worker.ready.wait()
                yield
            finally:
                stop.set()
                await running

    async def answers(self, count: int) -> list[tuple[int, str]]:
        """Wait for so many rows at the sink: offset and what they ended as."""
        intake = Envelopes("sink", None, self.metrics.stage("sink"), max_bytes=1 << 20)
        found: list[tuple[int, str]] = []
        async with self.bus.consumer(["sink"], None) as consumer, asyncio.timeout(20):
            while len(found) < count:
                intake.add(await consumer.poll(0.05))
                found += [
                    (s.offset, s.failure.kind if s.failure else "ok")
                    for item in intake.take()
                    for s in (item.envelope.samples if item.envelope else ())
                ]
        return found


async def road() -> Road:
    made = Road()
    await made.open()
    return made


async def test_a_deadline_passes_though_nothing_more_is_received() -> None:
    """A branch that is away must cost its deadline, not a timer's turn on top."""
    bench = await road()
    async with bench.worker(Patience(0.02, strict=True)):
        began = time.monotonic()
        for offset in range(20):
            await bench.send(0, [offset])
            answers = await bench.answers(offset + 1)
            assert answers[-1] == (offset, "timeout")
        took = time.monotonic() - began
    assert took < 20 * 0.4, f"{took / 20:.2f} s for a deadline of 0.02 s"


async def test_what_is_held_at_a_stop_is_joined_by_the_next_one() -> None:
    bench = await road()
    async with bench.worker(Patience()):
        await bench.send(0, [1, 2, 3])
        await bench.send(1, [2])
        assert await bench.answers(1) == [(2, "ok")]
    await bench.send(1, [1, 2, 3])
    async with bench.worker(Patience()):
        assert sorted(await bench.answers(3)) == [(o, "ok") for o in (1, 2, 3)]
        await asyncio.sleep(0.1)
        assert len(await bench.answers(3)) == 3, "2 was done: its second part came again"
    async with bench.bus.admin() as admin:
        (commit,) = (await admin.committed("g", [TopicPartition("parts", 1)])).values()
    assert commit is not None
    assert commit.offset == 3


async def test_what_is_held_of_a_revoked_partition_is_joined_by_its_new_owner() -> None:
    """Members that come and go: every row is joined, none ends as an error, whoever has it."""
    bench = await road()
    patience = Patience(5.0)
    async with bench.worker(patience):
        for partition in range(PARTITIONS):
            await bench.send(0, [1, 2, 3, 4], partition)
            await bench.send(1, [3], partition)
        await bench.answers(3)
        async with bench.worker(patience), bench.worker(patience):
            for partition in range(PARTITIONS):
                await bench.send(1, [2, 4], partition)
            await bench.answers(9)
        for partition in range(PARTITIONS):
            await bench.send(1, [1], partition)
        found = await bench.answers(12)
    assert {kind for _, kind in found} == {"ok"}
    assert {offset for offset, _ in found} == {1, 2, 3, 4}


class Slow(Plain):
    """A part that computes when it is let, and remembers what."""

    def __init__(self) -> None:
        self.go, self.seen = asyncio.Event(), list[int]()

    async def __call__(self, items: Sequence[Item]) -> Result:
        await self.go.wait()
        for item in items:
            assert item.envelope is not None
            self.seen += [sample.offset for sample in item.envelope.samples]
        return Result(settled=tuple(Settled(p) for item in items for p in item.positions))


async def test_nothing_is_deleted_that_a_slower_part_has_not_read() -> None:
    """Parts share a topic; without history the fast one would delete behind itself."""
    bench = await road()
    fast, slow = Slow(), Slow()
    fast.go.set()
    for offset in range(50):
        await bench.send(0, [offset])
    async with (
        bench.worker(Patience(), "fast", fast, "slow"),
        bench.bus.admin() as admin,
        asyncio.timeout(20),
    ):
        tp = TopicPartition("parts", 1)
        while (c := (await admin.committed("fast", [tp]))[tp]) is None or c.offset < 50:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert (await admin.offsets([tp]))[tp] == (0, 50), "nobody knows where the slow one is"
        async with bench.worker(Patience(), "slow", slow, "fast"):
            await asyncio.sleep(0.3)
            assert (await admin.offsets([tp]))[tp] == (0, 50)
            slow.go.set()
            while (await admin.offsets([tp]))[tp] != (50, 50):  # noqa: ASYNC110 - another trims
                await asyncio.sleep(0.01)
    assert slow.seen == fast.seen == list(range(50))
