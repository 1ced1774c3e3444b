"""A pipeline on the memory bus whose sink stops for a while; prints what piled up, as JSON.

`python -m tests.benchmarks.held_sink PIPELINE`, a process of its own so that its peak memory is the
pipeline's alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from streaminfer.app import Deployment
from streaminfer.metrics import Metrics
from streaminfer.planning.source import ensure
from streaminfer.spec.file import load
from streaminfer.topics import topic_specs
from streaminfer.topology import SINK, build
from streaminfer.transport.memory import MemoryTransport
from tests.benchmarks.bounded import press, resident


@asynccontextmanager
async def working(deployment: Deployment, name: str, metrics: Metrics) -> AsyncIterator[None]:
    """Run one worker inside the block."""
    stop = asyncio.Event()
    async with deployment.worker(name, metrics, stop) as worker:
        running = asyncio.create_task(worker.run())
        await worker.ready.wait()
        try:
            yield
        finally:
            stop.set()
            await running


async def main(file: Path) -> None:
    """Run every worker, the sink before and after the pause, and print the finding."""
    spec = load(file)
    folder = file.parent / "plan"
    plan = ensure(spec, folder, random_weights=True)
    transport, topology, metrics = MemoryTransport(), build(spec, plan), Metrics(plan.pipeline)
    async with transport.admin() as admin, AsyncExitStack() as stack:
        await admin.create(topic_specs(topology, spec, spec.kafka.partitions))
        deployment = await Deployment.open(spec, plan, folder, transport, history=False)
        for role in topology.workers[:-1]:
            await stack.enter_async_context(working(deployment, role.name, metrics))
        sink = await stack.enter_async_context(AsyncExitStack())
        await sink.enter_async_context(working(deployment, SINK, metrics))

        @asynccontextmanager
        async def stopped() -> AsyncIterator[None]:
            await sink.aclose()
            yield
            await sink.enter_async_context(working(deployment, SINK, metrics))

        print("ready", flush=True)
        sys.stdin.readline()
        before = resident(os.getpid(), "VmRSS")
        finding = await press(transport, spec, plan, stopped)
        peak = resident(os.getpid(), "VmHWM")
        whole = f"{before:.0f} → {peak:.0f} MB"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows is the end anyway
        print(json.dumps({"finding": finding, "all in one process": whole}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
