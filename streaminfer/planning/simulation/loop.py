"""An event loop in simulated time: one thread, whose jobs have turns."""

from __future__ import annotations

from collections import deque
from typing import Any

from streaminfer.planning.simulation.cores import DONE, Cores, Work
from streaminfer.planning.simulation.events import Call, Clock

__all__ = ["Loop"]

STEP = 50e-6  # seconds that a task runs on the average before it awaits something


class Loop:
    """One thread's event loop. A job takes the lock for all of its time, then its call runs.

    Where all share the cores, jobs that wait have turns, as tasks give way to each other where they
    await; where a worker has its own, they come one after the other: few wait there. The first job
    after a pause takes `wake` seconds longer.
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
        now = min(cost, STEP) if self._jobs and self._cores.shared else cost
        self.behind -= now
        self._cores.run(Work(now, thread=self), self._ended, now, cost - now, call, args)

    def _ended(self, cost: float, left: float, call: Call, args: tuple[Any, ...]) -> None:
        self.busy += cost
        self._working = False
        self._idle_since = self._clock.now
        if left > DONE:
            self._jobs.append((left, call, args))
        else:
            call(*args)
        if self._jobs and not self._working:
            self._next()
