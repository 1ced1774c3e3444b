"""What a group has committed, read and written with own requests that check every error code.

aiokafka 0.14 does not look at the top-level error of an OffsetFetch: while the coordinator loads,
it says "nothing committed", and whoever then starts from the beginning publishes everything again.
Its commit has a hole of its own: it stamps the generation of the moment of sending, so one that
waited out a rebalance is accepted though the partition has gone to somebody else.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from aiokafka import errors as kafka
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest

from streaminfer.transport.base import Commit, TopicPartition

__all__ = ["NOBODY", "Offsets", "Stamp", "parse_fetch"]

T = TypeVar("T")

_TEXT = 4096  # bytes; a broker counts characters, but what fits here must fit in memory too
_PAUSE = 0.1  # seconds between two tries
_GRACE = 5.0  # seconds in which a topic the coordinator does not know may still turn up


class Stamp(NamedTuple):
    """Who commits: the coordinator refuses what is not of its present generation."""

    generation: int
    member: str


NOBODY = Stamp(-1, "")  # accepted only while the group has no members


def parse_fetch(reply: Any) -> dict[TopicPartition, Commit | None]:
    """Read an OffsetFetch reply: None only where the broker says -1 without any error.

    Raises:
        aiokafka.errors.KafkaError: the reply's own error, or a partition's.
    """
    _check(reply.error_code if reply.API_VERSION >= 2 else 0)
    commits: dict[TopicPartition, Commit | None] = {}
    for topic, partitions in reply.topics:
        for partition, offset, metadata, code in partitions:
            _check(code)
            known = Commit(offset, metadata or "") if offset >= 0 else None
            commits[TopicPartition(topic, partition)] = known
    return commits


def _check(code: int) -> None:
    if code:
        raise kafka.for_code(code)()


class Offsets:
    """A group's commits. Finds the group's coordinator, and finds it again when it has moved."""

    def __init__(self, client: Any, group: str) -> None:
        self._client, self._group = client, group
        self._node: int | None = None
        self._lane = asyncio.Lock()  # of two commits the later one must not overtake

    async def read(
        self, partitions: Collection[TopicPartition], limit: float
    ) -> dict[TopicPartition, Commit | None]:
        """Return each partition's commit, None where there is none.

        Raises:
            aiokafka.errors.KafkaError: no clear answer within `limit` seconds.
        """
        topics: dict[str, list[int]] = defaultdict(list)
        for tp in partitions:
            topics[tp.topic].append(tp.partition)
        request = OffsetFetchRequest(self._group, list(topics.items()))

        async def attempt(node: int) -> dict[TopicPartition, Commit | None]:
            commits = parse_fetch(await self._send(node, request))
            if missing := set(partitions) - set(commits):
                raise kafka.KafkaProtocolError(f"the reply leaves out {sorted(missing)}")
            return commits

        return await self._persist(attempt, limit) if topics else {}

    async def write(
        self, commits: Mapping[TopicPartition, Commit], stamp: Stamp, limit: float
    ) -> None:
        """Commit.

        Raises:
            aiokafka.errors.KafkaError: `stamp` is not of the present generation (UnknownMemberId,
                IllegalGeneration, RebalanceInProgress), a text is over 4096 bytes, or no clear
                answer within `limit` seconds.
        """
        topics: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for tp, commit in commits.items():
            if (size := len(commit.metadata.encode())) > _TEXT:
                raise kafka.OffsetMetadataTooLargeError(f"{size} bytes; keep it within {_TEXT}")
            topics[tp.topic].append((tp.partition, *commit))
        keep = OffsetCommitRequest.DEFAULT_RETENTION_TIME
        request = OffsetCommitRequest(self._group, *stamp, keep, list(topics.items()))

        async def attempt(node: int) -> None:
            reply = await self._send(node, request)
            for _, partitions in reply.topics:
                for _, code in partitions:
                    _check(code)

        async with self._lane:
            if topics:
                await self._persist(attempt, limit)

    async def _persist(self, attempt: Callable[[int], Awaitable[T]], limit: float) -> T:
        """Try until it works, the error is final, or `limit` seconds are over."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while True:
            try:
                return await attempt(await self._coordinator())
            except kafka.KafkaError as error:
                self._node = None
                unknown = isinstance(error, kafka.UnknownTopicOrPartitionError)
                waited = loop.time() - begin
                if not error.retriable or waited > (min(limit, _GRACE) if unknown else limit):
                    raise
            await asyncio.sleep(_PAUSE)

    async def _coordinator(self) -> int:
        if self._node is None:
            self._node = await self._client.coordinator_lookup(CoordinationType.GROUP, self._group)
        return self._node

    async def _send(self, node: int, request: Any) -> Any:
        # Not on the connection of fetches: it would wait behind a long poll.
        return await self._client.send(node, request, group=ConnectionGroup.COORDINATION)
