"""From records to items: what the worker's loop hands to its step.

Raw        input records        → micro-batches of one partition, full or old enough
Envelopes  records of a stage   → chunks put together, envelopes decoded and judged
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

from streaminfer.errors import ForeignDigest, WireError
from streaminfer.metrics import StageMetrics
from streaminfer.runtime.flow import Window
from streaminfer.runtime.steps import Item
from streaminfer.spec import BatchSpec
from streaminfer.transport import Position, Record, TopicPartition
from streaminfer.wire import (
    MAX_SAMPLES,
    Assembler,
    BrokenMessage,
    Envelope,
    Failure,
    Origin,
    Patience,
    Sample,
    decode,
)

__all__ = ["Envelopes", "Intake", "Raw"]

log = logging.getLogger(__name__)


def _each(origin: Origin) -> Iterator[tuple[int, int]]:
    """Yield each offset that a message spoke for, as an interval of one.

    Some may be no samples (tombstones lie among them), but each that is has its own answer. Where
    there are more than a message has samples, the first of them are one: a gap, most likely.
    """
    intervals = list(origin.intervals())
    most = max(1, MAX_SAMPLES // len(intervals))
    for first, last in intervals:
        begin = max(first, last - most + 1)
        yield first, begin
        for offset in range(begin + 1, last + 1):
            yield offset, offset


class Intake(Protocol):
    """What stands between the poll and the step."""

    def add(self, records: Sequence[Record]) -> None:
        """Take what a poll returned."""

    def take(self) -> Iterator[Item]:
        """Hand out what is ready, oldest first."""

    def settled(self) -> Sequence[Position]:
        """Hand out positions of records that no item will carry (repeats, orphans)."""

    def due(self) -> float | None:
        """Seconds until something becomes ready by itself; None: nothing will."""

    def blocked(self) -> frozenset[TopicPartition]:
        """Partitions that are not to be polled now."""

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop what is held of these."""


