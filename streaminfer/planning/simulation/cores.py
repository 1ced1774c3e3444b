"""What threads of one process share in simulated time: cores, and the interpreter's lock.

Work    what a thread does, and how often it needs the lock for it
Cores   who runs, where, and how fast
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from streaminfer.planning.simulation.events import Call, Clock

__all__ = ["DONE", "Cores", "Work"]

DONE = 1e-12  # seconds of work that count as none
SWITCH = 0.005  # seconds after which CPython takes the lock from who has it
WAKES = 60e-6  # seconds until a thread that waits for the lock runs, if nobody took it again
HANDED = 100e-6  # seconds from there to where the next one that waits has it
TICK = 0.004  # between two times at which the kernel looks who has a core (CONFIG_HZ=250)
HOT = 0.0005  # seconds for which a thread that was put off stays where its caches are
PATIENCE = 2  # ticks of an empty core that finds none but those; then it takes one
# a thread that another wakes, counted in 10 s of the kernel's scheduler, 25,000 wakes, two cores:
PULLED = 0.28  # to the waker's core, though its own is empty
SPREAD = 0.24  # to an empty core, though its own is the waker's; to each of several
PREEMPTS = 0.5  # on a core that somebody has: at once
MOVES = 0.04  # until the kernel evens out cores: measured 30 to 60 ms, three threads on two


class Work(NamedTuple):
    """What a thread does.

    Attributes:
        seconds: on a core of its own.
        threads: cores that it keeps busy; without one of them it stands still.
        locked: 0-1: of the seconds, with the interpreter's lock.
        stretch: seconds between two times that it takes the lock; inf: it never does; None: the
            loop, which keeps it.
        beside: times that it takes as long while another device computes: they share caches.
        thread: whose work it is: it goes on where it was, and wakes up there.
    """

    seconds: float
    threads: int = 1
    locked: float = 1.0
    stretch: float | None = None
    beside: float = 1.0
    thread: object = None


class _Task:
    """Work that is under way."""

    __slots__ = ("args", "call", "homes", "left", "off", "rate", "until", "waits", "woken", "work")

    def __init__(self, work: Work, call: Call, args: tuple[Any, ...]) -> None:
        self.work, self.left, self.call, self.args = work, work.seconds, call, args
        # seconds of work to where it needs the lock while the loop has it: now, or never
        self.until = math.inf if work.stretch == math.inf else 0.0
        self.homes: list[_Core] = []  # that its threads are on
        self.rate = 0.0  # seconds of work in a second
        self.off = 0.0  # when it was last put off for another
        self.waits = False  # for the lock
        self.woken = False  # by another thread, not by a timer

    @property
    def is_loop(self) -> bool:
        return self.work.stretch is None

    @property
    def runs(self) -> int:
        """Return how many of its threads have their core."""
        return sum(core.queue[0] is self for core in self.homes)

    def pace(self) -> float:
        """Return 0-1: how fast its threads go, that wait for each other behind every operator.

        Those of two tasks have the cores by turns.
        """
        others = [core.queue[0].work for core in self.homes if core.queue[0] is not self]
        if any(other.threads == 1 for other in others) and self.work.threads > 1:
            return 0.0
        return self.runs / self.work.threads


class _Core:
    """A core: who has it, and who waits for it."""

    __slots__ = ("queue",)

    def __init__(self) -> None:
        self.queue: list[_Task] = []

    def add(self, task: _Task, now: float, *, at_once: bool) -> None:
        """Let it have the core at once, or wait for its turn."""
        task.homes.append(self)
        if self.queue and not at_once:
            task.off = now
            self.queue.append(task)
            return
        if self.queue:
            self.queue[0].off = now
        self.queue.insert(0, task)

    def remove(self, task: _Task) -> None:
        self.queue.remove(task)
        task.homes.remove(self)

    def turn(self, now: float) -> None:
        """Give it to the next one, at a tick."""
        if len(self.queue) > 1:
            self.queue[0].off = now
            self.queue.append(self.queue.pop(0))


class _Asleep(NamedTuple):
    """A thread that has nothing to do: where it was, whether it ran there, and since when."""

    homes: Sequence[_Core]
    ran: bool
    when: float


class Cores:
    """Cores and the interpreter's lock, shared by all that runs.

    A thread runs on one core, as the kernel has it. A timer wakes it on the core that it was on: an
    empty core of a virtual machine has stopped, and the kernel does not take it for idle. There it
    has slept while others ran, so it goes first, and who had the core waits. Whom a thread wakes
    may come to where that one runs. At every tick the next one has its turn, and an empty core
    takes one that waits, unless all of them ran a moment ago. Three threads on two cores stay
    uneven until the kernel moves one, after MOVES seconds on the average:

        core 0   a███████████████████████        a has a core, b and c have turns on the other
        core 1   b████c████b████c████b███        |    |    |    | ticks

    The event loop keeps the lock for as long as it has something to do: CPython hands it over when
    the loop sleeps, or after SWITCH seconds, to the first one that waits; the next one has it once
    that one is in torch. So a device's thread comes to the end of the operator, or the script, that
    it is in, and waits:

        loop    ─────██████████─────────        device   ████████··········███████
                     has the lock                        in torch      its next call

    `count` None: everybody has a core, and a lock, of their own.
    """

    def __init__(self, clock: Clock, count: float | None) -> None:
        self._clock, self._count = clock, count
        self._cores = [_Core() for _ in range(max(1, math.ceil(count or 1)))]
        self._tasks: list[_Task] = []
        self._since = 0.0
        self._version = 0
        self._held = False  # by a job of the loop that runs now
        self._opens = 0.0  # when others can have the lock, which the loop let go of
        self._taken = 0.0  # when the loop last took it from others
        self._waiting: deque[_Task] = deque()
        self._next = 0.0  # when the first of them has it
        self._asleep: dict[object, _Asleep] = {}
        self._failed = 0  # ticks at which an empty core found nobody to take
        self._dice = random.Random(0)  # noqa: S311 - no secret
        self._ending = False

    @property
    def shared(self) -> bool:
        """Whether there are only so many, for all."""
        return self._count is not None

    def run(self, work: Work, call: Call, *args: Any) -> None:
        """Do some work, then call."""
        if self._count is None:
            self._clock.at(self._clock.now + work.seconds, call, *args)
            return
        self._pass()
        task = _Task(work, call, args)
        task.woken = self._ending
        self._tasks.append(task)
        if not self._ending:
            self._plan()

    # ---- the lock --------------------------------------------------------------------------------

    def _hold(self) -> bool:
        """Let the loop take the lock once it has a core; return whether it did."""
        if self._held or not any(task.is_loop and task.runs for task in self._tasks):
            return False
        self._held, now = True, self._clock.now
        if now > self._opens:  # else nobody else had it in the meantime
            self._taken = now
            for task in self._tasks:
                if not task.waits:
                    task.until = self._dice.random() * (task.work.stretch or 0.0)
        self._next = max(now, self._taken + SWITCH)
        return True

    def _let_go(self) -> None:
        """Let the loop sleep: those that wait have the lock, one after the other."""
        self._held = False
        self._opens = self._next = self._clock.now + WAKES

    def _grant(self) -> None:
        """Let the first one that waits have the lock."""
        now = self._clock.now
        first = self._waiting.popleft()
        first.waits, first.until, first.woken = False, first.work.stretch or 0.0, True
        if self._held:
            self._taken = now
        self._next = now + (SWITCH if self._held else HANDED)

    def _want(self) -> None:
        """Let those wait that have come to where they need the lock."""
        if not self._closed():
            return
        for task in self._tasks:
            if not task.is_loop and not task.waits and task.until <= DONE:
                task.waits = True
                self._waiting.append(task)

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
        self._place()
        if self._hold():
            self._place()
        now, closed = self._clock.now, self._closed()
        going = [task for task in self._tasks if task.homes]
        self._set_rates(going, closed)
        due = math.inf
        for task in going:
            if task.rate:
                ends = min(task.left, task.until) if closed and not task.is_loop else task.left
                due = min(due, max(0.0, ends) / task.rate)
        due += now
        if any(len(core.queue) > 1 for core in self._cores):
            due = min(due, self._tick())
        if self._waiting:
            due = min(due, max(now, self._next))
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
        if ticks:
            self._turn()
        for task in ended:
            self._sleep(task)
        if any(task.is_loop for task in ended):
            self._let_go()
        elif self._waiting and now >= self._next:
            self._grant()
        self._ending = True  # who goes on at once stays where it is
        for task in ended:
            task.call(*task.args)
        self._ending = False
        self._plan()

    # ---- cores -----------------------------------------------------------------------------------

    def _place(self) -> None:
        """Take threads that wait for the lock off their cores, and give those that begin one."""
        self._want()
        for task in self._tasks:
            if task.homes and task.waits:
                self._sleep(task)
        begin = [task for task in self._tasks if not task.waits and not task.homes]
        for task in sorted(begin, key=self._paused):  # who goes on at once is where it was
            self._wake(task)

    def _paused(self, task: _Task) -> bool:
        was = self._asleep.get(task.work.thread)
        return was is None or was.when < self._clock.now

    def _sleep(self, task: _Task) -> None:
        now, homes = self._clock.now, tuple(task.homes)
        if task.work.thread is not None:
            self._asleep[task.work.thread] = _Asleep(homes, homes[0].queue[0] is task, now)
        for core in homes:
            core.remove(task)

    def _wake(self, task: _Task) -> None:
        """Put each of its threads where it was; those that are new, where it is emptiest."""
        now, was = self._clock.now, self._asleep.get(task.work.thread)
        for k in range(min(task.work.threads, len(self._cores))):
            at_once = not task.woken or self._dice.random() < PREEMPTS
            if not was or k >= len(was.homes):
                core = min(self._cores, key=lambda core: len(core.queue))
            elif was.when == now:
                core, at_once = was.homes[k], was.ran
            else:
                core = self._drawn(was.homes[k]) if task.woken else was.homes[k]
            core.add(task, now, at_once=at_once)

    def _drawn(self, home: _Core) -> _Core:
        """Return where a thread wakes that another one wakes, and whose home this is."""
        others = [core for core in self._cores if core is not home]
        empty = [core for core in others if not core.queue]
        seen = self._dice.random() > (1 - SPREAD) ** len(empty)
        if home.queue:
            return empty[0] if seen else home
        full = [core for core in others if core.queue]
        pulled = full and not seen and self._dice.random() < PULLED
        return full[0] if pulled else home

    def _turn(self) -> None:
        """Let the next one on every core have its turn, and even the cores out."""
        now = self._clock.now
        for core in self._cores:
            core.turn(now)
        while True:
            full = max(self._cores, key=lambda core: len(core.queue))
            least = min(self._cores, key=lambda core: len(core.queue))
            if least.queue or len(full.queue) < 2:
                break
            before = now - HOT if self._failed < PATIENCE else now
            taken = next((task for task in full.queue[1:] if task.off <= before), None)
            if taken is None:
                self._failed += 1
                return
            self._failed = 0
            self._move(taken, full, least)
        most = len(full.queue)
        if most > max(1, len(least.queue)) and self._dice.random() < TICK / MOVES:
            self._move(full.queue[-1], full, least)

    def _move(self, task: _Task, full: _Core, least: _Core) -> None:
        full.remove(task)
        least.add(task, self._clock.now, at_once=True)

    def _set_rates(self, going: Sequence[_Task], closed: bool) -> None:
        """Say how fast they go: by their cores, by the lock, by what devices share."""
        assert self._count is not None  # noqa: S101 - asked by _plan
        cut = min(1.0, self._count / len(self._cores))
        for task in self._tasks:
            task.rate = cut * task.pace()
        locked = 0.0 if closed else sum(task.rate * task.work.locked for task in going)
        slow = [t.work.beside for t in going if t.work.beside > 1.0 and t.rate]
        factor = 1.0 / max(1.0, locked)
        if len(slow) > 1:
            factor *= len(slow) / sum(slow)
        for task in going:
            task.rate *= factor
