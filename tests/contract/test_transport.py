"""What a transport promises about records, positions and topics. Groups are in `test_groups.py`."""

from __future__ import annotations

import asyncio
import time

import pytest

from streaminfer.errors import NotOwner, RecordTooLarge, TopicError, TransportError
from streaminfer.transport import Commit, Outgoing, Position, Record, TopicPartition, TopicSpec
from tests.contract.conftest import Harness
from tests.contract.members import by_partition, drain, nothing_comes, values

# ── records ───────────────────────────────────────────────────────────────────────────────────


async def test_order_within_a_partition_is_the_order_of_sending(harness: Harness) -> None:
    """A sink that publishes in order has nothing else to go by."""
    topic = await harness.topic(2)
    sent = [b"%d" % number for number in range(150)]
    acked = await harness.send(topic, sent, (0, 1))
    async with harness.transport.consumer([topic], None) as reader:
        records = await drain(reader, 300)
    assert by_partition(records) == {0: list(range(150)), 1: list(range(150))}
    for partition in (0, 1):
        assert values([r for r in records if r.partition == partition]) == sent
    assert {r.position for r in records} == set(acked), "an ack says where the record is"


@pytest.mark.parametrize("value", [b"bytes", b"", None], ids=["bytes", "empty", "tombstone"])
@pytest.mark.parametrize("key", [b"cat-1", b"", None], ids=["key", "empty key", "no key"])
async def test_everything_of_a_record_survives(
    harness: Harness, key: bytes | None, value: bytes | None
) -> None:
    """An empty value is an error to the user, a null one is skipped: they must stay apart."""
    topic = await harness.topic()
    headers = (("si-id", b"\x00\xff"), ("empty", b""), ("again", b"1"), ("again", b"2"))
    before = time.time()
    await (await harness.producer.send(Outgoing(topic, value, key, 0, headers)))
    async with harness.transport.consumer([topic], None) as reader:
        (record,) = await drain(reader, 1)
    assert (record.key, record.value, record.headers) == (key, value, headers)
    assert record.position == Position(topic, 0, 0)
    assert record.nbytes == len(key or b"") + len(value or b"")
    assert before - 1 <= record.timestamp_ms / 1000 <= time.time() + 1


async def test_key_goes_where_java_sends_it(harness: Harness) -> None:
    """Else one image's key would be on two partitions, depending on the client."""
    hashes = {  # from Kafka's own UtilsTest
        b"21": -973932308,
        b"foobar": -790332482,
        b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        b"abc": 479470107,
    }
    topic = await harness.topic(7)
    for key, number in hashes.items():
        position = await (await harness.producer.send(Outgoing(topic, b"", key)))
        assert position.partition == (number & 0x7FFFFFFF) % 7


async def test_records_without_key_use_every_partition(harness: Harness) -> None:
    topic = await harness.topic(2)
    acks = [await harness.producer.send(Outgoing(topic, bytes(8))) for _ in range(64)]
    assert {(await ack).partition for ack in acks} == {0, 1}


async def test_closing_a_producer_flushes_it(harness: Harness) -> None:
    topic = await harness.topic()
    async with harness.transport.producer() as producer:
        acks = [await producer.send(Outgoing(topic, b"%d" % n, partition=0)) for n in range(20)]
    assert [ack.result().offset for ack in acks] == list(range(20))


async def test_record_over_the_limit_is_refused_and_the_next_one_passes(harness: Harness) -> None:
    """One huge image must become one error, not a stuck producer."""
    topic = await harness.topic(max_message_bytes="10000")
    with pytest.raises(RecordTooLarge, match=r"max\.message\.bytes"):
        await (await harness.producer.send(Outgoing(topic, bytes(20_000), partition=0)))
    (position,) = await harness.send(topic, [b"small"])
    assert position.offset == 0
    await harness.admin.configure(topic, {"max.message.bytes": "50000"})
    async with asyncio.timeout(60):  # a broker takes a setting before its logs obey it
        while True:
            try:
                (position,) = await harness.send(topic, [bytes(20_000)])
                break
            except RecordTooLarge:
                await asyncio.sleep(0.2)
    assert position.offset == 1


