"""What a user loses when rows of parts are joined wrongly: somebody else's answer, or none."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaminfer.metrics import Metrics
from streaminfer.plan import PRESENT, Source, StagePlan, TensorSpec
from streaminfer.runtime.gather import Gather, Patience
from streaminfer.runtime.receive import Envelopes
from streaminfer.runtime.spans import MOST, Spans
from streaminfer.runtime.steps import Item, Result
from streaminfer.transport import Position, Record, TopicPartition
from streaminfer.wire import Envelope, Failure, Hop, Sample, Tensor, records

TP = TopicPartition("t.gather", 1)
PARTS = ("t.0", "t.1", "t.2")


def gather_plan(n: int, present: bool = False, dynamic: bool = False) -> StagePlan:
    row = (None, None if dynamic else 1)
    specs = [TensorSpec(name=f"y{k}", dtype="F32", shape=row) for k in range(n)]
    if present:
        specs.append(TensorSpec(name=PRESENT, dtype="F32", shape=(None, n)))
    sources = tuple(Source(stage=PARTS[k], tensors=(f"y{k}",)) for k in range(n))
    return StagePlan(
        name="t.gather", path="t", kind="gather", inputs=tuple(specs), outputs=(), sources=sources
    )


class Bench:
    """A gather whose clock and records are ours."""

    def __init__(self, n: int = 2, patience: Patience | None = None, **more: bool) -> None:
        self.now, self.at = 0.0, 0
        self.metrics = Metrics("p")
        self.gather = Gather(
            gather_plan(n, **more),
            patience or Patience(),
            self.metrics.stage("t.gather"),
            lambda: self.now,
        )

    async def begin(self, note: str = "") -> None:
        await self.gather.assign({TP: note})

    async def send(self, part: int, offsets: Sequence[int], failed: bool = False) -> Result:
        envelope = of_part(part, offsets, failed)
        item = Item((Position(*TP, self.at),), envelope)
        self.at += 1
        return await self.gather([item])


def of_part(part: int, offsets: Sequence[int], failed: bool = False) -> Envelope:
    failure = Failure("error", PARTS[part], "compute", "bad") if failed else None
    samples = tuple(Sample(o, o, f"id-{o}", None, 0, failure=failure) for o in offsets)
    values = struct.pack(f"<{len(offsets)}f", *[100 * part + o for o in offsets])
    tensor = Tensor("F32", (len(offsets), 1), memoryview(values))
    hops = (Hop("stem", 1, 1, 1), Hop(PARTS[part], 1, 1, 1))
    tensors = {} if failed else {f"y{part}": tensor}
    return Envelope(1, samples, "d" * 64, "i", tensors, hops, sender=PARTS[part])


def rows(result: Result) -> dict[int, tuple[float, ...]]:
    """Return what each row of the outputs holds, by offset."""
    found = {}
    for envelope in result.outputs:
        columns = [
            struct.unpack(f"<{len(t.data) // 4}f", t.data)
            for name, t in envelope.tensors.items()
            if name != PRESENT
        ]
        for at, sample in enumerate(envelope.samples):
            assert sample.offset not in found
            found[sample.offset] = tuple(column[at] for column in columns)
    return found


def settled(result: Result) -> list[int]:
    assert result.acked is not None
    more = result.acked()
    return sorted(s.position.offset for s in (*result.settled, *more.settled))


async def test_rows_go_on_when_their_last_part_came() -> None:
    bench = Bench()
    await bench.begin()
    first = await bench.send(0, [10, 11, 12])
    assert (rows(first), settled(first)) == ({}, [])
    second = await bench.send(1, [10, 11, 12])
    assert rows(second) == {o: (o, 100 + o) for o in (10, 11, 12)}
    assert settled(second) == [0, 1]
    (envelope,) = second.outputs
    assert [hop.stage for hop in envelope.hops] == ["stem", "t.0", "t.1"]


async def test_a_record_is_settled_only_with_the_last_of_its_rows() -> None:
    """Its commit would lose the rows that still wait if the worker died."""
    bench = Bench()
    await bench.begin()
    await bench.send(0, [1, 2, 3])
    one = await bench.send(1, [1, 2])
    assert sorted(rows(one)) == [1, 2]
    assert settled(one) == [1]
    assert settled(await bench.send(1, [3])) == [0, 2]


async def test_rows_of_a_newly_formed_batch_complete_those_of_the_old_one() -> None:
    """A restarted ingest forms other micro-batches of the same records."""
    bench = Bench()
    await bench.begin()
    await bench.send(0, [1, 2, 3, 4])  # the old one; its other part was never sent
    assert settled(await bench.send(0, [1, 2])) == [1]  # the same rows again
    first = await bench.send(1, [1, 2])
    assert rows(first) == {1: (1, 101), 2: (2, 102)}
    assert settled(first) == [2]
    await bench.send(0, [3, 4, 5])
    last = await bench.send(1, [3, 4, 5])
    assert sorted(rows(last)) == [3, 4, 5]
    assert settled(last) == [0, 3, 4]
    again = await bench.send(1, [1, 2, 3, 4, 5])
    assert (rows(again), settled(again)) == ({}, [5])


async def test_a_row_that_fails_in_one_part_fails_once() -> None:
    bench = Bench()
    await bench.begin()
    await bench.send(0, [1, 2, 3])
    assert settled(await bench.send(1, [1, 3])) == [1]
    last = await bench.send(1, [2], failed=True)
    (outcome,) = last.outcomes
    assert [(s.offset, s.failure and s.failure.stage) for s in outcome.samples] == [(2, "t.1")]
    assert settled(last) == [0, 2]


async def test_whoever_takes_over_knows_what_is_done() -> None:
    """Else the second part of a done row, read again alone, would wait and end as an error."""
    bench = Bench()
    await bench.begin()
    await bench.send(0, [5, 6])  # record 0: the commit may pass it
    await bench.send(0, [7])
    done = await bench.send(1, [5, 6])
    assert done.acked is not None
    note = done.acked().notes[TP]
    heir = Bench()
    await heir.begin(note)
    again = await heir.send(1, [5, 6])
    assert (rows(again), settled(again)) == ({}, [0])
    assert heir.gather.due() is None
    await heir.send(1, [7])
    assert heir.gather.due() is not None  # not done: it waits


async def test_what_is_not_acked_is_not_noted() -> None:
    """The note may be committed before the answer is: then a crash would lose the row."""
    bench = Bench()
    await bench.begin()
    await bench.send(0, [1, 2])
    unacked = await bench.send(1, [1])
    acked = await bench.send(1, [2])
    assert acked.acked is not None
    assert Spans.unpack(acked.acked().notes[TP]).last(9) == [(2, 2)]
    assert unacked.acked is not None
    assert Spans.unpack(unacked.acked().notes[TP]).last(9) == [(1, 2)]


async def test_a_part_that_stays_away_ends_the_row_with_an_error() -> None:
    bench = Bench(patience=Patience(deadline=30))
    await bench.begin()
    await bench.send(0, [1, 2])
    bench.now = 29
    assert not await bench.gather.tick()
    assert bench.gather.due() == pytest.approx(1)
    bench.now = 31
    late = await bench.gather.tick()
    (outcome,) = late.outcomes
    assert [s.offset for s in outcome.samples] == [1, 2]
    failure = outcome.samples[0].failure
    assert failure is not None
    assert failure.kind == "timeout"
    assert "t.1" in failure.message
    assert "30 s" in failure.message
    assert settled(late) == [0]
    too_late = await bench.send(1, [1, 2])
    assert (rows(too_late), settled(too_late)) == ({}, [1])


async def test_a_slow_part_is_waited_for_while_it_works() -> None:
    """A backlog before one part must not turn into errors."""
    bench = Bench(patience=Patience(deadline=30))
    await bench.begin()
    for offset in range(100):
        await bench.send(0, [offset])
    for offset in range(100):
        bench.now += 10
        assert not await bench.gather.tick()
        assert rows(await bench.send(1, [offset])) == {offset: (offset, 100 + offset)}


async def test_a_row_that_its_part_has_passed_is_lost() -> None:
    bench = Bench(patience=Patience(deadline=30))
    await bench.begin()
    await bench.send(0, [1, 2])
    bench.now = 40
    await bench.send(1, [2])  # at work, and past 1
    (outcome,) = (await bench.gather.tick()).outcomes
    assert [s.offset for s in outcome.samples] == [1]


async def test_a_part_that_works_for_others_alone_is_not_waited_for_for_ever() -> None:
    """Its record may be gone: then the last image of a partition would never be answered."""
    bench = Bench(patience=Patience(deadline=30))
    other = TopicPartition("t.gather", 2)
    await bench.gather.assign({TP: "", other: ""})
    await bench.send(0, [7])
    for k in range(30):
        bench.now += 10
        elsewhere = replace(of_part(1, [100 + k]), partition=2)
        await bench.gather([Item((Position(*other, k),), elsewhere)])
        gone = {s.offset for o in (await bench.gather.tick()).outcomes for s in o.samples}
        assert (7 in gone) == (bench.now >= 300)


async def test_a_quorum_answers_without_the_branch_that_is_late() -> None:
    bench = Bench(3, Patience(deadline=5, quorum=2, strict=True), present=True)
    await bench.begin()
    await bench.send(0, [1, 2])
    await bench.send(2, [1])
    bench.now = 5.5
    late = await bench.gather.tick()
    assert rows(late) == {1: (1, 0, 201)}
    (envelope,) = late.outputs
    assert envelope.samples[0].partial
    assert struct.unpack("<3f", envelope.tensors[PRESENT].data) == (1, 0, 1)
    assert [s.offset for o in late.outcomes for s in o.samples] == [2]  # one of three is too few


async def test_a_quorum_outlives_a_branch_that_fails() -> None:
    bench = Bench(2, Patience(quorum=1, strict=True), present=True)
    await bench.begin()
    await bench.send(0, [1, 2])
    whole = await bench.send(1, [1], failed=True)
    assert rows(whole) == {1: (1, 0)}
    assert whole.outputs[0].samples[0].partial
    both = await bench.send(1, [2])
    assert rows(both) == {2: (2, 102)}
    assert not both.outputs[0].samples[0].partial
    assert struct.unpack("<2f", both.outputs[0].tensors[PRESENT].data) == (1, 1)


async def test_a_stranger_is_settled_and_counted() -> None:
    bench = Bench()
    await bench.begin()
    foreign = replace(of_part(0, [1]), sender="other")
    result = await bench.gather([Item((Position(*TP, 9),), foreign)])
    assert settled(result) == [9]
    assert bench.gather.due() is None


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 3))
async def test_any_order_any_repeat_each_row_once_and_nothing_left(seed: int, n: int) -> None:
    """Batches cut anew, parts in any order, everything up to three times, some rows failing."""
    dice = random.Random(seed)
    bench = Bench(n)
    await bench.begin()
    count = dice.randint(1, 30)
    poison = {o for o in range(count) if dice.random() < 0.1}
    todo = []
    for _ in range(dice.randint(1, 3)):
        for part in range(n):
            at = 0
            while at < count:
                size = dice.randint(1, 6)
                todo.append((part, list(range(at, min(count, at + size)))))
                at += size
    dice.shuffle(todo)
    good: dict[int, tuple[float, ...]] = {}
    bad: list[int] = []
    done: list[int] = []
    results = []
    for part, offsets in todo:
        for failed in (False, True):
            some = [o for o in offsets if (o in poison and part == 0) is failed]
            if some:
                results.append(await bench.send(part, some, failed))
    dice.shuffle(results)  # acks come in any order
    for result in results:
        found = rows(result)
        assert not found.keys() & good.keys()
        good |= found
        bad += [s.offset for o in result.outcomes for s in o.samples]
        done += settled(result)
    assert good == {
        o: tuple(100.0 * k + o for k in range(n)) for o in range(count) if o not in poison
    }
    assert sorted(bad) == sorted(poison)
    assert sorted(done) == list(range(bench.at))
    assert bench.gather.due() is None


async def test_a_row_that_has_failed_waits_for_nobody() -> None:
    """Else each error would hold up the answers behind it until the slowest part has come."""
    bench = Bench(3)
    await bench.begin()
    first = await bench.send(1, [1], failed=True)
    assert [s.offset for o in first.outcomes for s in o.samples] == [1]
    assert settled(first) == [0]
    for part in (0, 2):
        late = await bench.send(part, [1])
        assert not late.outputs
        assert not late.outcomes
        assert len(settled(late)) == 1
    voted = Bench(3, Patience(quorum=2, strict=True), present=True)
    await voted.begin()
    assert not (await voted.send(1, [1], failed=True)).outcomes, "two can still make the quorum"
    (outcome,) = (await voted.send(2, [1], failed=True)).outcomes
    assert [s.offset for s in outcome.samples] == [1]
    assert voted.gather.due() is None


async def test_rows_rise_in_an_envelope_however_they_came() -> None:
    """The codec refuses others, and the sink would take them for repeats."""
    bench = Bench(3, Patience(deadline=5, quorum=1, strict=True), present=True)
    await bench.begin()
    await bench.send(2, [5], failed=True)
    await bench.send(0, [4, 5, 6])
    bench.now = 6
    late = await bench.gather.tick()
    assert [[s.offset for s in envelope.samples] for envelope in late.outputs] == [[4, 5, 6]]


async def test_a_damaged_part_ends_its_rows_at_once() -> None:
    """Only the header told whose it was; its rows must not wait for the deadline."""
    metrics = Metrics("p").stage("t.gather")
    intake = Envelopes("t.gather", "d" * 64, metrics, max_bytes=1 << 20)
    ((headers, value),) = records(of_part(0, [1, 2]), 900)
    intake.add([Record(*TP, 0, 0, None, value[:-9], headers)])
    bench = Bench()
    await bench.begin()
    await bench.send(1, [1, 2])
    result = await bench.gather(list(intake.take()))
    (outcome,) = result.outcomes
    assert [s.offset for s in outcome.samples] == [1, 2]
    assert outcome.digest == "d" * 64, "or what follows takes it for another plan's"
    assert bench.gather.due() is None


async def test_sizes_that_only_the_data_settles_are_those_of_the_branches_that_came() -> None:
    """Zeros of another size cannot be fused: every partial answer would be an error."""
    bench = Bench(2, Patience(quorum=1, strict=True), present=True, dynamic=True)
    await bench.begin()
    wide = Tensor("F32", (2, 3), memoryview(bytes(24)))
    envelope = replace(of_part(0, [1, 2]), tensors={"y0": wide})
    await bench.gather([Item((Position(*TP, 0),), envelope)])
    both = await bench.send(1, [1, 2], failed=True)
    assert both.outputs[0].tensors["y1"].shape == (2, 3)
    assert len(both.outputs[0].tensors["y1"].data) == 24


async def test_the_heir_of_a_thousand_holes_knows_them_all() -> None:
    """Samples that left at an exit are holes for ever; Kafka takes 4096 bytes of a note."""
    bench = Bench()
    await bench.begin()
    begin = 10**15
    offsets = [begin + 2 * k for k in range(2000)]
    await bench.send(0, [begin - 9])  # holds the commit
    await bench.send(0, offsets)
    last = await bench.send(1, offsets)
    assert last.acked is not None
    note = last.acked().notes[TP]
    assert len(note.encode()) <= 4096
    heir = Bench()
    await heir.begin(note)
    again = await heir.send(1, offsets)
    assert (rows(again), settled(again)) == ({}, [0])
    assert heir.gather.due() is None


@given(st.randoms(use_true_random=False), st.integers(1, 5000), st.integers(0, 2**60))
@settings(deadline=None, max_examples=40)
def test_a_note_has_the_highest_spans_that_kafka_takes(
    dice: random.Random, count: int, begin: int
) -> None:
    spans, at = Spans(), begin
    for _ in range(count):
        at += 2 + dice.getrandbits(dice.choice([1, 1, 4, 40]))
        spans.add(at, at := at + dice.getrandbits(dice.choice([1, 1, 4, 40])))
    text = spans.pack(4000)
    assert len(text.encode()) <= 4000
    kept = Spans.unpack(text)
    assert kept.last(10**6) == spans.last(len(kept))
    assert len(kept) >= min(count, 300)


def test_holes_of_samples_that_never_come_are_not_kept_for_ever() -> None:
    """A stage with an exit leaves one hole a sample: a worker that runs for a year runs full."""
    spans = Spans()
    for k in range(3 * MOST):
        spans.add(2 * k, 2 * k)
    assert len(spans) == MOST
    assert 1 in spans, "whoever comes so late has been answered"
    assert 6 * MOST - 3 not in spans, "what may be on its way is waited for"


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 20))))
def test_spans_are_the_set_in_few_words(pairs: list[tuple[int, int]]) -> None:
    spans, plain = Spans(), set[int]()
    for low, length in pairs:
        spans.add(low, low + length)
        plain |= set(range(low, low + length + 1))
    assert all((o in spans) == (o in plain) for o in range(-1, 230))
    found = spans.last(1000)
    assert [o for low, high in found for o in range(low, high + 1)] == sorted(plain)
    assert all(a[1] + 1 < b[0] for a, b in pairwise(found))
    assert Spans(found).last(1000) == found
