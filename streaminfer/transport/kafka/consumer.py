"""A consumer of Kafka: poll, commit, pause, and never stuck in silence.

aiokafka's getmany() is kept in a task of its own: during a rebalance it returns late, and a
cancelled one would leave its books wrong. What it brings is on a shelf until it is handed out.

    broker ──fetch──▶ aiokafka ──getmany──▶ shelf ──poll──▶ worker
                                            seek, rebalance: cleared   pause: stays there
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.errors import OffsetOutOfRangeError

from streaminfer.errors import NotOwner, TopicError, TransportError
from streaminfer.transport.base import Commit, Record, TopicPartition
from streaminfer.transport.kafka import lifecycle
from streaminfer.transport.kafka.border import translated
from streaminfer.transport.kafka.membership import Membership, Subscription
from streaminfer.transport.kafka.settings import KafkaSettings

__all__ = ["KafkaConsumer"]

_SLACK = 0.02  # seconds beyond its time-out in which a getmany() usually returns
_GONE = 3.0  # seconds without a topic that a broker may need to know it after its own start
_GAP = 5.0  # seconds without a poll after which "nothing came" says nothing


class KafkaConsumer:
    """One member of one group, or a reader of everything. See `transport.base.Consumer`."""

    def __init__(self, settings: KafkaSettings, client_id: str, subscription: Subscription) -> None:
        self._settings, self._client_id = settings, client_id
        self._subscription = subscription
        self._kafka: Any = None
        self._membership: Membership | None = None
        self._open = False
        self._fetching: asyncio.Task[None] | None = None
        self._lost = 0
        self._polled = self._quiet_since = self._topics_seen = time.monotonic()

    @property
    def _member(self) -> Membership:
        if self._membership is None:
            raise TransportError("this consumer is not open; use it in `async with`")
        return self._membership

    async def __aenter__(self) -> Self:
        """Join the group. Raises TopicError if a topic is missing, TransportError if no broker."""
        settings, topics = self._settings, self._subscription.topics
        options = settings.client(self._client_id)
        self._kafka = kafka = AIOKafkaConsumer(**options, **self._options())
        self._membership = member = Membership(settings, kafka, self._subscription)
        kafka._partition_assignment_strategy = (member,)
        try:
            await lifecycle.connect(kafka.start, settings.bootstrap, settings.connect_timeout)
            with translated(f"read {', '.join(topics)}"):
                counts = await lifecycle.require_topics(
                    kafka._client, topics, settings.connect_timeout
                )
                if self._subscription.group is None:
                    await self._take_all(counts)
            if self._subscription.group is not None:
                await member.join()
        except BaseException:
            await self._close()
            raise
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Revoke (the listener is called), leave the group, free everything. Never hangs."""
        if self._open:
            self._open = False
            await self._member.leave(self._settings.close_timeout)
            await self._close()

    async def poll(  # the protocol has `timeout`: an idle poll is no failure
        self,
        timeout: float,  # noqa: ASYNC109
        max_records: int = 500,
    ) -> Sequence[Record]:
        """Return the next records of unpaused partitions; () after `timeout` seconds.

        Raises:
            TransportError: the broker refuses, or nothing has been heard of it, or of the group,
                for `KafkaSettings.patience` seconds: make a new consumer.
            TopicError: a topic was deleted.
        """
        self._member.check()
        if not self._open:
            raise TransportError("this consumer was closed; make a new one")
        left, until = timeout, time.monotonic() + timeout
        while not (records := self._hand_out(max_records)):
            with translated(f"read {', '.join(self._subscription.topics)}"):
                await self._fetch(max(left, 0.0), max_records)
            self._member.check()
            if (left := until - time.monotonic()) <= 0 or not self._open:
                records = self._hand_out(max_records)
                break
        self._watch(bool(records))
        return records

    async def commit(self, commits: Mapping[TopicPartition, Commit]) -> None:
        """Commit. Raises NotOwner if a partition isn't ours in this generation."""
        if self._subscription.group is None:
            raise NotOwner("a consumer without a group commits nothing")
        await self._member.commit(commits)

    async def keepalive(self) -> None:
        """Reset the clock that puts a member out which does not poll."""
        self._member.check()
        with self._kafka._subscription.fetch_context():
            pass

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Read on from `offset`. Raises NotOwner."""
        if tp not in self._member.owned:
            raise NotOwner(f"{tp.topic}[{tp.partition}] is not ours: no seek to {offset}")
        self._member.shelf.pop(tp, None)
        self._kafka.seek(KafkaPartition(*tp), offset)

    def pause(self, partitions: Collection[TopicPartition]) -> None:
        """Stop handing out records of these; what is not ours (any more) is passed over."""
        for tp in self._member.owned.intersection(partitions):
            self._member.paused.add(tp)
            self._kafka.pause(KafkaPartition(*tp))

    def resume(self, partitions: Collection[TopicPartition]) -> None:
        """Hand them out again."""
        self._quiet_since = time.monotonic()
        for tp in self._member.owned.intersection(partitions):
            self._member.paused.discard(tp)
            if self._member.flowing:  # else taking over ends with it
                self._kafka.resume(KafkaPartition(*tp))

    def assignment(self) -> frozenset[TopicPartition]:
        """Return the partitions that are ours."""
        return self._member.owned

    def highwater(self, tp: TopicPartition) -> int | None:
        """Return the offset after the log's last record as of the last fetch."""
        if tp not in self._member.owned:
            return None
        highwater: int | None = self._kafka.highwater(KafkaPartition(*tp))
        return highwater

    def lost(self) -> int:
        """Return how many offsets were skipped so far because the log no longer had them."""
        return self._lost

    def _options(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "group_id": self._subscription.group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",  # we seek; nothing starts over on its own
            "isolation_level": "read_committed",
            "check_crcs": True,
            "fetch_max_wait_ms": round(settings.fetch_wait * 1000),
            "fetch_max_bytes": settings.fetch_bytes,
            "max_partition_fetch_bytes": settings.partition_fetch_bytes,
            "session_timeout_ms": round(settings.session_timeout * 1000),
            "heartbeat_interval_ms": round(settings.session_timeout * 100),
            "rebalance_timeout_ms": round(settings.rebalance_timeout * 1000),
            "max_poll_interval_ms": round(settings.max_poll_interval * 1000),
        }

    async def _take_all(self, counts: Mapping[str, int]) -> None:
        kafka = self._kafka
        tps = [KafkaPartition(topic, p) for topic, n in counts.items() for p in range(n)]
        find = kafka.end_offsets if self._subscription.from_end else kafka.beginning_offsets
        offsets = await find(tps)
        kafka.assign(tps)
        for tp in tps:
            kafka.seek(tp, offsets[tp])
        self._member.owned = frozenset(TopicPartition(*tp) for tp in tps)
        self._member.flowing = True

    async def _fetch(self, wait: float, max_records: int) -> None:
        """Wait for the getmany() under way, or a new one, `wait` seconds at most."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fill(wait, max_records))
        await asyncio.wait({self._fetching}, timeout=wait + _SLACK)
        if self._fetching.done():
            task, self._fetching = self._fetching, None
            if not task.cancelled():  # closing did
                task.result()

    async def _fill(self, wait: float, max_records: int) -> None:
        subscription = self._kafka._subscription
        try:
            batches = await self._kafka.getmany(
                timeout_ms=round(wait * 1000), max_records=max_records
            )
        except BaseException as error:
            # aiokafka counts getmany()s under way and forgets one that raises: the clock of
            # max_poll_interval would stand still for ever.
            subscription._fetch_count -= 1
            if not isinstance(error, OffsetOutOfRangeError):
                raise
            await self._skip_lost(error.args[0])
            return
        for tp, batch in batches.items():
            shelf = self._member.shelf.setdefault(TopicPartition(*tp), deque())
            shelf.extend(map(_record, batch))

    async def _skip_lost(self, positions: Mapping[KafkaPartition, int]) -> None:
        starts = await self._kafka.beginning_offsets(list(positions))
        for tp, position in positions.items():
            # Unless somebody else has it by now, or it was moved meanwhile.
            ours = TopicPartition(*tp) in self._member.owned
            if ours and await self._kafka.position(tp) == position:
                self._lost += max(0, starts[tp] - position)
                self._kafka.seek(tp, starts[tp])

    def _hand_out(self, limit: int) -> list[Record]:
        member = self._member
        if not member.flowing:
            return []
        records: list[Record] = []
        for tp, shelf in member.shelf.items():
            if tp in member.paused:
                continue
            records += [shelf.popleft() for _ in range(min(len(shelf), limit - len(records)))]
        return records

    def _watch(self, heard: bool) -> None:
        """Raise TransportError if nothing has moved for too long (aiokafka #1154 and its kin)."""
        now, patience, member = time.monotonic(), self._settings.patience, self._member
        if heard or now - self._polled > _GAP or not member.flowing:
            self._quiet_since = now
        self._polled = now
        self._watch_topics(now)
        if not member.flowing and now - member.since > patience:
            raise TransportError(
                f"group {self._subscription.group} has not come out of its rebalance for"
                f" {now - member.since:.0f} s; make a new consumer"
            )
        if now - self._quiet_since > patience:
            for tp in sorted(member.owned - member.paused):
                answered = self._kafka.last_poll_timestamp(KafkaPartition(*tp)) or 0
                if time.time() - answered / 1000 > patience:
                    raise TransportError(
                        f"no answer about {tp.topic}[{tp.partition}] for {patience:.0f} s; is the"
                        " broker there? make a new consumer"
                    )

    def _watch_topics(self, now: float) -> None:
        """Raise TopicError if the broker, asked again, still does not know a topic."""
        topics, client = self._subscription.topics, self._kafka._client
        gone = [topic for topic in topics if self._kafka.partitions_for_topic(topic) is None]
        since = now - self._topics_seen
        if not gone:
            self._topics_seen = now
        elif since > _GONE:
            told = time.time() - client.cluster._last_successful_refresh_ms / 1000  # seconds ago
            if told < since - _GONE:
                raise TopicError(f"topic {gone[0]} was deleted while it was read; restart")
            client.force_metadata_update()  # what was said before may be outdated

    async def _close(self) -> None:
        kafka = self._kafka
        await lifecycle.stop(kafka.stop(), kafka._client, self._settings.close_timeout)
        if (fetching := self._fetching) is not None:
            fetching.cancel()
            await asyncio.wait({fetching})


def _record(record: Any) -> Record:
    headers = tuple([(key, value or b"") for key, value in record.headers])
    return Record(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        record.key,
        record.value,
        headers,
    )
