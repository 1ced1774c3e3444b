"""A member that reads, commits, and then lives until it is killed: what a crash leaves behind.

python -m tests.contract.doomed ADDRESS TOPIC GROUP READ COMMIT
"""

from __future__ import annotations

import asyncio
import sys

from streaminfer.transport import Commit, Consumer, TopicPartition, Transport


def quick(address: str, *, max_poll_interval: float = 600.0) -> Transport:
    """A transport that gives up in seconds where production waits for minutes."""
    from streaminfer.transport.kafka import KafkaSettings, KafkaTransport

    settings = KafkaSettings(
        address,
        session_timeout=1.5,
        rebalance_timeout=3.0,
        request_timeout=5.0,
        close_timeout=2.0,
        max_poll_interval=max_poll_interval,
    )
    return KafkaTransport(settings)


async def read_and_commit(consumer: Consumer, tp: TopicPartition, read: int, commit: int) -> None:
    """Read so many records at least, commit the first of them, if any."""
    while read > 0:
        read -= len(await consumer.poll(0.2))
    if commit:
        await consumer.commit({tp: Commit(commit, "last words")})


async def main(address: str, topic: str, group: str, read: str, commit: str) -> None:
    async with quick(address).consumer([topic], group) as consumer:
        await read_and_commit(consumer, TopicPartition(topic, 0), int(read), int(commit))
        sys.stdout.write("committed\n")
        sys.stdout.flush()
        await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
