"""The loop on the memory bus: whatever fails or ends, every record comes out at least once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from streaminfer.errors import TransportError
from streaminfer.metrics import Metrics
from streaminfer.runtime.flow import Trimmer, Window, WindowWatch
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.receive import Raw
from streaminfer.runtime.sink import watermark
from streaminfer.runtime.steps import Item, Plain, Result, Settled
from streaminfer.runtime.worker import Limits, Upkeep, Worker
from streaminfer.spec import BatchSpec
from streaminfer.topology import Route, Routes
from streaminfer.transport import Commit, Outgoing, Producer, TopicPartition, TopicSpec
from streaminfer.transport.memory import MemoryTransport

NO_LIMITS = Limits()
TPS = [TopicPartition("in", p) for p in range(3)]


class Copy(Plain):
    """A step that answers each record with its value; `before` may fail or wait."""

    def __init__(self, before: Callable[[Item], Awaitable[None]] | None = None) -> None:
        self.before, self.sizes = before, list[int]()
        self.running = self.most = 0

    async def __call__(self, items: Sequence[Item]) -> Result:
        (item,) = items
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.before is not None:
                await self.before(item)
        finally:
            self.running -= 1
        self.sizes.append(len(item.records))
        answers = tuple(Outgoing("out", r.value, r.key) for r in item.records)
        return Result(answers=answers, settled=tuple(Settled(p) for p in item.positions))


class Flaky:
    """A producer whose first sends fail as a broker's would."""

    def __init__(self, producer: Producer, failures: int) -> None:
        self.producer, self.failures = producer, failures

    async def send_many(self, records: Sequence[Outgoing]) -> asyncio.Future[None]:
        if self.failures:
            self.failures -= 1
            raise TransportError("the broker is away")
        return await self.producer.send_many(records)


class Bench:
    """Topics `in` and `out`, and a worker between them."""

    def __init__(self) -> None:
        self.bus, self.stop = MemoryTransport(), asyncio.Event()
        self.window = Window(1000)

    async def topics(self, n: int) -> None:
        async with self.bus.admin() as admin:
            await admin.create([TopicSpec("in", 3), TopicSpec("out", 1), TopicSpec("sink", 3)])
        async with self.bus.producer() as producer:
            for k in range(n):
                await (await producer.send(Outgoing("in", b"%d" % k, None, k % 3)))

    async def run(
        self, step: Copy, *, failures: int = 0, burst: bool = True, limits: Limits = NO_LIMITS
    ) -> None:
        metrics = Metrics("p").stage("s")
        async with self.bus.producer() as producer, self.bus.admin() as admin:
            outbox = Outbox(Flaky(producer, failures), metrics, Routes((Route("out"),), "sink"))  # type: ignore[arg-type]
            worker = Worker(
                lambda listener: self.bus.consumer(["in"], "g", listener),
                Raw(BatchSpec(max=4, wait=0.001), self.window),
                step,
                outbox,
                metrics,
                self.stop,
                limits=limits,
                upkeep=Upkeep(
                    Trimmer(admin, 0.0, 0),
                    (
                        WindowWatch(
                            admin,
                            self.window,
                            group="sink",
                            topic="sink",
                            read=watermark,
                            write=lambda mark: f"from {mark}",
                        ),
                    ),
                ),
            )
            await worker.run(burst=burst)

    async def out(self) -> list[int]:
        seen: list[int] = []
        async with self.bus.consumer(["out"], None) as consumer:
            while records := await consumer.poll(0.02):
                seen += [int(r.value or b"") for r in records]
        return seen

    async def committed(self) -> dict[TopicPartition, Commit | None]:
        async with self.bus.admin() as admin:
            return dict(await admin.committed("g", TPS))


@pytest.fixture
async def bench() -> Bench:
    made = Bench()
    await made.topics(60)
    return made


async def test_burst_runs_until_empty_and_commits_it_all(bench: Bench) -> None:
    step = Copy()
    await bench.run(step)
    assert sorted(await bench.out()) == list(range(60))
    assert {c.offset for c in (await bench.committed()).values() if c} == {20}
    assert max(step.sizes) == 4, "micro-batches are formed, and never too large"


