"""One member's side of a consumer group: how it asks for partitions, takes them, gives them up.

    aiokafka's rebalance                     here
    1  begins                         ──▶    on_partitions_revoked: the listener finishes
    2  joins, sends `metadata`               weight, and what was owned: it may stay
    3  the leader runs `assign`              the pure function of `assignor`
    4  takes the answer               ──▶    on_assignment: hold all, or fetching begins
    5                                 ──▶    on_partitions_assigned: read commits, seek,
                                             the listener takes over, records flow

No heartbeat is sent in step 5: the listener has `session_timeout` for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.coordinator.protocol import (
    ConsumerProtocolMemberAssignment,
    ConsumerProtocolMemberMetadata,
)

from streaminfer.errors import Action, NotOwner, TransportError
from streaminfer.transport.assignor import Member, assign
from streaminfer.transport.base import Commit, Listener, Record, TopicPartition
from streaminfer.transport.kafka.border import translated
from streaminfer.transport.kafka.offsets import NOBODY, Offsets, Stamp
from streaminfer.transport.kafka.settings import KafkaSettings

__all__ = ["Claim", "Membership", "Subscription", "divide"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a consumer wants to read, and as whom."""

    topics: tuple[str, ...]
    group: str | None
    listener: Listener | None = None
    weight: float = 1.0
    from_end: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """What a member tells the leader beside its topics; JSON on the wire."""

    weight: float = 1.0
    generation: int = -1  # in which it owned them: of two claims the later one counts
    owned: frozenset[TopicPartition] = frozenset()

    def encode(self) -> bytes:
        """Return the user data of a JoinGroup."""
        topics: dict[str, list[int]] = defaultdict(list)
        for tp in sorted(self.owned):
            topics[tp.topic].append(tp.partition)
        fields = {"weight": self.weight, "generation": self.generation, "owned": topics}
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, data: bytes) -> Claim:
        """Read it; what is unreadable (another version of us) claims nothing at weight 1."""
        try:
            fields = json.loads(data)
            owned = fields["owned"].items()
            return cls(
                float(fields["weight"]),
                int(fields["generation"]),
                frozenset(TopicPartition(t, int(p)) for t, numbers in owned for p in numbers),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls()


class Membership(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """aiokafka's listener and its assignor in one, because both need what is owned."""

    name = "streaminfer"  # of the assignor: members of another one are refused by the broker

    def __init__(
        self, settings: KafkaSettings, kafka: AIOKafkaConsumer, subscription: Subscription
    ) -> None:
        self._settings, self._kafka = settings, kafka
        self._topics, self._listener = subscription.topics, subscription.listener
        self._group = subscription.group or ""
        self._weight = subscription.weight
        self._offsets = Offsets(kafka._client, self._group)
        self._last = Claim(subscription.weight)  # owned before the rebalance that goes on
        self._stamp: Stamp = NOBODY
        self._lane = asyncio.Lock()  # closing and a rebalance must not both revoke
        self._leaving = False
        self.owned: frozenset[TopicPartition] = frozenset()
        self.paused: set[TopicPartition] = set()
        self.shelf: dict[TopicPartition, deque[Record]] = {}  # fetched, not handed out
        self.flowing = False  # records of `owned` may be handed out
        self.failure: Exception | None = None  # this member cannot go on
        self.since = time.monotonic()  # when `flowing` changed

    async def join(self) -> None:
        """Ask for partitions and wait until they are there. Raises TransportError."""
        self._kafka.subscribe(self._topics, listener=self)
        limit = time.monotonic() + self._settings.patience
        with translated(f"join group {self._group}"):
            while not self.flowing:
                self._kafka._coordinator.check_errors()  # aiokafka tells only who asks
                self.check()
                if time.monotonic() > limit:
                    raise TimeoutError(f"no assignment within {self._settings.patience:g} s")
                await asyncio.sleep(0.01)

    async def leave(self, limit: float) -> None:
        """Give everything up, for good, within `limit` seconds."""
        self._leaving = True
        try:
            await asyncio.wait_for(self._revoke(), limit)
        except TimeoutError:
            _logger.warning("the listener did not let go within %g s; leaving anyway", limit)
        self.owned, self.flowing = frozenset(), False

    def check(self) -> None:
        """Raise TransportError if this member cannot go on: make a new consumer."""
        if self.failure:
            raise TransportError(
                f"cannot take over partitions of group {self._group}: {self.failure}"
            ) from self.failure

    async def commit(self, commits: Mapping[TopicPartition, Commit]) -> None:
        """Commit what is owned. Raises NotOwner for the rest, and then writes none."""
        if foreign := sorted(set(commits) - self.owned):
            topic, partition = foreign[0]
            raise NotOwner(
                f"{topic}[{partition}] is not ours in group {self._group}; drop this work, its"
                " owner reads it again"
            )
        with translated(f"commit for group {self._group}"):
            await self._offsets.write(commits, self._stamp, self._settings.request_timeout)

    # ── what aiokafka calls ────────────────────────────────────────────────────────────────────

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """Return what the leader is to know of this member."""
        return ConsumerProtocolMemberMetadata(0, sorted(topics), self._last.encode())

    def assign(
        self, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """Divide the partitions; only the group's leader is asked."""
        return divide(cluster, members)

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Hold the new partitions, before the fetcher gets to run.

        A position, any, also keeps aiokafka from reading commits by itself.
        """
        for tp in assignment.partitions():
            self._kafka.seek(tp, 0)
            self._kafka.pause(tp)

    async def on_partitions_revoked(self, revoked: Collection[KafkaPartition]) -> None:
        """Let the listener finish; after that a commit raises NotOwner."""
        await self._revoke()

    async def on_partitions_assigned(self, assigned: Collection[KafkaPartition]) -> None:
        """Take over: commits, positions, the listener, and then records."""
        async with self._lane:
            if self._leaving:
                return
            partitions = frozenset(TopicPartition(*tp) for tp in assigned)
            try:
                if (commits := await self._read_positions(partitions)) is not None:
                    await self._take(commits)
            except Exception as error:  # aiokafka would log it, and nothing would ever flow
                _logger.exception("cannot take over partitions of group %s", self._group)
                self.owned, self.failure = frozenset(), error

    # ── ────────────────────────────────────────────────────────────────────────────────────────

    async def _read_positions(
        self, partitions: frozenset[TopicPartition]
    ) -> dict[TopicPartition, Commit | None] | None:
        """Read the commits and seek to them, or to the log's start where there is none.

        None: the broker has just gone away. The member joins once more when it is back; by then
        its session is over anyway.
        """
        try:
            with translated(f"read what group {self._group} has committed"):
                commits = await self._offsets.read(partitions, self._settings.session_timeout)
                fresh = [KafkaPartition(*tp) for tp in partitions if commits[tp] is None]
                starts = await self._kafka.beginning_offsets(fresh)
        except TransportError as error:
            if error.action is not Action.RETRY:
                raise
            _logger.warning("%s; joining again", error)
            self._kafka._coordinator.request_rejoin()
            return None
        for tp, commit in commits.items():
            key = KafkaPartition(*tp)
            self._kafka.seek(key, starts[key] if commit is None else commit.offset)
        return commits

    async def _take(self, commits: Mapping[TopicPartition, Commit | None]) -> None:
        partitions = frozenset(commits)
        coordinator = self._kafka._coordinator
        self._stamp = Stamp(coordinator.generation, coordinator.member_id)
        self._last = Claim(self._weight, self._stamp.generation, partitions)
        self.owned = partitions
        if partitions and self._listener:
            await self._listener.assigned(commits)
        self.shelf.clear()  # of the last generation, whose positions are void
        self._kafka.resume(*(KafkaPartition(*tp) for tp in partitions - self.paused))
        self.flowing, self.since = True, time.monotonic()

    async def _revoke(self) -> None:
        if self.flowing:
            self.flowing, self.since = False, time.monotonic()
        async with self._lane:
            if self.owned and self._listener:
                await self._finish(self._listener)
            self.owned = frozenset()
            self.paused.clear()

    async def _finish(self, listener: Listener) -> None:
        """Await the listener; a failure of it must not keep the partitions from the others."""
        try:
            async with asyncio.timeout(self._settings.rebalance_timeout):
                await listener.revoked(self.owned)
        except Exception:
            _logger.exception("the listener failed to give up partitions of %s", self._group)


def divide(
    cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]
) -> dict[str, ConsumerProtocolMemberAssignment]:
    """Give every partition of the members' topics to one of them, as `assignor.assign` does."""
    claims = {name: Claim.decode(member.user_data) for name, member in members.items()}
    topics = {topic for member in members.values() for topic in member.subscription}
    counts = {t: len(p) for t in topics if (p := cluster.partitions_for_topic(t))}
    asking = {
        name: Member(claim.weight, members[name].subscription, _latest(claim, claims.values()))
        for name, claim in claims.items()
    }
    shares = assign(asking, counts)
    return {name: _encode_share(share) for name, share in shares.items()}


def _latest(claim: Claim, others: Iterable[Claim]) -> frozenset[TopicPartition]:
    """Return what nobody has owned since: a member that was away must not claim it back."""
    later = (other.owned for other in others if other.generation > claim.generation)
    return claim.owned.difference(*later)


def _encode_share(share: Iterable[TopicPartition]) -> ConsumerProtocolMemberAssignment:
    topics: dict[str, list[int]] = defaultdict(list)
    for tp in share:
        topics[tp.topic].append(tp.partition)
    return ConsumerProtocolMemberAssignment(0, list(topics.items()), b"")