async def test_many_records_at_once_are_all_there_in_their_order(harness: Harness) -> None:
    """The sink's answers go this way: one lost, doubled or overtaken is a broken promise."""
    topic = await harness.topic(3)
    keyed = [Outgoing(topic, b"%d" % n, b"key-%d" % (n % 20)) for n in range(400)]
    placed = [Outgoing(topic, b"%d" % n, None, n % 3) for n in range(400, 500)]
    alone = Outgoing(topic, b"500", b"key-7")
    producer = harness.producer
    acks = [await producer.send_many(keyed[:300])]
    one = await producer.send(keyed[300])
    more: list[list[Outgoing]] = [[*keyed[301:], *placed], [alone], []]
    acks += [await producer.send_many(records) for records in more]
    await asyncio.gather(one, *acks)
    async with harness.transport.consumer([topic], None) as reader:
        read = await drain(reader, 501)
    by_value = {int(r.value or b""): r for r in read}
    assert sorted(by_value) == list(range(501))
    for partition in range(3):
        numbers = [int(r.value or b"") for r in read if r.partition == partition]
        assert numbers == sorted(numbers)
    assert all(by_value[n].partition == n % 3 for n in range(400, 500))
    assert by_value[500].partition == by_value[7].partition, "a key has one partition"


async def test_many_records_at_once_lose_no_field_of_one(harness: Harness) -> None:
    topic = await harness.topic()
    headers = (("si-id", b"\x00\xff"), ("empty", b""), ("again", b"1"), ("again", b"2"))
    sent = [
        Outgoing(topic, value, key, 0, some)
        for value in (b"bytes", b"", None)
        for key in (b"cat-1", b"", None)
        for some in (headers, ())
    ]
    before = time.time()
    await (await harness.producer.send_many(sent))
    async with harness.transport.consumer([topic], None) as reader:
        records = await drain(reader, len(sent))
    assert [(r.value, r.key, r.headers) for r in records] == [
        (s.value, s.key, s.headers) for s in sent
    ]
    assert all(before - 1 <= r.timestamp_ms / 1000 <= time.time() + 1 for r in records)


async def test_many_records_may_be_more_than_one_request_takes(harness: Harness) -> None:
    topic = await harness.topic(2)
    sent = [Outgoing(topic, bytes([n]) * 90_000, None, n % 2) for n in range(60)]
    async with asyncio.timeout(90):
        await (await harness.producer.send_many(sent))
    async with harness.transport.consumer([topic], None) as reader:
        records = await drain(reader, 60)
    for partition in range(2):
        found = [(r.value or b"")[0] for r in records if r.partition == partition]
        assert found == list(range(partition, 60, 2))


async def test_one_of_many_that_is_too_large_is_refused_and_the_next_pass(harness: Harness) -> None:
    topic = await harness.topic(2, max_message_bytes="10000")
    sizes = [10, 20_000, 10]
    with pytest.raises(RecordTooLarge, match=r"max\.message\.bytes"):
        await (
            await harness.producer.send_many([Outgoing(topic, bytes(n), None, 0) for n in sizes])
        )
    before = (await harness.admin.offsets([TopicPartition(topic, 0)]))[TopicPartition(topic, 0)][1]
    small = [Outgoing(topic, b"small", None, 0)] * 3
    await (await harness.producer.send_many(small))
    ends = await harness.admin.offsets([TopicPartition(topic, 0)])
    assert ends[TopicPartition(topic, 0)][1] == before + 3
    with pytest.raises(TopicError, match="no-such-topic"):
        await (await harness.producer.send_many([Outgoing("no-such-topic", b"")] * 2))
    with pytest.raises(TopicError, match=topic):
        await (await harness.producer.send_many([Outgoing(topic, b"", None, 2)] * 2))


async def test_sending_nowhere_names_the_topic(harness: Harness) -> None:
    """Topics are never made by being named: a typo would swallow records."""
    topic = await harness.topic(2)
    with pytest.raises(TopicError, match="no-such-topic"):
        await (await harness.producer.send(Outgoing("no-such-topic", b"")))
    with pytest.raises(TopicError, match=topic):
        await (await harness.producer.send(Outgoing(topic, b"", partition=2)))
    assert await harness.admin.topics(["no-such-topic"]) == {}


# ── polling ───────────────────────────────────────────────────────────────────────────────────


async def test_poll_waits_as_long_as_asked_and_no_longer(harness: Harness) -> None:
    """A worker's timers depend on it."""
    topic = await harness.topic()
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        for timeout in (0.0, 0.4):
            waits = []
            for _ in range(3):
                begin = time.monotonic()
                assert not await consumer.poll(timeout)
                waits.append(time.monotonic() - begin)
            assert min(waits) >= timeout * 0.9
            assert min(waits) < timeout + harness.slack, "a busy machine may delay one, not all"


async def test_poll_returns_when_the_first_record_comes(harness: Harness) -> None:
    topic = await harness.topic()
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        waits = []
        for _ in range(3):
            begin = time.monotonic()
            poll = asyncio.create_task(consumer.poll(10.0))
            await asyncio.sleep(0.1)
            await harness.send(topic, [b"now"])
            assert values(await poll) == [b"now"]
            waits.append(time.monotonic() - begin)
        assert min(waits) < 0.1 + harness.slack, "a busy machine may delay one, not all"


