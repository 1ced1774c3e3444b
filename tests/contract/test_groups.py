"""What a transport promises about groups: shares, commits, rebalances, crashes."""

from __future__ import annotations

import asyncio
import time

import pytest

from streaminfer.errors import NotOwner, TransportError
from streaminfer.transport import Commit, Consumer, Record, TopicPartition
from tests.contract.conftest import Harness
from tests.contract.members import (
    Event,
    Witness,
    by_partition,
    drain,
    drain_all,
    nothing_comes,
    until,
    values,
)


def logs(topic: str, *numbers: int) -> frozenset[TopicPartition]:
    return frozenset(TopicPartition(topic, number) for number in numbers)


class Committer(Witness):
    """A member that commits, when it is asked to let go, exactly what it was given."""

    consumer: Consumer

    def __init__(self, name: str, events: list[Event]) -> None:
        super().__init__(name, events)
        self.done: dict[TopicPartition, Commit] = {}
        self.on_revoked = self._commit

    def took(self, records: list[Record]) -> list[Record]:
        for record in records:
            self.done[record.position.tp] = Commit(record.offset + 1, self.name)
        return records

    async def _commit(self) -> None:
        await self.consumer.commit(self.done)
        self.done = {}


# ── commits ───────────────────────────────────────────────────────────────────────────────────


async def test_without_a_commit_a_group_begins_at_the_start(harness: Harness) -> None:
    topic = await harness.topic(2)
    await harness.send(topic, [b"0", b"1"], (0, 1))
    witness, group = Witness(), "g-" + topic
    async with harness.transport.consumer([topic], group, witness) as consumer:
        assert by_partition(await drain(consumer, 4)) == {0: [0, 1], 1: [0, 1]}
    assert witness.commits == dict.fromkeys(logs(topic, 0, 1))
    assert await harness.admin.committed(group, logs(topic, 0, 1)) == witness.commits


