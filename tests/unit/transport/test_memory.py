"""What the transport in memory adds to the contract: it frees, it wakes, it lets nobody hang."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection, Mapping

import pytest

from streaminfer.errors import NotOwner, TopicError, TransportError
from streaminfer.transport import Commit, Outgoing, TopicPartition, TopicSpec, Transport
from streaminfer.transport.memory import MemoryTransport

TP = TopicPartition("t", 0)


async def make(partitions: int = 1, *, patience: float = 5.0) -> MemoryTransport:
    transport = MemoryTransport(clock=lambda: 1234.5678, patience=patience)
    async with transport.admin() as admin:
        await admin.create([TopicSpec("t", partitions)])
    return transport


async def send(transport: Transport, *values: bytes) -> None:
    async with transport.producer() as producer:
        for value in values:
            await producer.send(Outgoing("t", value, partition=0))


class Stuck:
    """A listener that does not let go before `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.assignments = 0

    async def assigned(self, partitions: Mapping[TopicPartition, Commit | None]) -> None:
        self.assignments += 1

    async def revoked(self, partitions: Collection[TopicPartition]) -> None:
        await self.go.wait()


async def test_bytes_are_shared_and_trim_frees_them() -> None:
    """A day's activations would fill the memory of a laptop."""
    transport = await make()
    value = bytes(1000)
    before = sys.getrefcount(value)
    await send(transport, value)
    async with transport.consumer(["t"], None) as reader:
        (record,) = await reader.poll(0)
        assert record.value is value
    del record
    assert sys.getrefcount(value) == before + 1
    async with transport.admin() as admin:
        await admin.trim({TP: 1})
        assert sys.getrefcount(value) == before
        await send(transport, value)
        await admin.delete(["t"])
    assert sys.getrefcount(value) == before


async def test_ack_is_there_and_time_is_the_clocks() -> None:
    transport = await make()
    async with transport.producer() as producer, transport.consumer(["t"], None) as reader:
        ack = await producer.send(Outgoing("t", b"x"))
        assert ack.done()
        assert [record.timestamp_ms for record in await reader.poll(0)] == [1_234_567]


async def test_records_without_key_go_round() -> None:
    transport = await make(3)
    async with transport.producer() as producer:
        acks = [await producer.send(Outgoing("t", b"x")) for _ in range(6)]
    assert [ack.result().partition for ack in acks] == [0, 1, 2, 0, 1, 2]


async def test_closing_wakes_a_poll() -> None:
    """A client that stops must not sit out its time-out."""
    transport = await make()
    for group in ("g", None):
        async with transport.consumer(["t"], group) as consumer:
            poll = asyncio.create_task(consumer.poll(60))
            await asyncio.sleep(0.01)
        assert await asyncio.wait_for(poll, 30) == []


async def test_cancelled_poll_loses_nothing() -> None:
    transport = await make()
    async with transport.consumer(["t"], "g") as consumer:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(consumer.poll(60), 0.01)
        await send(transport, b"kept")
        assert [record.value for record in await consumer.poll(0)] == [b"kept"]


async def test_full_polls_leave_room_for_others() -> None:
    """A poller that always finds records would freeze health checks and timers."""
    transport = await make()
    await send(transport, *[b"x"] * 100)
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with transport.consumer(["t"], "g") as consumer:
        ticking = asyncio.create_task(tick())
        for _ in range(50):
            assert await consumer.poll(1.0, max_records=1)
        ticking.cancel()
    assert turns >= 50


async def test_deleted_topic_is_told_to_its_readers() -> None:
    """A worker that waits on it would wait for ever, in silence."""
    transport = await make()
    async with transport.consumer(["t"], "g") as consumer, transport.admin() as admin:
        poll = asyncio.create_task(consumer.poll(60))
        await asyncio.sleep(0)
        await admin.delete(["t"])
        with pytest.raises(TopicError, match="t was deleted"):
            await asyncio.wait_for(poll, 30)


async def test_topic_made_anew_has_no_commits() -> None:
    """Else its first records would be skipped."""
    transport = await make()
    await send(transport, b"old", b"old")
    async with transport.admin() as admin:
        await admin.commit("g", {TP: Commit(2)})
        await admin.delete(["t"])
        await admin.create([TopicSpec("t", 1)])
        assert await admin.committed("g", [TP]) == {TP: None}
    await send(transport, b"new")
    async with transport.consumer(["t"], "g") as consumer:
        assert [record.value for record in await consumer.poll(0)] == [b"new"]


async def test_position_behind_the_end_begins_anew() -> None:
    """As Kafka does when a log was lost: at least once, not never."""
    transport = await make()
    await send(transport, b"0")
    async with transport.admin() as admin:
        await admin.commit("g", {TP: Commit(9)})
    async with transport.consumer(["t"], "g") as consumer:
        assert [record.value for record in await consumer.poll(0)] == [b"0"]
        assert consumer.lost() == 0


async def test_member_that_does_not_let_go_is_passed_over_and_comes_back() -> None:
    """One stuck worker must not stop a stage; when it is free again it helps."""
    transport = await make(2, patience=0.05)
    stuck = Stuck()
    slow = transport.consumer(["t"], "g", stuck)
    async with slow, transport.consumer(["t"], "g") as quick:
        assert len(quick.assignment()) == 2
        assert await slow.poll(0.01) == []
        with pytest.raises(NotOwner):
            await slow.commit({TP: Commit(1)})
        async with transport.admin() as admin:
            with pytest.raises(NotOwner):
                await admin.commit("g", {TP: Commit(1)})
        stuck.go.set()
        async with asyncio.timeout(30):
            while len(slow.assignment()) != 1 or len(quick.assignment()) != 1:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert stuck.assignments == 2


async def test_entering_that_is_cancelled_leaves_the_group() -> None:
    """A worker stopped while it joins must not keep partitions that nobody reads."""
    transport = await make(2)
    stuck = Stuck()
    async with transport.consumer(["t"], "g", stuck) as member:
        late = transport.consumer(["t"], "g")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(late.__aenter__(), 0.01)
        stuck.go.set()
        async with asyncio.timeout(30):
            while stuck.assignments < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert len(member.assignment()) == 2


async def test_client_that_is_not_open_says_so() -> None:
    """Records sent after closing would be lost without a word on Kafka; here it is told."""
    transport = await make()
    async with transport.producer() as producer:
        pass
    with pytest.raises(TransportError, match="not open"):
        await producer.send(Outgoing("t", b"x"))
    consumer = transport.consumer(["t"], "g")
    with pytest.raises(TransportError, match="not open"):
        await consumer.poll(0)
    async with consumer:
        pass
    with pytest.raises(TransportError, match="new consumer"):
        await consumer.__aenter__()


async def test_group_of_the_dead_may_be_committed_for() -> None:
    transport = await make()
    consumer = transport.consumer(["t"], "g")
    async with consumer:
        consumer.crash()
        async with transport.admin() as admin:
            await admin.commit("g", {TP: Commit(0, "reset")})
