"""The life of a record at one worker: receive → step → publish → settle → commit.

    receive        n+2 │ n+3          polls, forms items, waits for the budget
    step           n+1 │ n+2          decode, compute (in threads), merge
    publish, ack   n   │ n+1          then settle: the contiguous prefix is committed on a timer

Nothing is committed before what came of it is acked; so whatever dies, the record is read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streaminfer.errors import Action, NotOwner, StreaminferError, TransportError
from streaminfer.metrics import StageMetrics
from streaminfer.runtime.flow import Budget, Trimmer, Watch
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.receive import Intake
from streaminfer.runtime.steps import Item, Result, Settled, Step
from streaminfer.runtime.tracker import Tracker
from streaminfer.transport import Commit, Consumer, Listener, Record, TopicPartition

__all__ = ["Limits", "Upkeep", "Worker"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a worker. `serial` runs one call at a time, with all that is ready."""

    nbytes: int = 128_000_000
    samples: int = 256
    serial: bool = False
    commit_every: float = 0.2  # seconds
    drain: float = 10.0  # seconds that a revoke or a stop may wait for what is under way
    retries: float = 0.2  # seconds before a failed publish is tried again; doubles up to 5


class Upkeep(NamedTuple):
    """What else a worker looks after while it runs."""

    trimmer: Trimmer | None = None
    watches: Sequence[Watch] = ()


NO_UPKEEP = Upkeep()