async def test_next_member_goes_on_where_the_last_one_committed(harness: Harness) -> None:
    """And reads what was noted with it: a sink's watermark, ingest's chain."""
    topic = await harness.topic(2)
    zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
    await harness.send(topic, [b"%d" % n for n in range(5)], (0, 1))
    group = "g-" + topic
    note = '{"from": 3, "Schlüssel": "✓"}'
    async with harness.transport.consumer([topic], group) as consumer:
        await drain(consumer, 10)
        await consumer.commit({zero: Commit(4, "wrong")})
        await consumer.commit({zero: Commit(3, note)})  # may go back
        assert await nothing_comes(consumer), "a commit moves no position"
    expected = {zero: Commit(3, note), one: None}
    assert await harness.admin.committed(group, [zero, one]) == expected
    witness = Witness()
    async with harness.transport.consumer([topic], group, witness) as consumer:
        assert witness.commits == expected
        assert by_partition(await drain(consumer, 7)) == {0: [3, 4], 1: [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("fits", ["x" * 4096, "é" * 2048], ids=["ascii", "é"])
async def test_note_has_4096_bytes_at_most(harness: Harness, fits: str) -> None:
    """One that is cut, or dropped in silence, would be a wrong watermark."""
    topic = await harness.topic()
    tp, group = TopicPartition(topic, 0), "g-" + topic
    async with harness.transport.consumer([topic], group) as consumer:
        await consumer.commit({tp: Commit(0, fits)})
        with pytest.raises(TransportError):
            await consumer.commit({tp: Commit(1, fits + "x")})
    assert await harness.admin.committed(group, [tp]) == {tp: Commit(0, fits)}


async def test_commit_of_a_foreign_partition_is_refused_whole(harness: Harness) -> None:
    topic = await harness.topic()
    tp, group = TopicPartition(topic, 0), "g-" + topic
    async with harness.transport.consumer([topic], group) as consumer:
        with pytest.raises(NotOwner, match="elsewhere"):
            await consumer.commit({tp: Commit(1), TopicPartition("elsewhere", 0): Commit(1)})
    assert await harness.admin.committed(group, [tp]) == {tp: None}


async def test_commit_for_a_group_only_while_nobody_is_in_it(harness: Harness) -> None:
    """A reset under running workers would be overwritten by their next commit."""
    topic = await harness.topic()
    tp, group = TopicPartition(topic, 0), "g-" + topic
    await harness.send(topic, [b"%d" % n for n in range(5)])
    await harness.admin.commit(group, {tp: Commit(3, "reset")})
    witness = Witness()
    async with harness.transport.consumer([topic], group, witness) as consumer:
        assert witness.commits == {tp: Commit(3, "reset")}
        assert values(await drain(consumer, 2)) == [b"3", b"4"]
        with pytest.raises(NotOwner, match=group):
            await harness.admin.commit(group, {tp: Commit(0)})
    assert await harness.admin.committed(group, [tp]) == {tp: Commit(3, "reset")}
    await harness.admin.commit(group, {tp: Commit(1)})
    assert await harness.admin.committed(group, [tp]) == {tp: Commit(1)}


async def test_two_groups_both_read_everything(harness: Harness) -> None:
    topic = await harness.topic(2)
    await harness.send(topic, [b"0", b"1"], (0, 1))
    async with (
        harness.transport.consumer([topic], "a-" + topic) as a,
        harness.transport.consumer([topic], "b-" + topic) as b,
    ):
        await a.commit({TopicPartition(topic, 0): Commit(2)})
        for consumer in (a, b):
            assert by_partition(await drain(consumer, 4)) == {0: [0, 1], 1: [0, 1]}


# ── who reads what ────────────────────────────────────────────────────────────────────────────


async def test_shares_follow_weights(harness: Harness) -> None:
    """Equal shares would make a fast device wait for a slow one."""
    topic = await harness.topic(8)
    group = "g-" + topic
    async with (
        harness.transport.consumer([topic], group, weight=1.0) as slow,
        harness.transport.consumer([topic], group, weight=3.0) as fast,
    ):
        await until(lambda: len(slow.assignment()) == 2)
        assert len(fast.assignment()) == 6
        assert slow.assignment() | fast.assignment() == logs(topic, *range(8))


async def test_topics_of_equal_count_are_shared_alike(harness: Harness) -> None:
    """Else the parts of one image would go to two members and never be joined."""
    first, second = await harness.topic(4), await harness.topic(4)
    group = "g-" + first
    async with (
        harness.transport.consumer([first, second], group) as a,
        harness.transport.consumer([first, second], group) as b,
    ):
        await until(lambda: len(a.assignment()) == 4)
        for member in (a, b):
            by_topic = [
                {tp.partition for tp in member.assignment() if tp.topic == topic}
                for topic in (first, second)
            ]
            assert by_topic[0] == by_topic[1]
            assert len(by_topic[0]) == 2


async def test_member_too_many_waits_and_takes_over(harness: Harness) -> None:
    """A spare replica must sit still, and be there when it is needed."""
    topic = await harness.topic()
    tp, group = TopicPartition(topic, 0), "g-" + topic
    await harness.send(topic, [b"0", b"1"])
    async with harness.transport.consumer([topic], group) as spare:
        async with harness.transport.consumer([topic], group) as other:
            await until(lambda: len(spare.assignment()) + len(other.assignment()) == 1)
            owner, idle = (spare, other) if spare.assignment() else (other, spare)
            assert not await idle.poll(0.1)
            with pytest.raises(NotOwner):
                await idle.commit({tp: Commit(1)})
            assert len(await drain(owner, 2)) == 2
            await owner.commit({tp: Commit(2)})
        await harness.send(topic, [b"2"])
        await until(lambda: spare.assignment() == {tp})
        assert values(await drain(spare, 1)) == [b"2"]


# ── rebalances ────────────────────────────────────────────────────────────────────────────────


async def test_joining_and_leaving_lose_nothing_and_repeat_nothing(harness: Harness) -> None:
    """With a commit inside `revoked`, scaling a stage up and down is invisible to the user."""
    topic = await harness.topic(4)
    group, every = "g-" + topic, range(4)
    events: list[Event] = []
    await harness.send(topic, [b"x"] * 10, every)
    a, b = Committer("a", events), Committer("b", events)
    a.consumer = harness.transport.consumer([topic], group, a)
    b.consumer = harness.transport.consumer([topic], group, b)
    async with a.consumer:
        seen = a.took(await drain(a.consumer, 13))
        async with b.consumer:
            await until(lambda: len(a.consumer.assignment()) == 2)
            assert a.consumer.assignment().isdisjoint(b.consumer.assignment())
            assert a.consumer.assignment() | b.consumer.assignment() == logs(topic, *every)
            mine, theirs = a.consumer.assignment(), b.consumer.assignment()
            for _ in range(4):
                seen += a.took(list(await a.consumer.poll(0.2, max_records=3)))
                seen += b.took(list(await b.consumer.poll(0.2, max_records=3)))
        await until(lambda: len(a.consumer.assignment()) == 4)
        await harness.send(topic, [b"y"], every)
        seen += a.took(await drain(a.consumer, 44 - len(seen)))
        assert await nothing_comes(a.consumer)
    assert by_partition(seen) == {number: list(range(11)) for number in every}

    all_four = logs(topic, *every)
    assert events[:2] == [Event("a", "assigned", all_four), Event("a", "revoked", all_four)]
    assert set(events[2:4]) == {Event("a", "assigned", mine), Event("b", "assigned", theirs)}
    assert events[4] == Event("b", "revoked", theirs)
    assert events[5:7] == [Event("a", "revoked", mine), Event("a", "assigned", all_four)]
    assert events[7:] == [Event("a", "revoked", all_four)]


async def test_what_was_not_committed_is_read_again_by_the_new_owner(harness: Harness) -> None:
    topic = await harness.topic(2)
    group = "g-" + topic
    await harness.send(topic, [b"%d" % n for n in range(6)], (0, 1))
    async with harness.transport.consumer([topic], group) as a:
        await drain(a, 12)
        await a.commit({TopicPartition(topic, 0): Commit(4), TopicPartition(topic, 1): Commit(6)})
        async with harness.transport.consumer([topic], group) as b:
            await until(lambda: len(a.assignment()) == 1)
            assert by_partition(await drain_all([a, b], 2)) == {0: [4, 5]}
            assert await nothing_comes(a)
            assert await nothing_comes(b)


async def test_after_revoked_a_commit_is_refused(harness: Harness) -> None:
    """The new owner has begun: a late commit would skip what it is still to do, or undo it."""
    topic = await harness.topic(2)
    group = "g-" + topic
    a = harness.transport.consumer([topic], group)
    async with a, harness.transport.consumer([topic], group) as b:
        await until(lambda: len(a.assignment()) == 1)
        (theirs,) = b.assignment()
        with pytest.raises(NotOwner, match=topic):
            await a.commit({theirs: Commit(1, "late")})
        await b.commit({theirs: Commit(2, "mine")})
        assert (await harness.admin.committed(group, [theirs]))[theirs] == Commit(2, "mine")
    with pytest.raises(NotOwner):
        await a.commit({theirs: Commit(1, "much too late")})


async def test_nothing_is_handed_out_while_partitions_move(harness: Harness) -> None:
    """A record handed out after `revoked` began would be nobody's to commit."""
    topic = await harness.topic(2)
    group = "g-" + topic
    witness, begun, go = Witness("a"), asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        begun.set()
        await go.wait()

    witness.on_revoked = hold
    async with harness.transport.consumer([topic], group, witness) as a:
        b = harness.transport.consumer([topic], group)
        joining = asyncio.create_task(b.__aenter__())
        await begun.wait()
        await harness.send(topic, [b"x"] * 3, (0, 1))
        assert await nothing_comes(a, 0.4)
        assert not joining.done(), "revoked is awaited before the partitions go on"
        go.set()
        await joining
        try:
            records = await drain_all([a, b], 6)
        finally:
            await b.__aexit__(None, None, None)
    assert by_partition(records) == {0: [0, 1, 2], 1: [0, 1, 2]}


async def test_assigned_may_seek_pause_and_commit_before_the_first_record(harness: Harness) -> None:
    """A sink takes over by a commit and a seek; neither may race with a poll."""
    topic = await harness.topic(2)
    zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
    group, witness = "g-" + topic, Witness()
    await harness.send(topic, [b"%d" % n for n in range(5)], (0, 1))
    consumer = harness.transport.consumer([topic], group, witness)

    async def take_over() -> None:
        assert consumer.assignment() == {zero, one}
        await consumer.commit({zero: Commit(3, "mine")})
        consumer.seek(zero, 3)
        consumer.pause([one])

    witness.on_assigned = take_over
    async with consumer:
        assert by_partition(await drain(consumer, 2)) == {0: [3, 4]}
        assert await nothing_comes(consumer)
        consumer.resume([one])
        assert by_partition(await drain(consumer, 5)) == {1: [0, 1, 2, 3, 4]}
    assert (await harness.admin.committed(group, [zero]))[zero] == Commit(3, "mine")


async def test_pause_ends_with_the_assignment(harness: Harness) -> None:
    """Who paused has forgotten the partition: nobody would ever resume it."""
    topic = await harness.topic(2)
    group = "g-" + topic
    async with harness.transport.consumer([topic], group) as a:
        a.pause(logs(topic, 0, 1))
        async with harness.transport.consumer([topic], group) as b:
            await until(lambda: len(a.assignment()) == 1)
            await harness.send(topic, [b"x"], (0, 1))
            assert by_partition(await drain_all([a, b], 2)) == {0: [0], 1: [0]}


async def test_member_that_only_keeps_alive_still_takes_part(harness: Harness) -> None:
    """A worker that waits for its budget polls nothing; it must not hold up or lose its group."""
    topic = await harness.topic(2)
    group = "g-" + topic
    async with harness.strict.consumer([topic], group) as a:
        for _ in range(6):
            await asyncio.sleep(harness.silence / 3)
            await a.keepalive()
        async with asyncio.timeout(60), harness.strict.consumer([topic], group) as b:
            await until(lambda: len(a.assignment()) == 1)
            await a.commit(dict.fromkeys(a.assignment(), Commit(0)))
            assert a.assignment() | b.assignment() == logs(topic, 0, 1)


# ── crashes and listeners that fail ───────────────────────────────────────────────────────────


async def test_crash_gives_back_exactly_what_was_not_committed(harness: Harness) -> None:
    topic = await harness.topic()
    tp, group = TopicPartition(topic, 0), "g-" + topic
    await harness.send(topic, [b"%d" % n for n in range(10)])
    await harness.die(topic, group, read=10, commit=6)
    witness = Witness()
    async with harness.transport.consumer([topic], group, witness) as heir:
        assert witness.commits == {tp: Commit(6, "last words")}
        assert values(await drain(heir, 4)) == [b"6", b"7", b"8", b"9"]
        assert await nothing_comes(heir)


async def test_crash_beside_a_living_member_moves_the_partitions_to_it(harness: Harness) -> None:
    topic = await harness.topic(2)
    group = "g-" + topic
    async with harness.transport.consumer([topic], group) as survivor:
        await harness.send(topic, [b"%d" % n for n in range(5)], (0, 1))
        await harness.die(topic, group, read=0, commit=0)
        await until(lambda: survivor.assignment() == logs(topic, 0, 1))
        assert by_partition(await drain(survivor, 10)) == {0: list(range(5)), 1: list(range(5))}


async def test_listener_that_fails_to_let_go_does_not_keep_its_partitions(harness: Harness) -> None:
    topic = await harness.topic(2)
    group, witness = "g-" + topic, Witness()

    async def fail() -> None:
        raise ValueError("a bug in the worker")

    witness.on_revoked = fail
    waits = []
    for _ in range(3):
        async with harness.transport.consumer([topic], group, witness):
            async with harness.transport.consumer([topic], group) as other:
                assert len(other.assignment()) == 1
            begin = time.monotonic()
        waits.append(time.monotonic() - begin)
    assert min(waits) < 1 + harness.slack, "closing is prompt"


async def test_closing_twice_is_closing_once(harness: Harness) -> None:
    topic = await harness.topic()
    witness = Witness()
    consumer = harness.transport.consumer([topic], "g-" + topic, witness)
    async with consumer:
        pass
    await consumer.__aexit__(None, None, None)
    assert [event.what for event in witness.events] == ["assigned", "revoked"]
    assert consumer.assignment() == frozenset()


async def test_listener_that_hangs_does_not_keep_a_consumer_from_closing(harness: Harness) -> None:
    """SIGTERM must end a worker whose drain is stuck."""
    topic = await harness.topic()
    witness, never = Witness(), asyncio.Event()

    async def hang() -> None:
        await never.wait()

    witness.on_revoked = hang
    async with asyncio.timeout(60):
        async with harness.transport.consumer([topic], "g-" + topic, witness):
            pass


async def test_listener_that_cannot_take_over_stops_the_member(harness: Harness) -> None:
    """Records without their state would be answered wrongly; a loud end gets a restart."""
    topic = await harness.topic()
    group, witness = "g-" + topic, Witness()
    await harness.send(topic, [b"0"])

    async def fail() -> None:
        raise ValueError("watermark is no number")

    witness.on_assigned = fail
    with pytest.raises(TransportError, match="watermark is no number"):
        async with harness.transport.consumer([topic], group, witness):
            pytest.fail("joined")
    async with harness.transport.consumer([topic], group) as other:
        assert values(await drain(other, 1)) == [b"0"]
