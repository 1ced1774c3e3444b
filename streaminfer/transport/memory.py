"""The transport of one process: Kafka's semantics without Kafka, for laptops, tests and `--bus memory`.

What a cluster would do is done here in the same order: see `group` for rebalances and `log` for
what is stored. Different by design: an ack is there at once, nothing is retained by time or size
(only `Admin.trim` frees memory), and nothing survives the process. One event loop only.
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
from streaminfer.transport.log import Log, Topics
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
        consumer = MemoryConsumer(self._topics, self._patience, from_end=from_end)
        name = f"{group or 'reader'}-{self._members:06d}"  # sorts in the order of birth
        consumer.seat = Seat(name, topics, weight, listener, consumer.wake)
        consumer.group = None if group is None else self._group(group)
        return consumer

    def producer(self) -> MemoryProducer:
        """Make a producer."""
        return MemoryProducer(self._topics, self._clock)

    def admin(self) -> MemoryAdmin:
        """Make an admin."""
        return MemoryAdmin(self._topics, self._group, self._groups)

    def _group(self, name: str) -> Group:
        if name not in self._groups:
            self._groups[name] = Group(name, self._topics, self._patience)
        return self._groups[name]
