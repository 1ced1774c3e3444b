"""Which partition of an inner topic an envelope takes when the edge into it balances.

    images        p0 ████████████████   p1 █   p2 ▁        nine in ten have one key
    preserve      p0 ████████████████   p1 █   p2 ▁        one replica works, the others wait
    balance       p0 ██████   p1 ██████   p2 █████         order comes back at the sink

Least bytes on their way first (a broker that is slow to ack gets less), then least bytes sent so
far, then in turn. All of an envelope's chunks take one partition, and so does its second try: a
half that the first one left is covered there.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from streaminfer.wire import Envelope

__all__ = ["Spread"]


class Spread:
    """One sender's view of one topic. It begins anywhere: senders don't all begin at 0."""

    def __init__(self, partitions: int, begin: int | None = None) -> None:
        begin = random.randrange(partitions) if begin is None else begin  # noqa: S311 - no secret
        self._turn = [(number + begin) % partitions for number in range(partitions)]
        self._unacked = [0] * partitions
        self._sent = [0] * partitions
        self._placed: dict[int, tuple[int, int]] = {}  # by id(): those placed live until acked

    def place(self, envelope: Envelope, nbytes: int) -> int:
        """Return the partition of an envelope; the same one until it is acked."""
        key = id(envelope)
        if key not in self._placed:
            to = min(self._turn, key=lambda number: (self._unacked[number], self._sent[number]))
            self._turn.remove(to)
            self._turn.append(to)
            self._placed[key] = to, nbytes
            self._unacked[to] += nbytes
            self._sent[to] += nbytes
        return self._placed[key][0]

    def acked(self, envelopes: Iterable[Envelope]) -> None:
        """Note what has arrived."""
        for envelope in envelopes:
            if placed := self._placed.pop(id(envelope), None):
                self._unacked[placed[0]] -= placed[1]
