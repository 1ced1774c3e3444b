"""What bounds a worker: bytes in its memory, samples in the pipeline, records in its topics.

Budget   bytes received and not yet done with, per worker        (a full one stops receiving)
Window   samples ingested and not yet answered, per partition    (a full one stops ingest)
Trimmer  records behind the commit, per inner topic              (deleted but for `history`)
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol, TypeAlias

from streaminfer.transport import Admin, Commit, TopicPartition

__all__ = ["Budget", "Trimmer", "Watch", "Window", "WindowWatch"]


class Budget:
    """Bytes and samples that may be in hand at once. One receiver asks, many tasks give back.

    What is larger than the whole budget goes through when nothing else is in hand.
    """

    def __init__(self, nbytes: int, samples: int) -> None:
        self._nbytes, self._samples = nbytes, samples
        self.nbytes = self.samples = 0
        self._freed = asyncio.Event()

    def full(self) -> bool:
        """Whether the receiver has to wait."""
        return self.samples >= self._samples or self.nbytes >= self._nbytes

    def take(self, nbytes: int, samples: int) -> None:
        """Charge one call's input."""
        self.nbytes += nbytes
        self.samples += samples

    def give(self, nbytes: int, samples: int) -> None:
        """Return what a finished call was charged."""
        self.nbytes -= nbytes
        self.samples -= samples
        self._freed.set()

    async def wait(self, seconds: float) -> bool:
        """Wait until there is room, at most that long; say whether there is."""
        if self.full():
            self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), seconds)
            except TimeoutError:
                return False
        return not self.full()


class _Flight:
    """One input partition's samples between ingest and answer."""

    __slots__ = ("begin", "ends", "watermark")

    def __init__(self, begin: int, watermark: int) -> None:
        self.begin = begin  # where this owner began: what lies between watermark and here is unseen
        self.watermark = watermark
        self.ends: deque[int] = deque()  # offset behind each sample ingested by this owner

    @property
    def samples(self) -> int:
        return len(self.ends) + max(0, self.begin - self.watermark)


