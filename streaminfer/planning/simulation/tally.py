"""What a simulation knows of its samples: micro-batches, partitions, and what it counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from streaminfer.planning.simulation.events import Clock, Gauge

__all__ = ["Batch", "Lane", "Tally"]


class Batch:
    """A micro-batch: samples of one partition, formed once; or those of its rows that are left."""

    __slots__ = ("number", "partition", "parts", "rows", "sent", "whole")

    def __init__(self, partition: int, number: int, sent: Sequence[float]) -> None:
        self.partition, self.number, self.sent = partition, number, sent
        self.parts: dict[object, int] = {}  # what a gather has of it
        self.rows: Sequence[int] | None = None  # which of the micro-batch; None: all
        self.whole = len(sent)  # samples of the micro-batch

    def some(self, at: Sequence[int]) -> Batch:
        """Return the rows at these places of this one."""
        found = Batch(self.partition, self.number, [self.sent[k] for k in at])
        found.rows = at if self.rows is None else [self.rows[k] for k in at]
        found.whole = self.whole
        return found


class Lane:
    """One input partition: its log, the backlog of who reads it, its window."""

    __slots__ = (
        "answered", "backlog", "blocked", "closed", "committed", "count", "entered", "held", "log",
        "next", "number", "pieces", "row", "seen", "since",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.log: deque[float] = deque()  # arrival times, not polled
        self.backlog: deque[float] = deque()  # polled, not in a micro-batch
        self.since: deque[float] = deque()  # when each of the backlog was polled
        self.count = 0  # micro-batches formed
        self.entered = self.answered = self.committed = self.seen = 0
        self.closed = self.blocked = False
        self.next = 0  # the micro-batch whose turn it is at the sink
        self.row = 0  # of it, where its rows came apart
        self.held: dict[int, Batch] = {}
        self.pieces: dict[int, tuple[int, dict[int, float]]] = {}  # size; when sent, by row

    def in_turn(self, batch: Batch) -> list[Batch]:
        """Hold it; return all that nothing before it is missing of."""
        if batch.rows is None:
            self.held[batch.number] = batch
        else:
            _, found = self.pieces.setdefault(batch.number, (batch.whole, {}))
            found |= zip(batch.rows, batch.sent, strict=True)
        turns: list[Batch] = []
        while True:
            if (turn := self.held.pop(self.next, None)) is not None:
                self.next += 1
                turns.append(turn)
            elif (pieces := self.pieces.get(self.next)) is not None:
                whole, rows = pieces
                sent = []
                while self.row in rows:
                    sent.append(rows.pop(self.row))
                    self.row += 1
                if sent:
                    turns.append(Batch(self.number, self.next, sent))
                if self.row < whole:
                    return turns
                del self.pieces[self.next]
                self.next, self.row = self.next + 1, 0
            else:
                return turns


class Tally:
    """Answers, queues and busy devices; nothing before `warm` counts."""

    def __init__(self, clock: Clock, stages: int, warm: float) -> None:
        self._clock, self._warm = clock, warm
        self.lanes: list[Lane] = []
        self.busy = [0.0] * stages  # seconds, over all replicas
        self.calls = [0] * stages  # of devices
        self.rows = [0] * stages  # samples in them
        self.queues = [Gauge(clock, warm) for _ in range(stages)]  # samples
        self.inflight = Gauge(clock, warm)  # samples between arrival and answer
        self.sent: list[Sequence[float]] = []  # arrival times, a list for each answered batch
        self.done: list[tuple[float, int]] = []  # when it was answered, and its samples
        self.partial = self.failed = 0  # samples of gathers that did not wait for all
        self.again: Callable[[int], None] | None = None  # a closed loop's next samples

    def enter(self, stage: int, samples: float) -> None:
        """Count samples that wait for a stage from now on."""
        self.queues[stage].add(samples)

    @property
    def counts(self) -> bool:
        """Whether what happens now counts."""
        return self._clock.now >= self._warm

    def leave(self, stage: int, samples: int, *, computes: bool = True) -> None:
        """Count samples that a stage begins to compute, or that fail before it."""
        self.queues[stage].add(-samples)
        if computes and self.counts:
            self.calls[stage] += 1
            self.rows[stage] += samples

    def computed(self, stage: int, began: float) -> None:
        """Count what a device did since `began`."""
        self.busy[stage] += max(0.0, self._clock.now - max(began, self._warm))

    def answered(self, batches: Sequence[Batch]) -> None:
        """Count answers that the client has."""
        now, total = self._clock.now, 0
        for batch in batches:
            total += len(batch.sent)
            if self.counts:
                self.sent.append(batch.sent)
                self.done.append((now, len(batch.sent)))
        self.inflight.add(-total)
        if self.again:
            self.again(total)
