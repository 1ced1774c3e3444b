"""A stage on its device: merge what waits, compute, give every envelope its own rows back.

    calls      e1(4 rows) e2(8) e3(4) │ e4(16) …      equal shapes merge, up to batch.max
    device     ├───── 16 rows ───────┤├── 16 ──       one thread per device; the next full batch
    results    e1' e2' e3'             e4'            is handed over while this one computes

A batch that fails is split by envelope, then in halves, until the poison sample stands alone; a
batch too large for the memory is halved, and the size is remembered.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from streaminfer.errors import ComputeError, OutOfMemory, SampleError, SchemaError, StreaminferError
from streaminfer.metrics import StageMetrics
from streaminfer.parallel import Program, check_inputs
from streaminfer.plan import CAST, StagePlan, TensorSpec
from streaminfer.runtime.rows import DTYPES, NAMES, as_bytes, select, view
from streaminfer.runtime.speed import measured
from streaminfer.runtime.steps import Item, Result, Settled
from streaminfer.spec import BatchSpec
from streaminfer.transport import TopicPartition
from streaminfer.wire import Envelope, Failure, Hop, Tensor, compress, decompress

__all__ = ["Forward", "Stage"]

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Stage:
    """What a Forward runs: the cut-out and all that stands around it on the device."""

    plan: StagePlan
    load: Callable[[], Program]
    device: torch.device
    threads: int
    batch: BatchSpec
    out_dtype: str = "native"  # of the edge that its outputs take
    compress: Literal["none", "zstd", "lz4"] = "none"
    before: Callable[[torch.Tensor], torch.Tensor] | None = None
    after: Callable[[Mapping[str, torch.Tensor]], Outputs] | None = None


@dataclass(eq=False)
class _Call:
    """One envelope that waits for the device."""

    envelope: Envelope
    since: float
    arrived: float
    done: asyncio.Future[_Done]


@dataclass(slots=True)
class _Done:
    """What the device made of one envelope."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)  # by offset
    compute_us: int = 0
    batch: int = 0