class Window:
    """Samples in flight per input partition: closes above `size`, opens again at half of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._flights: dict[TopicPartition, _Flight] = {}
        self._closed: set[TopicPartition] = set()

    def assign(self, tp: TopicPartition, begin: int, watermark: int) -> None:
        """Begin with a partition at the offset `begin`, answered up to `watermark`."""
        self._flights[tp] = _Flight(begin, watermark)
        self._judge(tp)

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop partitions that are somebody else's now."""
        for tp in partitions:
            self._flights.pop(tp, None)
            self._closed.discard(tp)

    def enter(self, tp: TopicPartition, end: int) -> None:
        """Note a sample that was ingested; its interval ends before `end`."""
        if flight := self._flights.get(tp):
            flight.ends.append(end)
            if flight.samples >= self.size:
                self._closed.add(tp)

    def answered(self, tp: TopicPartition, watermark: int) -> None:
        """Note how far the sink is; a reading below an earlier one is stale and ignored."""
        flight = self._flights.get(tp)
        if flight is None or watermark <= flight.watermark:
            return
        flight.watermark = watermark
        while flight.ends and flight.ends[0] <= watermark:
            flight.ends.popleft()
        self._judge(tp)

    def room(self, tp: TopicPartition) -> int:
        """How many samples may still enter (0 while the window is closed)."""
        flight = self._flights.get(tp)
        if flight is None or tp in self._closed:
            return 0
        return max(0, self.size - flight.samples)

    def closed(self) -> frozenset[TopicPartition]:
        """The partitions that have to wait."""
        return frozenset(self._closed)

    def inflight(self) -> int:
        """Samples in flight over all partitions held."""
        return sum(flight.samples for flight in self._flights.values())

    def near(self) -> frozenset[TopicPartition]:
        """The partitions whose watermark is worth reading: over a quarter of the window is used."""
        return frozenset(tp for tp, f in self._flights.items() if f.samples > self.size // 4)

    def _judge(self, tp: TopicPartition) -> None:
        samples = self._flights[tp].samples
        if samples >= self.size:
            self._closed.add(tp)
        elif samples <= self.size // 2:
            self._closed.discard(tp)


Begin: TypeAlias = Mapping[TopicPartition, Commit | None]


class Watch(Protocol):
    """What else a worker looks after while it runs: called every `every` seconds."""

    every: float  # seconds

    async def assign(self, partitions: Mapping[TopicPartition, Commit | None]) -> Begin:
        """Begin with these partitions (before their first record); say where."""

    async def look(self) -> None:
        """Look once. A TransportError is logged; the next look may work."""


class WindowWatch(Watch):
    """Keeps ingest's window in step with the sink's watermark, read from the sink's commits."""

    def __init__(
        self,
        admin: Admin,
        window: Window,
        *,
        group: str,
        topic: str,
        read: Callable[[str], int],
        write: Callable[[int], str],
        every: float = 0.05,
    ) -> None:
        self._admin, self._window, self._group, self._topic = admin, window, group, topic
        self._read, self._write, self.every = read, write, every

    async def assign(self, partitions: Mapping[TopicPartition, Commit | None]) -> Begin:
        """Open the window of each partition as far as the sink's watermark allows.

        A plan that begins anew, or lags behind another, goes on at the watermark: what is answered
        is not computed again, and what another plan left on its way is.
        """
        marks = await self._watermarks(partitions)
        begin = dict(partitions)
        for tp, commit in partitions.items():
            mark, offset = marks.get(tp, 0), commit.offset if commit else 0
            if mark > offset:
                offset = mark
                begin[tp] = Commit(mark, self._write(mark))
            self._window.assign(tp, offset, mark)
        return begin

    async def look(self) -> None:
        """Read the watermarks of the partitions that come near the window's size."""
        near = self._window.near()
        for tp, mark in (await self._watermarks(near)).items() if near else ():
            self._window.answered(tp, mark)

    async def _watermarks(
        self, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, int]:
        origin = {TopicPartition(self._topic, tp.partition): tp for tp in partitions}
        commits = await self._admin.committed(self._group, list(origin))
        return {origin[tp]: self._read(c.metadata) for tp, c in commits.items() if c is not None}


class Trimmer:
    """Deletes inner records behind the commit, but for `history` seconds or bytes of them.

    `sharers` are other groups that read the same topic: what they have not read stays.
    """

    def __init__(
        self,
        admin: Admin,
        history: float,
        history_bytes: int,
        sharers: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admin, self._sharers, self._clock = admin, sharers, clock
        self._history, self._history_bytes = history, history_bytes
        self._marks: dict[TopicPartition, deque[tuple[float, int, int]]] = {}
        self._received: dict[TopicPartition, int] = {}

    def received(self, tp: TopicPartition, nbytes: int) -> None:
        """Count what came in, so that `history_bytes` can be kept."""
        self._received[tp] = self._received.get(tp, 0) + nbytes

    async def committed(self, commits: Mapping[TopicPartition, Commit]) -> None:
        """Note commits; delete what is older than the history."""
        now, due = self._clock(), {}
        for tp, commit in commits.items():
            marks = self._marks.setdefault(tp, deque())
            total = self._received.get(tp, 0)
            marks.append((now, total, commit.offset))
            while marks and (
                now - marks[0][0] >= self._history or total - marks[0][1] >= self._history_bytes
            ):
                due[tp] = marks.popleft()[2]
        if due := await self._read_by_all(due):
            await self._admin.trim(due)

    async def _read_by_all(self, due: dict[TopicPartition, int]) -> dict[TopicPartition, int]:
        """Hold back what another group of the topic has not read yet."""
        for group in self._sharers if due else ():
            theirs = await self._admin.committed(group, list(due))
            due = {
                tp: min(offset, commit.offset)
                for tp, offset in due.items()
                if (commit := theirs.get(tp)) is not None
            }
        return due

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop partitions that are somebody else's now."""
        for tp in partitions:
            self._marks.pop(tp, None)
            self._received.pop(tp, None)
