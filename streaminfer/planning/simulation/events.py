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
TICK = 0.004  # between two times at which the kernel looks who has a core (CONFIG_HZ=250)
HOT = 0.0005  # seconds for which a thread that was put off stays where its caches are
MOVES = 0.04  # until the kernel evens out cores: measured 30 to 60 ms, three threads on two
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

    __slots__ = ("args", "call", "homes", "left", "off", "rate", "until", "work")

    def __init__(self, work: Work, call: Call, args: tuple[Any, ...]) -> None:
        self.work, self.left, self.call, self.args = work, work.seconds, call, args
        # seconds of work to where it needs the lock while the loop has it: now, or never
        self.until = math.inf if work.stretch == math.inf else 0.0
        self.homes: list[int] = []  # the cores that its threads are on
        self.rate = 0.0  # seconds of work in a second
        self.off = 0.0  # when it was last put off for another

    @property
    def is_loop(self) -> bool:
        return self.work.stretch is None


class Cores:
    """Cores and the interpreter's lock, shared by all that runs.

    A thread runs on one core, as the kernel has it. It wakes on an empty one, or on the one it was
    on, where it goes first; at every tick the next one there has its turn. An empty core takes one
    that waits, unless that ran a moment ago: then at the tick. Three threads on two cores stay
    uneven until the kernel moves one, after MOVES seconds on the average:

        core 0   a███████████████████████        a has a core, b and c have turns on the other
        core 1   b████c████b████c████b███        |    |    |    | ticks

    The event loop keeps the lock for as long as it has something to do: CPython hands it over when
    the loop sleeps, or after SWITCH seconds. So a device's thread comes to the end of the operator
    that it is in, and waits:

        loop    ─────██████████─────────        device   ████████··········███████
                     has the lock                        operators     its next one

    `count` None: everybody has a core, and a lock, of their own.
    """

    def __init__(self, clock: Clock, count: float | None) -> None:
        self._clock, self._count = clock, count
        self._queues: list[list[_Task]] = [[] for _ in range(max(1, math.ceil(count or 1)))]
        self._tasks: list[_Task] = []
        self._since = 0.0
        self._version = 0
        self._held = False  # by a job of the loop that runs now
        self._opens = 0.0  # when those who wait for the lock run again
        self._granted = 0.0  # when the others last had the lock
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

    # ---- the lock --------------------------------------------------------------------------------

    def _hold(self) -> None:
        self._held = True
        if self._clock.now > self._opens:  # else nobody else had it in the meantime
            self._grant()

    def _grant(self) -> None:
        self._granted = self._clock.now
        for task in self._tasks:
            task.until = task.work.stretch or 0.0

    def _goes(self, task: _Task) -> bool:
        return task.is_loop or task.until > DONE or not self._closed()

    def _closed(self) -> bool:
        return self._held or self._clock.now < self._opens

    # ---- time ------------------------------------------------------------------------------------

    def _pass(self) -> None:
        now = self._clock.now
        seconds = now - self._since
        self._since = now
        if not seconds:
            return
        for task in self._tasks:
            done = seconds * task.rate
            task.left -= done
            task.until -= done

    def _plan(self) -> None:
        self._version += 1
        if not self._tasks or self._count is None:
            return
        now, closed = self._clock.now, self._closed()
        going = [task for task in self._tasks if self._goes(task)]
        self._place(going)
        self._set_rates(going, closed)
        due = math.inf
        for task in going:
            if task.rate:
                ends = min(task.left, task.until) if closed and not task.is_loop else task.left
                due = min(due, max(0.0, ends) / task.rate)
        due += now
        if any(len(queue) > 1 for queue in self._queues):
            due = min(due, self._tick())
        if self._held and len(going) < len(self._tasks):
            due = min(due, max(now, self._granted + SWITCH))
        elif closed and not self._held:
            due = min(due, self._opens)
        self._clock.at(due, self._end, self._version)

    def _tick(self) -> float:
        return (math.floor(self._clock.now / TICK + 1e-6) + 1) * TICK

    def _end(self, version: int) -> None:
        if version != self._version:  # somebody came in the meantime: it was planned anew
            return
        ticks = self._tick() - self._since > TICK  # it is one
        self._pass()
        now = self._clock.now
        ended = [task for task in self._tasks if task.left <= DONE]
        self._tasks = [task for task in self._tasks if task.left > DONE]
        for task in ended:
            self._sleep(task)
        if any(task.is_loop for task in ended):
            self._held, self._opens = False, now + WAKES
        elif self._held and now >= self._granted + SWITCH:
            self._grant()
        if ticks:
            self._turn()
        self._ending = True  # who goes on at once stays where it is
        for task in ended:
            task.call(*task.args)
        self._ending = False
        self._plan()

    # ---- cores -----------------------------------------------------------------------------------

    def _place(self, going: Sequence[_Task]) -> None:
        """Take threads that wait for the lock off their cores, and give those that begin one."""
        for task in self._tasks:
            if task.homes and not self._goes(task):
                self._sleep(task)
        for task in going:
            if not task.homes:
                self._wake(task)
        while (move := self._help(self._clock.now - HOT)) is not None:
            self._move(*move)

    def _sleep(self, task: _Task) -> None:
        for home in task.homes:
            self._queues[home].remove(task)
        if task.work.thread is not None:
            self._were[task.work.thread] = task.homes
        task.homes = []

    def _wake(self, task: _Task) -> None:
        """Choose a core for each of its threads, where it goes first: its last, or an empty one."""
        were = self._were.get(task.work.thread, [])
        for k in range(min(task.work.threads, len(self._queues))):
            loads = [len(queue) for queue in self._queues]
            home = were[k] if k < len(were) else loads.index(min(loads))
            if loads[home] and not min(loads):
                home = loads.index(0)
            task.homes.append(home)
            queue = self._queues[home]
            last = queue[0] if task.is_loop and queue else task
            last.off = self._clock.now
            queue.insert(0 if task.is_loop else len(queue), task)

    def _help(self, before: float) -> tuple[_Task, int, int] | None:
        """Find who waits on a core, for longer than since then, while another core is empty."""
        loads = [len(queue) for queue in self._queues]
        if min(loads) or max(loads) < 2:
            return None
        full = loads.index(max(loads))
        waits = [task for task in self._queues[full][1:] if task.off <= before]
        return (waits[0], full, loads.index(0)) if waits else None

    def _move(self, task: _Task, full: int, empty: int) -> None:
        task.homes[task.homes.index(full)] = empty
        self._queues[full].remove(task)
        self._queues[empty].append(task)

    def _turn(self) -> None:
        """Let the next one on every core have its turn, and even the cores out."""
        now = self._clock.now
        while (move := self._help(now)) is not None:
            self._move(*move)
        for queue in self._queues:
            if len(queue) > 1:
                queue[0].off = now
                queue.append(queue.pop(0))
        loads = [len(queue) for queue in self._queues]
        if max(loads) > max(1, min(loads)) and self._dice.random() < TICK / MOVES:
            full = loads.index(max(loads))
            self._move(self._queues[full][-1], full, loads.index(min(loads)))

    def _set_rates(self, going: Sequence[_Task], closed: bool) -> None:
        """Say how fast they go: by their cores, by the lock, by what devices share."""
        assert self._count is not None  # noqa: S101 - asked by _plan
        cut = min(1.0, self._count / len(self._queues))
        for task in self._tasks:
            first = sum(self._queues[home][0] is task for home in task.homes)
            task.rate = cut * first / task.work.threads
        locked = 0.0 if closed else sum(task.rate * task.work.locked for task in going)
        slow = [t.work.beside for t in going if t.work.beside > 1.0 and t.rate]
        factor = 1.0 / max(1.0, locked)
        if len(slow) > 1:
            factor *= len(slow) / sum(slow)
        for task in going:
            task.rate *= factor


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
