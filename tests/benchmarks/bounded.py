"""With the sink stopped under full input: what piles up is bounded by the window, on both buses.

input   ██████████████████████████████   never runs dry
sink    ▔▔▔▏ stopped for 30 s ▕▔▔▔▔▔▔▔   then it goes on, and every image gets its answer
inner   ▁▂▄▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▄▂▁▁▁▁▁   at most what the window allows
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import psutil

from streaminfer.client import connect
from streaminfer.plan import Plan
from streaminfer.planning.source import ensure
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load
from streaminfer.topics import window
from streaminfer.topology import build
from streaminfer.transport import Outgoing, Transport
from tests.benchmarks.gauge import gauge
from tests.benchmarks.images import digits
from tests.benchmarks.ours import pipeline
from tests.benchmarks.processes import Process, running
from tests.benchmarks.rows import Row, load_average
from tests.broker import Broker

__all__ = ["KAFKA", "MEMORY", "Finding", "on_kafka", "on_memory", "press", "resident"]

MEMORY = "memory_bounded_memory"
KAFKA = "memory_bounded_kafka"
STOPPED = 30.0  # seconds
IMAGES = 10_000
PARTITIONS = 2
HEADER = 256  # bytes of a sample's id, key, offsets and meta in an envelope
ANSWER = 8  # bytes of one of the top k: an index and a score
# The window this gives is hundreds of samples a partition: the input has many times of that.
SMALL: Mapping[str, object] = {
    "memory": "4MB",
    "kafka": {"partitions": PARTITIONS, "session_timeout": "2m"},
}

Finding = dict[str, float]  # of press(); numbers only, so that it crosses a process as JSON


async def on_memory(goals: Mapping[str, str | None]) -> list[Row]:
    """Measure in a process of its own, whose peak memory is then the pipeline's."""
    with TemporaryDirectory() as name:
        file = pipeline(Path(name), "digits", SMALL).file
        arguments = ["-m", "tests.benchmarks.held_sink", str(file)]
        async with running("memory bus", arguments) as process:
            line = await process.line(300)
    found = json.loads(line)
    return [_row(MEMORY, goals[MEMORY], found.pop("finding"), found)]


async def on_kafka(goals: Mapping[str, str | None]) -> list[Row]:
    """Measure `streaminfer run`; its sink is stopped with SIGSTOP."""
    with Broker.running() as broker, TemporaryDirectory() as name:
        ours = pipeline(Path(name), "digits", SMALL)
        async with ours.running(broker.address) as process:
            spec = load(ours.file, {"kafka.bootstrap": broker.address})
            plan = ensure(
                spec, Path(name) / ".streaminfer" / "plans" / spec.pipeline, random_weights=True
            )
            workers = _workers(process)
            before = {who: resident(one.pid, "VmRSS") for who, one in workers.items()}
            found = await press(connect(spec), spec, plan, lambda: _frozen(workers["sink"]))
            peaks = {
                who: f"{before[who]:.0f} → {resident(one.pid, 'VmHWM'):.0f} MB"
                for who, one in workers.items()
            }
    return [_row(KAFKA, goals[KAFKA], found, peaks)]


async def press(
    transport: Transport,
    spec: PipelineSpec,
    plan: Plan,
    sink_stopped: Callable[[], AbstractAsyncContextManager[None]],
) -> Finding:
    """Send without a pause, stop the sink for a while, await all answers; say what piled up."""
    topology = build(spec, plan)
    series = uuid4().hex[:8]
    missing = {f"{series}-{k}".encode() for k in range(IMAGES)}
    async with gauge(transport, topology, PARTITIONS) as peaks:
        answers = transport.consumer([topology.output_topic], None)
        async with transport.producer() as producer, answers:
            for key, value in zip(sorted(missing), digits(IMAGES), strict=True):
                await producer.send(Outgoing(topology.input_topic, value, key))
            async with sink_stopped():
                await asyncio.sleep(STOPPED)
            async with asyncio.timeout(120):
                while missing:
                    records = await answers.poll(1.0)
                    missing.difference_update(record.key or b"" for record in records)
    allowed = window(spec, plan, PARTITIONS) * PARTITIONS
    return {
        "nbytes": peaks.nbytes,
        "samples": peaks.samples,
        "allowed_nbytes": allowed * _row_bytes(plan),
        "allowed_samples": allowed,
    }


def _row_bytes(plan: Plan) -> int:
    """Return what one sample may take on all edges: a reader's commit may lag behind its output."""
    edges = [sum(t.row_bytes(stage.edge.dtype) for t in stage.inputs) for stage in plan.stages[1:]]
    return sum(edges) + plan.top_k * ANSWER + HEADER * (len(edges) + 1)


def _row(name: str, goal: str | None, found: Finding, peaks: Mapping[str, object]) -> Row:
    """Judge by what came closest to its bound: bytes or samples."""
    share = max(
        found["nbytes"] / found["allowed_nbytes"], found["samples"] / found["allowed_samples"]
    )
    note = (
        f"inner topics {found['nbytes'] / 1e6:.2f} of {found['allowed_nbytes'] / 1e6:.2f} MB, "
        f"{found['samples']:.0f} of {found['allowed_samples']:.0f} samples in flight, "
        f"{IMAGES} sent, all answered; resident before → peak: "
        f"{', '.join(f'{who} {size}' for who, size in peaks.items())}; {load_average()}"
    )
    return Row(name, share, "of the window", goal, note)


@asynccontextmanager
async def _frozen(process: psutil.Process) -> AsyncIterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def _workers(process: Process) -> dict[str, psutil.Process]:
    """Find the workers below the launcher by their command lines."""
    found = {}
    for child in process.tree():
        command = child.cmdline()
        if "worker" in command:
            stage = command[command.index("--stage") + 1] if "--stage" in command else "sink"
            found[stage] = child
    return found


def resident(pid: int, field: str) -> float:
    """Return VmRSS (now) or VmHWM (the peak) of a process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(f"no {field} of process {pid}")
