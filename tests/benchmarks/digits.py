"""Digits through three stages on Kafka, against a bare chain of consume and produce."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.images import digits
from tests.benchmarks.load import Load, create_topics
from tests.benchmarks.ours import Pipeline, measured, pipeline
from tests.benchmarks.processes import together
from tests.benchmarks.rows import Rate, Row, alternate
from tests.broker import Broker

__all__ = ["CHAIN", "measure"]

CHAIN = "digits_vs_raw_chain"
IMAGES = 5000  # a round
WARM = 1000
ROUNDS = 5
PARTITIONS = 4
HOPS = ["chain.images", "chain.1", "chain.2", "chain.3", "chain.answers"]  # s0, s1, s2, sink


class Comparison:
    """One broker and one pipeline file; each system is up only while it is measured."""

    def __init__(self, address: str, ours: Pipeline) -> None:
        self._address, self._ours = address, ours
        self._warm, self._images = list(digits(WARM)), list(digits(IMAGES))

    async def ours(self) -> Rate:
        """Measure `streaminfer run`: three stage workers and the sink."""
        async with (
            self._ours.running(self._address) as process,
            Load(self._address, self._ours.source, self._ours.target) as load,
        ):
            return await measured(load, [process], self._warm, self._images)

    async def chain(self) -> Rate:
        """Measure four processes that pass records on."""
        script = ["-m", "tests.benchmarks.raw_chain", self._address]
        starts = [(f"chain {a}", [*script, a, b]) for a, b in pairwise(HOPS)]
        async with (
            together(starts) as processes,
            Load(self._address, HOPS[0], HOPS[-1]) as load,
        ):
            return await measured(load, processes, self._warm, self._images)


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Measure the one comparison there is."""
    with Broker.running() as broker, TemporaryDirectory() as folder:
        await create_topics(broker.address, HOPS, PARTITIONS)
        ours = pipeline(Path(folder), "digits", {"kafka": {"partitions": PARTITIONS}})
        systems = Comparison(broker.address, ours)
        rounds = await alternate({"ours": systems.ours, "chain": systems.chain}, ROUNDS)
    note = rounds.note("ours", "chain")
    return [Row(CHAIN, rounds.ratio("ours", "chain"), "x", goals[CHAIN], note)]
