"""Fan-in through a topic: the rows of all parts of a stage meet here, matched by their origin.

    topic        10-13 of part 0 · 10-13 of part 1 · 14-17 of part 1 · 10-13 of part 0 again …
    held         10-13 {0}         → complete, on     14-17 {1}          done: dropped

What is held is memory: a record is settled when the answer to all its rows is acked, so whoever
takes over reads it again. The rows that are done stand in the commit's note, because the records
of their other parts may lie behind the commit. A row whose parts do not come has a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from streaminfer.metrics import StageMetrics
from streaminfer.plan import StagePlan
from streaminfer.runtime.join import Join, Joined, Piece
from streaminfer.runtime.spans import Spans
from streaminfer.runtime.steps import Acked, Item, Plain, Result, Settled
from streaminfer.transport import Position, TopicPartition
from streaminfer.wire import Envelope

__all__ = ["Gather", "Patience"]

NOTE = 4000  # bytes of a note's spans: Kafka takes 4096 (offset.metadata.max.bytes)
LONGEST = 10  # deadlines that a part may be busy with other partitions alone
AGAIN = 1.0  # seconds until an overdue row whose parts still come is looked at again


@dataclass(frozen=True)
class Patience:
    """How long a row waits for its parts, and how many of them will do.

    `strict`: from its first part on, whatever the others do (an ensemble that must answer in time).
    Otherwise a part that is slow but at work is waited for: the deadline counts while nothing comes
    from it, or once it has gone past the row.
    """

    deadline: float = 30.0  # seconds
    quorum: int | None = None  # None: all
    strict: bool = False


@dataclass(slots=True)
class _Arrival:
    """A message of the topic, and how many of its rows are not yet answered."""

    positions: tuple[Position, ...]
    left: int


@dataclass(slots=True)
class _Row:
    """A row that waits for parts."""

    pieces: list[Piece | None]
    born: float
    holders: list[_Arrival] = field(default_factory=list)


@dataclass(slots=True)
class _Lane:
    """One partition of the topic, which is one of the input's."""

    done: Spans
    acked: Spans
    seen: list[int]  # highest offset that came from each part
    heard: list[float]  # when
    rows: dict[int, _Row] = field(default_factory=dict)


