"""The comparator without compute: read a record, write it on. Four of them make the digits' hops.

`python -m tests.benchmarks.raw_chain ADDRESS FROM TO`
"""

from __future__ import annotations

import asyncio
import signal
import sys

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer


async def forward(address: str, source: str, target: str) -> None:
    """Pass records on until SIGTERM."""
    consumer = AIOKafkaConsumer(
        source,
        bootstrap_servers=address,
        group_id=f"raw-{source}",
        auto_offset_reset="earliest",
    )
    producer = AIOKafkaProducer(bootstrap_servers=address, acks=1)

    async def pass_on() -> None:
        async for record in consumer:
            await producer.send(target, record.value, record.key)

    async with consumer, producer:
        passing = asyncio.ensure_future(pass_on())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, passing.cancel)
        print("ready", flush=True)
        await asyncio.wait([passing])
        if not passing.cancelled():
            passing.result()


if __name__ == "__main__":
    asyncio.run(forward(*sys.argv[1:]))