async def test_poll_gives_no_more_than_asked_for_and_goes_on_there(harness: Harness) -> None:
    """What a poll does not hand out is not lost; a busy partition does not starve another."""
    topic = await harness.topic(2)
    await harness.send(topic, [b"x"] * 30, (0, 1))
    async with harness.transport.consumer([topic], None) as reader:
        records: list[Record] = []
        while len(records) < 60:
            batch = await reader.poll(30.0, max_records=7)
            assert 0 < len(batch) <= 7
            records += batch
    assert by_partition(records) == {0: list(range(30)), 1: list(range(30))}


async def test_seek_goes_back_and_forth(harness: Harness) -> None:
    """Nothing that was fetched before a seek may come after it: it would be computed twice."""
    topic = await harness.topic()
    tp = TopicPartition(topic, 0)
    await harness.send(topic, [b"%d" % n for n in range(10)])
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        assert values(await drain(consumer, 2)) == [b"0", b"1"]
        consumer.seek(tp, 7)
        assert values(await drain(consumer, 3)) == [b"7", b"8", b"9"]
        consumer.seek(tp, 4)
        assert values(await drain(consumer, 1)) == [b"4"]
        consumer.seek(tp, 10)
        assert await nothing_comes(consumer)
        await harness.send(topic, [b"10"])
        assert values(await drain(consumer, 1)) == [b"10"]
        with pytest.raises(NotOwner, match="elsewhere"):
            consumer.seek(TopicPartition("elsewhere", 0), 0)


async def test_paused_partition_waits_and_others_go_on(harness: Harness) -> None:
    """A full budget for one partition must not stop the others, nor lose the paused one's place."""
    topic = await harness.topic(2)
    zero, one = TopicPartition(topic, 0), TopicPartition(topic, 1)
    await harness.send(topic, [b"0", b"1", b"2"], (0, 1))
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        consumer.pause([zero, TopicPartition("elsewhere", 0)])  # a stale order is passed over
        records = await drain(consumer, 3)
        assert by_partition(records) == {1: [0, 1, 2]}
        assert await nothing_comes(consumer)
        consumer.pause([one])
        consumer.resume([zero])
        await harness.send(topic, [b"3"], (0, 1))
        assert by_partition(await drain(consumer, 4)) == {0: [0, 1, 2, 3]}
        consumer.resume([one])
        assert by_partition(await drain(consumer, 1)) == {1: [3]}


async def test_pausing_between_polls_holds_what_is_fetched_already(harness: Harness) -> None:
    topic = await harness.topic()
    tp = TopicPartition(topic, 0)
    await harness.send(topic, [b"%d" % n for n in range(5)])
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        await drain(consumer, 2)
        consumer.pause([tp])
        assert await nothing_comes(consumer)
        consumer.resume([tp])
        assert values(await drain(consumer, 3)) == [b"2", b"3", b"4"]


async def test_highwater_tells_what_is_still_to_come(harness: Harness) -> None:
    """Lag, and "run until empty", are computed from it."""
    topic = await harness.topic()
    tp = TopicPartition(topic, 0)
    await harness.send(topic, [b"x"] * 5)
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        await drain(consumer, 2)
        assert consumer.highwater(tp) == 5
        assert consumer.highwater(TopicPartition("elsewhere", 0)) is None
        await harness.send(topic, [b"x"])
        await drain(consumer, 4)
        assert consumer.highwater(tp) == 6


async def test_reader_without_group_reads_all_and_commits_nothing(harness: Harness) -> None:
    topic = await harness.topic(3)
    await harness.send(topic, [b"x"], (0, 1, 2))
    async with (
        harness.transport.consumer([topic], None) as one,
        harness.transport.consumer([topic], None) as other,
    ):
        for reader in (one, other):
            assert reader.assignment() == {TopicPartition(topic, p) for p in range(3)}
            assert by_partition(await drain(reader, 3)) == {0: [0], 1: [0], 2: [0]}
        with pytest.raises(NotOwner):
            await one.commit({TopicPartition(topic, 0): Commit(1)})


async def test_reader_from_the_end_sees_all_that_comes_after_it_is_there(harness: Harness) -> None:
    """A client that waits for its answer must not miss it, nor read a year of old ones."""
    topic = await harness.topic(2)
    await harness.send(topic, [b"old"], (0, 1))
    async with harness.transport.consumer([topic], None, from_end=True) as reader:
        await harness.send(topic, [b"new"], (0, 1))
        assert values(await drain(reader, 2)) == [b"new", b"new"]
        assert await nothing_comes(reader)


