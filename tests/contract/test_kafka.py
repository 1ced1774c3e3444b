"""What only a real Kafka can break: other clients, large requests, zombies, locked doors.

The semantics that both carriers share are in `test_transport.py`.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from streaminfer.errors import NotOwner, RecordTooLarge, TopicError, TransportError
from streaminfer.runtime.gather import NOTE
from streaminfer.runtime.spans import Spans
from streaminfer.transport.base import Commit, Outgoing, Position, TopicPartition
from streaminfer.transport.kafka import KafkaSettings, KafkaTransport
from tests.conftest import a_broker
from tests.contract.brokers import make, quick, read_all
from tests.contract.members import drain, nothing_comes, until

pytestmark = pytest.mark.kafka


@pytest.fixture
def kafka(kafka_address: str) -> KafkaTransport:
    return quick(kafka_address)


# ── other clients ─────────────────────────────────────────────────────────────────────────────


async def test_key_goes_where_kcat_sends_it(kafka: KafkaTransport, kafka_address: str) -> None:
    """Else images of one key, sent by two clients, would overtake each other."""
    kcat = shutil.which("kcat")
    if kcat is None:
        pytest.skip("needs kcat")
    topic = await make(kafka, 7)
    keys = [f"key-{n}" + "x" * (n % 5) for n in range(40)]
    lines = "".join(f"{key}:value\n" for key in keys)
    command = [kcat, "-P", "-b", kafka_address, "-t", topic, "-K:"]
    await asyncio.to_thread(
        subprocess.run,
        [*command, "-X", "partitioner=murmur2_random"],
        input=lines.encode(),
        check=True,
        timeout=90,
    )
    theirs = {record.key: record.partition for record in await read_all(kafka, topic, len(keys))}
    async with kafka.producer() as producer:
        for key in keys:
            position = await (await producer.send(Outgoing(topic, b"", key.encode())))
            assert position.partition == theirs[key.encode()]


# ── limits ────────────────────────────────────────────────────────────────────────────────────


async def test_many_wide_partitions_do_not_make_a_request_too_large(kafka: KafkaTransport) -> None:
    """aiokafka puts a batch of each into one request; over 100 MB it would be retried for ever."""
    topic = await make(kafka, 120)
    value = bytes(900_000)
    async with kafka.producer() as producer, asyncio.timeout(110):
        acks = [await producer.send(Outgoing(topic, value, partition=p)) for p in range(120)]
        positions = await asyncio.gather(*acks)
    assert positions == [Position(topic, p, 0) for p in range(120)]
    async with kafka.admin() as admin:
        await admin.delete([topic])


async def test_producer_goes_on_after_a_record_the_broker_refused(kafka: KafkaTransport) -> None:
    """The refused batch leaves a gap in the sequence numbers: all later ones would be refused."""
    topic = await make(kafka, max_message_bytes="100000")
    async with kafka.producer() as producer:
        await (await producer.send(Outgoing(topic, b"before")))
        with pytest.raises(RecordTooLarge, match=r"max\.message\.bytes"):
            await (await producer.send(Outgoing(topic, bytes(200_000))))
        assert await (await producer.send(Outgoing(topic, b"after"))) == Position(topic, 0, 1)
        with pytest.raises(RecordTooLarge):
            await producer.send(Outgoing(topic, bytes(2_000_000)))
        with pytest.raises(RecordTooLarge):
            await producer.send_many([Outgoing(topic, bytes(2_000_000), partition=0)] * 2)


async def test_larger_images_pass_where_the_topic_takes_them(kafka_address: str) -> None:
    settings = KafkaSettings(kafka_address, max_record_bytes=5_000_000)
    kafka = KafkaTransport(settings)
    topic = await make(kafka, max_message_bytes="5000000")
    async with kafka.producer() as producer:
        await (await producer.send(Outgoing(topic, bytes(4_000_000))))
    assert [record.nbytes for record in await read_all(kafka, topic, 1)] == [4_000_000]


async def test_the_longest_note_of_a_gather_is_taken_and_comes_back(kafka: KafkaTransport) -> None:
    """A commit that the broker refuses for its metadata is refused for ever: all is read again."""
    spans, dice = Spans(), random.Random(3)
    at = 10**15
    for _ in range(5000):
        at += 2 + dice.getrandbits(30)
        spans.add(at, at := at + dice.getrandbits(30))
    note = spans.pack(NOTE)
    assert len(note) > NOTE * 0.9
    tp = TopicPartition(await make(kafka, 1), 0)
    async with kafka.admin() as admin:
        await admin.commit(f"g-{tp.topic}", {tp: Commit(0, note)})
        assert (await admin.committed(f"g-{tp.topic}", [tp]))[tp] == Commit(0, note)


async def test_configuring_one_entry_keeps_the_others(kafka: KafkaTransport) -> None:
    """Kafka's older request replaces them all: `topics apply` would undo what the user set."""
    topic = await make(kafka, segment_bytes="1048576")
    async with kafka.admin() as admin:
        await admin.configure(topic, {"max.message.bytes": "123456"})
        config = (await admin.topics([topic]))[topic].config
        assert (config["segment.bytes"], config["max.message.bytes"]) == ("1048576", "123456")
        with pytest.raises(TopicError):
            await admin.configure(topic, {"no.such.thing": "1"})


