"""What piles up inside a pipeline: unread bytes of its inner topics, samples between in and out.

It reads the topics as any consumer would, keeps the size of each record until its reader has
committed it, and so works alike on both carriers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from streaminfer.runtime.sink import watermark
from streaminfer.topology import Topology
from streaminfer.transport import Admin, Consumer, TopicPartition, Transport

__all__ = ["Peaks", "gauge"]

EVERY = 0.1  # seconds


@dataclass
class Peaks:
    """The most that was there at once."""

    nbytes: int = 0  # unread, over all inner topics and the sink's
    samples: int = 0  # ingested and not yet answered, over all partitions


@asynccontextmanager
async def gauge(transport: Transport, topology: Topology, partitions: int) -> AsyncIterator[Peaks]:
    """Measure until the end of the block."""
    peaks = Peaks()
    topics = [worker.source for worker in topology.workers[1:]]
    async with transport.admin() as admin, transport.consumer(topics, None) as consumer:
        watching = asyncio.create_task(
            _Gauge(admin, consumer, topology, partitions).watch(peaks), name="gauge"
        )
        try:
            yield peaks
        finally:
            watching.cancel()
            found = await asyncio.gather(watching, return_exceptions=True)
    if isinstance(found[0], Exception):
        raise found[0]


class _Gauge:
    def __init__(
        self, admin: Admin, consumer: Consumer, topology: Topology, partitions: int
    ) -> None:
        self._admin, self._consumer = admin, consumer
        self._workers, self._partitions = topology.workers, range(partitions)
        self._unread: dict[TopicPartition, deque[tuple[int, int]]] = {}

    async def watch(self, peaks: Peaks) -> None:
        while True:
            for record in await self._consumer.poll(EVERY):
                tp = record.position.tp
                self._unread.setdefault(tp, deque()).append((record.offset, record.nbytes))
            nbytes, samples = await self._unread_bytes(), await self._in_flight()
            peaks.nbytes, peaks.samples = max(peaks.nbytes, nbytes), max(peaks.samples, samples)

    async def _unread_bytes(self) -> int:
        for worker in self._workers[1:]:
            tps = [TopicPartition(worker.source, p) for p in self._partitions]
            for tp, commit in (await self._admin.committed(worker.group, tps)).items():
                queue = self._unread.get(tp, deque())
                while commit and queue and queue[0][0] < commit.offset:
                    queue.popleft()
        return sum(size for queue in self._unread.values() for _, size in queue)

    async def _in_flight(self) -> int:
        """Ingest's commits minus the sink's watermarks: a lower bound."""
        first, sink = self._workers[0], self._workers[-1]
        taken = [TopicPartition(first.source, p) for p in self._partitions]
        ended = [TopicPartition(sink.source, p) for p in self._partitions]
        ingested = await self._admin.committed(first.group, taken)
        answered = await self._admin.committed(sink.group, ended)
        return sum(
            (commit.offset if (commit := ingested.get(a)) else 0)
            - (watermark(mark.metadata) if (mark := answered.get(b)) else 0)
            for a, b in zip(taken, ended, strict=True)
        )
