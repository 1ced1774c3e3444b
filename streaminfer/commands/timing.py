"""Time what a plan is made of, each alone: its stages by batch size, its decoding.

A cell is timed as it will run: its Forward, fed with what comes out of those that it reads.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from streaminfer.commands.records import DISTINCT, Input, example_rows, inputs_of
from streaminfer.commands.trial import device_seconds
from streaminfer.errors import ConfigError
from streaminfer.metrics import Metrics
from streaminfer.plan import ITEMSIZE, PRESENT, Plan, StagePlan
from streaminfer.planning.simulation.measured import stage_times, takes
from streaminfer.planning.simulation.scenario import StageTimes
from streaminfer.planning.timing import PAUSE, PAUSES, cores
from streaminfer.runtime.compute import forward, share
from streaminfer.runtime.decode import decode_image
from streaminfer.runtime.rows import select
from streaminfer.runtime.steps import Item
from streaminfer.spec import BatchSpec, InputSpec, PipelineSpec
from streaminfer.topology import build
from streaminfer.wire import Envelope, Sample, Tensor, compress

if TYPE_CHECKING:
    from streaminfer.runtime.forward import Forward

__all__ = ["time_decode", "time_stages"]

GROUPS = 7  # of calls, of which the median counts
LEAST = 0.012  # seconds of one group
PAIRS, BESIDE = 5, 3  # times that calls are timed alone and beside others, so many each
NEAR = 0.05  # seconds of them at least


def time_decode(source: InputSpec, inputs: Sequence[Input]) -> float:
    """Return the seconds that ingest's pool takes for one image; 0 for tensors."""
    if source.decode != "image":
        return 0.0
    took = []
    for one in inputs:
        began = time.thread_time()
        decode_image(one.value, None, source)
        took.append(time.thread_time() - began)
    return statistics.median(took)


async def time_stages(
    spec: PipelineSpec, plan: Plan, folder: Path, *, batches: Sequence[int] = ()
) -> dict[str, StageTimes]:
    """Time every cell of a built plan on its own devices, with the threads that it will have.

    A batch's time is all that its device thread does: bytes to tensors, compute, tensors to bytes.

    Returns:
        By cell: seconds by batch size, for 1, 2, 4 … `batch.max` (or `batches`).

    Raises:
        ConfigError: a device that this machine does not have.
    """
    roles = {name: role for role in build(spec, plan).workers for name in role.stages}
    last = plan.stages[-1].name
    found: dict[str, StageTimes] = {}
    made: dict[str, Envelope] = {}  # what each cell gives for its largest batch
    loads: dict[str, _Load] = {}
    for stage in plan.stages:
        role, most = roles[stage.name], spec.batch_of(stage.path).max
        devices = [role.device(stage.name, replica) for replica in range(role.replicas)]
        sizes = sorted({*(n for n in (batches or _powers(most)) if n <= most), most})
        bench = _Bench(_alone(spec, most), plan, folder, stage)
        feed = [_feed(spec, plan, stage, made, n) for n in sizes]
        rows = {device: await bench.timed(device, feed) for device in dict.fromkeys(devices)}
        times = {device: [statistics.median(t.warm) for t in one] for device, one in rows.items()}
        low, middle, high = statistics.quantiles(rows[devices[0]][-1].warm, n=4)
        first = times[devices[0]]
        single = [one.cold for one in rows[devices[0]]]
        calls = stage_times(
            dict(zip(sizes, first, strict=True)),
            dict(zip(sizes, single, strict=True)),
            takes(rows[devices[0]][-1].steps, first=not stage.sources, last=stage.name == last),
        )
        loads[stage.name] = _Load(bench, devices[0], feed[-1], middle / most)
        made[stage.name] = await bench.output(devices[0], feed[-1])
        found[stage.name] = replace(
            calls,
            spread=(high - low) / middle,
            speeds=tuple(first[-1] / times[device][-1] for device in devices),
            ratio=_ratio(made[stage.name]),
        )
    for name, load in loads.items():
        near = load if roles[name].replicas > 1 else _neighbour(name, loads)
        found[name] = replace(found[name], beside=await _beside(load, near))
    return found


class _Load(NamedTuple):
    """A cell, and the largest batch that it computes."""

    bench: _Bench
    device: str
    envelope: Envelope
    each: float  # seconds of a sample


