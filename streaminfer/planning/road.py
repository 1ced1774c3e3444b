"""The life of a micro-batch in simulated time: what `runtime` does, one event per step of it.

    arrive ─▶ Ingest  poll, form, window, budget, decode ─▶ Device  merge, compute ─▶ publish
                                                                 │ link
              Inner   poll, budget, gather ─▶ Device … ─▶ publish ─▶ Sink  order, answer ─▶ client

A worker polls, forms items and starts a call for each as its budget allows (runtime/worker.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from streaminfer.planning.events import Clock, Cores, Loop
from streaminfer.planning.scenario import Host, Link, SimStage
from streaminfer.planning.tally import Batch, Lane, Tally

__all__ = ["Device", "Ingest", "Inner", "Machine", "Sink", "Worker"]

POLL = 500  # records that one poll returns at most
PATIENCE = 0.1  # seconds that a poll waits for news


class Machine(NamedTuple):
    """What all parts of a simulation share."""

    clock: Clock
    cores: Cores
    host: Host
    link: Link
    tally: Tally
    decoders: int  # threads of the ingest's pool


class Device:
    """A stage on its device: runtime/forward.py.

    A full batch goes at once, one ahead of the device; a part goes when the device is idle and its
    oldest call has waited `batch_wait`.
    """

    def __init__(
        self, machine: Machine, index: int, stage: SimStage, speed: float, loop: Loop
    ) -> None:
        self._machine, self._index, self._stage, self._loop = machine, index, stage, loop
        self._seconds = [t / speed for t in stage.table()]
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
                    clock.at(self._timer, self._form)
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
            self._compute()

    def _compute(self) -> None:
        calls = self._ahead.popleft()
        machine, stage, self._computing = self._machine, self._stage, True
        rows = sum(len(batch.sent) for batch, _, _ in calls)
        machine.tally.leave(self._index, rows)
        began = machine.clock.now
        seconds = self._seconds[min(rows, stage.batch_max)]
        locked = min(1.0, stage.python / seconds) if seconds else 0.0
        machine.cores.run(seconds, stage.threads, locked, self._computed, calls, began)

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


class Worker:
    """What Ingest and Inner share: the budget, the road through its devices, the publishing."""

    def __init__(
        self, machine: Machine, loop: Loop, stages: Sequence[tuple[int, SimStage]]
    ) -> None:
        self.machine, self.loop = machine, loop
        self.stages = stages
        self.devices: list[Device] = []
        self.targets: Mapping[int, Sequence[Sequence[Inner]]] = {}  # by stage: readers by partition
        self._limit = stages[0][1].batch_max * (3 + len(stages)) if stages else 256
        self._inhand = 0
        self._items: Iterator[Batch] = iter(())
        self._item: Batch | None = None  # taken, waits for the budget
        self._busy = self._stalled = False
        self._sent_at = 0.0  # when its link is free again
        self._order = {index: k for k, (index, _) in enumerate(stages)}

    def wake(self) -> None:
        """Let it poll, unless it is at work: then it polls by itself."""
        if not self._busy:
            self._busy = True
            self.loop.do(self.machine.host.turn, self._poll)

    def computed(self, batch: Batch, index: int) -> None:
        """Go on after a stage: to the next one of this worker, or out."""
        k, host = self._order[index], self.machine.host
        size = len(batch.sent)
        last = k + 1 == len(self.stages)
        if not last:
            self.machine.tally.enter(self.stages[k + 1][0], size)
            self.devices[k + 1].submit(batch, self)
        if last or self.targets[index]:
            stage = self.stages[k][1]
            cost = host.hop / 2 + size * (host.row + stage.bytes_out * host.nbyte) + stage.overhead
            self.loop.do(cost, self._publish, batch, index, last)

    def _publish(self, batch: Batch, index: int, last: bool) -> None:
        clock, link = self.machine.clock, self.machine.link
        nbytes = len(batch.sent) * self.stages[self._order[index]][1].bytes_out
        for readers in self.targets[index]:
            target = readers[batch.partition]
            self._sent_at = max(clock.now, self._sent_at) + link.beta * nbytes
            arrives = self._sent_at + link.alpha
            if arrives > clock.now:
                clock.at(arrives, target.add, batch)
            else:
                target.add(batch)
        if last:
            self._inhand -= len(batch.sent)
            if self._stalled and self._inhand < self._limit:
                self._stalled = False
                self._dispatch()

    def _poll(self) -> None:
        raise NotImplementedError

    def _begin(self, batch: Batch) -> None:
        raise NotImplementedError

    def _dispatch(self) -> None:
        """Start a call for each item, as the budget allows; then poll again."""
        while True:
            if self._item is None:
                self._item = next(self._items, None)
            batch = self._item
            if batch is None:
                break
            if self._inhand >= self._limit:
                self._stalled = True
                return
            self._item = None
            self._inhand += len(batch.sent)
            self._begin(batch)
        clock = self.machine.clock
        clock.at(clock.now, self.loop.do, self.machine.host.turn, self._poll)


class Ingest(Worker):
    """The first worker: runtime/receive.py Raw, runtime/ingest.py and the window."""

    def __init__(
        self,
        machine: Machine,
        loop: Loop,
        stages: Sequence[tuple[int, SimStage]],
        lanes: Sequence[Lane],
        window: int,
    ) -> None:
        super().__init__(machine, loop, stages)
        self.lanes, self._window = list(lanes), window
        self._turn = 0
        self._timer = 0.0
        self._decoding: deque[Batch] = deque()
        self._decoders = machine.decoders

    def add(self, lane: Lane, times: Sequence[float]) -> None:
        """Let samples arrive."""
        lane.log.extend(times)
        if not lane.blocked:
            self.wake()

    def _poll(self) -> None:
        for lane in self.lanes:
            lane.blocked = lane.closed or len(lane.backlog) >= 2 * self.stages[0][1].batch_max
        self._turn = (self._turn + 1) % len(self.lanes)
        found: list[tuple[Lane, int]] = []
        left = POLL
        for lane in self.lanes[self._turn :] + self.lanes[: self._turn]:
            if left and lane.log and not lane.blocked:
                found.append((lane, min(left, len(lane.log))))
                left -= found[-1][1]
        self.loop.do((POLL - left) * self.machine.host.receive, self._form, found)

    def _form(self, found: Sequence[tuple[Lane, int]]) -> None:
        now = self.machine.clock.now
        for lane, count in found:
            lane.backlog.extend(lane.log.popleft() for _ in range(count))
            lane.since.extend([now] * count)
        self._items = self._ready(now)
        self._item = next(self._items, None)
        if found or self._item is not None:
            self._dispatch()
            return
        self._busy = False
        self._wait()

    def _ready(self, now: float) -> Iterator[Batch]:
        """Yield full micro-batches, and parts whose oldest record has waited enough."""
        most, wait = self.stages[0][1].batch_max, self.stages[0][1].batch_wait
        for lane in self.lanes:
            while lane.backlog and (room := self._room(lane)):
                if len(lane.backlog) < most and now - lane.since[0] < wait - 1e-12:
                    break
                size = min(len(lane.backlog), most, room)
                sent = [lane.backlog.popleft() for _ in range(size)]
                for _ in range(size):
                    lane.since.popleft()
                yield Batch(lane.number, lane.count, sent)

    def _room(self, lane: Lane) -> int:
        return 0 if lane.closed else max(0, self._window - lane.entered + lane.seen)

    def _wait(self) -> None:
        """Look again when a part has waited enough, or when the poll's patience is over."""
        clock, wait = self.machine.clock, self.stages[0][1].batch_wait
        if not any(lane.backlog or lane.log for lane in self.lanes):
            return
        due = clock.now + PATIENCE
        for lane in self.lanes:
            if lane.backlog and self._room(lane):
                due = min(due, lane.since[0] + wait)
        due = max(due, clock.now) + self.machine.host.timer
        if self._timer <= clock.now or due < self._timer:
            self._timer = due
            clock.at(due, self.wake)

    def _begin(self, batch: Batch) -> None:
        lane = self.machine.tally.lanes[batch.partition]
        lane.count += 1
        lane.entered += len(batch.sent)
        lane.closed = lane.closed or lane.entered - lane.seen >= self._window
        self._decoding.append(batch)
        self._decode()

    def _decode(self) -> None:
        host = self.machine.host
        while self._decoders and self._decoding:
            batch = self._decoding.popleft()
            self._decoders -= 1
            work = len(batch.sent) * host.decode
            if work:
                self.machine.cores.run(work, 1, host.python, self._decoded, batch)
            else:
                self._decoded(batch)

    def _decoded(self, batch: Batch) -> None:
        self._decoders += 1
        self._decode()
        self.loop.do(self.machine.host.form, self.devices[0].submit, batch, self)

    def look(self) -> None:
        """Read the sink's commits: the window opens again at half of it."""
        for lane in self.lanes:
            lane.seen = lane.committed
            if lane.closed and lane.entered - lane.seen <= self._window // 2:
                lane.closed = False


