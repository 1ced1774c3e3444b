"""The transport of one process: Kafka's semantics without Kafka.

It is what a laptop, the tests and `--bus memory` run on. What a cluster would do is done here in
the same order: see `group` for rebalances and `log` for what is stored. Different by design: an
ack is there at once, nothing is retained by time or size (only `Admin.trim` frees memory), and
nothing survives the process. One event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Self

from streaminfer.errors import NotOwner, TopicError, TransportError
from streaminfer.transport.base import (
    Commit,
    Listener,
    Outgoing,
    Position,
    Record,
    TopicInfo,
    TopicPartition,
    TopicSpec,
)
from streaminfer.transport.group import Cursor, Group, Seat
from streaminfer.transport.log import Topics
from streaminfer.transport.partitioner import partition_for

__all__ = ["MemoryAdmin", "MemoryConsumer", "MemoryProducer", "MemoryTransport"]


class MemoryTransport:
    """Topics and groups of this process.

    Args:
        clock: Unix time in seconds, for the timestamps of records.
        patience: seconds that a rebalance or a close waits for a member's listener; after it the
            member is evicted (its commits raise NotOwner) until the listener returns.
    """

    def __init__(self, clock: Callable[[], float] = time.time, *, patience: float = 30.0) -> None:
        self._clock, self._patience = clock, patience
        self._topics = Topics()
        self._groups: dict[str, Group] = {}
        self._members = 0

    def consumer(
        self,
        topics: Sequence[str],
        group: str | None,
        listener: Listener | None = None,
        *,
        weight: float = 1.0,
        from_end: bool = False,
    ) -> MemoryConsumer:
        """Make a member of `group`, or (None) a reader of all partitions of the topics."""
        self._members += 1
        name = f"{group or 'reader'}-{self._members:06d}"  # sorts in the order of birth
        if group is None:
            seat = Seat(name, topics, weight, None)  # nothing comes and goes
            return MemoryConsumer(self._topics, seat, None, self._patience, from_end=from_end)
        seat = Seat(name, topics, weight, listener)
        return MemoryConsumer(self._topics, seat, self._group(group), self._patience)

    def producer(self) -> MemoryProducer:
        """Make a producer."""
        return MemoryProducer(self._topics, self._clock)

    def admin(self) -> MemoryAdmin:
        """Make an admin."""
        return MemoryAdmin(self._topics, self._groups, self._group)

    def _group(self, name: str) -> Group:
        if name not in self._groups:
            self._groups[name] = Group(name, self._topics, self._patience)
        return self._groups[name]


class _Session:
    """What is entered and left; a second leaving does nothing."""

    _entered = False

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered = False

    def _check_entered(self) -> None:
        if not self._entered:
            raise TransportError(f"this {type(self).__name__} is not open; use it in `async with`")


class MemoryConsumer(_Session):
    """A `Consumer`; see base. `crash` is for tests."""

    def __init__(
        self,
        topics: Topics,
        seat: Seat,
        group: Group | None,
        patience: float,
        *,
        from_end: bool = False,
    ) -> None:
        self._topics, self._seat, self._group = topics, seat, group
        self._patience, self._from_end = patience, from_end
        self._lost = 0
        self._turn = 0  # the partition that a poll starts with: all get their turn

    async def __aenter__(self) -> Self:
        """Join the group and wait for the first share. Raises TopicError, TransportError."""
        seat = self._seat
        if seat.leaving:
            raise TransportError(f"{seat.name} was closed; make a new consumer")
        logs = [log for topic in seat.topics for log in self._topics.get(topic).logs]
        self._entered = True
        if self._group is None:
            ends = {log.tp: Commit(log.end) for log in logs} if self._from_end else {}
            await seat.take(logs, ends)
            return self
        self._group.join(seat)
        try:
            await seat.ready.wait()
            seat.check()
        except BaseException:
            self.crash()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Revoke, leave, wake a poll that waits."""
        if not self._entered:
            return
        self._entered = False
        await self._seat.close(self._patience)
        if self._group:
            self._group.leave(self._seat)

    def crash(self) -> None:
        """Vanish as a killed process does: no revoke, no commit; the group notices at once."""
        self._entered = False
        self._seat.abandon()
        if self._group:
            self._group.leave(self._seat)

    async def poll(  # the protocol has `timeout`: an idle poll is no failure
        self,
        timeout: float,  # noqa: ASYNC109
        max_records: int = 500,
    ) -> Sequence[Record]:
        """Return the next records; see base.

        Raises:
            TransportError: the listener could not take over, or this consumer is closed.
            TopicError: a topic was deleted.
        """
        self._check_entered()
        await asyncio.sleep(0)  # a poller that always finds records must not starve the loop
        records = self._collect(max_records)
        if records or timeout <= 0:
            return records
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not records and self._entered and (left := deadline - loop.time()) > 0:
            await self._seat.news(left)
            records = self._collect(max_records)
        return records

    def _collect(self, limit: int) -> list[Record]:
        seat = self._seat
        seat.check()
        found: list[Record] = []
        if not seat.open or not seat.cursors:
            return found
        cursors = list(seat.cursors.values())
        self._turn = (self._turn + 1) % len(cursors)
        for cursor in cursors[self._turn :] + cursors[: self._turn]:
            if not cursor.paused:
                found += self._read(cursor, limit - len(found))
                if len(found) >= limit:
                    break
        return found

    def _read(self, cursor: Cursor, limit: int) -> list[Record]:
        log = cursor.log
        if log.deleted:
            raise TopicError(f"topic {log.tp.topic} was deleted while it was read; restart")
        if cursor.position < log.start:
            self._lost += log.start - cursor.position
            cursor.position = log.start
        if cursor.position > log.end:  # a log made anew: what is in it was not read
            cursor.position = log.start
        records = log.read(cursor.position, limit)
        cursor.position += len(records)
        return records

    async def commit(self, commits: Mapping[TopicPartition, Commit]) -> None:
        """Commit; see base."""
        if self._group is None:
            raise NotOwner("a reader without a group owns nothing; give the consumer a group")
        self._group.commit(self._seat, commits)

    async def keepalive(self) -> None:
        """Nothing evicts a member of this process for silence."""

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Read on from `offset`. Raises NotOwner."""
        cursor = self._seat.cursors.get(tp)
        if cursor is None:
            raise NotOwner(f"{tp.topic}[{tp.partition}] is not {self._seat.name}'s: cannot seek")
        cursor.position = offset
        self._seat.wake()

    def pause(self, partitions: Collection[TopicPartition]) -> None:
        """Stop handing out records of those of these that are ours, until the next rebalance."""
        self._set_paused(partitions, paused=True)

    def resume(self, partitions: Collection[TopicPartition]) -> None:
        """Hand them out again."""
        self._set_paused(partitions, paused=False)
        self._seat.wake()

    def _set_paused(self, partitions: Collection[TopicPartition], *, paused: bool) -> None:
        for tp in partitions:
            if cursor := self._seat.cursors.get(tp):
                cursor.paused = paused

    def assignment(self) -> frozenset[TopicPartition]:
        """Return the partitions that are ours."""
        return frozenset(self._seat.cursors)

    def highwater(self, tp: TopicPartition) -> int | None:
        """Return the offset after the log's last record; None if it is not ours."""
        cursor = self._seat.cursors.get(tp)
        return cursor.log.end if cursor else None

    def lost(self) -> int:
        """Return how many trimmed offsets were skipped."""
        return self._lost


