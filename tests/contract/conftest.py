"""What the contract suite runs on: the same tests, once in memory and once on a real Kafka."""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest

from streaminfer.transport import (
    Admin,
    Outgoing,
    Position,
    Producer,
    TopicPartition,
    TopicSpec,
    Transport,
)
from streaminfer.transport.memory import MemoryTransport
from tests.contract.doomed import read_and_commit


class Harness(ABC):
    """A carrier under test, with an admin and a producer at hand."""

    transport: Transport
    strict: Transport  # its members must poll or keep alive within `silence` seconds
    silence: float
    slack: float  # seconds that a wait may take longer than asked for, on a busy machine
    admin: Admin
    producer: Producer

    @abstractmethod
    async def die(self, topic: str, group: str, read: int, commit: int) -> None:
        """Let a member read records of partition 0, commit some, and die without a word."""

    async def open(self, stack: AsyncExitStack) -> None:
        self.admin = await stack.enter_async_context(self.transport.admin())
        self.producer = await stack.enter_async_context(self.transport.producer())

    async def topic(self, partitions: int = 1, **config: str) -> str:
        """Create a topic with a name of its own; `max_message_bytes` is max.message.bytes."""
        name = f"t-{uuid4().hex[:12]}"
        settings = {key.replace("_", "."): value for key, value in config.items()}
        await self.admin.create([TopicSpec(name, partitions, settings)])
        return name

    async def send(
        self, topic: str, values: Iterable[bytes], partitions: Collection[int] = (0,)
    ) -> list[Position]:
        """Send each value to each of the partitions, and wait for the acks."""
        acks = [
            await self.producer.send(Outgoing(topic, value, partition=partition))
            for value in values
            for partition in partitions
        ]
        return [await ack for ack in acks]

    async def ends(self, topic: str) -> tuple[int, int]:
        """Return first and next offset of partition 0."""
        tp = TopicPartition(topic, 0)
        return (await self.admin.offsets([tp]))[tp]


class MemoryHarness(Harness):
    slack = 0.5
    silence = 0.02

    def __init__(self) -> None:
        self.transport = self.strict = self.memory = MemoryTransport(patience=2.0)

    async def die(self, topic: str, group: str, read: int, commit: int) -> None:
        consumer = self.memory.consumer([topic], group)
        await consumer.__aenter__()
        await read_and_commit(consumer, TopicPartition(topic, 0), read, commit)
        consumer.crash()


class KafkaHarness(Harness):
    slack = 1.5
    silence = 2.0

    def __init__(self, address: str) -> None:
        from tests.contract.doomed import quick

        self._address = address
        self.transport = quick(address)
        self.strict = quick(address, max_poll_interval=self.silence)

    async def die(self, topic: str, group: str, read: int, commit: int) -> None:
        command = ["-m", "tests.contract.doomed", self._address, topic, group, str(read)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, str(commit), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout
        async with asyncio.timeout(90):
            assert await process.stdout.readline() == b"committed\n"
        process.kill()
        await process.communicate()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def carrier(request: pytest.FixtureRequest) -> Harness:
    if request.param == "memory":
        return MemoryHarness()
    return KafkaHarness(request.getfixturevalue("kafka_address"))


@pytest.fixture
async def harness(carrier: Harness) -> AsyncIterator[Harness]:
    async with AsyncExitStack() as stack:
        await carrier.open(stack)
        yield carrier
