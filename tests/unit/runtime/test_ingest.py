"""Every input offset belongs to exactly one interval, or the sink waits for ever or skips."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from streaminfer.metrics import Metrics
from streaminfer.plan import Plan, StagePlan, TensorSpec
from streaminfer.runtime.flow import Window
from streaminfer.runtime.ingest import Ingest, chained
from streaminfer.runtime.steps import Item, Result
from streaminfer.spec import InputSpec
from streaminfer.transport import Record, TopicPartition
from streaminfer.wire import Sample
from tests.corpus import encode, picture

TP = TopicPartition("images", 1)
GOOD = encode(picture(8, 8, "L"), "PNG")
PLAN = Plan(
    pipeline="p",
    digest="d" * 64,
    source="",
    model="toy",
    model_version="1",
    input=InputSpec(channels=1, max_bytes=10_000),
    stages=(
        StagePlan(
            name="s0",
            path="s0",
            layers=("a",),
            inputs=(TensorSpec(name="x", dtype="F32", shape=(None, 1, 8, 8)),),
            outputs=(TensorSpec(name="y", dtype="F32", shape=(None, 3)),),
        ),
    ),
    top_k=1,
)


@asynccontextmanager
async def ingest(note: str = "") -> AsyncIterator[Ingest]:
    window = Window(100)
    made = Ingest(PLAN, window, Metrics("p").stage("s0"), clock=lambda: 2_000.0)
    window.assign(TP, 0, 0)
    await made.assign({TP: note})
    try:
        yield made
    finally:
        await made.stop()


def record(offset: int, value: bytes | None = GOOD, **headers: bytes) -> Record:
    named = tuple((k if k == "ce_id" else k.replace("_", "-"), v) for k, v in headers.items())
    return Record("images", 1, offset, 1_999_000, b"key-%d" % offset, value, named)


def item(*records: Record) -> Item:
    return Item(tuple(r.position for r in records), records=records)


def samples(result: Result) -> list[Sample]:
    found = [s for e in (*result.outputs, *result.outcomes) for s in e.samples]
    return sorted(found, key=lambda s: s.offset)


def intervals(found: Sequence[Sample]) -> list[tuple[int, int]]:
    return [(s.start, s.offset) for s in found]


async def test_intervals_cover_tombstones_and_gaps() -> None:
    async with ingest('{"from": 3}') as step:
        first = await step([item(record(5), record(6, None), record(9))])
        second = await step([item(record(10, None), record(12, b""))])
    assert intervals(samples(first)) == [(3, 5), (6, 9)]
    assert intervals(samples(second)) == [(10, 12)]
    assert [chained(s.note) for s in first.settled] == [6, 6, 10]
    assert [chained(s.note) for s in second.settled] == [10, 13]


async def test_a_revoked_partition_is_left_to_its_new_owner() -> None:
    """A chain begun at 0 in its place would let the sink skip what nobody answered."""
    async with ingest() as step:
        await step.forget([TP])
        result = await step([item(record(5))])
    assert (result.outputs, result.outcomes, result.settled) == ((), (), ())


@settings(deadline=None)  # a busy machine is no bug
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["good", "bad", "none"])), max_size=30)
)
def test_every_offset_is_in_exactly_one_interval(steps: list[tuple[int, str]]) -> None:
    import asyncio

    async def check() -> None:
        offset, records = -1, []
        for gap, kind in steps:
            offset += gap
            records.append(record(offset, {"good": GOOD, "bad": b"?", "none": None}[kind]))
        async with ingest() as step:
            found = [s for r in records for s in samples(await step([item(r)]))]
        covered = [o for s in found for o in range(s.start, s.offset + 1)]
        assert covered == list(range(len(covered)))
        live = [r.offset for r in records if r.value is not None]
        assert [s.offset for s in found] == live

    asyncio.run(check())


async def test_the_first_name_given_is_the_id() -> None:
    async with ingest() as step:
        result = await step(
            [
                item(
                    record(0, si_id=b"mine", ce_id=b"theirs"),
                    record(1, ce_id=b"theirs"),
                    record(2),
                    Record("images", 1, 3, 1_999_000, None, GOOD),
                )
            ]
        )
    assert [s.id for s in samples(result)] == ["mine", "theirs", "key-2", "images-1-3"]


async def test_what_cannot_travel_is_refused_not_fatal() -> None:
    huge = Record("images", 1, 0, 1_999_000, b"k" * 100_000, GOOD)
    many = record(1, **{f"si_meta_{k}": b"v" for k in range(80)})
    long = record(2, si_meta_note=b"x" * 10_000)
    async with ingest() as step:
        found = samples(await step([item(huge, many, long)]))
    assert [s.failure.kind if s.failure else None for s in found] == ["schema"] * 3
    assert found[0].key is None


async def test_a_deadline_counts_from_the_record() -> None:
    async with ingest() as step:
        found = samples(
            await step([item(record(0, si_deadline_ms=b"5000"), record(1, si_deadline_ms=b"10"))])
        )
    assert (found[0].failure, found[0].deadline_ms) == (None, 2_004_000)
    assert found[1].failure is not None and found[1].failure.status == "expired"


async def test_a_good_sample_becomes_pixels() -> None:
    async with ingest() as step:
        (envelope,) = (await step([item(record(0), record(1))])).outputs
    tensor = envelope.tensors["x"]
    assert (tensor.dtype, tensor.shape, tensor.data.nbytes) == ("U8", (2, 1, 8, 8), 128)
