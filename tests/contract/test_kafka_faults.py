"""A real Kafka that is not there, dies, freezes or loads: what a worker then loses (nothing)."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from streaminfer.errors import TopicError, TransportError
from streaminfer.transport.base import Commit, Outgoing, Position, TopicPartition
from streaminfer.transport.kafka import KafkaTransport
from tests.broker import Broker
from tests.contract.brokers import make, quick, read_all
from tests.contract.members import Witness, drain, until

pytestmark = pytest.mark.kafka


@pytest.fixture
def kafka(kafka_address: str) -> KafkaTransport:
    return quick(kafka_address)


async def test_nothing_is_there_is_said_within_seconds() -> None:
    kafka = quick("127.0.0.1:1")
    begin = time.monotonic()
    for client in (kafka.consumer(["t"], "g"), kafka.producer(), kafka.admin()):
        with pytest.raises(TransportError, match=r"127\.0\.0\.1:1"):
            async with client:
                pytest.fail("connected to nothing")
    assert time.monotonic() - begin < 60, "production would wait for minutes"


async def test_missing_topic_is_not_waited_for(kafka: KafkaTransport) -> None:
    begin = time.monotonic()
    with pytest.raises(TopicError, match=r"no-such-topic.*topics apply"):
        async with kafka.consumer(["no-such-topic"], "g"):
            pytest.fail("joined")
    async with kafka.producer() as producer:
        with pytest.raises(TopicError, match=r"no-such-topic.*topics apply"):
            await producer.send(Outgoing("no-such-topic", b"x"))
    assert time.monotonic() - begin < 60


async def test_topic_deleted_while_it_is_read_ends_the_reader(kafka: KafkaTransport) -> None:
    """aiokafka would ask for it again and again, a thousand times a second, and say nothing."""
    topic = await make(kafka)
    async with kafka.consumer([topic], "g-" + topic) as consumer, kafka.admin() as admin:
        await admin.delete([topic])
        with pytest.raises(TopicError, match="deleted"):
            async with asyncio.timeout(60):
                while True:
                    await consumer.poll(0.2)


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_closing_never_hangs(own_broker: Broker, fault: str) -> None:
    """SIGTERM must end a worker though its broker is gone, or open but silent."""
    kafka = quick(own_broker.address)
    topic = await make(kafka)
    consumer, producer = kafka.consumer([topic], "g"), kafka.producer()
    async with asyncio.timeout(100):
        async with consumer, producer:
            await (await producer.send(Outgoing(topic, b"kept")))
            getattr(own_broker, fault)()
            ack = await producer.send(Outgoing(topic, b"in doubt"))
            begin = time.monotonic()
        assert time.monotonic() - begin < 60, "each step has 2 s; aiokafka alone has no end"
        with pytest.raises(TransportError):
            await ack


async def test_silent_broker_is_noticed(own_broker: Broker) -> None:
    """Else a worker waits for ever on a connection that nobody answers (or a lost rebalance)."""
    kafka = quick(own_broker.address, session_timeout=0.6, rebalance_timeout=1.0)
    topic = await make(kafka)
    async with asyncio.timeout(110):
        async with kafka.consumer([topic], "g") as consumer:
            assert await consumer.poll(0.2) == []
            own_broker.freeze()
            with pytest.raises(TransportError, match="new consumer"):
                while True:
                    await consumer.poll(0.1)
        own_broker.thaw()
        kafka = quick(own_broker.address, rebalance_timeout=30.0)
        async with kafka.consumer([topic], "g") as consumer, kafka.producer() as producer:
            await (await producer.send(Outgoing(topic, b"again")))
            assert [r.value for r in await drain(consumer, 1)] == [b"again"]


async def test_killed_broker_loses_nothing_that_was_acked(own_broker: Broker) -> None:
    """Also: in order, none twice, and the consumer finds its way back by itself."""
    # Patience outlasts the broker's start, which takes many seconds on a busy machine.
    kafka = quick(own_broker.address, close_timeout=20.0, rebalance_timeout=30.0)
    topic = await make(kafka)
    acks: list[asyncio.Future[Position]] = []
    joined, done = asyncio.Event(), asyncio.Event()

    def acked() -> int:
        return sum(ack.done() for ack in acks)

    async def send() -> None:
        async with kafka.producer() as producer:
            while not done.is_set():
                value = b"%06d" % len(acks) + bytes(20_000)
                acks.append(await producer.send(Outgoing(topic, value)))
                await asyncio.sleep(0.001)

    seen: dict[bytes, None] = {}  # first sights in order: nothing is committed, so some come twice

    async def receive() -> None:
        async with kafka.consumer([topic], "g") as consumer:
            joined.set()
            while not done.is_set() or len(seen) < len(acks):
                seen.update(
                    ((record.value or b"")[:6], None) for record in await consumer.poll(0.2)
                )

    async with asyncio.timeout(110), asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        tasks.create_task(receive())
        await joined.wait()
        await until(lambda: acked() >= 20)
        await asyncio.to_thread(own_broker.kill)
        before = acked()
        await asyncio.to_thread(own_broker.start)
        await until(lambda: acked() >= before + 20)
        done.set()
    positions = [ack.result() for ack in acks]
    assert 0 < before < len(positions)
    assert positions == [Position(topic, 0, offset) for offset in range(len(positions))]
    log = [(record.value or b"")[:6] for record in await read_all(kafka, topic, len(positions))]
    assert log == [b"%06d" % number for number in range(len(positions))]
    assert list(seen) == log


async def test_broker_that_dies_in_a_takeover_only_delays_it(own_broker: Broker) -> None:
    """Else a restart of the broker at the wrong moment ends every worker that is starting."""
    kafka = quick(own_broker.address, rebalance_timeout=60.0)
    topic = await make(kafka)
    group, tp = "g-dies", TopicPartition(topic, 0)
    async with kafka.admin() as admin:
        await admin.commit(group, {tp: Commit(7, "seven")})

    class Killer(logging.Handler):
        fired = False

        def emit(self, record: logging.LogRecord) -> None:
            if not self.fired and record.msg.startswith("Setting newly assigned partitions"):
                self.fired = True  # the share is there, the commits are not read yet
                own_broker.kill()

    logger, killer = logging.getLogger("aiokafka.consumer.group_coordinator"), Killer()
    logger.addHandler(killer)
    logger.setLevel(logging.INFO)
    try:
        witness = Witness()
        consumer = kafka.consumer([topic], group, witness)
        joining = asyncio.create_task(consumer.__aenter__())
        await until(lambda: killer.fired)
        await asyncio.sleep(3)  # beyond the session: reading has given up by now
        assert not joining.done()
        await asyncio.to_thread(own_broker.start)
        async with asyncio.timeout(60):
            await joining
        assert witness.commits == {tp: Commit(7, "seven")}
        await consumer.__aexit__(None, None, None)
    finally:
        logger.removeHandler(killer)
        logger.setLevel(logging.NOTSET)


async def test_loading_coordinator_never_says_that_nothing_is_committed(
    own_broker: Broker,
) -> None:
    """aiokafka alone would then answer "no commit": the whole log would be sent again."""
    kafka = quick(own_broker.address, request_timeout=20.0)
    topic = await make(kafka, 4)
    group = "g-loading"
    expected = {TopicPartition(topic, p): Commit(1000, f"note {p}") for p in range(4)}
    async with kafka.admin() as admin:
        for offset in range(0, 1001, 20):  # something to load
            await admin.commit(
                group, {tp: Commit(offset, commit.metadata) for tp, commit in expected.items()}
            )
    own_broker.kill()
    starting = asyncio.create_task(asyncio.to_thread(own_broker.start))
    async with asyncio.timeout(100):
        while True:
            try:
                async with kafka.admin() as admin:
                    assert await admin.committed(group, list(expected)) == expected
                    break
            except TransportError:
                await asyncio.sleep(0.02)
        witness = Witness()
        async with kafka.consumer([topic], group, witness):
            assert witness.commits == expected
        await starting
