"""A producer for Kafka: idempotent, acks=all, bounded, and able to end when the broker cannot.

send ──▶ room within 32 MB? ──▶ topic, partition known? ──▶ aiokafka's batch ──▶ broker
  └──────────────── future ◀── Position, or our error ◀── ack ◀────────────────────┘

send_many ──▶ shares by partition ─┬─ of one record ────▶ as send does
                                   └─ of several ───────▶ a batch of our own, one future for it
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaTimeoutError, MessageSizeTooLargeError
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from streaminfer.errors import TopicError, TransportError
from streaminfer.transport.base import Outgoing, Position
from streaminfer.transport.kafka import lifecycle
from streaminfer.transport.kafka.border import translate, translated
from streaminfer.transport.kafka.settings import KafkaSettings
from streaminfer.transport.partitioner import partition_for

__all__ = ["KafkaProducer"]

_logger = logging.getLogger(__name__)

# aiokafka packs a batch of every partition of a broker into one request, without a cap; over the
# broker's 100 MB (socket.request.max.bytes) it would be refused and repeated for ever.
_IN_FLIGHT = 32_000_000
_BATCH = 1_000_000  # the default 16 kB puts one activation into each request: a third the speed
_NOTHING = object()  # stands for a null value: aiokafka asserts that key or value is there


class KafkaProducer:
    """See `transport.base.Producer`. One coroutine at a time may be in `send`."""

    def __init__(self, settings: KafkaSettings, client_id: str) -> None:
        self._settings, self._client_id = settings, client_id
        self._kafka: Any = None
        self._open = False
        self._broken = False  # a batch failed: the broker now misses its sequence numbers
        self._in_flight = 0  # bytes handed to aiokafka and not acked
        self._freed = asyncio.Event()
        self._counts: dict[str, tuple[int, float]] = {}  # partitions, and until when to believe it

    async def __aenter__(self) -> Self:
        """Connect. Raises TransportError naming the address."""
        await self._connect()
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Flush (time-boxed: what is not acked then fails) and free everything."""
        if self._open:
            self._open = False
            await self._stop()

    async def send(self, record: Outgoing) -> Future[Position]:
        """Hand over a record; waits while 32 MB are under way, or while the broker is away.

        Raises:
            RecordTooLarge: here over `max_record_bytes`; in the future over the topic's limit.
            TopicError: no such topic or partition.
            TransportError: no broker answers about a topic not seen before; or not open.
        """
        if not self._open:
            raise TransportError("this producer is not open; use it in `async with`")
        size = _size(record)
        await self._room(size)
        if self._broken:
            await self._renew()
        with translated(f"send to {record.topic}"):
            partition = _partition(record, await self._count(record.topic))
            ack = await self._append(record, partition)
        return self._promise(ack, record.topic, size)

    async def send_many(self, records: Sequence[Outgoing]) -> Future[None]:
        """Hand over records; the order within each partition is theirs. Raises as `send` does."""
        if not self._open:
            raise TransportError("this producer is not open; use it in `async with`")
        counts: dict[str, int] = {}
        for topic in {record.topic for record in records}:
            with translated(f"send to {topic}"):
                counts[topic] = await self._count(topic)
        shares: dict[tuple[str, int | None], list[Outgoing]] = {}
        for record in records:
            place = record.topic, _partition(record, counts[record.topic])
            shares.setdefault(place, []).append(record)
        acks: list[Future[Position]] = []
        for (topic, partition), share in shares.items():
            if partition is None or len(share) == 1:
                acks += [await self.send(record) for record in share]
                continue
            with translated(f"send to {topic}"):
                for batch, size in self._batches(share):
                    acks.append(await self._send_batch(batch, topic, partition, size))
        return asyncio.ensure_future(_all(acks))

    def _batches(self, share: Sequence[Outgoing]) -> Iterator[tuple[Any, int]]:
        """Yield batches for the records of one partition, and the bytes in each."""
        batch, size = self._kafka.create_batch(), 0
        for record in share:
            key, value, headers = record.key, record.value, list(record.headers)
            estimate = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, headers)
            if estimate > self._settings.max_record_bytes:
                raise MessageSizeTooLargeError(f"a record of {estimate} bytes")
            while not batch.append(timestamp=None, key=key, value=value, headers=headers):
                yield batch, size  # it is full; an empty one takes a record of any size
                batch, size = self._kafka.create_batch(), 0
            size += _size(record)
        yield batch, size

    async def _send_batch(
        self, batch: Any, topic: str, partition: int, size: int
    ) -> Future[Position]:
        await self._room(size)
        if self._broken:
            await self._renew()
        while True:
            try:
                ack = await self._kafka.send_batch(batch, topic, partition=partition)
            except KafkaTimeoutError:  # see _append
                _logger.warning("no room to send to %s; is the broker there?", topic)
            else:
                return self._promise(ack, topic, size)

    def _promise(self, ack: Future[Any], topic: str, size: int) -> Future[Position]:
        self._in_flight += size
        future: Future[Position] = asyncio.get_running_loop().create_future()
        ack.add_done_callback(partial(self._acked, future, topic, size))
        return future

    async def _append(self, record: Outgoing, partition: int | None) -> Future[Any]:
        while True:
            try:
                ack: Future[Any] = await self._kafka.send(
                    record.topic,
                    _NOTHING if record.value is None else record.value,
                    record.key,
                    partition,
                    headers=list(record.headers),
                )
            except KafkaTimeoutError:
                # The partition's buffer stayed full for request_timeout. Nothing was appended,
                # so this is no duplicate; giving up here would be the only way to lose it.
                _logger.warning("no room to send to %s; is the broker there?", record.topic)
            else:
                return ack

    async def _count(self, topic: str) -> int:
        now = asyncio.get_running_loop().time()
        count, until = self._counts.get(topic, (0, 0.0))
        if now >= until:
            known = self._kafka.client.cluster.partitions_for_topic(topic)
            if known is None:
                limit = self._settings.request_timeout
                await lifecycle.require_topics(self._kafka.client, [topic], limit)
                known = await self._kafka.partitions_for(topic)
            count = len(known)
            self._counts[topic] = (count, now + 1.0)
        return count

    async def _room(self, size: int) -> None:
        while self._in_flight and self._in_flight + size > _IN_FLIGHT:
            self._freed.clear()
            await self._freed.wait()

    def _acked(self, future: Future[Position], topic: str, size: int, ack: Future[Any]) -> None:
        self._in_flight -= size
        self._freed.set()
        error = TransportError("cancelled") if ack.cancelled() else ack.exception()
        if error is not None:
            self._broken = True
            if not future.done():
                future.set_exception(translate(error, f"send to {topic}"))
        elif not future.done():
            done = ack.result()
            future.set_result(Position(done.topic, done.partition, done.offset))

    async def _connect(self) -> None:
        settings = self._settings
        self._kafka = kafka = AIOKafkaProducer(
            **settings.client(self._client_id),
            enable_idempotence=True,
            acks="all",
            max_batch_size=_BATCH,
            max_request_size=settings.max_record_bytes,
            linger_ms=0,
            compression_type=None,  # it would run on the event loop
            value_serializer=lambda value: None if value is _NOTHING else value,
        )
        try:
            await lifecycle.connect(kafka.start, settings.bootstrap, settings.connect_timeout)
        except BaseException:
            await self._stop()
            raise
        self._broken = False

    async def _renew(self) -> None:
        """Begin anew, with sequence numbers from 0: the old ones have a gap, the broker refuses."""
        _logger.warning("a batch failed; going on with a new producer")
        await self._stop()
        await self._connect()

    async def _stop(self) -> None:
        kafka, limit = self._kafka, self._settings.close_timeout
        try:
            await asyncio.wait_for(kafka.flush(), limit)
        except TimeoutError:
            _logger.warning("not all records were acked within %g s; giving up on them", limit)
            # Otherwise stop() would wait for them, and an idempotent batch never expires.
            late = KafkaTimeoutError(f"not acked within {limit:g} s of closing")
            kafka._message_accumulator.fail_all(late)
        await lifecycle.stop(kafka.stop(), kafka.client, limit)


def _partition(record: Outgoing, count: int) -> int | None:
    """Return where it goes among `count` partitions, None for anywhere. Raises TopicError."""
    if record.partition is None:
        return None if record.key is None else partition_for(record.key, count)
    if not 0 <= record.partition < count:
        raise TopicError(
            f"{record.topic} has {count} partitions, there is no {record.partition}; was the"
            " plan built for another topic?"
        )
    return record.partition


def _size(record: Outgoing) -> int:
    return len(record.key or b"") + len(record.value or b"")


async def _all(acks: Sequence[Future[Position]]) -> None:
    await asyncio.gather(*acks)
