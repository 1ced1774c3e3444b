"""What is settled: the contiguous prefix of each partition that may be committed.

delivered   10  11  12  13  14        done: 10 11 13      commit offset 12
             ✓   ✓   ·   ✓   ·                            with the note of 11
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import groupby
from operator import attrgetter

from streaminfer.runtime.steps import Settled
from streaminfer.transport import Commit, Position, TopicPartition

__all__ = ["Tracker"]


class _Log:
    """One partition's records between delivery and commit."""

    __slots__ = ("commit", "committed", "done", "latest", "note", "open")

    def __init__(self) -> None:
        self.open: deque[tuple[int, float]] = deque()  # (offset, when delivered), in order
        self.done: dict[int, str] = {}  # settled ahead of the prefix: offset → note
        self.commit: int | None = None  # what may be committed
        self.note = ""  # of the last record of the prefix
        self.latest = ""  # a note that holds whatever the prefix
        self.committed: Commit | None = None

    def advance(self) -> None:
        while self.open and self.open[0][0] in self.done:
            offset, _ = self.open.popleft()
            self.note = self.done.pop(offset) or self.note
            self.commit = offset + 1


class Tracker:
    """Counts a worker's records in and out. Not thread-safe: the event loop's own."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._logs: dict[TopicPartition, _Log] = {}

    def assign(self, partitions: Mapping[TopicPartition, Commit | None]) -> None:
        """Begin with these partitions, at what was committed of them."""
        for tp, commit in partitions.items():
            log = self._logs[tp] = _Log()
            if commit is not None:
                log.commit, log.note, log.committed = commit.offset, commit.metadata, commit

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop partitions that are somebody else's now."""
        for tp in partitions:
            self._logs.pop(tp, None)

    def deliver(self, positions: Iterable[Position]) -> None:
        """Note records as received, in offset order within each partition."""
        now = self._clock()
        for tp, run in groupby(positions, attrgetter("topic", "partition")):
            if log := self._logs.get(TopicPartition(*tp)):
                log.open.extend((position.offset, now) for position in run)

    def settle(self, settled: Iterable[Settled], notes: Mapping[TopicPartition, str]) -> None:
        """Note records as done; `notes` go into the next commit whatever its prefix."""
        for tp, run in groupby(settled, attrgetter("position.topic", "position.partition")):
            log = self._logs.get(TopicPartition(*tp))
            if not log or not log.open:
                continue
            first = log.open[0][0]  # below it: a call of an earlier assignment came home late
            log.done.update((p.offset, note) for p, note in run if p.offset >= first)
            log.advance()
        for tp, note in notes.items():
            if log := self._logs.get(tp):
                log.latest = note

    def commits(
        self, partitions: Collection[TopicPartition] | None = None
    ) -> dict[TopicPartition, Commit]:
        """Return what may be committed and isn't yet."""
        found = {}
        for tp, log in self._logs.items():
            if partitions is not None and tp not in partitions:
                continue
            if log.commit is None and not log.latest:
                continue
            commit = Commit(self._offset(log), log.latest or log.note)
            if commit != log.committed:
                found[tp] = commit
        return found

    def committed(self, commits: Mapping[TopicPartition, Commit]) -> None:
        """Note what went through."""
        for tp, commit in commits.items():
            if log := self._logs.get(tp):
                log.committed = commit

    def outstanding(self, partitions: Collection[TopicPartition] | None = None) -> int:
        """Count records delivered and not yet settled."""
        return sum(
            len(log.open) - len(log.done)
            for tp, log in self._logs.items()
            if partitions is None or tp in partitions
        )

    def oldest(self, tp: TopicPartition) -> float | None:
        """Return when the oldest unsettled record was delivered; None: all are settled."""
        log = self._logs.get(tp)
        return log.open[0][1] if log and log.open else None

    def position(self, tp: TopicPartition) -> int | None:
        """Return the offset that may be committed; None: nothing yet."""
        log = self._logs.get(tp)
        return log.commit if log else None

    @staticmethod
    def _offset(log: _Log) -> int:
        # a watermark may be known before any record of the prefix is done: commit where we began
        if log.commit is not None:
            return log.commit
        return log.open[0][0] if log.open else 0
