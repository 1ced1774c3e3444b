"""Simulated time.

Clock   what happens when: a heap of calls
Gauge   a number over time
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

__all__ = ["Call", "Clock", "Gauge"]

Call = Callable[..., None]


class Clock:
    """Simulated seconds. What is due at one time runs in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Call, tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when: float, call: Call, *args: Any) -> None:
        """Run `call(*args)` at a time, now if that is past."""
        self._count += 1
        heapq.heappush(self._heap, (max(when, self.now), self._count, call, args))

    def run(self, until: float) -> None:
        """Let time pass up to `until`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, call, args = heapq.heappop(heap)
            self.events += 1
            call(*args)
        self.now = until


class Gauge:
    """A number over time: its largest value, and its mean from `since` on."""

    __slots__ = ("_at", "_clock", "_since", "_sum", "largest", "value")

    def __init__(self, clock: Clock, since: float) -> None:
        self._clock, self._since = clock, since
        self.value = self.largest = 0.0
        self._at = since
        self._sum = 0.0

    def add(self, change: float) -> None:
        """Change it now."""
        now = self._clock.now
        if now > self._at:
            self._sum += self.value * (now - self._at)
            self._at = now
        self.value += change
        if now >= self._since and self.value > self.largest:
            self.largest = self.value

    def mean(self) -> float:
        """Return the mean so far."""
        self.add(0.0)
        span = self._at - self._since
        return self._sum / span if span > 0 else self.value