def _neighbour(name: str, loads: Mapping[str, _Load]) -> _Load:
    """Return the CPU's cell that will most often compute beside this one; itself if there is none.

    What a stage loses to another one's use of their caches depends on both: a copy of it would
    have weights of its own, which they do not have room for.
    """
    others = [load for other, load in loads.items() if other != name and load.device == "cpu"]
    return max(others, key=lambda load: load.each, default=loads[name])


async def _beside(mine: _Load, near: _Load) -> float:
    """Return how much longer a call takes while another device computes."""
    threads = max(mine.bench.threads(), near.bench.threads())
    if mine.device != "cpu" or near.device != "cpu" or cores() < 2 * threads:
        return 1.0
    ratios = []
    one, other = mine.bench.running(mine.device), near.bench.running(near.device)
    async with one as (first, clock), other as (second, _):
        item, theirs = Item((), mine.envelope), Item((), near.envelope)
        await asyncio.gather(_calls(first, item, 2), _calls(second, theirs, 2))
        began = clock()
        await _calls(first, item, BESIDE)
        count = max(BESIDE, round(BESIDE * NEAR / max(1e-6, clock() - began)))
        for _ in range(PAIRS):
            began = clock()
            await _calls(first, item, count)
            alone, began = clock() - began, clock()
            busy = asyncio.create_task(_calls(second, theirs))
            await _calls(first, item, count)
            ratios.append((clock() - began) / alone)
            busy.cancel()
            await asyncio.gather(busy, return_exceptions=True)
    return statistics.median(ratios)


def _ratio(envelope: Envelope) -> float:
    """Return the bytes of an envelope's tensors as they travel ÷ before they were compressed."""
    tensors = envelope.tensors.values()
    if not any(tensor.codec for tensor in tensors):
        return 1.0
    whole = sum(prod(tensor.shape) * ITEMSIZE[tensor.dtype] for tensor in tensors)
    return sum(len(tensor.data) for tensor in tensors) / max(1, whole)


def _alone(spec: PipelineSpec, most: int) -> PipelineSpec:
    """Return the same with one size of batches everywhere, that waits for nothing."""
    stages = tuple(
        stage.model_copy(
            update={
                "batch": None,
                "branches": tuple(
                    branch.model_copy(
                        update={
                            "batch": None,
                            "stages": tuple(
                                part.model_copy(update={"batch": None}) for part in branch.stages
                            ),
                        }
                    )
                    for branch in stage.branches
                ),
            }
        )
        for stage in spec.stages
    )
    return spec.model_copy(update={"batch": BatchSpec(max=most, wait=0.0), "stages": stages})


@dataclass(frozen=True)
class _Bench:
    """One cell to be run by itself."""

    spec: PipelineSpec
    plan: Plan
    folder: Path
    stage: StagePlan

    async def timed(self, device: str, feed: Sequence[Envelope]) -> list[_Timed]:
        """Return the seconds of a call for each envelope."""
        async with self.running(device) as (step, clock):
            return [await _timed(step, envelope, clock) for envelope in feed]

    def threads(self) -> int:
        return self.spec.stage(self.stage.path).threads or share(self.spec, self.plan)

    async def output(self, device: str, envelope: Envelope) -> Envelope:
        """Return what comes out, of all rows: none leaves at an exit."""
        stages = tuple(s.model_copy(update={"exit": None}) for s in self.plan.stages)
        whole = self.plan.model_copy(update={"stages": stages})
        async with self.running(device, whole) as (step, _):
            result = await step([Item((), envelope)])
        if not result.outputs:
            failure = result.outcomes[0].samples[0].failure
            why = failure.message if failure else "nothing came out"
            raise ConfigError(f"{self.stage.name}: {why}", where="model.example")
        return _plain(result.outputs[0])

    @asynccontextmanager
    async def running(
        self, device: str, plan: Plan | None = None
    ) -> AsyncIterator[tuple[Forward, Callable[[], float]]]:
        """Give the cell, started, and the clock of its device's work."""
        plan, name = plan or self.plan, self.stage.name
        metrics = Metrics(plan.pipeline)
        before = {thread.ident for thread in threading.enumerate()}
        step = forward(self.spec, plan, self.folder, name, metrics.stage(name), device=device)
        await step.start()
        try:
            yield step, _clock(name, self.threads(), device, metrics, before)
        finally:
            await step.stop()