class Gather(Plain):
    """Joins the parts of one stage, one row at a time, for the stage's gather program."""

    def __init__(
        self,
        stage: StagePlan,
        patience: Patience,
        metrics: StageMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._join = Join(stage, patience.quorum)
        self._index = {name: k for k, name in enumerate(self._join.sources)}
        self._patience, self._metrics, self._clock = patience, metrics, clock
        self._lanes: dict[TopicPartition, _Lane] = {}
        self._heard = [clock()] * len(self._index)  # when each part last sent anything
        self._looked = 0.0
        metrics.start_gather(self._join.sources)

    async def assign(self, partitions: Mapping[TopicPartition, str]) -> None:
        """Begin with the rows that the last owner noted as done."""
        for tp, note in partitions.items():
            parts = len(self._index)
            done, acked = Spans.unpack(note), Spans.unpack(note)
            self._lanes[tp] = _Lane(done, acked, [-1] * parts, [self._clock()] * parts)
        self._heard = [self._clock()] * len(self._index)

    async def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop what is held: the next owner reads it again."""
        for tp in partitions:
            self._lanes.pop(tp, None)
        self._measure()

    async def __call__(self, items: Sequence[Item]) -> Result:
        """Hold what is incomplete; hand on the rows whose last part came."""
        settled: list[Settled] = []
        complete: dict[TopicPartition, list[int]] = {}
        for item in items:
            tp, envelope = item.positions[0].tp, item.envelope
            lane = self._lanes.get(tp)
            if lane is None or envelope is None:  # revoked: the next owner reads it again
                continue
            part = self._index.get(envelope.sender)
            if part is None:  # of no part of this stage: nobody waits for it
                self._metrics.errors["schema"].inc(len(envelope.samples))
                settled += map(Settled, item.positions)
                continue
            arrival = _Arrival(item.positions, len(envelope.samples))
            complete.setdefault(tp, []).extend(self._hold(lane, part, envelope, arrival))
            if not arrival.left:  # all of it came before
                settled += map(Settled, item.positions)
        return self._release(complete, settled, "")

    def due(self) -> float | None:
        """Seconds until the oldest row is overdue."""
        oldest = [next(iter(lane.rows.values())).born for lane in self._lanes.values() if lane.rows]
        if not oldest:
            return None
        patience = self._patience
        due = min(oldest) + patience.deadline
        if not patience.strict:  # what is overdue may stay
            due = max(due, self._looked + min(AGAIN, patience.deadline))
        return max(0.0, due - self._clock())

    async def tick(self) -> Result:
        """Speak for the rows whose parts did not come in time."""
        self._looked = now = self._clock()
        overdue: dict[TopicPartition, list[int]] = {}
        for tp, lane in self._lanes.items():
            gone = []
            for offset, row in lane.rows.items():  # the oldest first
                if now - row.born < self._patience.deadline:
                    break
                if self._patience.strict or self._is_lost(lane, offset, row, now):
                    gone.append(offset)
            if gone:
                overdue[tp] = gone
                self._count_missing([lane.rows[offset] for offset in gone])
        return self._release(overdue, [], f"within {self._patience.deadline:g} s")

    def _is_lost(self, lane: _Lane, offset: int, row: _Row, now: float) -> bool:
        """Tell whether no missing part will come: each is past the row, or silent."""
        deadline = self._patience.deadline
        return all(
            lane.seen[k] > offset
            or now - self._heard[k] >= deadline
            or now - max(lane.heard[k], row.born) >= LONGEST * deadline
            for k, piece in enumerate(row.pieces)
            if piece is None
        )

    def _hold(self, lane: _Lane, part: int, envelope: Envelope, arrival: _Arrival) -> list[int]:
        """Put an envelope's rows beside those of the other parts; return the complete ones."""
        now = self._clock()
        self._heard[part] = lane.heard[part] = now
        lane.seen[part] = max(lane.seen[part], envelope.last)
        complete = []
        for at, sample in enumerate(envelope.samples):
            if sample.offset in lane.done:
                arrival.left -= 1
                continue
            row = lane.rows.get(sample.offset)
            if row is None:
                row = lane.rows[sample.offset] = _Row([None] * len(self._index), now)
            if row.pieces[part] is not None:  # the same again: a part was started anew
                arrival.left -= 1
                continue
            row.pieces[part] = Piece(envelope, at)
            row.holders.append(arrival)
            if None not in row.pieces or (sample.failure and self._is_hopeless(row)):
                complete.append(sample.offset)
        return complete

    def _is_hopeless(self, row: _Row) -> bool:
        """Tell whether too many parts have failed: what the others would say changes nothing."""
        failed = sum(piece is not None and piece.sample.failure is not None for piece in row.pieces)
        return len(row.pieces) - failed < self._join.quorum

    def _release(
        self, rows: Mapping[TopicPartition, Sequence[int]], settled: list[Settled], missing: str
    ) -> Result:
        taken: list[tuple[TopicPartition, _Lane, _Row]] = []
        now = self._clock()
        for tp, offsets in rows.items():
            lane = self._lanes[tp]
            for offset in offsets:
                row = lane.rows.pop(offset)
                sample = _first(row).sample
                lane.done.add(sample.start, offset)
                self._metrics.gather_wait.observe(now - row.born)
                taken.append((tp, lane, row))
        joined = self._join([row.pieces for _, _, row in taken], missing) if taken else Joined()
        self._metrics.partial.inc(joined.partial)
        self._measure()
        return Result(
            joined.outputs, joined.outcomes, settled=tuple(settled), acked=lambda: self._ack(taken)
        )

    def _ack(self, taken: Sequence[tuple[TopicPartition, _Lane, _Row]]) -> Acked:
        """Settle the records whose rows are all answered; note the rows."""
        settled: list[Settled] = []
        lanes: dict[TopicPartition, _Lane] = {}
        for tp, lane, row in taken:
            sample = _first(row).sample
            lane.acked.add(sample.start, sample.offset)
            lanes[tp] = lane
            for holder in row.holders:
                holder.left -= 1
                if not holder.left:
                    settled += map(Settled, holder.positions)
        notes = {
            tp: lane.acked.pack(NOTE) for tp, lane in lanes.items() if self._lanes.get(tp) is lane
        }
        return Acked(settled, notes)

    def _count_missing(self, rows: Sequence[_Row]) -> None:
        for k, name in enumerate(self._join.sources):
            self._metrics.missing[name].inc(sum(row.pieces[k] is None for row in rows))

    def _measure(self) -> None:
        self._metrics.gather_held.set(sum(len(lane.rows) for lane in self._lanes.values()))


def _first(row: _Row) -> Piece:
    return next(piece for piece in row.pieces if piece is not None)
