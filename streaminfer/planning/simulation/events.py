"""Simulated time, and what is shared in it: cores, the interpreter's lock, an event loop.

Clock   what happens when: a heap of calls
Cores   threads that run at once slow each other down
Loop    an asyncio loop: jobs one after the other, first come, first served
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["Clock", "Cores", "Gauge", "Loop", "Work"]

Call = Callable[..., None]
DONE = 1e-12  # seconds of work that count as none
SWITCH = 0.005  # seconds after which CPython takes the lock from who has it
SLICE = 0.003  # seconds that a thread has a core before others on it get their share
MOVES = 0.04  # until the kernel evens out a core: measured 30 to 60 ms, three threads on two cores
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
        thread: whose work it is: it goes on where it was, or wakes up there if it can.
    """

    seconds: float
    threads: int = 1
    locked: float = 1.0
    stretch: float | None = None
    beside: float = 1.0
    thread: object = None


class _Task:
    """Work that is under way."""

    __slots__ = ("args", "call", "homes", "left", "rate", "until", "work")

    def __init__(self, work: Work, call: Call, args: tuple[Any, ...]) -> None:
        self.work, self.left, self.call, self.args = work, work.seconds, call, args
        # seconds of work to where it needs the lock while the loop has it: now, or never
        self.until = math.inf if work.stretch == math.inf else 0.0
        self.homes: list[int] = []  # the cores that its threads are on
        self.rate = 0.0  # seconds of work in a second

    @property
    def is_loop(self) -> bool:
        return self.work.stretch is None


