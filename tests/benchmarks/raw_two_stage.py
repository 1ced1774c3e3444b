"""The comparator: a stage as one would write it by hand, with aiokafka, msgpack and torch alone.

`python -m tests.benchmarks.raw_two_stage first|second ADDRESS FROM TO WEIGHTS`

    images (key = id) ─▶ [first] ─▶ msgpack(ids, shape, fp16) ─▶ [second] ─▶ JSON (key = id)

Reading, computing and writing overlap, so that it is what a careful person gets; it has no retry,
no order, no window, no dead letter, and commits by the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import torch
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from tests.benchmarks.images import photos
from tests.benchmarks.load import LARGEST
from tests.benchmarks.network import BATCH, best, halves, prepare

Message = tuple[bytes | None, bytes]  # key and value
Batch = tuple[Sequence[bytes], Sequence[bytes]]  # keys and values


def first(weights: Path) -> Callable[[Batch], list[Message]]:
    """Return the work of the first stage: JPEGs in, one micro-batch of activations out."""
    network, _ = halves(weights)

    def work(batch: Batch) -> list[Message]:
        keys, jpegs = batch
        with torch.inference_mode():
            half = network(prepare(jpegs)).half()
        return [(None, msgpack.packb((keys, list(half.shape), half.numpy().data.cast("B"))))]

    work(([b""] * BATCH, list(photos(BATCH))))
    return work


def second(weights: Path) -> Callable[[Batch], list[Message]]:
    """Return the work of the second stage: micro-batches in, an answer per image out."""
    _, network = halves(weights)

    def work(batch: Batch) -> list[Message]:
        answers: list[Message] = []
        for message in batch[1]:
            keys, shape, data = msgpack.unpackb(message)
            half = torch.from_numpy(np.frombuffer(data, np.float16).reshape(shape))
            with torch.inference_mode():
                rows = best(network(half.float()))
            answers += [
                (key, json.dumps(row).encode()) for key, row in zip(keys, rows, strict=True)
            ]
        return answers

    return work


async def serve(
    work: Callable[[Batch], list[Message]], address: str, source: str, target: str, take: int
) -> None:
    """Read, compute and write at once, `take` records at a time, until SIGTERM."""
    consumer = AIOKafkaConsumer(
        source,
        bootstrap_servers=address,
        group_id=f"raw-{source}",
        auto_offset_reset="earliest",
        fetch_max_bytes=LARGEST,
        max_partition_fetch_bytes=LARGEST,
        check_crcs=False,
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=address, acks=1, max_request_size=LARGEST, max_batch_size=LARGEST
    )
    read: asyncio.Queue[Batch] = asyncio.Queue(2)
    done: asyncio.Queue[list[Message]] = asyncio.Queue(2)
    loop, device = asyncio.get_running_loop(), ThreadPoolExecutor(1)

    async def receive() -> None:
        while True:
            for records in (await consumer.getmany(timeout_ms=1000, max_records=take)).values():
                await read.put(([r.key for r in records], [r.value for r in records]))

    async def compute() -> None:
        while True:
            await done.put(await loop.run_in_executor(device, work, await read.get()))

    async def publish() -> None:
        while True:
            sent = [await producer.send(target, value, key) for key, value in await done.get()]
            await asyncio.gather(*sent)

    async with consumer, producer:
        tasks = [asyncio.ensure_future(part()) for part in (receive, compute, publish)]
        loop.add_signal_handler(signal.SIGTERM, lambda: [task.cancel() for task in tasks])
        print("ready", flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)


if __name__ == "__main__":
    stage, broker, topic_in, topic_out, file = sys.argv[1:]
    torch.set_num_threads(1)
    make, records = {"first": (first, BATCH), "second": (second, 1)}[stage]
    asyncio.run(serve(make(Path(file)), broker, topic_in, topic_out, records))
