"""The one shape that everything a worker does has: a Step from items to a Result.

first stage  chain(ingest, forward)       local edges  Graph of forwards
inner stage  forward                      sink         order
behind parts chain(gather, forward)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from streaminfer.transport import Outgoing, Position, Record, TopicPartition
from streaminfer.wire import Envelope

__all__ = ["Acked", "Chain", "Item", "Plain", "Result", "Settled", "Step", "chain"]


@dataclass(frozen=True, slots=True)
class Item:
    """What one call of a step gets of one source: an envelope, or raw input records.

    `positions` are the records it came in: settling them is what the commit waits for. `since` is
    when it was written (Unix seconds): its time in the queue begins there.
    """

    positions: tuple[Position, ...]
    envelope: Envelope | None = None
    records: tuple[Record, ...] = ()  # of one input partition, in order; ingest's food
    nbytes: int = 0
    since: float = 0.0

    @property
    def samples(self) -> int:
        """How many samples it brings."""
        return len(self.envelope.samples) if self.envelope else len(self.records)


class Acked(NamedTuple):
    """What is done with once a result is acked, and could not be told before."""

    settled: Sequence[Settled] = ()
    notes: Mapping[TopicPartition, str] = {}


class Settled(NamedTuple):
    """A record that is done with; `note` is what a commit says whose prefix ends with it."""

    position: Position
    note: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What a step made of its items.

    `outputs` go to the next step of a chain, or to the outbox, which routes and encodes them.
    `settled` may be committed once `outputs` and `answers` are acked; `notes` say, per partition,
    what the next commit is to say whatever its prefix (the sink's watermark). `acked` is called
    once everything is acked, and may settle more.
    """

    outputs: tuple[Envelope, ...] = ()  # to the next stage
    outcomes: tuple[Envelope, ...] = ()  # failed samples, straight to the sink
    answers: tuple[Outgoing, ...] = ()  # records ready to be sent
    settled: tuple[Settled, ...] = ()
    notes: Mapping[TopicPartition, str] = field(default_factory=dict)
    acked: Callable[[], Acked] | None = None

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.outputs or self.outcomes or self.answers or self.settled or self.notes)


class Step(Protocol):
    """Re-entrant: up to `inflight` calls at once."""

    async def start(self) -> None:
        """Load, compile, warm."""

    async def __call__(self, items: Sequence[Item]) -> Result:
        """Do the work. What a sample is to blame for is an outcome, never an exception."""

    def due(self) -> float | None:
        """Seconds until `tick` has something to do (a gather's deadline); None: nothing waits."""

    async def tick(self) -> Result:
        """Do what is due."""

    async def assign(self, partitions: Mapping[TopicPartition, str]) -> None:
        """Own these now; the value is the note of the last commit ("" if there was none)."""

    async def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop what is held of these: a new owner re-reads it."""

    async def stop(self) -> None:
        """Free everything."""


class Plain:
    """What most steps have in common: they hold nothing per partition and wait for nothing."""

    async def start(self) -> None:
        """Nothing to load."""

    async def stop(self) -> None:
        """Nothing to free."""

    def due(self) -> float | None:
        """Nothing waits."""
        return None

    async def tick(self) -> Result:
        """Nothing is due."""
        return Result()

    async def assign(self, partitions: Mapping[TopicPartition, str]) -> None:
        """Nothing is held per partition."""

    async def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Nothing is held per partition."""


class Chain:
    """Two steps as one: the first one's outputs are the second one's items."""

    def __init__(self, first: Step, second: Step) -> None:
        self.first, self.second = first, second

    async def start(self) -> None:
        """Start both, the last one first, so that whoever hands over finds a taker."""
        await self.second.start()
        await self.first.start()

    async def __call__(self, items: Sequence[Item]) -> Result:
        """Run the second on what the first gave; failures of both go on."""
        return await self._rest(await self.first(items))

    async def _rest(self, head: Result) -> Result:
        if not head.outputs:
            return head
        now = time.time()
        handed = [
            Item((), envelope, nbytes=envelope.nbytes, since=now) for envelope in head.outputs
        ]
        tail = await self.second(handed)
        return replace(
            head,
            outputs=tail.outputs,
            outcomes=head.outcomes + tail.outcomes,
            answers=head.answers + tail.answers,
        )

    def due(self) -> float | None:
        """Seconds until either has something to do."""
        waits = [due for due in (self.first.due(), self.second.due()) if due is not None]
        return min(waits, default=None)

    async def tick(self) -> Result:
        """Do what is due in the first; the second one's steps wait for nothing."""
        return await self._rest(await self.first.tick())

    async def assign(self, partitions: Mapping[TopicPartition, str]) -> None:
        """Tell both."""
        await self.first.assign(partitions)
        await self.second.assign(partitions)

    async def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Tell both."""
        await self.first.forget(partitions)
        await self.second.forget(partitions)

    async def stop(self) -> None:
        """Stop both, in the order of the road."""
        await self.first.stop()
        await self.second.stop()


def chain(*steps: Step) -> Step:
    """Join steps into one."""
    first, *rest = steps
    for step in rest:
        first = Chain(first, step)
    return first
