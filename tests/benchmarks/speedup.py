"""What a second core brings: ResNet-50 in two stages against the whole of it on one core."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.images import photos
from tests.benchmarks.load import Load
from tests.benchmarks.network import BATCH, write_weights
from tests.benchmarks.ours import Pipeline, measured, pipeline
from tests.benchmarks.processes import running
from tests.benchmarks.rows import Rate, Row, alternate
from tests.broker import Broker

__all__ = ["KAFKA", "MEMORY", "measure"]

MEMORY = "resnet50_speedup_memory"
KAFKA = "resnet50_speedup_kafka"
IMAGES = 192  # a round: filling and draining the pipeline counts, too
ROUNDS = 3


class Speedup:
    """One model three times; each is up only while it is measured."""

    def __init__(self, address: str, ours: Pipeline, weights: Path) -> None:
        self._address, self._ours, self._weights = address, ours, weights
        self._warm, self._images = list(photos(4 * BATCH)), list(photos(IMAGES))

    async def one(self) -> Rate:
        """Measure the whole model in one process with one thread."""
        return await self._script("one", "tests.benchmarks.plain", str(self._weights))

    async def memory(self) -> Rate:
        """Measure two stages on the memory bus, one thread each."""
        return await self._script("memory", "tests.benchmarks.streamed", str(self._ours.file))

    async def kafka(self) -> Rate:
        """Measure two stages on Kafka, a process and a thread each."""
        async with (
            self._ours.running(self._address) as process,
            Load(self._address, self._ours.source, self._ours.target) as load,
        ):
            return await measured(load, [process], self._warm, self._images)

    async def _script(self, name: str, module: str, what: str) -> Rate:
        async with running(name, ["-m", module, what, str(IMAGES)]) as process:
            before, began = process.cpu_seconds(), time.perf_counter()
            await process.line(300)
            seconds = time.perf_counter() - began
            used = process.cpu_seconds() - before
        return Rate(IMAGES / seconds, used / IMAGES * 1e3)


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Measure one speed-up, or both in the same rounds."""
    with Broker.running() as broker, TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(folder / "weights.pt")
        ours = pipeline(folder, "resnet50", {"kafka": {"partitions": 1}})
        systems = Speedup(broker.address, ours, folder / "weights.pt")
        others = {MEMORY: ("memory", systems.memory), KAFKA: ("kafka", systems.kafka)}
        chosen = dict([("one", systems.one), *(others[name] for name in goals)])
        rounds = await alternate(chosen, ROUNDS)
    return [
        Row(name, rounds.ratio(other, "one"), "x", goal, rounds.note(other, "one"))
        for name, goal in goals.items()
        for other, _ in [others[name]]
    ]
