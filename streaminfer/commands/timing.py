"""Time what a plan is made of, each alone: its stages by batch size, its decoding, its inputs.

A stage is timed as it will run: its Forward, fed with the output of the stage before.
"""

from __future__ import annotations

import io
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streaminfer.commands.trial import device_seconds
from streaminfer.metrics import Metrics
from streaminfer.plan import Plan
from streaminfer.runtime.decode import decode_image
from streaminfer.runtime.steps import Item
from streaminfer.spec import BatchSpec, PipelineSpec
from streaminfer.wire import Envelope, Sample, Tensor, TensorInput, encode_tensor_input

if TYPE_CHECKING:
    from streaminfer.runtime.forward import Forward

__all__ = ["StageTimes", "inputs_of", "time_decode", "time_stages"]

GROUPS = 7  # of calls, of which the median counts
LEAST = 0.012  # seconds of one group
DISTINCT = 64  # inputs that are made; they come again


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one device call by batch size, and the spread of the groups it is from."""

    seconds: Mapping[int, float]
    spread: float  # (third quartile - first) / median, at the largest batch


def inputs_of(spec: PipelineSpec, plan: Plan, count: int = DISTINCT) -> list[bytes]:
    """Return seeded inputs as a client would send them: JPEGs of soft noise, or tensors."""
    random = np.random.default_rng(0)
    if plan.input.decode == "image":
        side = plan.input.resize or plan.input.crop
        height, width = (
            (side, side) if side else next(iter(spec.first_model.examples().values())).shape[1:]
        )
        return [_image(random, height, width, plan.input.channels) for _ in range(count)]
    row = plan.stages[0].inputs[0]
    found = []
    for _ in range(count):
        if row.dtype.startswith("F"):
            data = random.normal(
                size=next(iter(spec.first_model.examples().values())).shape
            ).astype(f"<f{int(row.dtype[1:]) // 8}")
        else:
            data = np.zeros(
                next(iter(spec.first_model.examples().values())).shape,
                f"<i{int(row.dtype[1:]) // 8}",
            )
        tensor = Tensor(row.dtype, data.shape, memoryview(data.tobytes()))
        found.append(encode_tensor_input(TensorInput(tensor)))
    return found


def _image(random: np.random.Generator, height: int, width: int, channels: int) -> bytes:
    from PIL import Image

    coarse = random.integers(0, 255, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert("L" if channels == 1 else "RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


def time_decode(plan: Plan, inputs: Sequence[bytes]) -> float:
    """Return the seconds that ingest's pool takes for one image; 0 for tensors."""
    if plan.input.decode != "image":
        return 0.0
    took = []
    for value in inputs:
        began = time.thread_time()
        decode_image(value, None, plan.input)
        took.append(time.thread_time() - began)
    return statistics.median(took)


async def time_stages(
    spec: PipelineSpec, plan: Plan, folder: Path, *, batches: Sequence[int] = ()
) -> dict[str, StageTimes]:
    """Time every stage of a built plan on its own device, with the threads that it will have.

    A batch's time is all that its device thread does: bytes to tensors, compute, tensors to bytes.

    Returns:
        By stage: seconds by batch size, for 1, 2, 4 … `batch.max` (or `batches`).
    """
    from streaminfer.runtime.compute import forward, share

    found: dict[str, StageTimes] = {}
    feed: dict[int, Envelope] = {}
    for stage in plan.stages:
        most = spec.batch_of(stage.name).max
        sizes = sorted({*(n for n in (batches or _powers(most)) if n <= most), most})
        alone = spec.model_copy(
            update={
                "stages": tuple(
                    s.model_copy(update={"batch": BatchSpec(max=most, wait=0.0)})
                    for s in spec.stages
                )
            }
        )
        metrics = Metrics(plan.pipeline)
        step = forward(
            alone,
            plan,
            folder,
            stage.name,
            metrics.stage(stage.name),
            device=spec.stage(stage.path).devices[0],
        )
        await step.start()
        try:
            place = spec.stage(stage.name)
            threads = place.threads or share(spec, plan)
            clock = _clock(stage.name, threads, place.devices[0], metrics)
            rows: dict[int, list[float]] = {}
            outputs: dict[int, Envelope] = {}
            for n in sizes:
                envelope = _cut(feed, n) if feed else _first(spec, plan, n)
                rows[n], outputs[n] = await _timed(step, envelope, clock)
        finally:
            await step.stop()
        feed = outputs
        last = rows[sizes[-1]]
        low, middle, high = statistics.quantiles(last, n=4)
        found[stage.name] = StageTimes(
            {n: statistics.median(times) for n, times in rows.items()}, (high - low) / middle
        )
    return found


