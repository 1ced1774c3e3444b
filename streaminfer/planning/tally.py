"""What a simulation knows of its samples: micro-batches, partitions, and what it counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from streaminfer.planning.events import Clock, Gauge

__all__ = ["Batch", "Lane", "Tally"]


class Batch:
    """A micro-batch: samples of one partition, formed once."""

    __slots__ = ("number", "partition", "parts", "sent")

    def __init__(self, partition: int, number: int, sent: Sequence[float]) -> None:
        self.partition, self.number, self.sent = partition, number, sent
        self.parts: dict[object, int] = {}  # what a gather has of it


class Lane:
    """One input partition: its log, the backlog of who reads it, its window."""

    __slots__ = (
        "answered", "backlog", "blocked", "closed", "committed", "count", "entered", "held", "log",
        "next", "number", "seen", "since",
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
        self.held: dict[int, Batch] = {}


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
        self.again: Callable[[int], None] | None = None  # a closed loop's next samples

    def enter(self, stage: int, samples: float) -> None:
        """Count samples that wait for a stage from now on."""
        self.queues[stage].add(samples)

    def leave(self, stage: int, samples: int) -> None:
        """Count samples that a stage begins to compute."""
        self.queues[stage].add(-samples)
        if self._clock.now >= self._warm:
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
            if now >= self._warm:
                self.sent.append(batch.sent)
                self.done.append((now, len(batch.sent)))
        self.inflight.add(-total)
        if self.again:
            self.again(total)