class MemoryProducer(_Session):
    """A `Producer`; see base. The ack is there when `send` returns."""

    def __init__(self, topics: Topics, clock: Callable[[], float]) -> None:
        self._topics, self._clock = topics, clock
        self._sent: Counter[str] = Counter()  # null keys by topic, for round robin

    async def send(self, record: Outgoing) -> asyncio.Future[Position]:
        """Append a record. Raises RecordTooLarge, TopicError."""
        self._check_entered()
        topic = self._topics.get(record.topic)
        topic.check_size(record)
        log = topic.log(self._partition(record, len(topic.logs)))
        ack: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
        ack.set_result(log.append(record, int(self._clock() * 1000)))
        return ack

    async def send_many(self, records: Sequence[Outgoing]) -> asyncio.Future[None]:
        """Append records. Raises RecordTooLarge, TopicError."""
        for record in records:
            await self.send(record)
        acks: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        acks.set_result(None)
        return acks

    def _partition(self, record: Outgoing, count: int) -> int:
        if record.partition is not None:
            return record.partition
        if record.key is not None:
            return partition_for(record.key, count)
        self._sent[record.topic] += 1
        return (self._sent[record.topic] - 1) % count


class MemoryAdmin(_Session):
    """An `Admin`; see base."""

    def __init__(
        self, topics: Topics, groups: Mapping[str, Group], group: Callable[[str], Group]
    ) -> None:
        self._topics, self._groups, self._group = topics, groups, group

    async def topics(self, names: Collection[str]) -> Mapping[str, TopicInfo]:
        """Describe those that exist; the configuration is what was set."""
        found = (self._topics.find(name) for name in names)
        return {t.name: TopicInfo(len(t.logs), dict(t.config)) for t in found if t}

    async def create(self, topics: Collection[TopicSpec]) -> None:
        """Create those that are missing. Raises TopicError for fewer than one partition."""
        for spec in topics:
            self._topics.create(spec)

    async def configure(self, name: str, config: Mapping[str, str]) -> None:
        """Set entries. Raises TopicError."""
        self._topics.get(name).configure(config)

    async def delete(self, names: Collection[str]) -> None:
        """Delete topics, and what groups have committed of them."""
        for name in names:
            self._topics.delete(name)
            for group in self._groups.values():
                group.forget(name)

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, Commit | None]:
        """Read a group's commits."""
        known = self._groups[group].commits if group in self._groups else {}
        return {tp: known.get(tp) for tp in partitions}

    async def commit(self, group: str, commits: Mapping[TopicPartition, Commit]) -> None:
        """Commit for a group without members. Raises NotOwner if it has some."""
        self._group(group).commit(None, commits)

    async def offsets(
        self, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, tuple[int, int]]:
        """Return (first, next) offset of each. Raises TopicError."""
        logs = [self._topics.log(tp) for tp in partitions]
        return {log.tp: (log.start, log.end) for log in logs}

    async def trim(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Free the records before these offsets. Raises TopicError, TransportError."""
        for tp, offset in offsets.items():
            self._topics.log(tp).trim(offset)