def _powers(most: int) -> list[int]:
    return [1 << k for k in range(most.bit_length())]


async def _timed(
    step: Forward, envelope: Envelope, clock: Callable[[], float]
) -> tuple[list[float], Envelope]:
    """Return the seconds of a call, a number for each group of calls, and what comes out."""
    item = Item((), envelope)
    await step([item])
    began = clock()
    out = (await step([item])).outputs[0]
    once = max(1e-6, clock() - began)
    calls = max(1, min(50, round(LEAST / once)))
    found = []
    for _ in range(GROUPS if once < 1.0 else 3):
        began = clock()
        for _ in range(calls):
            await step([item])
        found.append((clock() - began) / calls)
    return found, _plain(out)


def _clock(stage: str, threads: int, device: str, metrics: Metrics) -> Callable[[], float]:
    """Return the clock of a device's work.

    Its thread's CPU time where one CPU thread does all of it: nobody else's load is in that.
    Otherwise the seconds that its metrics count.
    """
    if threads == 1 and device == "cpu" and hasattr(time, "pthread_getcpuclockid"):
        for thread in threading.enumerate():
            if thread.name.startswith(f"device-{stage}") and thread.ident is not None:
                clock = time.pthread_getcpuclockid(thread.ident)
                return lambda: time.clock_gettime(clock)
    return lambda: sum(device_seconds(metrics).values())


def _first(spec: PipelineSpec, plan: Plan, n: int) -> Envelope:
    """Make what ingest would hand to the first stage."""
    row = plan.stages[0].inputs[0]
    inputs = inputs_of(spec, plan, min(n, DISTINCT))
    if plan.input.decode == "image":
        pixels = np.stack(
            [decode_image(inputs[k % len(inputs)], None, plan.input) for k in range(n)]
        )
        tensor = Tensor("U8", pixels.shape, memoryview(pixels.tobytes()))
    else:
        width = row.row_bytes() if None not in row.shape[1:] else 0
        shape = (n, *next(iter(spec.first_model.examples().values())).shape)
        nbytes = width * n if width else int(np.prod(shape)) * _itemsize(row.dtype)
        tensor = Tensor(row.dtype, shape, memoryview(bytes(nbytes)))
    return _envelope({row.name: tensor}, n, plan.digest)


def _itemsize(dtype: str) -> int:
    return 1 if dtype == "BOOL" else int("".join(c for c in dtype if c.isdigit())) // 8


def _envelope(tensors: Mapping[str, Tensor], n: int, digest: str) -> Envelope:
    now = int(time.time() * 1000)
    samples = tuple(Sample(k, k, str(k), None, now) for k in range(n))
    return Envelope(0, samples, digest, "trial", tensors=dict(tensors))


def _cut(feed: Mapping[int, Envelope], n: int) -> Envelope:
    """Return an envelope of n rows out of those of the stage before."""
    if n in feed:
        return feed[n]
    from streaminfer.runtime.rows import select

    whole = feed[max(feed)]
    rows = [k % len(whole.samples) for k in range(n)]
    return _plain(select(whole, rows))


def _plain(envelope: Envelope) -> Envelope:
    """Let the bytes be as a receiver has them: not to be written to."""
    tensors = {
        name: replace(tensor, data=memoryview(bytes(tensor.data)))
        for name, tensor in envelope.tensors.items()
    }
    return replace(envelope, tensors=tensors, hops=())
