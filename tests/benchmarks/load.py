"""The load: one Kafka client that sends n images and waits for their n answers, for all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

__all__ = ["Load", "create_topics"]

LARGEST = 32 << 20  # bytes of a record; the hand-written script sends a micro-batch as one
PATIENCE = 120.0  # seconds without an answer after which a system counts as stuck


async def create_topics(address: str, names: Iterable[str], partitions: int) -> None:
    """Create topics that take large records."""
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    try:
        config = {"max.message.bytes": str(LARGEST)}
        topics = [NewTopic(name, partitions, 1, topic_configs=config) for name in names]
        await admin.create_topics(topics)
    finally:
        await admin.close()


class Load:
    """Sends to one topic, counts the keys that come out of another."""

    def __init__(self, address: str, source: str, target: str) -> None:
        self._source = source
        self._producer = AIOKafkaProducer(bootstrap_servers=address, acks=1)
        self._consumer = AIOKafkaConsumer(
            target, bootstrap_servers=address, auto_offset_reset="latest"
        )
        self._missing: set[bytes] = set()
        self._progress = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._producer.start()
        await self._consumer.start()
        await self._consumer.seek_to_end()
        for partition in self._consumer.assignment():
            await self._consumer.position(partition)  # fixed now, not at the first fetch
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._consumer.stop()
        await self._producer.stop()

    async def run(self, images: Sequence[bytes]) -> float:
        """Send all, await all; return the seconds from the first send to the last answer.

        Raises TimeoutError when no answer comes for two minutes.
        """
        series = uuid4().hex[:8]
        keyed = [(f"{series}-{k}".encode(), value) for k, value in enumerate(images)]
        self._missing = {key for key, _ in keyed}
        began = time.perf_counter()
        sending = asyncio.create_task(self.send(keyed))
        await self.answered()
        seconds = time.perf_counter() - began
        await sending
        return seconds

    async def send(self, keyed: Iterable[tuple[bytes, bytes]]) -> None:
        """Send records as fast as the broker takes them."""
        for key, value in keyed:
            await self._producer.send(self._source, value, key)
        await self._producer.flush()

    async def answered(self) -> None:
        """Wait until every image of the run has its answer."""
        while self._missing:
            self._progress.clear()
            if self._reader is not None and self._reader.done():
                self._reader.result()
            try:
                await asyncio.wait_for(self._progress.wait(), PATIENCE)
            except TimeoutError:
                raise TimeoutError(
                    f"{len(self._missing)} images have no answer and none came for {PATIENCE:.0f} s"
                ) from None

    async def _read(self) -> None:
        while True:
            for records in (await self._consumer.getmany(timeout_ms=1000)).values():
                self._missing.difference_update(record.key for record in records)
                self._progress.set()
