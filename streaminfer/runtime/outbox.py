"""Publish, ack: envelopes become records, records become acked positions.

At least once: what a result settles is committed after everything it sends is acked. (The
transaction that makes the sink exactly-once will be a second class with the same `publish`.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from streaminfer.metrics import StageMetrics
from streaminfer.runtime.steps import Result
from streaminfer.transport import Outgoing, Producer
from streaminfer.wire import Envelope, records

__all__ = ["Outbox"]


class Outbox:
    """Where a worker's results leave: outputs to the next stage, outcomes to the sink."""

    def __init__(
        self,
        producer: Producer,
        metrics: StageMetrics,
        *,
        target: str,
        sink: str,
        max_record_bytes: int = 900_000,
    ) -> None:
        self._producer, self._metrics = producer, metrics
        self._target, self._sink, self._max_bytes = target, sink, max_record_bytes
        self._sender = asyncio.Lock()  # one sender at a time keeps the order within a partition

    async def publish(self, result: Result) -> None:
        """Send everything a result has and wait until it is acked.

        Raises TransportError when it was not; then nothing of the result may be settled.
        """
        began = time.perf_counter()
        outgoing = [*result.answers]
        for topic, envelopes in ((self._target, result.outputs), (self._sink, result.outcomes)):
            for envelope in envelopes:
                outgoing += self._records(topic, envelope)
        async with self._sender:
            acks = await self._producer.send_many(outgoing)
        await acks
        self._metrics.busy["produce"].inc(time.perf_counter() - began)
        self._count(outgoing)
        if result.acked is not None:
            result.acked()

    def _records(self, topic: str, envelope: Envelope) -> list[Outgoing]:
        """Encode an envelope; its records go to the origin's partition, in order."""
        return [
            Outgoing(topic, value, None, envelope.partition, headers)
            for headers, value in records(envelope, self._max_bytes)
        ]

    def _count(self, outgoing: Sequence[Outgoing]) -> None:
        metrics = self._metrics
        metrics.produced.inc(len(outgoing))
        sizes = [len(record.value or b"") for record in outgoing]
        metrics.sent_bytes.inc(sum(sizes))
        metrics.record_size["out"].observe_all(sizes)
