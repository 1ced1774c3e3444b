"""A stage on its device: merge what waits, compute, give every envelope its own rows back.

    calls      e1(4 rows) e2(8) e3(4) │ e4(16) …      equal shapes merge, up to batch.max
    device     ├───── 16 rows ───────┤├── 16 ──       one thread per device; the next full batch
    results    e1' e2' e3'             e4'            is handed over while this one computes

A batch that fails is split by envelope, then in halves, until the poison sample stands alone; a
batch too large for the memory is halved, and the size is remembered.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from streaminfer.metrics import StageMetrics
from streaminfer.openmp import release_team
from streaminfer.runtime.device import Device, Done, Stage
from streaminfer.runtime.rows import select
from streaminfer.runtime.steps import Item, Plain, Result, Settled
from streaminfer.wire import Envelope, Failure, Hop, Tensor

__all__ = ["Forward", "Stage"]

PATIENCE = 0.25  # seconds that a part of a batch lets full ones of other shapes go by


@dataclass(eq=False)
class _Call:
    """One envelope that waits for the device."""

    envelope: Envelope
    since: float
    arrived: float
    done: asyncio.Future[Done]


class Forward(Plain):
    """One stage's step. Its calls overlap; its device computes one batch at a time."""

    def __init__(
        self,
        stage: Stage,
        metrics: StageMetrics,
        *,
        timed: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stage, self._metrics, self._clock = stage, metrics, clock
        self._queues: dict[tuple[object, ...], deque[_Call]] = {}
        self._arrived = asyncio.Event()
        self._running = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"device-{stage.plan.name}")
        self._batcher: asyncio.Task[None] | None = None
        self._batches: set[asyncio.Task[None]] = set()
        self._device = Device(stage, metrics, timed=timed)
        self.device = stage.device

    @property
    def speed(self) -> float | None:
        """Samples per second of full batches, once it has started, if `timed`."""
        return self._device.speed

    @property
    def steps(self) -> int:
        """How often a batch goes from Python, whose lock it takes, into its program."""
        return self._device.steps

    async def start(self) -> None:
        """Load the stage's own weights and run batches of zeros through it."""
        release_team()  # this thread may have computed before, and won't any more
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._device.warm)
        self._batcher = asyncio.create_task(self._batch(), name=f"batch {self._stage.plan.name}")

    async def stop(self) -> None:
        """End the device's thread; what waits is dropped."""
        tasks = [t for t in (self._batcher, *self._batches) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        self._device.drop()

    async def __call__(self, items: Sequence[Item]) -> Result:
        """Compute each item's envelope; rows that fail leave it as outcomes."""
        results = await asyncio.gather(*[self._one(item) for item in items])
        return Result(
            outputs=tuple(e for r in results for e in r.outputs),
            outcomes=tuple(e for r in results for e in r.outcomes),
            settled=tuple(Settled(p) for item in items for p in item.positions),
        )

    async def _one(self, item: Item) -> Result:
        whole = item.envelope
        if whole is None:
            raise TypeError("forward takes envelopes")
        if whole.samples[0].failure:  # outcomes only pass
            return Result(outcomes=(whole,))
        late = self._late(whole)
        rows = [i for i, s in enumerate(whole.samples) if s.offset not in late]
        if not rows:
            return Result(outcomes=(whole.outcomes(late),))
        envelope = select(whole, rows) if late else whole
        since = item.since if whole.hops else whole.samples[0].timestamp_ms / 1000
        done, queued = await self._submit(envelope, since)
        hops = (*whole.hops, Hop(self._stage.plan.name, queued, done.compute_us, done.batch))
        gone = late | done.failures
        outcomes = [replace(whole.outcomes(gone), hops=hops)] if gone else []
        if done.left:
            outcomes.append(_kept(envelope, set(done.left), done.answers, hops))
        staying = {s.offset for s in envelope.samples} - gone.keys() - set(done.left)
        self._metrics.samples["ok"].inc(len(staying) + len(done.left))
        if not staying:
            return Result(outcomes=tuple(outcomes))
        return Result((_kept(envelope, staying, done.tensors, hops),), tuple(outcomes))

    def _late(self, envelope: Envelope) -> dict[int, Failure]:
        """Find the samples whose deadline has passed: no compute for them."""
        now = self._clock() * 1000
        late = {
            s.offset: Failure("expired", self._stage.plan.name, "timeout", "the deadline passed")
            for s in envelope.samples
            if s.deadline_ms and now > s.deadline_ms
        }
        if late:
            self._metrics.samples["expired"].inc(len(late))
            self._metrics.errors["timeout"].inc(len(late))
        return late

    async def _submit(self, envelope: Envelope, since: float) -> tuple[Done, int]:
        key = tuple((n, t.dtype, t.shape[1:]) for n, t in sorted(envelope.tensors.items()))
        now = self._clock()
        call = _Call(envelope, since, time.monotonic(), asyncio.get_running_loop().create_future())
        self._queues.setdefault(key, deque()).append(call)
        self._metrics.queue.inc(len(envelope.samples))
        self._arrived.set()
        done = await call.done
        return done, max(0, int((now - since) * 1e6))

    async def _batch(self) -> None:
        """Form batches for ever: oldest first, equal shapes together."""
        while True:
            calls = self._take()
            if calls:
                self._running += 1
                task = asyncio.create_task(self._run(calls))
                self._batches.add(task)
                task.add_done_callback(self._batches.discard)
                continue
            self._arrived.clear()
            due = self._due()
            try:
                await asyncio.wait_for(self._arrived.wait(), due)
            except TimeoutError:
                continue

    def _due(self) -> float | None:
        """Seconds until the oldest call has waited long enough; None: wait for an event."""
        if not self._queues or self._running:
            return None
        oldest = min(q[0].arrived for q in self._queues.values())
        return max(0.0, oldest + self._stage.batch.wait - time.monotonic())

    def _take(self) -> list[_Call]:
        """Take the next batch, or nothing while it may still grow.

        A full batch goes at once, one ahead of the device; a part goes when the device is idle
        and its oldest call has waited `batch.wait`, or PATIENCE while others' full ones go by.
        """
        now, limit = time.monotonic(), self._device.limit
        waiting = {key: sum(len(c.envelope.samples) for c in q) for key, q in self._queues.items()}
        patience = PATIENCE if max(waiting.values(), default=0) >= limit else math.inf
        for key in sorted(self._queues, key=lambda k: self._queues[k][0].arrived):
            queue = self._queues[key]
            waited = now - queue[0].arrived
            ready = waiting[key] >= limit or waited >= patience
            aged = waited >= self._stage.batch.wait
            if (ready and self._running < 2) or (aged and not self._running):
                calls: list[_Call] = []
                rows = 0
                while queue and (
                    not calls or rows + len(queue[0].envelope.samples) <= self._device.limit
                ):
                    rows += len(queue[0].envelope.samples)
                    calls.append(queue.popleft())
                if not queue:
                    del self._queues[key]
                return calls
        return []

    async def _run(self, calls: list[_Call]) -> None:
        now = self._clock()
        rows = sum(len(c.envelope.samples) for c in calls)
        self._metrics.queue.dec(rows)
        for call in calls:
            self._metrics.queue_time.observe(max(0.0, now - call.since))
        self._metrics.batch_wait.observe(time.monotonic() - calls[0].arrived)
        loop = asyncio.get_running_loop()
        try:
            envelopes = [call.envelope for call in calls]
            results = await loop.run_in_executor(self._thread, self._device.compute, envelopes)
        except BaseException as error:
            for call in calls:
                if not call.done.done():
                    call.done.set_exception(error) if isinstance(
                        error, Exception
                    ) else call.done.cancel()
            if not isinstance(error, Exception):
                raise
            return
        finally:
            self._running -= 1
            self._arrived.set()
        for call, result in zip(calls, results, strict=True):
            if not call.done.done():
                call.done.set_result(result)


def _kept(
    envelope: Envelope, offsets: set[int], tensors: dict[str, Tensor], hops: tuple[Hop, ...]
) -> Envelope:
    """Return the envelope with these samples only; `tensors` are theirs."""
    samples = envelope.samples
    if len(offsets) < len(samples):
        samples = tuple(s for s in samples if s.offset in offsets)
    return replace(envelope, samples=samples, tensors=tensors, hops=hops)