async def test_missing_topic_is_named_at_once(harness: Harness) -> None:
    topic = await harness.topic()
    for group in ("g-" + topic, None):
        with pytest.raises(TopicError, match="no-such-topic"):
            async with asyncio.timeout(60):
                async with harness.transport.consumer([topic, "no-such-topic"], group):
                    pytest.fail("joined")


async def test_closed_consumer_says_so(harness: Harness) -> None:
    topic = await harness.topic()
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        pass
    with pytest.raises(TransportError):
        await consumer.poll(0.1)


# ── trimming ──────────────────────────────────────────────────────────────────────────────────


async def test_trim_deletes_what_lies_before_and_nothing_else(harness: Harness) -> None:
    topic = await harness.topic(2)
    tp = TopicPartition(topic, 0)
    await harness.send(topic, [b"%d" % n for n in range(10)], (0, 1))
    await harness.admin.trim({tp: 6})
    assert await harness.admin.offsets([tp, TopicPartition(topic, 1)]) == {
        tp: (6, 10),
        TopicPartition(topic, 1): (0, 10),
    }
    await harness.admin.trim({tp: 3})  # done already
    assert await harness.ends(topic) == (6, 10)
    with pytest.raises(TransportError):
        await harness.admin.trim({tp: 11})
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        assert by_partition(await drain(consumer, 14)) == {0: [6, 7, 8, 9], 1: list(range(10))}
        assert consumer.lost() == 0, "what was gone before it began is no loss"


async def test_reader_whose_place_is_trimmed_goes_on_and_counts_the_loss(harness: Harness) -> None:
    """Lost records must be counted: they are inputs without an answer."""
    topic = await harness.topic()
    tp = TopicPartition(topic, 0)
    await harness.send(topic, [b"%d" % n for n in range(10)])
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        assert values(await drain(consumer, 2)) == [b"0", b"1"]
        consumer.pause([tp])
        await harness.admin.trim({tp: 7})
        consumer.seek(tp, 2)  # also forgets what was fetched before the trim
        consumer.resume([tp])
        assert values(await drain(consumer, 3)) == [b"7", b"8", b"9"]
        assert consumer.lost() == 5


async def test_commit_that_is_trimmed_away_counts_as_lost(harness: Harness) -> None:
    topic = await harness.topic()
    tp = TopicPartition(topic, 0)
    await harness.send(topic, [b"%d" % n for n in range(6)])
    await harness.admin.commit("g-" + topic, {tp: Commit(1)})
    await harness.admin.trim({tp: 4})
    async with harness.transport.consumer([topic], "g-" + topic) as consumer:
        assert values(await drain(consumer, 2)) == [b"4", b"5"]
        assert consumer.lost() == 3


# ── topics ────────────────────────────────────────────────────────────────────────────────────


async def test_topics_are_made_once_configured_and_deleted(harness: Harness) -> None:
    topic = await harness.topic(3, max_message_bytes="20000")
    await harness.send(topic, [b"kept"])
    await harness.admin.create([TopicSpec(topic, 5, {"max.message.bytes": "99"})])
    info = (await harness.admin.topics([topic, "no-such-topic"]))[topic]
    assert (info.partitions, info.config["max.message.bytes"]) == (3, "20000")
    assert await harness.ends(topic) == (0, 1)

    await harness.admin.configure(topic, {"segment.bytes": "1048576"})
    async with asyncio.timeout(60):  # a broker answers before its replicas know
        while True:
            config = (await harness.admin.topics([topic]))[topic].config
            if config["segment.bytes"] == "1048576":
                break
            await asyncio.sleep(0.1)
    assert config["max.message.bytes"] == "20000"

    await harness.admin.delete([topic, "no-such-topic"])
    assert await harness.admin.topics([topic]) == {}


async def test_wrong_topics_are_refused_by_name(harness: Harness) -> None:
    with pytest.raises(TopicError, match="no-partitions"):
        await harness.admin.create([TopicSpec("no-partitions", 0)])
    with pytest.raises(TopicError, match="no-such-topic"):
        await harness.admin.configure("no-such-topic", {"retention.ms": "1"})
    with pytest.raises(TopicError, match="no-such-topic"):
        await harness.admin.offsets([TopicPartition("no-such-topic", 0)])
    with pytest.raises(TopicError, match="no-such-topic"):
        await harness.admin.trim({TopicPartition("no-such-topic", 0): 0})


async def test_topic_made_anew_is_empty(harness: Harness) -> None:
    topic = await harness.topic()
    await harness.send(topic, [b"old"] * 3)
    await harness.admin.delete([topic])
    await harness.admin.create([TopicSpec(topic, 1)])
    assert await harness.ends(topic) == (0, 0)
    async with harness.transport.producer() as producer:
        ack = await producer.send(Outgoing(topic, b"new", partition=0))
        assert await ack == Position(topic, 0, 0)