class Inner(Worker):
    """A worker that reads a stage's output, or that of several: then it gathers."""

    parts = 1

    def __init__(
        self, machine: Machine, loop: Loop, stages: Sequence[tuple[int, SimStage]]
    ) -> None:
        super().__init__(machine, loop, stages)
        self._logs: dict[int, deque[Batch]] = {}
        self._bytes = 0.0  # of a sample, as it comes

    def reads(self, nbytes: float, parts: int) -> None:
        """Say what a sample weighs that it reads, and of how many parts a micro-batch is."""
        self._bytes, self.parts = nbytes, parts

    def add(self, batch: Batch) -> None:
        """Append to its topic."""
        if self.stages:
            self.machine.tally.enter(self.stages[0][0], len(batch.sent) / self.parts)
        self._logs.setdefault(batch.partition, deque()).append(batch)
        self.wake()

    def _poll(self) -> None:
        found: list[Batch] = []
        while self._logs and len(found) < POLL:
            partition, log = next(iter(self._logs.items()))
            while log and len(found) < POLL:
                found.append(log.popleft())
            if not log:
                del self._logs[partition]
        if not found:
            self._busy = False
            return
        host = self.machine.host
        rows = sum(len(batch.sent) for batch in found)
        each = host.row + self._bytes / self.parts * host.nbyte
        self.loop.do(len(found) * host.hop / 2 + rows * each, self._take, found)

    def _take(self, found: Sequence[Batch]) -> None:
        self._items = iter(found)
        self._dispatch()

    def _begin(self, batch: Batch) -> None:
        if self.parts > 1:
            have = batch.parts[self] = batch.parts.get(self, 0) + 1
            if have < self.parts:
                self._inhand -= len(batch.sent)  # what is held is not charged to the budget
                return
            del batch.parts[self]
        self.devices[0].submit(batch, self)


class Sink(Inner):
    """Puts micro-batches in order per partition and answers them: runtime/sink.py."""

    def _take(self, found: Sequence[Batch]) -> None:
        answers: list[Batch] = []
        for batch in found:
            if self.parts > 1:
                have = batch.parts[self] = batch.parts.get(self, 0) + 1
                if have < self.parts:
                    continue
            lane = self.machine.tally.lanes[batch.partition]
            lane.held[batch.number] = batch
            while (turn := lane.held.pop(lane.next, None)) is not None:
                lane.next += 1
                answers.append(turn)
        rows = sum(len(batch.sent) for batch in answers)
        host = self.machine.host
        cost = rows * host.answer + len(answers) * host.settle
        self.loop.do(cost, self._answer, answers, rows)

    def _answer(self, answers: Sequence[Batch], rows: int) -> None:
        for batch in answers:
            self.machine.tally.lanes[batch.partition].answered += len(batch.sent)
        if answers:
            self.loop.do(rows * self.machine.host.client / 2, self.machine.tally.answered, answers)
        clock = self.machine.clock
        clock.at(clock.now, self.loop.do, self.machine.host.turn, self._poll)
