"""Topics in memory: each partition is a list of records that grows at the end and is cut in front.

           start                       end
    offset   7     8     9    10    11  ┊ next append
          ┌─────┬─────┬─────┬─────┬─────┐
    trim ▶│  r  │  r  │  r  │  r  │  r  │◀ append, then every watcher is called
          └─────┴─────┴─────┴─────┴─────┘

Records share the bytes of whoever sent them: nothing is copied. Nothing is freed but by `trim`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from streaminfer.errors import RecordTooLarge, TopicError, TransportError
from streaminfer.transport.base import (
    Headers,
    Outgoing,
    Position,
    Record,
    TopicPartition,
    TopicSpec,
)

__all__ = ["Log", "Topic", "Topics"]

# A broker's own default for `max.message.bytes`.
_DEFAULT_LIMIT = 1_048_588
# A record batch's header and the longest header of a record in it: what a limit counts as well.
_OVERHEAD = 61 + 21


class Log:
    """One partition."""

    def __init__(self, tp: TopicPartition) -> None:
        self.tp = tp
        self.start = 0
        self.deleted = False
        self.watchers: set[Callable[[], None]] = set()  # pollers to wake when there is news
        self._records: list[Record] = []

    @property
    def end(self) -> int:
        """The offset that the next record will get."""
        return self.start + len(self._records)

    def append(self, record: Outgoing, timestamp_ms: int) -> Position:
        """Add a record and wake whoever waits for one."""
        topic, partition = self.tp
        offset = self.start + len(self._records)
        self._records.append(
            Record(topic, partition, offset, timestamp_ms, record.key, record.value, record.headers)
        )
        self.notify()
        return Position(topic, partition, offset)

    def read(self, offset: int, limit: int) -> list[Record]:
        """Return up to `limit` records from `offset` on; `offset` is not before `start`."""
        first = offset - self.start
        return self._records[first : first + limit]

    def trim(self, offset: int) -> None:
        """Free the records before `offset`. Raises TransportError behind the end, as a broker."""
        if offset > self.end:
            raise TransportError(
                f"{self.tp.topic}[{self.tp.partition}] ends at {self.end}: cannot be trimmed to"
                f" {offset}; trim to a committed offset of this topic"
            )
        if offset > self.start:
            del self._records[: offset - self.start]
            self.start = offset

    def drop(self) -> None:
        """Free everything; pollers learn that the topic is gone."""
        self._records.clear()
        self.deleted = True
        self.notify()

    def notify(self) -> None:
        """Wake the pollers."""
        for wake in self.watchers:
            wake()


class Topic:
    """A named set of logs with its configuration."""

    def __init__(self, spec: TopicSpec) -> None:
        if spec.partitions < 1:
            raise TopicError(
                f"topic {spec.name}: {spec.partitions} partitions asked for; ask for 1 or more"
            )
        self.name = spec.name
        self.logs = [Log(TopicPartition(spec.name, number)) for number in range(spec.partitions)]
        self.config: dict[str, str] = {}
        self._limit = _DEFAULT_LIMIT
        self.configure(spec.config)

    def configure(self, config: Mapping[str, str]) -> None:
        """Set these entries. Raises TopicError if the size limit is no number."""
        limit = config.get("max.message.bytes", str(self._limit))
        if not limit.isdecimal():
            raise TopicError(
                f"topic {self.name}: max.message.bytes is {limit!r}; give a number of bytes"
            )
        self._limit = int(limit)
        self.config |= config

    def log(self, partition: int) -> Log:
        """Return one of the logs. Raises TopicError if there is no such partition."""
        if not 0 <= partition < len(self.logs):
            raise TopicError(
                f"topic {self.name} has {len(self.logs)} partitions and no partition {partition};"
                " create the topic with as many as the input has"
            )
        return self.logs[partition]

    def check_size(self, record: Outgoing) -> None:
        """Raise RecordTooLarge if a broker could refuse the record."""
        size = _OVERHEAD + len(record.key or b"") + len(record.value or b"")
        if record.headers:
            size += _headers_size(record.headers)
        if size > self._limit:
            raise RecordTooLarge(
                f"a record of {size} bytes is over the {self._limit} of topic {self.name};"
                " send it in chunks or raise max.message.bytes"
            )


def _headers_size(headers: Headers) -> int:
    # 10: two lengths as varints
    return sum(len(name.encode()) + len(value) + 10 for name, value in headers)


class Topics:
    """All topics of a transport. They are never created by being named."""

    def __init__(self) -> None:
        self._topics: dict[str, Topic] = {}

    def find(self, name: str) -> Topic | None:
        """Return a topic, or None."""
        return self._topics.get(name)

    def get(self, name: str) -> Topic:
        """Return a topic. Raises TopicError if it is missing."""
        topic = self._topics.get(name)
        if topic is None:
            raise TopicError(
                f"there is no topic {name}; create it first (streaminfer topics apply)"
            )
        return topic

    def log(self, tp: TopicPartition) -> Log:
        """Return a log. Raises TopicError if topic or partition is missing."""
        return self.get(tp.topic).log(tp.partition)

    def create(self, spec: TopicSpec) -> None:
        """Create a topic unless it exists."""
        if spec.name not in self._topics:
            self._topics[spec.name] = Topic(spec)

    def delete(self, name: str) -> None:
        """Delete a topic if it exists."""
        topic = self._topics.pop(name, None)
        for log in topic.logs if topic else ():
            log.drop()
