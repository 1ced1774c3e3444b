"""Messages as records of at most 900 kB: cut into chunks, and put together again.

A set is the chunks of one message. What becomes of a record that is added:

    whole message ──────────────────────────────▶ message            (covers sets of its samples)
    chunk 0 ─▶ set held ─┬─ last chunk, sum ok ──▶ message
                         ├─ sum or header wrong ─▶ BrokenMessage      (the whole set, its origin)
                         ├─ covered ─────────────▶ settled           (others brought its samples)
                         ├─ too many sets ───────▶ BrokenMessage      (the oldest)
                         └─ given up ────────────▶ BrokenMessage      (beside a whole message)
    chunk k > 0 of no set ──────────────────────▶ settled            (its set was done before)
    chunk of a finished set, or held already ───▶ settled            (a repeat)

Chunk 0 is committed only with its set, so whoever starts reading behind a chunk 0 knows that the
set was done. A set whose sender died stays open: the sender's heir sends the same samples again, in
a message of another id, and that covers it. Time never ends a set: a slow sender is not a dead one.

Where senders spread messages over the partitions (`Patience`), the heir's may come elsewhere and
cover nothing here. There a set is given up after a long silence in which many others came: an error
outcome, which the sink drops if the heir's message was answered, and it was unless all is lost.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from xxhash import xxh3_64, xxh3_64_intdigest

from streaminfer.errors import WireError
from streaminfer.wire.codec import encode, encoded_size
from streaminfer.wire.envelope import Envelope
from streaminfer.wire.headers import (
    Chunk,
    Headers,
    Origin,
    chunk_header,
    headers,
    read_chunk,
    read_origin,
)
from streaminfer.wire.tensors import Buffer

__all__ = [
    "CHUNK_BYTES",
    "Added",
    "Assembler",
    "BrokenMessage",
    "Message",
    "Patience",
    "records",
    "split",
]

CHUNK_BYTES = 900_000  # Kafka's default limit of a record is 1,048,588 with headers
DONE_IDS = 1024  # finished sets whose repeats are known, per topic partition

Place = tuple[str, int, int]  # topic, partition, offset
PositionT = TypeVar("PositionT", bound=Place)
Interval = tuple[int, int]


def split(buffers: Sequence[Buffer], max_bytes: int = CHUNK_BYTES) -> list[bytes]:
    """Cut a message (flat buffers, one after another) into values of `max_bytes`, the last less.

    Every byte is copied once. What fits is one value.
    """
    values: list[bytes] = []
    pieces: list[Buffer] = []
    room = max_bytes
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view) > room:
            pieces.append(view[:room])
            values.append(b"".join(pieces))
            view, pieces, room = view[room:], [], max_bytes
        pieces.append(view)
        room -= len(view)
    values.append(b"".join(pieces))
    return values


def records(
    envelope: Envelope,
    max_bytes: int = CHUNK_BYTES,
    new_id: Callable[[], str] = lambda: os.urandom(8).hex(),
) -> list[tuple[Headers, bytes]]:
    """Encode an envelope: headers and value of each of its records, in the order to send them.

    All go to one partition, in order and by one coroutine. `new_id` names this sending: to send
    the envelope once more, call once more. Raises WireError as `encode` does.
    """
    buffers = encode(envelope)
    head = headers(envelope)
    values = split(buffers, max_bytes)
    if len(values) == 1:
        return [(head, values[0])]
    whole = xxh3_64()
    for value in values:
        whole.update(value)
    chunk = Chunk(new_id(), 0, len(values), encoded_size(buffers), whole.intdigest())
    return [((*head, chunk_header(chunk._replace(k=k))), v) for k, v in enumerate(values)]


class BrokenMessage(WireError, Generic[PositionT]):
    """A record that is no part of a message, or a set that will never be one.

    `positions` are to be settled; `origin` says whose outcome is an error (None: nobody knows).
    """

    def __init__(
        self, message: str, positions: tuple[PositionT, ...], origin: Origin | None
    ) -> None:
        super().__init__(message)
        self.positions, self.origin = positions, origin


@dataclass(frozen=True, slots=True)
class Message(Generic[PositionT]):
    """A whole message: `decode` it, and settle all its `positions` when it is done."""

    positions: tuple[PositionT, ...]
    buffer: Buffer
    origin: Origin


class Added(NamedTuple, Generic[PositionT]):
    """What a record completed, if anything, and which positions wait for nothing any more."""

    message: Message[PositionT] | None = None
    settled: tuple[PositionT, ...] = ()
    given_up: tuple[BrokenMessage[PositionT], ...] = ()


class Patience(NamedTuple):
    """When a set is given up: silent for `seconds`, in which `messages` whole ones came.

    Longer than a group takes to notice a death and the heir's messages to be answered.
    """

    messages: int = 256
    seconds: float = 90.0


@dataclass(slots=True)
class _Set(Generic[PositionT]):
    """The chunks so far of one message."""

    origin: Origin
    head: Chunk
    size: int  # of every chunk but the last
    missing: list[Interval]  # of its origin's, not in a message that came whole since
    positions: list[PositionT] = field(default_factory=list)
    held: dict[int, Buffer] = field(default_factory=dict)
    sum: xxh3_64 = field(default_factory=xxh3_64)
    summed: int = 0  # chunks in `sum`: all, if they come in order
    heard: float = 0.0  # when its last chunk came
    later: int = 0  # whole messages since

    def put(self, k: int, value: Buffer, now: float) -> None:
        self.heard, self.later = now, 0
        self.held[k] = value
        if k == self.summed:
            self.sum.update(value)
            self.summed += 1

    def joined(self) -> bytearray:
        """Return the message. Raises WireError if it is not the one that was sent."""
        whole = bytearray().join(self.held[k] for k in range(self.head.n))
        in_order = self.summed == self.head.n
        found = self.sum.intdigest() if in_order else xxh3_64_intdigest(whole)
        if found != self.head.checksum:
            raise WireError(
                f"message {self.head.id}: checksum does not match, its bytes were damaged"
            )
        return whole


@dataclass(slots=True)
class _Source(Generic[PositionT]):
    """One topic partition: its open sets, the oldest first, and the ids of the last closed ones."""

    sets: dict[str, _Set[PositionT]] = field(default_factory=dict)
    done: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def close(self, id_: str) -> tuple[PositionT, ...]:
        """Forget a set but for its id; return its positions."""
        self.done[id_] = None
        if len(self.done) > DONE_IDS:
            self.done.popitem(last=False)
        return tuple(self.sets.pop(id_).positions)


class Assembler(Generic[PositionT]):
    """Puts messages together from the records of any number of topic partitions.

    `max_bytes` caps one message, `max_sets` the messages open at once in a topic partition: more
    than the workers that send into it are never open for long. `patience` is for topics whose
    senders spread their messages; None: a set waits for ever. Records of a topic partition come
    in the log's order; after a seek back, `forget` it first. Not thread-safe.
    """

    def __init__(
        self,
        max_bytes: int,
        max_sets: int = 64,
        *,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes, self.max_sets = max_bytes, max_sets
        self._patience, self._clock = patience, clock
        self._sources: dict[tuple[str, int], _Source[PositionT]] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes that came of the open sets."""
        held = [s for source in self._sources.values() for s in source.sets.values()]
        return sum(len(value) for one in held for value in one.held.values())

    def held_positions(self, topic: str, partition: int) -> tuple[PositionT, ...]:
        """Return what was added of this topic partition and not yet handed back, rising."""
        source = self._sources.get((topic, partition))
        return tuple(sorted(p for s in source.sets.values() for p in s.positions)) if source else ()

    def forget(self, topic: str, partition: int) -> None:
        """Drop all state of a topic partition: it is read again, by us or by another."""
        self._sources.pop((topic, partition), None)

    def add(self, position: PositionT, headers: Headers, value: Buffer | None) -> Added[PositionT]:
        """Take a record. Every position comes back once: in a message, in `settled`, in an error.

        Sets that are `given_up` are errors, too, but beside a message that is none.


        Raises BrokenMessage for a record or a set that can never become a message.
        """
        source = self._sources.setdefault((position[0], position[1]), _Source())
        fields, origin = dict(headers), None
        try:
            origin = read_origin(fields)
            chunk = read_chunk(fields)
            if value is None:
                raise WireError("a record without a value")
            if chunk is None:
                return self._whole(source, origin, (position,), value)
            return self._part(source, origin, chunk, position, value)
        except BrokenMessage:
            raise
        except WireError as error:
            # a record that breaks takes the sets of its micro-batch along: they lack a chunk now
            ids = [id_ for id_, s in source.sets.items() if s.origin == origin]
            lost = [p for id_ in ids for p in source.close(id_)]
            raise BrokenMessage(str(error), (*lost, position), origin) from None

    def _whole(
        self,
        source: _Source[PositionT],
        origin: Origin,
        positions: tuple[PositionT, ...],
        buffer: Buffer,
    ) -> Added[PositionT]:
        if len(buffer) > self.max_bytes:
            raise WireError(f"message of {len(buffer)} bytes: over the limit of {self.max_bytes}")
        covered = []
        for id_, other in source.sets.items():
            if _alike(other.origin, origin):
                other.missing = _subtract(other.missing, origin.intervals())
                if not other.missing:
                    covered.append(id_)
        settled = tuple(p for id_ in covered for p in source.close(id_))
        return Added(Message(positions, buffer, origin), settled, self._give_up(source))

    def _give_up(self, source: _Source[PositionT]) -> tuple[BrokenMessage[PositionT], ...]:
        """Close the sets that nobody will finish or cover; a whole message came just now."""
        if self._patience is None or not source.sets:
            return ()
        messages, seconds = self._patience
        latest = self._clock() - seconds
        hopeless = []
        for id_, other in source.sets.items():
            other.later += 1
            if other.later >= messages and other.heard <= latest:
                hopeless.append((id_, other))
        return tuple(
            BrokenMessage(
                f"message {id_}: {len(other.held)} of {other.head.n} chunks came, and none in"
                f" {seconds:.0f} s and {other.later} other messages: its sender is gone",
                source.close(id_),
                other.origin,
            )
            for id_, other in hopeless
        )

    def _part(
        self,
        source: _Source[PositionT],
        origin: Origin,
        chunk: Chunk,
        position: PositionT,
        value: Buffer,
    ) -> Added[PositionT]:
        current = source.sets.get(chunk.id)
        if current is None and (chunk.k > 0 or chunk.id in source.done):
            return Added(settled=(position,))
        if current is None:
            current = self._open(origin, chunk, len(value))
            source.sets[chunk.id] = current
        _check_fit(current, origin, chunk, len(value))
        if chunk.k in current.held:
            return Added(settled=(position,))
        current.put(chunk.k, value, self._clock())
        if len(current.held) < chunk.n:
            current.positions.append(position)
            self._evict(source)
            return Added()
        whole = current.joined()
        positions = (*source.close(chunk.id), position)
        return self._whole(source, origin, positions, whole)

    def _open(self, origin: Origin, chunk: Chunk, size: int) -> _Set[PositionT]:
        """Start a set, if its claim makes sense."""
        if chunk.total > self.max_bytes:
            raise WireError(f"message of {chunk.total} bytes: over the limit of {self.max_bytes}")
        if not (chunk.n - 1) * size < chunk.total <= chunk.n * size:
            raise WireError(f"{chunk.n} chunks of {size} bytes are no {chunk.total} bytes")
        return _Set(origin, chunk, size, list(origin.intervals()))

    def _evict(self, source: _Source[PositionT]) -> None:
        if len(source.sets) <= self.max_sets:
            return
        id_, oldest = next(iter(source.sets.items()))
        raise BrokenMessage(
            f"message {id_}: {len(oldest.held)} of {oldest.head.n} chunks came before "
            f"{self.max_sets} others were begun",
            source.close(id_),
            oldest.origin,
        )


def _alike(one: Origin, other: Origin) -> bool:
    """Tell whether two micro-batches are of one kind, so that one may stand for the other."""
    return (one.partition, one.part, one.sender) == (other.partition, other.part, other.sender)


def _check_fit(current: _Set[PositionT], origin: Origin, chunk: Chunk, size: int) -> None:
    """Raise WireError for a chunk that is not of this set, or not where it says it is."""
    if chunk._replace(k=0) != current.head or origin != current.origin:
        raise WireError(f"message {chunk.id}: its chunks contradict each other")
    last = chunk.k == chunk.n - 1
    expected = chunk.total - chunk.k * current.size if last else current.size
    if size != expected:
        raise WireError(f"message {chunk.id}: chunk {chunk.k} of {size} bytes, not {expected}")


def _subtract(have: list[Interval], cut: Iterable[Interval]) -> list[Interval]:
    """Return what is left of rising intervals [from, to] without those in `cut`, rising too."""
    left: list[Interval] = []
    cuts = list(cut)
    for start, end in have:
        for low, high in cuts:
            if high < start or low > end:
                continue
            if start < low:
                left.append((start, low - 1))
            start = high + 1
        if start <= end:
            left.append((start, end))
    return left
