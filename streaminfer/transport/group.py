"""A consumer group in memory: who owns which partition, and how that changes. Kafka's eager way.

    join, leave, crash ──▶ every seat: nothing is handed out any more, listener.revoked
                           └─ all have returned (or run out of patience: evicted till they do)
                              ──▶ a new generation is dealt by weight, few partitions move
                                  └─ every seat: listener.assigned, then records flow

A seat is one member's side of it, and also what a reader without a group sits on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from streaminfer.errors import NotOwner, TransportError
from streaminfer.transport.assignor import Member, assign
from streaminfer.transport.base import Commit, Listener, TopicPartition
from streaminfer.transport.log import Log, Topics

__all__ = ["Cursor", "Group", "Seat"]

_logger = logging.getLogger(__name__)

# A broker's default for `offset.metadata.max.bytes`. (It counts UTF-16 units; bytes are stricter.)
_METADATA_LIMIT = 4096


class Cursor:
    """Where a reader stands in a log."""

    __slots__ = ("log", "paused", "position")

    def __init__(self, log: Log, position: int) -> None:
        self.log, self.position, self.paused = log, position, False


class Seat:
    """A member's own view: what it reads and from where. Its listener is called one at a time."""

    def __init__(
        self, name: str, topics: Sequence[str], weight: float, listener: Listener | None
    ) -> None:
        self.name, self.topics, self.weight = name, tuple(topics), weight
        self.cursors: dict[TopicPartition, Cursor] = {}
        self.open = False  # records may be handed out: no rebalance is going on
        self.leaving = False  # takes nothing any more
        self.ready = asyncio.Event()  # the first share has been taken
        self.failure: Exception | None = None  # of `assigned`: this member cannot go on
        self.last: tuple[TopicPartition, ...] = ()  # owned before the rebalance: kept if possible
        self._listener = listener
        self._waiter: asyncio.Future[None] | None = None
        self._lane = asyncio.Lock()  # a listener hears of one change after the other
        self._recalled = False  # a revoke waits for the lane: an `assigned` must not open

    async def revoke(self) -> None:
        """Stop handing out, let the listener finish, own nothing."""
        self.open, self._recalled = False, True
        async with self._lane:
            self.last = tuple(self.cursors)
            if self.last and self._listener:
                await self._finish(self._listener)
            self.clear()
            self._recalled = False

    async def take(self, logs: Iterable[Log], commits: Mapping[TopicPartition, Commit]) -> None:
        """Own these logs from what was committed, else from their start; tell the listener."""
        async with self._lane:
            if self.leaving:
                return
            for log in logs:
                commit = commits.get(log.tp)
                self.cursors[log.tp] = Cursor(log, commit.offset if commit else log.start)
                log.watchers.add(self.wake)
            if self.cursors and self._listener:
                await self._begin(self._listener, {tp: commits.get(tp) for tp in self.cursors})
            self.open = not self._recalled
            self.ready.set()
            self.wake()

    def check(self) -> None:
        """Raise TransportError if this member cannot go on: make a new consumer."""
        if self.failure:
            raise TransportError(
                f"{self.name} cannot take over its partitions: {self.failure}"
            ) from self.failure

    async def news(self, seconds: float) -> None:
        """Wait until something changed that a poller must look at, or for so many seconds."""
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        timer = waiter.get_loop().call_later(seconds, _release, waiter)
        try:
            await waiter
        finally:
            timer.cancel()

    def wake(self) -> None:
        """Let the poller look again."""
        if self._waiter is not None:
            _release(self._waiter)

    def clear(self) -> None:
        """Own nothing."""
        for cursor in self.cursors.values():
            cursor.log.watchers.discard(self.wake)
        self.cursors = {}

    async def close(self, patience: float) -> None:
        """Revoke for the last time; a listener that takes longer than `patience` is cancelled."""
        self.leaving = True
        task = asyncio.create_task(self.revoke())
        await asyncio.wait({task}, timeout=patience)
        task.cancel()
        self.abandon()

    def abandon(self) -> None:
        """Own nothing, tell nobody."""
        self.leaving, self.open = True, False
        self.clear()
        self.ready.set()
        self.wake()

    async def _begin(
        self, listener: Listener, partitions: Mapping[TopicPartition, Commit | None]
    ) -> None:
        try:
            await listener.assigned(partitions)
        except Exception as error:
            _logger.exception("%s cannot take over its partitions", self.name)
            self.failure = error
            self.clear()

    async def _finish(self, listener: Listener) -> None:
        """Await the listener; a failure of it must not keep the partitions from the others."""
        try:
            await listener.revoked(self.last)
        except Exception:
            _logger.exception("the listener of %s failed to give up its partitions", self.name)


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Group:
    """The coordinator's side: members, owners, commits."""

    def __init__(self, name: str, topics: Topics, patience: float) -> None:
        self.name = name
        self.commits: dict[TopicPartition, Commit] = {}
        self._topics, self._patience = topics, patience
        self._seats: dict[str, Seat] = {}
        self._owners: dict[TopicPartition, Seat] = {}  # of this generation
        self._stirred = False  # members changed since the last deal began
        self._task: asyncio.Task[None] | None = None
        self._late: dict[asyncio.Task[None], Seat] = {}  # evicted, and still in their listener

    def join(self, seat: Seat) -> None:
        """Let a member in at the next deal (again, if it was late)."""
        self._seats[seat.name] = seat
        self._stir()

    def leave(self, seat: Seat) -> None:
        """Strike a member off; the others share what it had."""
        if self._seats.pop(seat.name, None):
            self._owners = {tp: owner for tp, owner in self._owners.items() if owner is not seat}
            self._stir()

    def has_members(self) -> bool:
        """Whether anybody is in, or late and coming back."""
        return bool(self._seats) or any(not seat.leaving for seat in self._late.values())

    def commit(self, seat: Seat | None, commits: Mapping[TopicPartition, Commit]) -> None:
        """Write all of these or none; `seat` None is an admin.

        Raises:
            NotOwner: the seat does not own one of them in this generation; for an admin: the
                group has members.
            TransportError: a note is over 4096 bytes.
        """
        if seat is None and self.has_members():
            raise NotOwner(f"group {self.name} has members; stop its workers, then commit for it")
        for tp, commit in commits.items():
            if seat and not (self._owners.get(tp) is seat and tp in seat.cursors):
                raise NotOwner(
                    f"{tp.topic}[{tp.partition}] is not {seat.name}'s in group {self.name};"
                    " drop this work, its owner reads it again"
                )
            if (size := len(commit.metadata.encode())) > _METADATA_LIMIT:
                raise TransportError(
                    f"the note of {tp.topic}[{tp.partition}] has {size} bytes; keep it within"
                    f" {_METADATA_LIMIT}"
                )
        self.commits |= commits

    def forget(self, topic: str) -> None:
        """Drop the commits of a deleted topic: one made anew starts at 0."""
        self.commits = {tp: commit for tp, commit in self.commits.items() if tp.topic != topic}

    def _stir(self) -> None:
        self._stirred = bool(self._seats)  # an empty group has nobody to deal to
        if self._stirred and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._rebalance())

    async def _rebalance(self) -> None:
        while self._stirred:
            self._stirred = False
            calls = {asyncio.create_task(seat.revoke()): seat for seat in self._seats.values()}
            for task in await self._unfinished(calls):
                self._evict(calls[task], task)
            if not self._stirred:  # else whoever came or went meanwhile is in the same deal
                await self._deal()

    async def _deal(self) -> None:
        seats = self._seats
        members = {
            name: Member(seat.weight, seat.topics, seat.last) for name, seat in seats.items()
        }
        named = {topic for seat in seats.values() for topic in seat.topics}
        topics = {name: found for name in named if (found := self._topics.find(name))}
        shares = assign(members, {name: len(topic.logs) for name, topic in topics.items()})
        self._owners = {tp: seats[name] for name, tps in shares.items() for tp in tps}
        takes = [
            asyncio.create_task(
                seat.take([topics[tp.topic].log(tp.partition) for tp in shares[name]], self.commits)
            )
            for name, seat in seats.items()
        ]
        await self._unfinished(takes)

    async def _unfinished(self, calls: Collection[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        if not calls:
            return set()
        return (await asyncio.wait(calls, timeout=self._patience))[1]

    def _evict(self, seat: Seat, call: asyncio.Task[None]) -> None:
        """Go on without a member whose listener does not return; it joins anew once it does."""
        self._seats.pop(seat.name, None)
        self._late[call] = seat

        def back(call: asyncio.Task[None]) -> None:
            del self._late[call]
            if not seat.leaving:
                self.join(seat)

        call.add_done_callback(back)