class Forward:
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
        self._limit = stage.batch.max  # falls when the device's memory was not enough
        self._queues: dict[tuple[object, ...], deque[_Call]] = {}
        self._arrived = asyncio.Event()
        self._running = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"device-{stage.plan.name}")
        self._batcher: asyncio.Task[None] | None = None
        self._batches: set[asyncio.Task[None]] = set()
        self._program: Program | None = None
        self._timed = timed
        self.device = stage.device
        self.speed: float | None = None  # samples per second of full batches, if `timed`

    async def start(self) -> None:
        """Load the stage's own weights and run batches of zeros through it."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._warm)
        self._batcher = asyncio.create_task(self._batch(), name=f"batch {self._stage.plan.name}")

    async def stop(self) -> None:
        """End the device's thread; what waits is dropped."""
        tasks = [t for t in (self._batcher, *self._batches) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        self._program = None

    async def assign(self, partitions: Mapping[TopicPartition, str]) -> None:
        """Nothing is held per partition."""

    async def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Nothing is held per partition."""

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
        outcomes = (replace(whole.outcomes(gone), hops=hops),) if gone else ()
        kept = tuple(s for s in envelope.samples if s.offset not in done.failures)
        if not kept:
            return Result(outcomes=outcomes)
        self._metrics.samples["ok"].inc(len(kept))
        return Result((replace(envelope, samples=kept, tensors=done.tensors, hops=hops),), outcomes)

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

    async def _submit(self, envelope: Envelope, since: float) -> tuple[_Done, int]:
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
        and its oldest call has waited `batch.wait`.
        """
        now = time.monotonic()
        for key in sorted(self._queues, key=lambda k: self._queues[k][0].arrived):
            queue = self._queues[key]
            rows = sum(len(c.envelope.samples) for c in queue)
            aged = now - queue[0].arrived >= self._stage.batch.wait
            if (rows >= self._limit and self._running < 2) or (aged and not self._running):
                calls: list[_Call] = []
                rows = 0
                while queue and (not calls or rows + len(queue[0].envelope.samples) <= self._limit):
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
            results = await loop.run_in_executor(self._thread, self._compute, calls)
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

    # ---- in the device's thread ------------------------------------------------------------

    def _warm(self) -> None:
        torch.set_num_threads(self._stage.threads)
        self._program = self._stage.load()
        shapes = [spec.shape[1:] for spec in self._stage.plan.inputs]
        if any(n is None for shape in shapes for n in shape):
            return  # sizes that only the data settles
        for rows in (1, self._limit):  # the first batch of a size makes the kernels choose
            self._forward(self._zeros(rows))
        if self._timed:
            rows = self._limit
            self.speed = measured(rows, lambda: self._forward(self._zeros(rows)))

    def _zeros(self, rows: int) -> dict[str, torch.Tensor]:
        return {
            spec.name: torch.zeros(
                (rows, *(n or 1 for n in spec.shape[1:])),
                dtype=DTYPES[spec.dtype],
            ).to(self._stage.device)
            for spec in self._stage.plan.inputs
        }

    def _compute(self, calls: Sequence[_Call]) -> list[_Done]:
        envelopes = [call.envelope for call in calls]
        results = self._attempt(envelopes)
        if self._stage.device.type == "cuda":
            self._metrics.torch_allocated.set(torch.cuda.memory_allocated(self._stage.device))
            self._metrics.torch_reserved.set(torch.cuda.memory_reserved(self._stage.device))
        return results

    def _attempt(self, envelopes: Sequence[Envelope]) -> list[_Done]:
        """Compute envelopes together; on failure apart, then in halves, down to single samples."""
        rows = sum(len(e.samples) for e in envelopes)
        if rows > self._limit and rows > 1:
            return self._apart(envelopes)
        try:
            return self._together(envelopes)
        except StreaminferError as error:
            if isinstance(error, OutOfMemory) and rows > 1:
                self._limit = max(1, min(self._limit, rows // 2))
            if rows == 1 or isinstance(error, SampleError):
                return [self._poisoned(e, error) for e in envelopes]
            self._metrics.retries["compute"].inc()
            return self._apart(envelopes)

    def _apart(self, envelopes: Sequence[Envelope]) -> list[_Done]:
        if len(envelopes) > 1:
            return [done for e in envelopes for done in self._attempt([e])]
        (envelope,) = envelopes
        half = len(envelope.samples) // 2
        n = len(envelope.samples)
        parts = [select(envelope, range(half)), select(envelope, range(half, n))]
        return [_join([done for part in parts for done in self._attempt([part])])]

    def _poisoned(self, envelope: Envelope, error: StreaminferError) -> _Done:
        failure = Failure("error", self._stage.plan.name, error.kind, str(error)[:1000])
        self._metrics.samples["error"].inc(len(envelope.samples))
        self._metrics.errors[error.kind].inc(len(envelope.samples))
        return _Done(failures={s.offset: failure for s in envelope.samples})

    def _together(self, envelopes: Sequence[Envelope]) -> list[_Done]:
        stage, began = self._stage, time.perf_counter()
        inputs = {spec.name: self._load(spec, envelopes) for spec in stage.plan.inputs}
        if stage.before is not None:
            first = stage.plan.inputs[0].name
            inputs[first] = stage.before(inputs[first])
        check_inputs(stage.plan.inputs, inputs)
        loaded = time.perf_counter()
        try:
            outputs = self._forward(inputs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from error
        except SampleError:
            raise
        except Exception as error:
            raise ComputeError(f"{type(error).__name__}: {error}") from error
        computed = time.perf_counter()
        rows = [len(e.samples) for e in envelopes]
        results = self._unload(outputs, rows)
        ended = time.perf_counter()
        for done in results:
            done.compute_us, done.batch = int((computed - loaded) * 1e6), sum(rows)
        self._measure(sum(rows), loaded - began, computed - loaded, ended - computed)
        return results

    def _forward(self, inputs: Mapping[str, torch.Tensor]) -> Outputs:
        if self._program is None:
            raise ComputeError("the stage is stopped")
        stage = self._stage.plan
        with torch.inference_mode():
            values = self._program(*[inputs[spec.name] for spec in stage.inputs])
            outputs = dict(zip((spec.name for spec in stage.outputs), values, strict=True))
            if self._stage.after is not None:
                outputs = self._stage.after(outputs)
            if cast := CAST[self._stage.out_dtype]:
                outputs = {
                    n: t.to(DTYPES[cast]) if t.is_floating_point() else t
                    for n, t in outputs.items()
                }
            return {n: t.to("cpu").contiguous() for n, t in outputs.items()}

    def _load(self, spec: TensorSpec, envelopes: Sequence[Envelope]) -> torch.Tensor:
        """Bring one input of all envelopes onto the device, as one batch, in the model's dtype."""
        if missing := [e for e in envelopes if spec.name not in e.tensors]:
            found = ", ".join(missing[0].tensors) or "none"
            raise SchemaError(f"the envelope has no tensor {spec.name!r}; it has: {found}")
        parts = [view(decompress(envelope.tensors[spec.name])) for envelope in envelopes]
        batch = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self._stage.device)
        wanted = DTYPES[spec.dtype]
        if batch.is_floating_point() and wanted.is_floating_point and batch.dtype != wanted:
            batch = batch.to(wanted)
        return batch

    def _unload(self, outputs: Outputs, rows: Sequence[int]) -> list[_Done]:
        results = [_Done() for _ in rows]
        for name, value in outputs.items():
            for done, part in zip(results, torch.split(value, list(rows)), strict=True):
                packed = Tensor(NAMES[part.dtype], tuple(part.shape), as_bytes(part))
                done.tensors[name] = (
                    packed
                    if self._stage.compress == "none"
                    else compress(packed, self._stage.compress)
                )
        return results

    def _measure(self, rows: int, decode: float, compute: float, encode: float) -> None:
        metrics = self._metrics
        metrics.batches.inc()
        metrics.batch_size.observe(rows)
        metrics.compute_time.observe(compute)
        metrics.codec_time["decode"].observe(decode)
        metrics.codec_time["encode"].observe(encode)
        metrics.busy["decode"].inc(decode)
        metrics.busy["compute"].inc(compute)
        metrics.busy["encode"].inc(encode)


def _join(parts: Sequence[_Done]) -> _Done:
    """Put the halves of a split envelope together again; rows that failed are missing."""
    whole = [p for p in parts if p.tensors]
    failures = {offset: f for p in parts for offset, f in p.failures.items()}
    if not whole:
        return _Done(failures=failures)
    tensors = {}
    for name, first in whole[0].tensors.items():
        pieces = [decompress(p.tensors[name]) for p in whole]
        shape = (sum(p.shape[0] for p in pieces), *first.shape[1:])
        tensors[name] = Tensor(first.dtype, shape, memoryview(b"".join(p.data for p in pieces)))
    compute = sum(p.compute_us for p in whole)
    return _Done(tensors, failures, compute, max(p.batch for p in whole))
