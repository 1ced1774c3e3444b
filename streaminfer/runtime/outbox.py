"""Publish, ack: envelopes become records, records become acked positions.

At least once: what a result settles is committed after everything it sends is acked. (The
transaction that makes the sink exactly-once will be a second class with the same `publish`.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from streaminfer.metrics import StageMetrics
from streaminfer.runtime.spread import Spread
from streaminfer.runtime.steps import Result
from streaminfer.transport import Outgoing, Position, Producer
from streaminfer.wire import Envelope, records

__all__ = ["Outbox"]


class Outbox:
    """Where a worker's results leave: outputs to the next stage, outcomes to the sink.

    `spread` chooses the partitions of the outputs; None: they keep the origin's. What goes to the
    sink always keeps it: order is restored there by partition.
    """

    def __init__(
        self,
        producer: Producer,
        metrics: StageMetrics,
        *,
        target: str,
        sink: str,
        max_record_bytes: int = 900_000,
        spread: Spread | None = None,
    ) -> None:
        self._producer, self._metrics = producer, metrics
        self._target, self._sink, self._max_bytes = target, sink, max_record_bytes
        self._spread = spread
        self._sender = asyncio.Lock()  # one sender at a time keeps the order within a partition

    async def publish(self, result: Result) -> None:
        """Send everything a result has and wait until it is acked.

        Raises TransportError when it was not; then nothing of the result may be settled.
        """
        began = time.perf_counter()
        outgoing = [*result.answers]
        for envelope in result.outputs:
            outgoing += self._records(self._target, envelope, self._spread)
        for envelope in result.outcomes:
            outgoing += self._records(self._sink, envelope)
        acks: list[asyncio.Future[Position]] = []
        async with self._sender:
            acks += [await self._producer.send(record) for record in outgoing]
        await asyncio.gather(*acks)
        if self._spread is not None:
            self._spread.acked(result.outputs)
        self._metrics.busy["produce"].inc(time.perf_counter() - began)
        self._count(outgoing)
        if result.acked is not None:
            result.acked()

    def _records(
        self, topic: str, envelope: Envelope, spread: Spread | None = None
    ) -> list[Outgoing]:
        """Encode an envelope; its records go to one partition, in order."""
        sent = records(envelope, self._max_bytes)
        to = envelope.partition
        if spread is not None:
            to = spread.place(envelope, sum(len(value) for _, value in sent))
        return [Outgoing(topic, value, None, to, headers) for headers, value in sent]

    def _count(self, outgoing: Sequence[Outgoing]) -> None:
        metrics = self._metrics
        metrics.produced.inc(len(outgoing))
        sizes = [len(record.value or b"") for record in outgoing]
        metrics.sent_bytes.inc(sum(sizes))
        for size in sizes:
            metrics.record_size["out"].observe(size)
