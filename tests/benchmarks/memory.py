"""What the road itself costs on the memory bus: one hop, and three stages against a plain loop."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from streaminfer.app import LocalPipeline
from streaminfer.metrics import Metrics
from streaminfer.parallel import Program, load
from streaminfer.parallel.weights import read
from streaminfer.plan import Plan, stage_files
from streaminfer.planning.source import ensure
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.postprocess import batch_of, top_k
from streaminfer.runtime.receive import Envelopes
from streaminfer.runtime.steps import Acked, Item, Plain, Result, Settled
from streaminfer.runtime.worker import Limits, Worker
from streaminfer.spec.file import load as load_spec
from streaminfer.topology import Route, Routes
from streaminfer.transport import TopicSpec
from streaminfer.transport.memory import MemoryTransport
from streaminfer.wire import Envelope, Sample, Tensor
from tests.benchmarks.images import digits
from tests.benchmarks.ours import pipeline
from tests.benchmarks.rows import Rate, Row, alternate, load_average, spread

__all__ = ["EFFICIENCY", "HOP", "efficiency", "hop"]

HOP = "memory_hop"
EFFICIENCY = "memory_efficiency"
HOPS = 400  # micro-batches a round
SHAPE = (64, 24, 8, 8)  # of what leaves the digits' first stage
IMAGES = 3000  # a round
ROUNDS = 5


class Pass(Plain):
    """The step that does nothing; it notes when each micro-batch was acked."""

    def __init__(self) -> None:
        self.acked: list[float] = []

    async def __call__(self, items: Sequence[Item]) -> Result:
        """Hand on what came."""
        return Result(
            outputs=tuple(item.envelope for item in items if item.envelope),
            settled=tuple(Settled(at) for item in items for at in item.positions),
            acked=self._note,
        )

    def _note(self) -> Acked:
        self.acked.append(time.perf_counter())
        return Acked()


async def hop(goals: Mapping[str, str | None]) -> list[Row]:
    """Send micro-batches through a worker that computes nothing: µs from ack to ack."""
    found = [await _hop() for _ in range(ROUNDS)]
    floats = " x ".join(str(n) for n in SHAPE)
    road = "receive, decode, encode, send, ack, settle"
    note = f"{road} of {floats} floats; rounds {spread(found, 0)}; {load_average()}"
    return [Row(HOP, statistics.median(found), "µs per micro-batch", goals[HOP], note)]


async def _hop() -> float:
    """Run one worker over a full topic."""
    transport, metrics, stop = MemoryTransport(), Metrics("hop").stage("hop"), asyncio.Event()
    step = Pass()
    async with transport.admin() as admin, transport.producer() as producer:
        limit = {"max.message.bytes": str(1 << 20)}
        await admin.create([TopicSpec(name, 1, limit) for name in ("before", "behind")])
        fill = Outbox(producer, metrics, Routes((Route("before"),), "behind"))
        for k in range(HOPS):
            await fill.publish(Result(outputs=(_envelope(k),)))
        worker = Worker(
            lambda listener: transport.consumer(["before"], "hop", listener),
            Envelopes("hop", None, metrics, max_bytes=1 << 24),
            step,
            Outbox(producer, metrics, Routes((Route("behind"),), "behind")),
            metrics,
            stop,
            limits=Limits(),
        )
        await worker.run(burst=True)
    return (step.acked[-1] - step.acked[0]) / (HOPS - 1) * 1e6


def _envelope(k: int) -> Envelope:
    rows = SHAPE[0]
    samples = [Sample(n, n, f"digit-{n}", None, 0) for n in range(k * rows, (k + 1) * rows)]
    data = torch.rand(SHAPE).numpy().data.cast("B")
    return Envelope(
        partition=0,
        samples=tuple(samples),
        digest="0" * 64,
        incarnation="benchmark",
        tensors={"relu": Tensor("F32", SHAPE, data)},
    )


async def efficiency(goals: Mapping[str, str | None]) -> list[Row]:
    """Compare the three-stage pipeline in one process with a loop over the same programs."""
    images = list(digits(IMAGES))
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        file = pipeline(Path(name), "digits", {}).file
        spec, folder = load_spec(file), Path(name) / "plan"
        plan = ensure(spec, folder)
        programs = [_program(folder, stage.name) for stage in plan.stages]

        async def loop() -> Rate:
            return _timed_loop(plan, programs, spec.batch.max, images)

        async def streamed() -> Rate:
            async with LocalPipeline(spec, plan, folder) as running, running.client() as client:
                async for _ in client.stream(images[:500]):
                    pass
                began, used = time.perf_counter(), time.process_time()
                async for answer in client.stream(images, concurrency=1024):
                    assert answer.status == "ok", answer
                return _rate(began, used)

        rounds = await alternate({"ours": streamed, "loop": loop}, ROUNDS)
    note = rounds.note("ours", "loop")
    return [Row(EFFICIENCY, rounds.ratio("ours", "loop"), "x", goals[EFFICIENCY], note)]


def _program(folder: Path, stage: str) -> Program:
    graph, weights = stage_files(folder, stage)
    return load(graph.read_bytes(), read(weights))


def _timed_loop(plan: Plan, programs: Sequence[Program], batch: int, images: list[bytes]) -> Rate:
    """Decode, compute and rank in batches, one after the other."""
    finish = top_k(plan.top_k)
    began, used = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for k in range(0, len(images), batch):
            values: Sequence[torch.Tensor] = [batch_of(images[k : k + batch], plan.input)]
            for program in programs:
                values = program(*values)
            {name: rows.tolist() for name, rows in finish({"logits": values[0]}).items()}
    return _rate(began, used)


def _rate(began: float, used: float) -> Rate:
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return Rate(IMAGES / seconds, cpu / IMAGES * 1e3)