class Raw:
    """Forms micro-batches. They wait for company at most `batch.wait`, and for the window."""

    def __init__(
        self, batch: BatchSpec, window: Window, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._batch, self._window, self._clock = batch, window, clock
        self._backlog: dict[TopicPartition, deque[tuple[Record, float]]] = {}

    def add(self, records: Sequence[Record]) -> None:
        """Queue records by partition."""
        now = self._clock()
        for record in records:
            self._backlog.setdefault(record.tp, deque()).append((record, now))

    def take(self) -> Iterator[Item]:
        """Hand out full micro-batches, and parts whose oldest record has waited enough."""
        now = self._clock()
        for tp in list(self._backlog):
            # a revocation may come between two items: look again each time
            while (queue := self._backlog.get(tp)) and (room := self._window.room(tp)):
                ready = len(queue) >= self._batch.max or now - queue[0][1] >= self._batch.wait
                if not ready:
                    break
                size = min(len(queue), self._batch.max, room)
                records = tuple(queue.popleft()[0] for _ in range(size))
                yield Item(
                    tuple(r.position for r in records),
                    records=records,
                    nbytes=sum(r.nbytes for r in records),
                    since=records[0].timestamp_ms / 1000,
                )

    def settled(self) -> Sequence[Position]:
        """Every raw record is in an item."""
        return ()

    def due(self) -> float | None:
        """Seconds until a part has waited enough; those that the window holds don't count."""
        waits = [
            queue[0][1] + self._batch.wait - self._clock()
            for tp, queue in self._backlog.items()
            if queue and self._window.room(tp)
        ]
        return max(0.0, min(waits)) if waits else None

    def blocked(self) -> frozenset[TopicPartition]:
        """Partitions that the window holds, or that have enough for the next batches."""
        most = 2 * self._batch.max
        return self._window.closed() | {tp for tp, q in self._backlog.items() if len(q) >= most}

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop the backlog: the next owner reads it again."""
        for tp in partitions:
            self._backlog.pop(tp, None)


class Envelopes:
    """Puts chunks together and decodes; what is broken becomes an outcome for its samples.

    `digest` None takes envelopes of any plan (the sink belongs to the pipeline, not to a plan).
    `patience` is for an edge that balances: how long a message waits for its last chunks.
    """

    def __init__(
        self,
        stage: str,
        digest: str | None,
        metrics: StageMetrics,
        *,
        max_bytes: int,
        patience: Patience | None = None,
    ) -> None:
        self._stage, self._digest, self._metrics = stage, digest, metrics
        self._max_bytes = max_bytes
        self._assembler: Assembler[Position] = Assembler(max_bytes, patience=patience)
        self._ready: deque[Item] = deque()
        self._settled: list[Position] = []

    def add(self, records: Sequence[Record]) -> None:
        """Decode what is whole; hold the chunks of what isn't."""
        began = time.perf_counter()
        for record in records:
            try:
                self._add(record)
            except BrokenMessage as error:
                self._broken(error)
        self._metrics.busy["decode"].inc(time.perf_counter() - began)

    def take(self) -> Iterator[Item]:
        """Hand out the envelopes that are whole."""
        while self._ready:
            yield self._ready.popleft()

    def settled(self) -> Sequence[Position]:
        """Hand out repeats, orphans and what nobody can make sense of."""
        found, self._settled = self._settled, []
        return found

    def due(self) -> float | None:
        """Nothing becomes ready by itself."""
        return None

    def blocked(self) -> frozenset[TopicPartition]:
        """Nothing is held back here: the budget does that."""
        return frozenset()

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop what is held of these."""
        gone = set(partitions)
        for tp in gone:
            self._assembler.forget(*tp)
        self._ready = deque(i for i in self._ready if i.positions[0].tp not in gone)
        self._settled = [p for p in self._settled if p.tp not in gone]

    def _add(self, record: Record) -> None:
        added = self._assembler.add(record.position, record.headers, record.value)
        message = added.message
        self._settled += added.settled
        for error in added.given_up:
            self._broken(error)
        if message is None:
            return
        try:
            envelope = decode(message.buffer, max_bytes=self._max_bytes)
            if self._digest is not None and envelope.digest != self._digest:
                raise ForeignDigest(
                    f"made under plan {envelope.digest[:8]}; this worker has {self._digest[:8]}"
                )
        except ForeignDigest as error:
            gone = {s.offset: self._failure(error.kind, str(error)) for s in envelope.samples}
            self._fail(envelope.outcomes(gone), message.positions)
        except WireError as error:
            raise BrokenMessage(str(error), message.positions, message.origin) from error
        else:
            since = record.timestamp_ms / 1000
            size = len(message.buffer)
            self._ready.append(Item(message.positions, envelope, nbytes=size, since=since))

    def _broken(self, error: BrokenMessage[Position]) -> None:
        """Speak for samples whose envelope cannot be read: only their offsets are known."""
        log.error("broken record at %s: %s", error.positions, error)
        self._metrics.errors[error.kind].inc()
        if error.origin is None:  # not ours at all: nobody waits for it
            self._settled += error.positions
            return
        failure = self._failure(error.kind, f"its record on the way was damaged: {error}")
        samples = tuple(
            Sample(last, first, f"offset-{last}", None, 0, failure=failure)
            for first, last in _each(error.origin)
        )
        origin = error.origin
        envelope = Envelope(
            origin.partition, samples, self._digest or "0" * 64, origin.incarnation,
            part=origin.part, sender=origin.sender,
        )  # fmt: skip
        self._fail(envelope, error.positions)

    def _fail(self, outcome: Envelope, positions: tuple[Position, ...]) -> None:
        self._metrics.samples["error"].inc(len(outcome.samples))
        self._ready.append(Item(positions, outcome))

    def _failure(self, kind: str, text: str) -> Failure:
        return Failure("error", self._stage, kind, text[:1000])