# ── who may commit ────────────────────────────────────────────────────────────────────────────


async def test_zombie_cannot_commit(kafka: KafkaTransport, kafka_address: str) -> None:
    """A worker that stood still comes back and commits: the group's progress must not go back."""
    topic = await make(kafka)
    group, tp = f"g-{topic}", TopicPartition(topic, 0)
    stop = threading.Event()
    committed = threading.Event()

    async def successor() -> None:
        async with quick(kafka_address).consumer([topic], group) as consumer:
            await consumer.commit({tp: Commit(20, "mine")})
            committed.set()
            while not stop.is_set():
                await consumer.poll(0.05)

    async with kafka.consumer([topic], group) as zombie:
        other = threading.Thread(target=lambda: asyncio.run(successor()))
        other.start()
        try:
            assert committed.wait(90)  # blocks this loop, heartbeats and all: that is the point
            assert tp in zombie.assignment(), "it has not heard of anything yet"
            with pytest.raises(NotOwner):
                await zombie.commit({tp: Commit(10, "late")})
        finally:
            stop.set()
            other.join()
    async with kafka.admin() as admin:
        assert await admin.committed(group, [tp]) == {tp: Commit(20, "mine")}


async def test_cancelled_poll_loses_nothing(kafka: KafkaTransport) -> None:
    """What aiokafka gives to a poll that has gone away must come with the next one."""
    topic = await make(kafka)
    async with kafka.consumer([topic], "g-" + topic) as consumer, kafka.producer() as producer:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(consumer.poll(5.0), 0.1)
        await (await producer.send(Outgoing(topic, b"kept")))
        await asyncio.sleep(0.3)
        assert [record.value for record in await consumer.poll(60.0)] == [b"kept"]


async def test_rebalance_voids_what_was_fetched_and_not_polled(kafka: KafkaTransport) -> None:
    """Else two workers would compute one sample, and the slower one's commit is refused."""
    topic = await make(kafka, 4)
    group = "g-" + topic
    async with kafka.producer() as producer:
        for partition in range(4):
            await (await producer.send(Outgoing(topic, b"x", partition=partition)))
    async with kafka.consumer([topic], group) as first:
        poll = asyncio.create_task(first.poll(5.0))
        await asyncio.sleep(0)
        poll.cancel()
        await asyncio.sleep(0.5)  # all four are fetched by now, and wait for the next poll
        async with kafka.consumer([topic], group) as second:
            await until(lambda: len(first.assignment()) == 2)
            for member in (first, second):
                got = [record.position.tp for record in await drain(member, 2)]
                assert sorted(got) == sorted(member.assignment())
                assert await nothing_comes(member)


# ── safety on the wire ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[KafkaSettings]:
    """How to reach a broker that wants TLS and a password."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    certificate, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=broker", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True
    )
    store = tmp_path / "broker.pem"
    store.write_text(key.read_text() + certificate.read_text())
    login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    properties = {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(store),
        "sasl.enabled.mechanisms": "PLAIN",
        "plain.sasl.jaas.config": f'{login} user_worker="s3cret";',
    }
    with a_broker(
        {f"listener.name.sasl_ssl.{key}": value for key, value in properties.items()}
    ) as b:
        yield KafkaSettings(
            b.secure_address,
            security_protocol="SASL_SSL",
            sasl_username="worker",
            sasl_password="s3cret",  # noqa: S106
            ssl_cafile=str(certificate),
        )


async def test_only_the_right_password_and_authority_get_in(secure: KafkaSettings) -> None:
    """What the user set about TLS and SASL must reach every client, or nobody is protected."""
    kafka = KafkaTransport(secure)
    topic = await make(kafka)
    async with kafka.producer() as producer:
        await (await producer.send(Outgoing(topic, b"hello")))
    assert [record.value for record in await read_all(kafka, topic, 1)] == [b"hello"]
    for wrong in (
        replace(secure, sasl_password="guess"),  # noqa: S106
        replace(secure, ssl_cafile=None),
        replace(secure, security_protocol="PLAINTEXT", connect_timeout=3.0),
    ):
        with pytest.raises(TransportError, match="password right"):
            async with KafkaTransport(wrong).producer():
                pytest.fail("let in")
