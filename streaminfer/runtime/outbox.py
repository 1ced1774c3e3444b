"""Publish, ack: envelopes become records, records become acked positions.

At least once: what a result settles is committed after everything it sends is acked. (The
transaction that makes the sink exactly-once will be a second class with the same `publish`.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from streaminfer.metrics import StageMetrics
from streaminfer.runtime.spread import Spread
from streaminfer.runtime.steps import Result
from streaminfer.topology import Routes
from streaminfer.transport import Outgoing, Producer
from streaminfer.wire import Envelope, records

__all__ = ["Outbox"]


class Outbox:
    """Where a worker's results leave: outputs by their routes, outcomes to who answers for them.

    A route that balances chooses the partitions; others keep the origin's, so that order can be
    restored and parts can meet.
    """

    def __init__(
        self,
        producer: Producer,
        metrics: StageMetrics,
        routes: Routes,
        *,
        max_record_bytes: int = 900_000,
        partitions: int = 1,
    ) -> None:
        self._producer, self._metrics = producer, metrics
        self._routes, self._max_bytes = routes, max_record_bytes
        self._spreads = {
            route.topic: Spread(partitions) for route in routes.outputs if route.balance
        }
        self._sender = asyncio.Lock()  # one sender at a time keeps the order within a partition

    async def publish(self, result: Result) -> None:
        """Send everything a result has and wait until it is acked.

        Raises TransportError when it was not; then nothing of the result may be settled.
        """
        began = time.perf_counter()
        outgoing = [*result.answers]
        for envelope in result.outputs:
            for topic, tensors, _ in self._routes.outputs:
                kept = envelope.only(tensors) if tensors else envelope.tensors
                sent = replace(envelope, tensors=kept, sender=self._routes.sender)
                outgoing += self._records(topic, sent, envelope)
        for envelope in result.outcomes:
            sent = replace(envelope, sender=self._routes.voice)
            outgoing += self._records(self._routes.outcomes, sent, envelope)
        async with self._sender:
            acks = await self._producer.send_many(outgoing)
        await acks
        for spread in self._spreads.values():
            spread.acked(result.outputs)
        self._metrics.busy["produce"].inc(time.perf_counter() - began)
        self._count(outgoing)

    def _records(self, topic: str, envelope: Envelope, of: Envelope) -> list[Outgoing]:
        """Encode an envelope made `of` another; its records go to one partition, in order."""
        sent = records(envelope, self._max_bytes)
        to = envelope.partition
        if spread := self._spreads.get(topic):
            to = spread.place(of, sum(len(value) for _, value in sent))
        return [Outgoing(topic, value, None, to, headers) for headers, value in sent]

    def _count(self, outgoing: Sequence[Outgoing]) -> None:
        metrics = self._metrics
        metrics.produced.inc(len(outgoing))
        sizes = [len(record.value or b"") for record in outgoing]
        metrics.sent_bytes.inc(sum(sizes))
        metrics.record_size["out"].observe_all(sizes)
