"""Simulated time, and what is shared in it: cores, the interpreter's lock, an event loop.

Clock   what happens when: a heap of calls
Cores   work that runs at once slows each other down: processor sharing
Loop    an asyncio loop: jobs one after the other, first come, first served
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["Clock", "Cores", "Gauge", "Loop", "Work"]

Call = Callable[..., None]
DONE = 1e-12  # seconds of work that count as none
SWITCH = 0.005  # seconds after which CPython takes the lock from who has it
WAKES = 60e-6  # seconds until a thread that waits for the lock runs, if nobody took it again


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


class Work(NamedTuple):
    """What a thread does.

    Attributes:
        seconds: on a core of its own.
        threads: cores that it keeps busy.
        locked: 0-1: of the seconds, with the interpreter's lock.
        stretch: seconds between two times that it takes the lock; inf: it never does; None: the
            loop, which keeps it.
        beside: times that it takes as long while another device computes: they share caches.
    """

    seconds: float
    threads: int = 1
    locked: float = 1.0
    stretch: float | None = None
    beside: float = 1.0


class _Task:
    """Work that is under way."""

    __slots__ = ("args", "call", "left", "until", "work")

    def __init__(self, work: Work, call: Call, args: tuple[Any, ...]) -> None:
        self.work, self.left, self.call, self.args = work, work.seconds, call, args
        # seconds of work to where it needs the lock while the loop has it: now, or never
        self.until = math.inf if work.stretch == math.inf else 0.0


class Cores:
    """Cores and the interpreter's lock, shared by all that runs.

    n threads on c cores each go at min(1, c / n). The event loop keeps the lock for as long as it
    has something to do: CPython hands it over when the loop sleeps, or after SWITCH seconds. So a
    device's thread comes to the end of the operator that it is in, and waits:

        loop    ─────██████████─────────        device   ████████··········███████
                     has the lock                        operators     its next one

    `count` None: everybody has a core, and a lock, of their own.
    """

    def __init__(self, clock: Clock, count: float | None) -> None:
        self._clock, self._count = clock, count
        self._tasks: list[_Task] = []
        self._going: list[_Task] = []
        self._since = 0.0
        self._rate = 1.0
        self._version = 0
        self._held = False  # by a job of the loop that runs now
        self._opens = 0.0  # when those who wait for the lock run again
        self._granted = 0.0  # when the others last had the lock

    def run(self, work: Work, call: Call, *args: Any) -> None:
        """Do some work, then call."""
        if self._count is None:
            self._clock.at(self._clock.now + work.seconds, call, *args)
            return
        self._pass()
        if work.stretch is None:
            self._hold()
        self._tasks.append(_Task(work, call, args))
        self._plan()

    def _hold(self) -> None:
        self._held = True
        if self._clock.now > self._opens:  # else nobody else had it in the meantime
            self._grant()

    def _grant(self) -> None:
        self._granted = self._clock.now
        for task in self._tasks:
            task.until = task.work.stretch or 0.0

    def _goes(self, task: _Task) -> bool:
        return task.work.stretch is None or task.until > DONE or not self._closed()

    def _closed(self) -> bool:
        return self._held or self._clock.now < self._opens

    def _pass(self) -> None:
        now = self._clock.now
        done = (now - self._since) * self._rate
        self._since = now
        if not done:
            return
        for task in self._going:
            task.left -= done
            task.until -= done

    def _plan(self) -> None:
        self._version += 1
        if not self._tasks or self._count is None:
            return
        now, closed = self._clock.now, self._closed()
        self._going = going = [task for task in self._tasks if self._goes(task)]
        self._rate = self._speed(going, closed)
        firsts = [task.left for task in going]
        if closed:
            firsts += [task.until for task in going if task.work.stretch is not None]
        due = now + max(0.0, min(firsts)) / self._rate if firsts else math.inf
        if self._held and len(going) < len(self._tasks):
            due = min(due, max(now, self._granted + SWITCH))
        elif closed and not self._held:
            due = min(due, self._opens)
        self._clock.at(due, self._end, self._version)

    def _speed(self, going: Sequence[_Task], closed: bool) -> float:
        """Return how fast they go: by cores, by the lock, by what devices share."""
        if not going or self._count is None:
            return 1.0
        threads = sum(task.work.threads for task in going)
        locked = 0.0 if closed else sum(task.work.locked for task in going)
        rate = min(1.0, self._count / threads, 1.0 / locked if locked else math.inf)
        slow = [task.work.beside for task in going if task.work.beside > 1.0]
        return rate * len(slow) / sum(slow) if len(slow) > 1 else rate

    def _end(self, version: int) -> None:
        if version != self._version:  # somebody came in the meantime: it was planned anew
            return
        self._pass()
        ended = [task for task in self._tasks if task.left <= DONE]
        self._tasks = [task for task in self._tasks if task.left > DONE]
        if any(task.work.stretch is None for task in ended):
            self._held, self._opens = False, self._clock.now + WAKES
        elif self._held and self._clock.now >= self._granted + SWITCH:
            self._grant()
        self._plan()
        for task in ended:
            task.call(*task.args)


class Loop:
    """One thread's event loop. A job takes the lock for all of its time, then its call runs.

    The first job after a pause takes `wake` seconds longer.
    """

    def __init__(self, clock: Clock, cores: Cores, wake: float = 0.0) -> None:
        self._clock, self._cores, self._wake = clock, cores, wake
        self._jobs: deque[tuple[float, Call, tuple[Any, ...]]] = deque()
        self._working = False
        self._idle_since = 0.0
        self.wakes = 0  # times that it began again
        self.busy = 0.0  # seconds of work done
        self.behind = 0.0  # seconds of work that wait

    def do(self, cost: float, call: Call, *args: Any) -> None:
        """Queue a job of so many seconds; `call(*args)` comes at its end."""
        if not cost and not self._working:
            call(*args)
            return
        if not self._working and self._clock.now > self._idle_since:
            self.wakes += 1
            cost += self._wake
        self._jobs.append((cost, call, args))
        self.behind += cost
        if not self._working:
            self._next()

    def _next(self) -> None:
        self._working = True
        cost, call, args = self._jobs.popleft()
        self.behind -= cost
        self._cores.run(Work(cost), self._ended, cost, call, args)

    def _ended(self, cost: float, call: Call, args: tuple[Any, ...]) -> None:
        self.busy += cost
        self._working = False
        self._idle_since = self._clock.now
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