class Cores:
    """Cores and the interpreter's lock, shared by all that runs.

    A thread runs on one core. It wakes on an empty one, or on the one it was on, which it shares
    with those that are there; a core that becomes empty takes one from another at once. Three
    threads on two cores stay uneven until the kernel moves one, after MOVES seconds on the average:

        core 0   a████████████ b██c██b██c██      a gets a whole core, b and c get halves;
        core 1   b██c██b██c██b a████████████     then b moves

    The event loop's thread runs at once when it wakes; after SLICE seconds it is one of them.

    The event loop keeps the lock for as long as it has something to do: CPython hands it over when
    the loop sleeps, or after SWITCH seconds. So a device's thread comes to the end of the operator
    that it is in, and waits:

        loop    ─────██████████─────────        device   ████████··········███████
                     has the lock                        operators     its next one

    `count` None: everybody has a core, and a lock, of their own.
    """

    def __init__(self, clock: Clock, count: float | None) -> None:
        self._clock, self._count = clock, count
        self._places = max(1, math.ceil(count or 1))
        self._tasks: list[_Task] = []
        self._going: list[_Task] = []
        self._since = 0.0
        self._version = 0
        self._held = False  # by a job of the loop that runs now
        self._opens = 0.0  # when those who wait for the lock run again
        self._granted = 0.0  # when the others last had the lock
        self._fresh = 0.0  # until when the loop's thread goes first
        self._ended = -math.inf  # when the loop last had nothing to do
        self._moves = math.inf  # when a thread goes to an emptier core
        self._were: dict[object, list[int]] = {}  # the cores of threads that sleep
        self._dice = random.Random(0)  # noqa: S311 - no secret
        self._ending = False

    def run(self, work: Work, call: Call, *args: Any) -> None:
        """Do some work, then call."""
        if self._count is None:
            self._clock.at(self._clock.now + work.seconds, call, *args)
            return
        self._pass()
        task = _Task(work, call, args)
        if task.is_loop:
            self._hold()
        self._tasks.append(task)
        if not self._ending:
            self._plan()

    def _hold(self) -> None:
        now = self._clock.now
        self._held = True
        if now > self._opens:  # else nobody else had it in the meantime
            self._grant()
        if now > self._ended:
            self._fresh = now + SLICE

    def _grant(self) -> None:
        self._granted = self._clock.now
        for task in self._tasks:
            task.until = task.work.stretch or 0.0

    def _goes(self, task: _Task) -> bool:
        return task.is_loop or task.until > DONE or not self._closed()

    def _closed(self) -> bool:
        return self._held or self._clock.now < self._opens

    def _pass(self) -> None:
        now = self._clock.now
        seconds = now - self._since
        self._since = now
        if not seconds:
            return
        for task in self._going:
            done = seconds * task.rate
            task.left -= done
            task.until -= done

    def _plan(self) -> None:
        self._version += 1
        if not self._tasks or self._count is None:
            return
        now, closed = self._clock.now, self._closed()
        self._going = going = [task for task in self._tasks if self._goes(task)]
        self._settle(self._place(going))
        self._set_rates(going, closed)
        due = math.inf
        for task in going:
            if task.rate:
                ends = closed and not task.is_loop
                due = min(due, max(0.0, min(task.left, task.until) if ends else task.left)
                          / task.rate)  # fmt: skip
        due = min(now + due, self._moves)
        if self._held:
            if now < self._fresh:
                due = min(due, self._fresh)
            if len(going) < len(self._tasks):
                due = min(due, max(now, self._granted + SWITCH))
        elif closed:
            due = min(due, self._opens)
        self._clock.at(due, self._end, self._version)

    def _place(self, going: Sequence[_Task]) -> list[int]:
        """Give threads that begin a core; return how many are on each."""
        for task in self._tasks:
            if task.homes and not self._goes(task):
                self._sleep(task)
        loads = [0] * self._places
        for task in going:
            for home in task.homes:
                loads[home] += 1
        for task in going:
            if not task.homes:
                task.homes = self._homes(task, loads)
        while not min(loads) and max(loads) > 1:  # an empty core helps at once
            self._move(going, loads)
        return loads

    def _sleep(self, task: _Task) -> None:
        self._were[task.work.thread or task], task.homes = task.homes, []

    def _homes(self, task: _Task, loads: list[int]) -> list[int]:
        """Choose a core for each of its threads: an empty one, where it was, the emptiest."""
        were = self._were.pop(task.work.thread or task, [])
        homes = []
        for k in range(task.work.threads):
            home = were[k] if k < len(were) else loads.index(min(loads))
            if loads[home] and not min(loads):
                home = loads.index(0)
            homes.append(home)
            loads[home] += 1
        return homes

    def _move(self, going: Sequence[_Task], loads: list[int]) -> None:
        full, empty = loads.index(max(loads)), loads.index(min(loads))
        task = self._dice.choice([task for task in going if full in task.homes])
        task.homes[task.homes.index(full)] = empty
        loads[full] -= 1
        loads[empty] += 1

    def _settle(self, loads: Sequence[int]) -> None:
        """Say when a thread moves: never, while all cores have as many."""
        if max(loads) <= 1 or max(loads) == min(loads):
            self._moves = math.inf
        elif self._moves == math.inf:
            self._moves = self._clock.now + self._dice.expovariate(1 / MOVES)

    def _set_rates(self, going: Sequence[_Task], closed: bool) -> None:
        """Say how fast they go: by their cores, by the lock, by what devices share."""
        assert self._count is not None  # noqa: S101 - asked by _plan
        first = self._clock.now < self._fresh
        loops = {home for task in going if task.is_loop for home in task.homes} if first else set()
        loads = [0] * self._places
        for task in going:
            for home in task.homes:
                loads[home] += task.is_loop or home not in loops
        cut = min(1.0, self._count / self._places)
        for task in going:
            waits = not task.is_loop and any(home in loops for home in task.homes)
            task.rate = 0.0 if waits else cut / max(loads[home] for home in task.homes)
        locked = 0.0 if closed else sum(task.rate * task.work.locked for task in going)
        slow = [task.work.beside for task in going if task.work.beside > 1.0]
        factor = 1.0 / max(1.0, locked)
        if len(slow) > 1:
            factor *= len(slow) / sum(slow)
        for task in going:
            task.rate *= factor

    def _end(self, version: int) -> None:
        if version != self._version:  # somebody came in the meantime: it was planned anew
            return
        self._pass()
        now = self._clock.now
        if now >= self._moves:
            self._moves = math.inf
            self._move(self._going, self._loads())
        ended = [task for task in self._tasks if task.left <= DONE]
        self._tasks = [task for task in self._tasks if task.left > DONE]
        for task in ended:
            if task.work.thread is not None:
                self._sleep(task)
        if any(task.is_loop for task in ended):
            self._held, self._opens, self._ended = False, now + WAKES, now
        elif self._held and now >= self._granted + SWITCH:
            self._grant()
        self._ending = True  # who goes on at once stays where it is
        for task in ended:
            task.call(*task.args)
        self._ending = False
        self._plan()

    def _loads(self) -> list[int]:
        loads = [0] * self._places
        for task in self._going:
            for home in task.homes:
                loads[home] += 1
        return loads


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
        self._cores.run(Work(cost, thread=self), self._ended, cost, call, args)

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
