"""ResNet-50 in two stages on two cores, against a hand-written script and against no transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.images import photos
from tests.benchmarks.load import Load, create_topics
from tests.benchmarks.network import BATCH, write_weights
from tests.benchmarks.ours import Pipeline, measured, pipeline
from tests.benchmarks.processes import together
from tests.benchmarks.rows import Rate, Row, alternate
from tests.broker import Broker

__all__ = ["PLAIN", "RAW", "measure"]

RAW = "resnet50_vs_raw"
PLAIN = "resnet50_vs_plain"
IMAGES = 192  # a round
ROUNDS = 3


class Comparison:
    """One broker, one pipeline file, one set of weights; each system is up only while measured."""

    def __init__(self, address: str, ours: Pipeline, weights: Path) -> None:
        self._address, self._ours, self._weights = address, ours, weights
        self._warm, self._images = list(photos(4 * BATCH)), list(photos(IMAGES))

    async def ours(self) -> Rate:
        """Measure `streaminfer run`: two stage workers and the sink."""
        async with (
            self._ours.running(self._address) as process,
            Load(self._address, self._ours.source, self._ours.target) as load,
        ):
            return await measured(load, [process], self._warm, self._images)

    async def raw(self) -> Rate:
        """Measure the hand-written script: two processes."""
        script = ["-m", "tests.benchmarks.raw_two_stage"]
        first = [*script, "first", self._address, "raw.images", "raw.halves", str(self._weights)]
        second = [*script, "second", self._address, "raw.halves", "raw.answers", str(self._weights)]
        async with (
            together([("raw first", first), ("raw second", second)]) as processes,
            Load(self._address, "raw.images", "raw.answers") as load,
        ):
            return await measured(load, processes, self._warm, self._images)

    async def plain(self) -> Rate:
        """Measure two processes with half of the images each."""
        half = ["-m", "tests.benchmarks.plain", str(self._weights), str(IMAGES // 2)]
        async with together([("plain 0", half), ("plain 1", half)]) as processes:
            before = sum(process.cpu_seconds() for process in processes)
            began = time.perf_counter()
            await asyncio.gather(*[process.line(300) for process in processes])
            seconds = time.perf_counter() - began
            used = sum(process.cpu_seconds() for process in processes) - before
        return Rate(IMAGES / seconds, used / IMAGES * 1e3)


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Measure one comparison, or both in the same rounds."""
    with Broker.running() as broker, TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(folder / "weights.pt")
        await create_topics(broker.address, ["raw.images", "raw.halves", "raw.answers"], 1)
        ours = pipeline(folder, "resnet50", {"kafka": {"partitions": 1}})
        systems = Comparison(broker.address, ours, folder / "weights.pt")
        others = {RAW: ("raw", systems.raw), PLAIN: ("plain", systems.plain)}
        chosen = dict([("ours", systems.ours), *(others[name] for name in goals)])
        rounds = await alternate(chosen, ROUNDS)
    return [
        Row(name, rounds.ratio("ours", other), "x", goal, rounds.note("ours", other))
        for name, goal in goals.items()
        for other, _ in [others[name]]
    ]
