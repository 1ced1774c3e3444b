"""A sender died in the middle of a message on an edge that balances; its heir sent it elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaminfer.metrics import Metrics
from streaminfer.plan import Plan, StagePlan, TensorSpec
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.receive import Envelopes
from streaminfer.runtime.sink import Order
from streaminfer.runtime.steps import Item, Plain, Result, Settled
from streaminfer.runtime.worker import Limits, Worker
from streaminfer.spec import InputSpec
from streaminfer.topology import Route, Routes
from streaminfer.transport import Outgoing, Record, TopicPartition, TopicSpec
from streaminfer.transport.memory import MemoryTransport
from streaminfer.wire import MAX_SAMPLES, Envelope, Patience, Sample, pack, records

DIGEST = "d" * 64
WHERE = 1  # the input partition of all these samples; at the sink it is theirs again
X = TensorSpec(name="x", dtype="F32", shape=(None, 100))
PLAN = Plan(
    pipeline="p", digest=DIGEST, source="", model="toy", model_version="1", input=InputSpec(),
    stages=(StagePlan(name="s1", path="s1", layers=("l",), inputs=(X,), outputs=(X,)),), top_k=0,
)  # fmt: skip


def batch(first: int) -> Envelope:
    samples = tuple(Sample(n, n, str(n), None, 0) for n in range(first, first + 4))
    return Envelope(WHERE, samples, DIGEST, "i", {"x": pack("F32", (4, 100), bytes(1600))})


class Pass(Plain):
    """A stage that computes nothing; outcomes pass it as they pass every stage."""

    async def __call__(self, items: Sequence[Item]) -> Result:
        envelopes = [item.envelope for item in items if item.envelope]
        return Result(
            outputs=tuple(e for e in envelopes if not e.samples[0].failure),
            outcomes=tuple(e for e in envelopes if e.samples[0].failure),
            settled=tuple(Settled(p) for item in items for p in item.positions),
        )


class Road:
    """stage ─▶ sink ─▶ answers, on the memory bus."""

    def __init__(self) -> None:
        self.bus, self.metrics = MemoryTransport(), Metrics("p")

    async def send(self, partition: int, envelope: Envelope, chunks: int | None = None) -> None:
        async with self.bus.producer() as producer:
            for headers, value in records(envelope, 300)[:chunks]:
                await producer.send(Outgoing("stage", value, None, partition, headers))

    async def run(self) -> list[dict[str, object]]:
        """Let the stage and the sink do all that is there; return the answers of WHERE."""
        stage, sink = self.metrics.stage("s1"), self.metrics.stage("sink")
        async with self.bus.producer() as producer:
            for name, step, metrics, out in (
                ("stage", Pass(), stage, "sink"),
                ("sink", Order(PLAN, "answers", self.metrics), sink, "answers"),
            ):
                worker = Worker(
                    lambda listener, name=name: self.bus.consumer([name], name, listener),  # type: ignore[misc]
                    Envelopes(
                        name, None, metrics, max_bytes=1 << 20,
                        patience=Patience(3, 0) if name == "stage" else None,
                    ),
                    step,
                    Outbox(producer, metrics, Routes((Route(out),), "sink")),
                    metrics,
                    asyncio.Event(),
                    limits=Limits(serial=name == "sink"),
                )  # fmt: skip
                try:
                    await asyncio.wait_for(worker.run(burst=True), 2)
                except TimeoutError:
                    continue  # not all of it is settled, so a burst has no end
        async with self.bus.consumer(["answers"], None) as consumer:
            return [json.loads(r.value or b"") for r in await consumer.poll(0)]

    async def open(self) -> int:
        """Return how many records of the stage's topic are not committed."""
        tps = [TopicPartition("stage", p) for p in range(2)]
        async with self.bus.admin() as admin:
            ends = await admin.offsets(tps)
            commits = await admin.committed("stage", tps)
        return sum(ends[tp][1] - (c.offset if c else 0) for tp, c in commits.items())


@pytest.fixture
async def road() -> Road:
    made = Road()
    async with made.bus.admin() as admin:
        await admin.create([TopicSpec(name, 2) for name in ("stage", "sink", "answers")])
    await made.send(0, batch(0), chunks=2)
    return made


async def test_the_heirs_message_elsewhere_is_the_answer_and_commits_go_on(road: Road) -> None:
    await road.send(1, batch(0))
    assert len(await road.run()) == 4
    for first in (4, 8, 12):
        await road.send(0, batch(first))
    answers = await road.run()
    assert await road.open() == 0, "or the log is read again from here after every restart"
    offsets = [answer["source"]["offset"] for answer in answers]  # type: ignore[index]
    assert offsets == list(range(16)), "each once, in order"
    assert {answer["status"] for answer in answers} == {"ok"}


async def test_without_an_heir_its_samples_end_as_errors_and_hold_nobody_up(road: Road) -> None:
    for first in (4, 8, 12):
        await road.send(0, batch(first))
    answers = await road.run()
    assert await road.open() == 0
    assert [answer["status"] for answer in answers] == ["error"] * 4 + ["ok"] * 12
    assert "its sender is gone" in str(answers[0]["error"])


async def test_while_it_may_yet_come_nothing_is_committed_and_nobody_judged(road: Road) -> None:
    for first in (4, 8):
        await road.send(0, batch(first))
    assert await road.run() == []
    assert await road.open() > 2


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=6))
def test_every_sample_of_a_message_that_is_lost_has_its_own_error(
    runs: list[tuple[int, int]],
) -> None:
    """One error for all of them would leave the others' clients waiting."""
    offsets, end = list[int](), 5
    for gap, length in runs:
        offsets += range(end + gap, end + gap + length)
        end = offsets[-1] + 1
    samples = tuple(Sample(n, n, str(n), None, 0) for n in offsets)
    intake = Envelopes("s", None, Metrics("p").stage("s"), max_bytes=1 << 20)
    ((headers, _),) = records(Envelope(WHERE, samples, DIGEST, "i"))
    intake.add([Record("stage", 0, 0, 0, None, b"damaged", headers)])
    (item,) = intake.take()
    assert item.envelope is not None
    assert item.envelope.partition == WHERE
    assert [(s.start, s.offset) for s in item.envelope.samples] == [(n, n) for n in offsets]


def test_a_gap_of_a_million_offsets_is_not_a_million_errors() -> None:
    intake = Envelopes("s", None, Metrics("p").stage("s"), max_bytes=1 << 20)
    sample = Sample(1_000_000, 3, "x", None, 0)
    ((headers, _),) = records(Envelope(WHERE, (sample,), DIGEST, "i"))
    intake.add([Record("stage", 0, 0, 0, None, b"damaged", headers)])
    (item,) = intake.take()
    assert item.envelope is not None
    found = item.envelope.samples
    assert len(found) == MAX_SAMPLES
    assert (found[0].start, found[-1].offset) == (3, 1_000_000)
    assert all(a.offset + 1 == b.start for a, b in pairwise(found))
