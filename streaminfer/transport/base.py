"""How records travel: the protocol that memory and Kafka both keep (tests/contract proves it).

Semantics are Kafka's: topics of partitions, each an ordered log; groups whose members share the
partitions; at-least-once from the committed offset. A carrier raises only `TransportError`s.

    Transport ── consumer(group) ──▶ Consumer   poll · commit · seek · pause
              ── producer()      ──▶ Producer   send → future of the acked Position · send_many
              ── admin()         ──▶ Admin      topics, committed offsets, trim
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

__all__ = [
    "Admin",
    "Commit",
    "Consumer",
    "Headers",
    "Listener",
    "Outgoing",
    "Position",
    "Producer",
    "Record",
    "TopicInfo",
    "TopicPartition",
    "TopicSpec",
    "Transport",
]

Headers = tuple[tuple[str, bytes], ...]


class TopicPartition(NamedTuple):
    """One log."""

    topic: str
    partition: int


class Position(NamedTuple):
    """One record's place."""

    topic: str
    partition: int
    offset: int

    @property
    def tp(self) -> TopicPartition:
        """The log it is in."""
        return TopicPartition(self.topic, self.partition)


@dataclass(frozen=True, slots=True)
class Record:
    """A record as received. `value` None is a tombstone. `timestamp_ms` is Unix time."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    @property
    def position(self) -> Position:
        """Where it was read."""
        return Position(self.topic, self.partition, self.offset)

    @property
    def tp(self) -> TopicPartition:
        """The log it was read from."""
        return TopicPartition(self.topic, self.partition)

    @property
    def nbytes(self) -> int:
        """Bytes of key and value."""
        return len(self.key or b"") + len(self.value or b"")


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to send. `partition` None means murmur2(key) as Java does, or any for a null key."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    headers: Headers = ()


class Commit(NamedTuple):
    """What a group has done with a partition: everything before `offset`; `metadata` is ours."""

    offset: int
    metadata: str = ""


class Listener(Protocol):
    """Told when partitions come and go. Both are awaited before the rebalance goes on."""

    async def assigned(self, partitions: Mapping[TopicPartition, Commit | None]) -> None:
        """Own these now; the value is what was committed (None: never). Nothing was polled yet."""

    async def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Finish and commit now: after this returns a commit raises NotOwner."""


class Consumer(Protocol):
    """One member of one group. Positions start at the committed offset, else at the log's start."""

    async def __aenter__(self) -> Self:
        """Join the group. Raises TopicError if a topic is missing, TransportError if no broker."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Revoke (the listener is called), leave the group, free everything. Never hangs."""

    async def poll(self, timeout: float, max_records: int = 500) -> Sequence[Record]:  # noqa: ASYNC109
        """Return the next records of unpaused partitions, in offset order within each.

        Waits up to `timeout` seconds for the first one. Never cancel it: use the timeout.
        """

    async def commit(self, commits: Mapping[TopicPartition, Commit]) -> None:
        """Commit. Raises NotOwner if a partition isn't ours in this generation."""

    async def keepalive(self) -> None:
        """Say that this member lives though it polls nothing (call it at least once a minute)."""

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Read on from `offset`; what was fetched and not polled is forgotten."""

    def pause(self, partitions: Collection[TopicPartition]) -> None:
        """Stop handing out records of these; their positions stay."""

    def resume(self, partitions: Collection[TopicPartition]) -> None:
        """Hand them out again."""

    def assignment(self) -> frozenset[TopicPartition]:
        """Return the partitions that are ours."""

    def highwater(self, tp: TopicPartition) -> int | None:
        """Return the offset after the log's last record as last seen; None: not known yet."""

    def lost(self) -> int:
        """Return how many offsets were skipped so far because the log no longer had them."""


class Producer(Protocol):
    """Sends records; idempotent, acks=all. Order within a partition is the order of `send`."""

    async def __aenter__(self) -> Self:
        """Connect."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Flush (time-boxed) and free everything. Never hangs."""

    async def send(self, record: Outgoing) -> Future[Position]:
        """Hand over a record (waits while the buffer is full); the future is its ack.

        Raises RecordTooLarge at once or in the future; TopicError if there is no such topic.
        One coroutine at a time may be in here or in `send_many`, or order is lost.
        """

    async def send_many(self, records: Sequence[Outgoing]) -> Future[None]:
        """Hand over records as `send` would, one after another; the future is all their acks.

        Costs a fraction of as many `send`s. Raises, here or in the future, what the first record
        to fail would raise; the others may have been written.
        """


class TopicInfo(NamedTuple):
    """A topic as it is."""

    partitions: int
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as it should be."""

    name: str
    partitions: int
    config: Mapping[str, str] = field(default_factory=dict)


class Admin(Protocol):
    """Looks after topics and reads other groups' commits."""

    async def __aenter__(self) -> Self:
        """Connect."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect."""

    async def topics(self, names: Collection[str]) -> Mapping[str, TopicInfo]:
        """Describe the topics that exist among `names`."""

    async def create(self, topics: Collection[TopicSpec]) -> None:
        """Create topics; one that exists is left as it is."""

    async def configure(self, name: str, config: Mapping[str, str]) -> None:
        """Set these configuration entries of a topic; others stay."""

    async def delete(self, names: Collection[str]) -> None:
        """Delete topics; one that is missing is no error."""

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, Commit | None]:
        """Read a group's commits. None only where the broker says that there is none."""

    async def commit(self, group: str, commits: Mapping[TopicPartition, Commit]) -> None:
        """Write commits for a group that has no members. Raises NotOwner if it has some."""

    async def offsets(
        self, partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, tuple[int, int]]:
        """Return (first offset in the log, offset after its last record) of each partition."""

    async def trim(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Delete the records before these offsets."""


class Transport(Protocol):
    """A place where topics live: one process' memory, or a Kafka cluster."""

    def consumer(
        self,
        topics: Sequence[str],
        group: str | None,
        listener: Listener | None = None,
        *,
        weight: float = 1.0,
        from_end: bool = False,
    ) -> Consumer:
        """Make a member of `group`; its share of partitions follows `weight` within the group.

        Group None: no group, all partitions of the topics, nothing committed (clients); then
        `from_end` starts behind the last record (fixed before `__aenter__` returns).
        """

    def producer(self) -> Producer:
        """Make a producer."""

    def admin(self) -> Admin:
        """Make an admin."""
