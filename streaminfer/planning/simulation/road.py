"""The life of a micro-batch in simulated time: what `runtime` does, one event per step of it.

    arrive ─▶ Ingest  poll, form, window, budget, decode ─▶ Device  merge, compute ─▶ publish
                                                                 │ link
              Inner   poll, budget, gather ─▶ Device … ─▶ publish ─▶ Sink  order, answer ─▶ client

A worker polls, forms items and starts a call for each as its budget allows (runtime/worker.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from streaminfer.planning.simulation.cores import Work
from streaminfer.planning.simulation.device import Device, Machine
from streaminfer.planning.simulation.loop import Loop
from streaminfer.planning.simulation.scenario import SimStage
from streaminfer.planning.simulation.tally import Batch, Lane

__all__ = ["Ingest", "Inner", "Outlet", "Sink", "Worker"]

POLL = 500  # records that one poll returns at most
PATIENCE = 0.1  # seconds that a poll waits for news


class Outlet:
    """A topic that a stage sends to: runtime/spread.py where the edge balances.

    `nbytes`: per sample. `groups` read it, each by the owners of its partitions.
    """

    def __init__(self, nbytes: float, partitions: int, *, balance: bool = False) -> None:
        self.nbytes, self._balance = nbytes, balance
        self.groups: list[Sequence[Inner]] = []
        self._sent = [0] * partitions
        self._turn = deque(range(partitions))

    def readers(self, batch: Batch) -> list[Inner]:
        """Return who gets a micro-batch."""
        to = batch.partition
        if self._balance:
            to = min(self._turn, key=self._sent.__getitem__)
            self._turn.remove(to)
            self._turn.append(to)
            self._sent[to] += len(batch.sent)
        return [group[to] for group in self.groups]


class Worker:
    """What Ingest and Inner share: the budget, the road through its devices, the publishing."""

    def __init__(
        self, machine: Machine, loop: Loop, stages: Sequence[tuple[int, SimStage]]
    ) -> None:
        self.machine, self.loop = machine, loop
        self.stages = stages
        self.devices: list[Device] = []
        self.outlets: Mapping[int, Mapping[str, Outlet]] = {}  # by stage, by topic
        self.following: Mapping[int, Sequence[tuple[int, int]]] = {}  # here: place, and its parts
        self.exit: Outlet | None = None
        self._limit = stages[0][1].batch_max * (3 + len(stages)) if stages else 256
        self._inhand = 0
        self._items: Iterator[Batch] = iter(())
        self._item: Batch | None = None  # taken, waits for the budget
        self._busy = self._stalled = False
        self._sent_at = 0.0  # when its link is free again
        self._order = {index: k for k, (index, _) in enumerate(stages)}
        self._left: dict[Batch, Batch] = {}  # whose answer travels once the others are done

    def wake(self) -> None:
        """Let it poll, unless it is at work: then it polls by itself."""
        if not self._busy:
            self._busy = True
            self.loop.do(self.machine.host.turn, self._poll)

    def computed(self, batch: Batch, index: int) -> None:
        """Go on after a stage: to those of this worker that follow, or out."""
        k = self._order[index]
        stage, last = self.stages[k][1], k + 1 == len(self.stages)
        gone = self._left.pop(batch, None) if last else None
        staying: Batch | None = batch
        if stage.leaves:
            staying, gone = self._part(batch, stage.leaves, gone)
        if staying is not None and gone is not None and not last:
            self._left[staying] = gone
        elif gone is not None and self.exit is not None:
            self._out(gone, [self.exit], 0.0, done=True)
        if staying is None:
            return
        for place, parts in self.following.get(index, ()):
            self._on(staying, place, parts)
        if last or self.outlets[index]:
            self._out(staying, list(self.outlets[index].values()), stage.overhead, done=last)

    def _part(self, batch: Batch, share: float, gone: Batch | None) -> tuple[Batch | None, ...]:
        """Return the rows that stay and those that leave, with those that left before."""
        leaving = self.machine.random.random(len(batch.sent)) < share
        out = [k for k, leaves in enumerate(leaving) if leaves]
        if not out:
            return batch, gone
        rest = [k for k, leaves in enumerate(leaving) if not leaves]
        left = batch.some(out)
        if gone is not None:
            left.sent = [*left.sent, *gone.sent]
            left.rows = [*(left.rows or ()), *(gone.rows or ())]
        return (batch.some(rest) if rest else None), left

    def _on(self, batch: Batch, place: int, parts: int) -> None:
        """Hand it to a stage of this worker, once all that it reads is there."""
        if parts > 1:
            have = batch.parts[self, place] = batch.parts.get((self, place), 0) + 1
            if have < parts:
                return
            del batch.parts[self, place]
        self.machine.tally.enter(self.stages[place][0], len(batch.sent))
        self.devices[place].submit(batch, self)

    def _out(self, batch: Batch, outlets: Sequence[Outlet], overhead: float, *, done: bool) -> None:
        host, size = self.machine.host, len(batch.sent)
        each = sum(host.hop / 2 + size * (host.row + o.nbytes * host.nbyte) for o in outlets)
        self.loop.do(each + overhead, self._publish, batch, outlets, done)

    def _publish(self, batch: Batch, outlets: Sequence[Outlet], done: bool) -> None:
        clock, link = self.machine.clock, self.machine.link
        for outlet in outlets:
            nbytes = len(batch.sent) * outlet.nbytes
            self._sent_at = max(clock.now, self._sent_at) + link.beta * nbytes
            arrives = self._sent_at + link.alpha
            for reader in outlet.readers(batch):
                if arrives > clock.now:
                    clock.at(arrives, reader.add, batch)
                else:
                    reader.add(batch)
        if done:
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
                decoding = Work(work, 1, host.python, host.decode)
                self.machine.cores.run(decoding, self._decoded, batch)
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
    """A worker that reads a stage's output, or that of several: then it gathers.

    With a quorum a micro-batch goes on at the deadline without what is missing, or fails there if
    too few came; what comes later is dropped (runtime/gather.py, strict).
    """

    parts = 1

    def __init__(
        self, machine: Machine, loop: Loop, stages: Sequence[tuple[int, SimStage]]
    ) -> None:
        super().__init__(machine, loop, stages)
        self._logs: dict[int, deque[Batch]] = {}
        self._bytes = 0.0  # of a sample, as it comes
        self._gone: set[Batch] = set()  # of which parts may still come

    def reads(self, nbytes: float, parts: int) -> None:
        """Say what a sample weighs that it reads, and of how many parts a micro-batch is."""
        self._bytes, self.parts = nbytes, parts

    def add(self, batch: Batch) -> None:
        """Append to its topic."""
        if self.stages and batch not in self._gone:
            batch.parts[self, "came"] = batch.parts.get((self, "came"), 0) + 1
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
                if have == 1 and self.stages[0][1].quorum is not None:
                    due = self.machine.clock.now + self.stages[0][1].deadline
                    self.machine.clock.at(due + self.machine.host.timer, self._overdue, batch)
                return
            del batch.parts[self]
            if batch in self._gone:
                self._gone.remove(batch)
                self._inhand -= len(batch.sent)
                return
        self.devices[0].submit(batch, self)

    def _overdue(self, batch: Batch) -> None:
        """Speak for a micro-batch whose parts did not all come in time."""
        have, quorum = batch.parts.get(self, 0), self.stages[0][1].quorum or self.parts
        if not have:  # all of them came
            return
        self._gone.add(batch)
        tally, index, size = self.machine.tally, self.stages[0][0], len(batch.sent)
        came = batch.parts[self, "came"] / self.parts
        tally.enter(index, size * (1 - came))  # the queue is of whole micro-batches
        self._inhand += size
        if have >= quorum:
            tally.partial += size * tally.counts
            self.devices[0].submit(batch, self)
            return
        tally.failed += size * tally.counts
        tally.leave(index, size, computes=False)
        self._out(batch, [self.exit] if self.exit else [], 0.0, done=True)


class Sink(Inner):
    """Puts micro-batches in order per partition and answers them: runtime/sink.py."""

    def _take(self, found: Sequence[Batch]) -> None:
        answers: list[Batch] = []
        for batch in found:
            if self.parts > 1 and batch.rows is None:
                have = batch.parts[self] = batch.parts.get(self, 0) + 1
                if have < self.parts:
                    continue
            answers += self.machine.tally.lanes[batch.partition].in_turn(batch)
        rows = sum(len(batch.sent) for batch in answers)
        host = self.machine.host
        cost = rows * host.answer + len(answers) * host.settle
        self.loop.do(cost, self._answer, answers, rows)

    def _answer(self, answers: Sequence[Batch], rows: int) -> None:
        for batch in answers:
            self.machine.tally.lanes[batch.partition].answered += len(batch.sent)
        clock, alpha = self.machine.clock, self.machine.link.alpha
        if answers and alpha:
            clock.at(clock.now + alpha, self._got, answers, rows)
        elif answers:
            self._got(answers, rows)
        clock.at(clock.now, self.loop.do, self.machine.host.turn, self._poll)

    def _got(self, answers: Sequence[Batch], rows: int) -> None:
        """Let the client have them."""
        self.loop.do(rows * self.machine.host.client / 2, self.machine.tally.answered, answers)
