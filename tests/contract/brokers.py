"""What the tests share that run on a real Kafka alone."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from streaminfer.transport.base import Record, TopicSpec
from streaminfer.transport.kafka import KafkaSettings, KafkaTransport


def quick(address: str, **other: float) -> KafkaTransport:
    """A transport that gives up in seconds where production waits for minutes."""
    times: dict[str, float] = {
        "session_timeout": 1.5,
        "rebalance_timeout": 3.0,
        "request_timeout": 5.0,
        "close_timeout": 2.0,
        **other,
    }
    return KafkaTransport(KafkaSettings(address, **times))  # type: ignore[arg-type]


async def make(kafka: KafkaTransport, partitions: int = 1, **config: str) -> str:
    name = f"t-{uuid4().hex[:12]}"
    async with kafka.admin() as admin:
        settings = {key.replace("_", "."): value for key, value in config.items()}
        await admin.create([TopicSpec(name, partitions, settings)])
    return name


async def read_all(kafka: KafkaTransport, topic: str, count: int) -> list[Record]:
    records: list[Record] = []
    async with kafka.consumer([topic], None) as reader, asyncio.timeout(60):
        while len(records) < count:
            records += await reader.poll(0.5)
    return records
