"""Simulated time, and what is shared in it: cores, the interpreter's lock, an event loop.

Clock   what happens when: a heap of calls
Cores   work that runs at once slows each other down: processor sharing
Loop    an asyncio loop: jobs one after the other, first come, first served
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Clock", "Cores", "Gauge", "Loop"]

Call = Callable[..., None]
DONE = 1e-12  # seconds of work that count as none


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


class _Task:
    """Work that is under way."""

    __slots__ = ("args", "call", "left", "python", "threads")

    def __init__(
        self, left: float, threads: int, python: float, call: Call, args: tuple[Any, ...]
    ) -> None:
        self.left, self.threads, self.python = left, threads, python
        self.call, self.args = call, args


class Cores:
    """Cores shared by all that runs: n threads on c cores each go at min(1, c / n).

    `python` is the part of a task that needs the interpreter's lock: those parts together are
    never more than 1, whatever the cores. `count` None: everybody has a core of their own.
    """

    def __init__(self, clock: Clock, count: float | None) -> None:
        self._clock, self._count = clock, count
        self._tasks: list[_Task] = []
        self._since = 0.0
        self._rate = 1.0
        self._version = 0

    def run(self, work: float, threads: int, python: float, call: Call, *args: Any) -> None:
        """Do `work` seconds of work, then call."""
        if self._count is None:
            self._clock.at(self._clock.now + work, call, *args)
            return
        self._pass()
        self._tasks.append(_Task(work, threads, python, call, args))
        self._plan()

    def _pass(self) -> None:
        now = self._clock.now
        done = (now - self._since) * self._rate
        self._since = now
        if done:
            for task in self._tasks:
                task.left -= done

    def _plan(self) -> None:
        self._version += 1
        if not self._tasks or self._count is None:
            return
        threads = sum(task.threads for task in self._tasks)
        locked = sum(task.python for task in self._tasks)
        self._rate = min(1.0, self._count / threads, 1.0 / locked if locked else math.inf)
        first = min(task.left for task in self._tasks)
        self._clock.at(self._clock.now + max(0.0, first) / self._rate, self._end, self._version)

    def _end(self, version: int) -> None:
        if version != self._version:  # somebody came in the meantime: it was planned anew
            return
        self._pass()
        ended = [task for task in self._tasks if task.left <= DONE]
        self._tasks = [task for task in self._tasks if task.left > DONE]
        self._plan()
        for task in ended:
            task.call(*task.args)


class Loop:
    """One thread's event loop. A job takes the lock for all of its time, then its call runs."""

    def __init__(self, clock: Clock, cores: Cores) -> None:
        self._clock, self._cores = clock, cores
        self._jobs: deque[tuple[float, Call, tuple[Any, ...]]] = deque()
        self._working = False
        self.busy = 0.0  # seconds of work done
        self.behind = 0.0  # seconds of work that wait

    def do(self, cost: float, call: Call, *args: Any) -> None:
        """Queue a job of so many seconds; `call(*args)` comes at its end."""
        if not cost and not self._working:
            call(*args)
            return
        self._jobs.append((cost, call, args))
        self.behind += cost
        if not self._working:
            self._next()

    def _next(self) -> None:
        self._working = True
        cost, call, args = self._jobs.popleft()
        self.behind -= cost
        self._cores.run(cost, 1, 1.0, self._ended, cost, call, args)

    def _ended(self, cost: float, call: Call, args: tuple[Any, ...]) -> None:
        self.busy += cost
        self._working = False
        call(*args)
        if self._jobs and not self._working:
            self._next()


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