def _feed(
    spec: PipelineSpec, plan: Plan, stage: StagePlan, made: Mapping[str, Envelope], n: int
) -> Envelope:
    """Return n rows of all that a cell reads."""
    if not stage.sources:
        return _first(spec, plan, n)
    tensors: dict[str, Tensor] = {}
    for source in stage.sources:
        rows = _cut(made[source.stage], n).tensors
        tensors |= {name: rows[name] for name in source.tensors}
    if any(one.name == PRESENT for one in stage.inputs):
        ones = np.ones((n, len(stage.sources)), "<f4")
        tensors[PRESENT] = Tensor("F32", ones.shape, memoryview(ones.tobytes()))
    return _envelope(tensors, n, plan.digest)


def _powers(most: int) -> list[int]:
    return [1 << k for k in range(most.bit_length())]


async def _calls(step: Forward, item: Item, count: int | None = None) -> None:
    for _ in range(count) if count else repeat(None):
        await step([item])


class _Timed(NamedTuple):
    """Seconds of a call: a number for each group of calls, and for each after a pause."""

    warm: list[float]
    cold: list[float]
    steps: int  # how often it takes the interpreter's lock for its program


async def _timed(step: Forward, envelope: Envelope, clock: Callable[[], float]) -> _Timed:
    item = Item((), envelope)

    async def took(calls: int) -> float:
        began = clock()
        await _calls(step, item, calls)
        return (clock() - began) / calls

    await took(1)
    once = max(1e-6, await took(1))
    calls = max(1, min(50, round(LEAST / once)))
    warm = [await took(calls) for _ in range(GROUPS if once < 1.0 else 3)]
    cold = []
    for _ in range(PAUSES if once < 1.0 else 1):
        await asyncio.sleep(PAUSE)
        cold.append(await took(1))
    return _Timed(warm, cold, step.steps)


def _clock(
    stage: str, threads: int, device: str, metrics: Metrics, before: Collection[int | None]
) -> Callable[[], float]:
    """Return the clock of a device's work, whose thread is none of those that were `before`.

    Its thread's CPU time where one CPU thread does all of it: nobody else's load is in that.
    Otherwise the seconds that its metrics count.
    """
    if threads == 1 and device == "cpu" and hasattr(time, "pthread_getcpuclockid"):
        for thread in threading.enumerate():
            ours = thread.name.startswith(f"device-{stage}") and thread.ident not in before
            if ours and thread.ident is not None:
                clock = time.pthread_getcpuclockid(thread.ident)
                return lambda: time.clock_gettime(clock)
    return lambda: sum(device_seconds(metrics).values())


def _first(spec: PipelineSpec, plan: Plan, n: int) -> Envelope:
    """Make what ingest would hand to the first cell."""
    if plan.input.decode != "image":
        tensors = example_rows(spec, plan, n)
        return _plain(_envelope(tensors, n, plan.digest))
    inputs = inputs_of(spec, plan, min(n, DISTINCT))
    ranges = plan.stages[0].inputs[0].ranges
    pixels = np.stack(
        [decode_image(inputs[k % len(inputs)].value, None, plan.input, ranges) for k in range(n)]
    )
    tensor = Tensor("U8", pixels.shape, memoryview(pixels.tobytes()))
    return _envelope({plan.stages[0].inputs[0].name: tensor}, n, plan.digest)


def _envelope(tensors: Mapping[str, Tensor], n: int, digest: str) -> Envelope:
    now = int(time.time() * 1000)
    samples = tuple(Sample(k, k, str(k), None, now) for k in range(n))
    return Envelope(0, samples, digest, "trial", tensors=dict(tensors))


def _cut(whole: Envelope, n: int) -> Envelope:
    """Return n rows of an envelope; if it has less, they come again."""
    if n == len(whole.samples):
        return whole
    part = select(whole, [k % len(whole.samples) for k in range(n)])
    packed = {name: tensor.codec for name, tensor in whole.tensors.items()}
    tensors = {
        name: compress(tensor, codec) if (codec := packed[name]) else tensor
        for name, tensor in part.tensors.items()
    }
    return _plain(replace(part, tensors=tensors))


def _plain(envelope: Envelope) -> Envelope:
    """Let the bytes be as a receiver has them: not to be written to."""
    tensors = {
        name: replace(tensor, data=memoryview(bytes(tensor.data)))
        for name, tensor in envelope.tensors.items()
    }
    return replace(envelope, tensors=tensors, hops=())
