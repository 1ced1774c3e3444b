"""The sink's step: put the samples of each input partition in order, answer each exactly once.

    watermark 12          arrives [15,17] [12,12] [10,11] [13,14]
    every sample before it is answered   held    go      again   go, and then [15,17] → 18

An interval that begins at or below the watermark goes out and moves the watermark behind it; one
that ends below it came again; what begins above it is held until the gap is filled.
"""

from __future__ import annotations

import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streaminfer.metrics import Metrics
from streaminfer.plan import Plan
from streaminfer.runtime.answer import Answers, Form
from streaminfer.runtime.steps import Acked, Item, Plain, Result, Settled
from streaminfer.transport import Outgoing, TopicPartition
from streaminfer.wire import Envelope

__all__ = ["Order", "watermark"]


def watermark(note: str) -> int:
    """Read the watermark out of the sink's commit metadata ("" = nothing answered yet)."""
    return int(json.loads(note)["watermark"]) if note else 0


class _Arrival:
    """An item of the sink's topic, and which of its samples is next: they are in order."""

    __slots__ = ("answers", "positions", "row", "samples", "since")

    def __init__(self, item: Item, envelope: Envelope, form: Form, now: float) -> None:
        self.samples, self.positions, self.since = envelope.samples, item.positions, now
        self.answers = Answers(form, envelope)
        self.row = 0


class _Waiting(NamedTuple):
    start: int  # of the arrival's next sample
    arrived: int  # makes every entry of the heap different
    arrival: _Arrival


@dataclass
class _Lane:
    """One input partition at the sink."""

    watermark: int
    heap: list[_Waiting] = field(default_factory=list)

    def held(self) -> int:
        """Count the samples that wait."""
        return sum(len(w.arrival.samples) - w.arrival.row for w in self.heap)


@dataclass
class _Released:
    """What one call lets go."""

    answers: list[Outgoing] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)  # the input records' times, Unix ms
    waits: list[float] = field(default_factory=list)  # seconds between arrival and turn
    statuses: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0


class Order(Plain):
    """Restores order per input partition, drops what comes again, writes the answers."""

    def __init__(
        self,
        plan: Plan,
        output: str,
        metrics: Metrics,
        *,
        max_bytes: int = 1_000_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pipeline, self._metrics, self._clock = plan.pipeline, metrics, clock
        self._form = Form(plan, output, max_bytes)
        self._lanes: dict[TopicPartition, _Lane] = {}
        self._count = 0
        metrics.start_sink()
        metrics.stage("sink")

    async def assign(self, partitions: Mapping[TopicPartition, str]) -> None:
        """Go on from the watermark in the note of the last commit."""
        for tp, note in partitions.items():
            self._lanes[tp] = _Lane(watermark(note))

    async def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop what is held: the next owner reads it again."""
        for tp in partitions:
            self._lanes.pop(tp, None)

    async def __call__(self, items: Sequence[Item]) -> Result:
        """Answer what is in turn; hold the rest."""
        now = self._clock()
        touched = set()
        for item in items:
            tp = item.positions[0].tp
            envelope = item.envelope
            lane = self._lanes.get(tp)
            if envelope is None or lane is None:
                continue
            touched.add(tp)
            self._count += 1
            arrival = _Arrival(item, envelope, self._form, now)
            start = envelope.samples[0].start
            heapq.heappush(lane.heap, _Waiting(start, self._count, arrival))
        released = _Released()
        for tp in touched:
            self._release(self._lanes[tp], now, released)
        self._report(released)
        notes = {tp: json.dumps({"watermark": self._lanes[tp].watermark}) for tp in touched}
        return Result(
            answers=tuple(released.answers),
            settled=tuple(released.settled),
            notes=notes,
            acked=lambda: self._observe(released.sent),
        )

    @staticmethod
    def _release(lane: _Lane, now: float, released: _Released) -> None:
        """Let go what is in turn: of the arrival whose next sample is the earliest, all that is."""
        while lane.heap and lane.heap[0].start <= lane.watermark:
            _, arrived, arrival = heapq.heappop(lane.heap)
            for sample in arrival.samples[arrival.row :]:
                if sample.start > lane.watermark:
                    heapq.heappush(lane.heap, _Waiting(sample.start, arrived, arrival))
                    break
                if sample.offset < lane.watermark:
                    released.duplicates += 1
                else:
                    lane.watermark = sample.offset + 1
                    status, answer = arrival.answers.write(arrival.row, now)
                    released.answers.append(answer)
                    released.statuses[status] += 1
                    released.sent.append(sample.timestamp_ms)
                    released.waits.append(now - arrival.since)
                arrival.row += 1
            else:
                released.settled += [Settled(position) for position in arrival.positions]

    def _report(self, released: _Released) -> None:
        samples = self._metrics.stage("sink").samples
        for status, count in released.statuses.items():
            samples[status if status in samples else "error"].inc(count)
        held = sum(lane.held() for lane in self._lanes.values())
        self._metrics.held.labels(self._pipeline).set(held)
        self._metrics.duplicates.labels(self._pipeline).inc(released.duplicates)
        self._metrics.order_wait.labels(self._pipeline).observe_all(released.waits)

    def _observe(self, sent: Sequence[int]) -> Acked:
        now_ms = self._clock() * 1000
        self._metrics.clock_skew.labels(self._pipeline).inc(sum(t > now_ms for t in sent))
        waits = [max(0.0, now_ms - t) / 1000 for t in sent]
        self._metrics.e2e.labels(self._pipeline).observe_all(waits)
        return Acked()
