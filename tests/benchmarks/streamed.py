"""A pipeline on the memory bus, in a process of its own.

`python -m tests.benchmarks.streamed FILE IMAGES`: for each line on stdin it streams so many photos
once, prints the seconds that it took.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from streaminfer import Client, LocalPipeline
from streaminfer.planning import ensure
from streaminfer.spec.file import load
from tests.benchmarks.images import photos


async def main(file: Path, count: int) -> None:
    """Stream `count` photos for every line."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # its stdin is read in a thread
    spec, folder = load(file), file.parent / "plan"
    plan = ensure(spec, folder, random_weights=True)
    jpegs = list(photos(count))
    async with LocalPipeline(spec, plan, folder) as pipeline, pipeline.client() as client:
        await _stream(client, jpegs[: count // 6])
        print("ready", flush=True)
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(None, sys.stdin.readline):
            began = time.perf_counter()
            await _stream(client, jpegs)
            print(time.perf_counter() - began, flush=True)


async def _stream(client: Client, jpegs: list[bytes]) -> None:
    async for answer in client.stream(jpegs, concurrency=64):
        assert answer.status == "ok", answer


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