class Worker(Listener):
    """One async consumer that runs one step. Construct, then `run`; `stop` is passed in."""

    def __init__(
        self,
        consume: Callable[[Listener], Consumer],
        intake: Intake,
        step: Step,
        outbox: Outbox,
        metrics: StageMetrics,
        stop: asyncio.Event,
        *,
        limits: Limits = Limits(),
        upkeep: Upkeep = NO_UPKEEP,
    ) -> None:
        self._consume = consume  # called once the step has started: it may know its speed then
        self._consumer: Consumer
        self._intake, self._step, self._outbox, self._metrics = intake, step, outbox, metrics
        self._stop, self._limits = stop, limits
        self._trimmer, self._watches = upkeep
        metrics.start_worker()
        self._tracker = Tracker()
        self._budget = Budget(limits.nbytes, limits.samples)
        self._calls: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None
        self._paused: frozenset[TopicPartition] = frozenset()
        self._waits = asyncio.Event()  # the step has something to do later
        self._epoch = 0  # counts revocations: what was taken before one may not start after it
        self._lost = 0
        self.ready = asyncio.Event()  # can take work: loaded and a member of the group
        self.polled = 0.0  # when the loop last went round (time.monotonic), for /livez

    async def run(self, *, burst: bool = False, ready: Callable[[], None] = lambda: None) -> None:
        """Work until `stop` is set, then drain: finish, flush, commit, leave.

        `ready` is called when it can take work. `burst` ends by itself when everything that is
        there now is done (tests use it).
        """
        await self._step.start()
        self._consumer = self._consume(self)
        try:
            async with self._consumer:
                watching = asyncio.create_task(self._look_after())
                self.ready.set()
                self._metrics.ready.set(1)
                ready()
                try:
                    await self._receive(burst)
                finally:
                    self.ready.clear()
                    self._metrics.ready.set(0)
                    watching.cancel()
                    await asyncio.gather(watching, return_exceptions=True)
        finally:
            for task in self._calls:  # what the drain's time was not enough for is read again
                task.cancel()
            await self._step.stop()
        if self._failed is not None:
            raise self._failed

    async def _receive(self, burst: bool) -> None:
        """Poll, form items, run the step on each: the loop."""
        while not self._stop.is_set() and self._failed is None:
            self.polled = time.monotonic()
            self._pause(self._intake.blocked())
            due = self._intake.due()
            patience = 0.1 if due is None else min(due, 0.1)
            records = await self._consumer.poll(patience)
            if records:
                self._tracker.deliver(r.position for r in records)
                self._count(records)
                self._intake.add(records)
            self._tracker.settle([Settled(p) for p in self._intake.settled()], {})
            await self._dispatch()
            if burst and not records and await self._empty():
                return
        await self._drain()

    async def _dispatch(self) -> None:
        """Start a call for each item that is ready, as the budget allows."""
        if self._limits.serial:
            if items := list(self._intake.take()):
                await asyncio.wait([self._start(items)])
            return
        for item in self._intake.take():
            epoch = self._epoch
            while not await self._budget.wait(0.5):
                await self._consumer.keepalive()
                if self._failed is not None:
                    return
            if epoch == self._epoch:  # else revoked while it waited: whoever owns it reads it again
                self._start([item])
                await asyncio.sleep(0)  # calls begin in the order of their records

    def _start(self, items: Sequence[Item]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._call(items))
        self._calls.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _call(self, items: Sequence[Item]) -> None:
        """Step, publish, ack, settle."""
        samples, nbytes = sum(i.samples for i in items), sum(i.nbytes for i in items)
        self._budget.take(nbytes, samples)
        self._metrics.inflight.inc(samples)
        try:
            result = await self._step(items)
            if self._step.due() is not None:
                self._waits.set()
            await self._finish(result)
        finally:
            self._budget.give(nbytes, samples)
            self._metrics.inflight.dec(samples)

    async def _finish(self, result: Result) -> None:
        await self._persist(lambda: self._outbox.publish(result))
        self._tracker.settle(result.settled, result.notes)
        if result.acked is not None:
            self._tracker.settle(*result.acked())

    async def _persist(self, publish: Callable[[], Awaitable[None]]) -> None:
        """Publish until it is acked: what is lost here would be lost for good."""
        wait = self._limits.retries
        while True:
            try:
                return await publish()
            except TransportError as error:
                if error.action is not Action.RETRY:
                    raise
                log.warning("publish failed, again in %.1f s: %s", wait, error)
                self._metrics.retries["produce"].inc()
                self._metrics.errors["produce"].inc()
            await asyncio.sleep(wait)
            wait = min(wait * 2, 5.0)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if not task.cancelled() and (error := task.exception()) and self._failed is None:
            log.error("a call failed: %r", error, exc_info=error)
            self._failed = error

    # ---- the group's word --------------------------------------------------------------------

    async def assigned(self, partitions: Mapping[TopicPartition, Commit | None]) -> None:
        """Begin with these: the step reads where the last owner left off from the notes."""
        self._metrics.rebalances.inc()
        begin = partitions
        for watch in self._watches:
            begin = await watch.assign(begin)
        for tp, commit in begin.items():
            if commit is not None and commit != partitions[tp]:
                self._consumer.seek(tp, commit.offset)
        self._tracker.assign(begin)
        await self._step.assign({tp: c.metadata if c else "" for tp, c in begin.items()})

    async def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Finish what is under way (time-boxed), commit, and drop the rest."""
        self._epoch += 1
        self._intake.forget(partitions)
        await self._settle_calls()
        await self._commit()
        await self._step.forget(partitions)
        self._tracker.forget(partitions)
        if self._trimmer:
            self._trimmer.forget(partitions)
        self._paused -= frozenset(partitions)
        for tp in partitions:
            self._metrics.no_lag(*tp)

    async def _settle_calls(self) -> None:
        pending = [task for task in self._calls if task is not asyncio.current_task()]
        if pending:
            await asyncio.wait(pending, timeout=self._limits.drain)

    async def _drain(self) -> None:
        await self._settle_calls()
        await self._commit()

    async def _empty(self) -> bool:
        """Whether all that is in the logs was received and settled."""
        await self._settle_calls()
        await self._commit()
        tps = self._consumer.assignment()
        if not tps or self._tracker.outstanding():
            return False
        return all(
            (self._tracker.position(tp) or 0) >= (self._consumer.highwater(tp) or 0) for tp in tps
        )

    # ---- on timers ---------------------------------------------------------------------------

    async def _look_after(self) -> None:
        """Commit, report and watch, each at its own pace, whatever the poll does."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._every(self._limits.commit_every, self._commit))
            group.create_task(self._every(1.0, self._report))
            group.create_task(self._tick())
            for watch in self._watches:
                group.create_task(self._every(watch.every, watch.look))

    async def _tick(self) -> None:
        """Let the step do what waits for time alone."""
        while True:
            due = self._step.due()
            if due is None:  # only a call changes that
                self._waits.clear()
                await self._waits.wait()
            elif due > 0:
                await asyncio.sleep(min(due, 0.5))  # what is due may come to be due earlier
            else:
                call = asyncio.create_task(self._ticked())
                self._calls.add(call)
                call.add_done_callback(self._ended)
                await asyncio.wait([call])

    async def _ticked(self) -> None:
        if result := await self._step.tick():
            await self._finish(result)

    async def _every(self, seconds: float, do: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await do()
            except TransportError as error:
                log.warning("%s: %s", getattr(do, "__name__", do), error)
            except StreaminferError as error:
                self._failed = error

    async def _commit(self) -> None:
        """Commit the settled prefix; somebody else's partitions are not ours to commit."""
        commits = self._tracker.commits()
        if not commits:
            return
        try:
            await self._consumer.commit(commits)
        except NotOwner as error:
            log.info("not committed: %s", error)
            return
        except TransportError as error:
            log.warning("commit failed, again soon: %s", error)
            return
        self._tracker.committed(commits)
        self._metrics.last_success.set(time.time())
        if self._trimmer:
            with contextlib.suppress(TransportError):  # the next commit trims this too
                await self._trimmer.committed(commits)

    async def _report(self) -> None:
        now = time.time()
        for tp in self._consumer.assignment():
            high, position = self._consumer.highwater(tp), self._tracker.position(tp)
            oldest = self._tracker.oldest(tp)
            behind = max(0, high - (position or 0)) if high is not None else 0
            self._metrics.lag(*tp, behind, now - oldest if oldest else 0.0)
        lost = self._consumer.lost()
        self._metrics.lost.inc(lost - self._lost)
        self._lost = lost
        self._metrics.resident.set(_resident())

    # ---- small matters -----------------------------------------------------------------------

    def _pause(self, blocked: frozenset[TopicPartition]) -> None:
        blocked &= self._consumer.assignment()
        if more := blocked - self._paused:
            self._consumer.pause(more)
        if less := (self._paused - blocked) & self._consumer.assignment():
            self._consumer.resume(less)
        self._paused = blocked
        self._metrics.paused.set(1 if blocked else 0)

    def _count(self, records: Sequence[Record]) -> None:
        self._metrics.consumed.inc(len(records))
        sizes = [record.nbytes for record in records]
        self._metrics.received_bytes.inc(sum(sizes))
        self._metrics.record_size["in"].observe_all(sizes)
        if self._trimmer:
            for record, size in zip(records, sizes, strict=True):
                self._trimmer.received(record.tp, size)


def _resident() -> int:
    """Resident bytes of this process (Linux; elsewhere 0)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a kernel file
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