async def test_read_records_are_deleted_behind_the_commit(bench: Bench) -> None:
    await bench.run(Copy())
    async with bench.bus.admin() as admin:
        assert {first for first, _ in (await admin.offsets(TPS)).values()} == {20}


async def test_a_broker_that_is_away_costs_time_and_nothing_else(bench: Bench) -> None:
    await bench.run(Copy(), failures=7, limits=Limits(retries=0.001))
    assert sorted(set(await bench.out())) == list(range(60))


async def test_what_was_in_hand_when_a_worker_broke_is_read_again(bench: Bench) -> None:
    async def broken(item: Item) -> None:
        if item.records[0].value == b"36":
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await bench.run(Copy(broken))
    await bench.run(Copy())
    assert sorted(set(await bench.out())) == list(range(60))


async def test_stop_drains_what_is_under_way(bench: Bench) -> None:
    begun = asyncio.Event()

    async def slow(item: Item) -> None:
        begun.set()
        await asyncio.sleep(0.05)

    step = Copy(slow)
    running = asyncio.create_task(bench.run(step, burst=False))
    await begun.wait()
    bench.stop.set()
    await asyncio.wait_for(running, 30)
    seen = await bench.out()
    commits = await bench.committed()
    assert len(seen) == sum(step.sizes) == sum(c.offset for c in commits.values() if c)


async def test_no_more_in_hand_than_the_budget(bench: Bench) -> None:
    async def slow(item: Item) -> None:
        await asyncio.sleep(0.005)

    step = Copy(slow)
    await bench.run(step, limits=Limits(samples=8))
    assert step.most <= 3, "two micro-batches of four, and the one that filled the budget"
    assert sorted(await bench.out()) == list(range(60))


async def test_a_closed_window_stops_the_intake_and_an_answer_opens_it(bench: Bench) -> None:
    bench.window = Window(4)
    entered: list[int] = []

    async def enter(item: Item) -> None:
        for record in item.records:
            entered.append(record.offset)
            bench.window.enter(record.position.tp, record.offset + 1)

    async def come(count: int) -> None:
        """Wait for so many, and a moment for one too many."""
        async with asyncio.timeout(30):
            while len(entered) < count:  # noqa: ASYNC110 - another task counts
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)

    running = asyncio.create_task(bench.run(Copy(enter), burst=False))
    await come(12)
    assert len(entered) == 12, "four of each of the three partitions"
    async with bench.bus.admin() as admin:
        marks = {TopicPartition("sink", p): Commit(0, '{"watermark": 4}') for p in range(3)}
        await admin.commit("sink", marks)
    await come(24)
    assert len(entered) == 24
    bench.stop.set()
    await asyncio.wait_for(running, 30)


async def test_a_plan_that_begins_anew_goes_on_at_the_watermark(bench: Bench) -> None:
    """Answered samples are not computed again when a pipeline gets a new plan."""
    async with bench.bus.admin() as admin:
        marks = {TopicPartition("sink", 1): Commit(0, '{"watermark": 15}')}
        await admin.commit("sink", marks)
    await bench.run(Copy())
    expected = [k for k in range(60) if k % 3 != 1 or k // 3 >= 15]
    assert sorted(await bench.out()) == expected


async def test_two_workers_share_and_a_third_takes_over(bench: Bench) -> None:
    async def slow(item: Item) -> None:
        await asyncio.sleep(0.01)

    first = asyncio.create_task(bench.run(Copy(slow), burst=False))
    await asyncio.sleep(0.03)
    other = Bench()
    other.bus, other.window = bench.bus, Window(1000)
    second = asyncio.create_task(other.run(Copy(slow), burst=False))
    await asyncio.sleep(0.1)
    bench.stop.set()
    other.stop.set()
    await asyncio.gather(first, second)
    third = Bench()
    third.bus = bench.bus
    await third.run(Copy())
    assert sorted(set(await bench.out())) == list(range(60))
