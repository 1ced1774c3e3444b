"""A device in simulated time: which calls it merges, and when it begins: runtime/forward.py."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from streaminfer.planning.simulation.cores import Cores, Work
from streaminfer.planning.simulation.events import Clock
from streaminfer.planning.simulation.loop import Loop
from streaminfer.planning.simulation.scenario import Host, Link, SimStage
from streaminfer.planning.simulation.tally import Batch, Tally

if TYPE_CHECKING:
    from streaminfer.planning.simulation.road import Worker

__all__ = ["Device", "Machine"]

HELD = 10e-6  # seconds of the interpreter's lock, each time that a device's thread takes it


class Machine(NamedTuple):
    """What all parts of a simulation share."""

    clock: Clock
    cores: Cores
    host: Host
    link: Link
    tally: Tally
    decoders: int  # threads of the ingest's pool
    random: np.random.Generator  # of who leaves at an exit
    noise: np.random.Generator  # of how long calls take


class Device:
    """A stage on its device.

    A full batch goes at once, one ahead of the device; a part goes when the device is idle and its
    oldest call has waited `batch_wait`.
    """

    def __init__(
        self, machine: Machine, index: int, stage: SimStage, speed: float, loop: Loop
    ) -> None:
        self._machine, self._index, self._stage, self._loop = machine, index, stage, loop
        self._seconds = [t / speed for t in stage.table()]
        self._warming = [t / speed for t in stage.warming_table()]
        self._calls: deque[tuple[Batch, float, Worker]] = deque()
        self._rows = self._running = 0
        self._ahead: deque[list[tuple[Batch, float, Worker]]] = deque()  # in the thread's queue
        self._computing = False
        self._timer = 0.0  # when a timer is due that is still to come

    def submit(self, batch: Batch, worker: Worker) -> None:
        """Take a micro-batch; `worker.computed` is called when it is done."""
        self._calls.append((batch, self._machine.clock.now, worker))
        self._rows += len(batch.sent)
        self._form()

    def _form(self) -> None:
        clock, stage = self._machine.clock, self._stage
        while self._calls:
            oldest = self._calls[0][1] + stage.batch_wait
            full = self._rows >= stage.batch_max and self._running < 2
            if not full and self._running:
                return
            if not full and oldest > clock.now + 1e-12:
                if self._timer <= clock.now or oldest < self._timer:
                    self._timer = oldest + self._machine.host.timer
                    clock.at(self._timer, self._loop.do, 0.0, self._form)
                return
            calls = [self._calls.popleft()]
            rows = len(calls[0][0].sent)
            while self._calls and rows + len(self._calls[0][0].sent) <= stage.batch_max:
                calls.append(self._calls.popleft())
                rows += len(calls[-1][0].sent)
            self._rows -= rows
            self._running += 1
            self._loop.do(self._machine.host.call / 2, self._launch, calls)

    def _launch(self, calls: list[tuple[Batch, float, Worker]]) -> None:
        self._ahead.append(calls)
        if not self._computing:
            self._compute(idle=True)

    def _compute(self, *, idle: bool = False) -> None:
        calls = self._ahead.popleft()
        machine, stage, self._computing = self._machine, self._stage, True
        rows = sum(len(batch.sent) for batch, _, _ in calls)
        machine.tally.leave(self._index, rows)
        began = machine.clock.now
        size = min(rows, stage.batch_max)
        seconds = self._seconds[size] + (self._warming[size] if idle else 0.0)
        if stage.noise:
            seconds *= stage.noise[machine.noise.integers(len(stage.noise))]
        locked = min(1.0, stage.takes * HELD / seconds) if seconds else 0.0
        stretch = seconds / stage.takes if stage.takes else math.inf
        work = Work(seconds, stage.threads, locked, stretch, stage.beside, self)
        machine.cores.run(work, self._computed, calls, began)

    def _computed(self, calls: list[tuple[Batch, float, Worker]], began: float) -> None:
        self._computing = False
        self._machine.tally.computed(self._index, began)
        if self._ahead:
            self._compute()
        self._loop.do(self._machine.host.call / 2, self._finish, calls)

    def _finish(self, calls: list[tuple[Batch, float, Worker]]) -> None:
        self._running -= 1
        self._form()
        for batch, _, worker in calls:
            worker.computed(batch, self._index)
