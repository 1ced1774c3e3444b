"""How contract tests look at a group: what its members hear, and what they read."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import NamedTuple

from streaminfer.transport import Commit, Consumer, Record, TopicPartition

PATIENCE = 60.0  # seconds until a test gives up on what should be there in milliseconds


class Event(NamedTuple):
    """What a listener heard."""

    name: str
    what: str
    partitions: frozenset[TopicPartition]


class Witness:
    """A listener that writes down what it hears; members may share `events` to see its order."""

    def __init__(self, name: str = "", events: list[Event] | None = None) -> None:
        self.name = name
        self.events = [] if events is None else events
        self.commits: dict[TopicPartition, Commit | None] = {}
        self.on_assigned: Callable[[], Awaitable[None]] | None = None
        self.on_revoked: Callable[[], Awaitable[None]] | None = None

    async def assigned(self, partitions: Mapping[TopicPartition, Commit | None]) -> None:
        self.events.append(Event(self.name, "assigned", frozenset(partitions)))
        self.commits = dict(partitions)
        if self.on_assigned:
            await self.on_assigned()

    async def revoked(self, partitions: Collection[TopicPartition]) -> None:
        if self.on_revoked:
            await self.on_revoked()
        self.events.append(Event(self.name, "revoked", frozenset(partitions)))


async def drain(consumer: Consumer, count: int) -> list[Record]:
    """Poll until `count` records are there; fail rather than wait for ever, or for one too many."""
    records: list[Record] = []
    async with asyncio.timeout(PATIENCE):
        while len(records) < count:
            records += await consumer.poll(0.2, max_records=count - len(records))
    assert len(records) == count
    return records


async def drain_all(consumers: Collection[Consumer], count: int) -> list[Record]:
    """Poll all of them in turn until they have `count` records together, or more."""
    records: list[Record] = []
    async with asyncio.timeout(PATIENCE):
        while len(records) < count:
            for consumer in consumers:
                records += await consumer.poll(0.05)
    return records


async def nothing_comes(consumer: Consumer, seconds: float = 0.3) -> bool:
    """Whether polls bring nothing for so long."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while loop.time() < until:
        if await consumer.poll(0.1):
            return False
    return True


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it; fail rather than wait for ever."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what it asks has no event
            await asyncio.sleep(0.01)


def by_partition(records: Collection[Record]) -> dict[int, list[int]]:
    """Return the offsets by partition, in the order in which they came."""
    offsets: dict[int, list[int]] = defaultdict(list)
    for record in records:
        offsets[record.partition].append(record.offset)
    return dict(offsets)


def values(records: Collection[Record]) -> list[bytes | None]:
    return [record.value for record in records]
