"""What all goes to one partition is the work of one replica, whatever the others wait for."""

from __future__ import annotations

from collections import Counter

from streaminfer.metrics import Metrics
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.spread import Spread
from streaminfer.runtime.steps import Result
from streaminfer.topology import Route, Routes
from streaminfer.transport import TopicSpec
from streaminfer.transport.memory import MemoryTransport
from tests.envelopes import envelope

ENVELOPES = [envelope(10 * k, 4) for k in range(80)]  # of one input partition


def test_bytes_are_spread_evenly_whatever_the_sizes() -> None:
    spread = Spread(8)
    sent = Counter[int]()
    for k, sample in enumerate(ENVELOPES):
        nbytes = 1000 if k % 5 == 0 else 10
        sent[spread.place(sample, nbytes)] += nbytes
        spread.acked([sample])
    assert len(sent) == 8
    assert max(sent.values()) - min(sent.values()) <= 1000


def test_equal_envelopes_go_round() -> None:
    spread = Spread(3, begin=1)
    places = []
    for sample in ENVELOPES[:7]:
        places.append(spread.place(sample, 10))
        spread.acked([sample])
    assert places == [1, 2, 0, 1, 2, 0, 1]


def test_a_partition_that_does_not_ack_gets_no_more() -> None:
    """Its broker is slow, and everything behind would wait for it."""
    spread = Spread(3, begin=0)
    assert spread.place(ENVELOPES[0], 10) == 0
    for sample in ENVELOPES[1:20]:
        assert spread.place(sample, 10) != 0
        spread.acked([sample])
    spread.acked(ENVELOPES[:1])
    assert spread.place(ENVELOPES[20], 10) == 0


def test_a_second_try_goes_where_the_first_did() -> None:
    """There it covers the chunks that the first one left; elsewhere they would wait for long."""
    spread = Spread(8)
    first = spread.place(ENVELOPES[0], 10)
    for sample in ENVELOPES[1:5]:
        spread.place(sample, 10)
    assert spread.place(ENVELOPES[0], 10) == first


def test_senders_do_not_all_begin_with_one_partition() -> None:
    assert len({Spread(64).place(ENVELOPES[0], 1) for _ in range(20)}) > 5


async def test_chunks_stay_together_and_outcomes_keep_the_origins_partition() -> None:
    """The sink restores order by partition: an outcome elsewhere would wait there for ever."""
    bus = MemoryTransport()
    async with bus.admin() as admin, bus.producer() as producer:
        await admin.create([TopicSpec("next", 8), TopicSpec("sink", 8)])
        outbox = Outbox(
            producer, Metrics("p").stage("s"), Routes((Route("next", balance=True),), "sink"),
            max_record_bytes=300, partitions=8,
        )  # fmt: skip
        big = tuple(envelope(10 * k, 9, bytes(100)) for k in range(16))
        failed = tuple(envelope(1000 + 10 * k, 9) for k in range(4))
        await outbox.publish(Result(outputs=big, outcomes=failed))
        async with bus.consumer(["next", "sink"], None) as consumer:
            records = await consumer.poll(0)
    homes: dict[bytes, set[int]] = {}
    for record in records:
        headers = dict(record.headers)
        if record.topic == "next":
            homes.setdefault(headers["si-chunk"][:16], set()).add(record.partition)
        else:
            assert record.partition == 3
    assert len(homes) == 16
    assert all(len(places) == 1 for places in homes.values())
    assert Counter(home for (home,) in homes.values()) == dict.fromkeys(range(8), 2)
