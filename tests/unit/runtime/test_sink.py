"""The sink's word is final: a sample answered twice, never, or out of order is what users lose."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from streaminfer.metrics import Metrics
from streaminfer.plan import Plan, StagePlan, TensorSpec
from streaminfer.runtime.sink import Order, watermark
from streaminfer.runtime.steps import Item, Result
from streaminfer.spec import InputSpec
from streaminfer.transport import Position, TopicPartition
from streaminfer.wire import Envelope, Failure, Hop, Sample, Tensor

TP = TopicPartition("sink", 2)
PLAN = Plan(
    pipeline="p",
    digest="d" * 64,
    source="",
    model="toy",
    model_version="7",
    input=InputSpec(),
    stages=(
        StagePlan(
            name="s0",
            path="s0",
            layers=("a",),
            inputs=(TensorSpec(name="x", dtype="F32", shape=(None, 4)),),
            outputs=(TensorSpec(name="y", dtype="F32", shape=(None, 3)),),
        ),
    ),
    top_k=2,
    labels=("cat", "dog", "owl"),
)


def sample(offset: int, start: int | None = None, **more: object) -> Sample:
    begin = offset if start is None else start
    return Sample(offset, begin, f"id-{offset}", b"k", 1_000_000, **more)  # type: ignore[arg-type]


def item(at: int, samples: Sequence[Sample]) -> Item:
    n = len(samples)
    tensors = {}
    if not samples[0].failure:
        index = struct.pack(f"<{2 * n}i", *[v for s in samples for v in (s.offset % 3, 0)])
        score = struct.pack(f"<{2 * n}f", *([0.75, 0.25] * n))
        tensors = {
            "index": Tensor("I32", (n, 2), memoryview(index)),
            "score": Tensor("F32", (n, 2), memoryview(score)),
        }
    hops = (Hop("s0", 1500, 2500, n),)
    envelope = Envelope(2, tuple(samples), PLAN.digest, "i", tensors, hops)
    return Item((Position(*TP, at),), envelope)


async def order(note: str = "", **more: int) -> Order:
    made = Order(PLAN, "predictions", Metrics("p"), clock=lambda: 1001.0, **more)
    await made.assign({TP: note})
    return made


def offsets(result: Result) -> list[int]:
    return [json.loads(a.value or b"")["source"]["offset"] for a in result.answers]


async def test_the_answer_says_all_that_was_promised() -> None:
    made = await order()
    result = await made([item(0, [sample(0, meta={"camera": "7", "traceparent": "00-ab"})])])
    (answer,) = result.answers
    assert (answer.topic, answer.key, answer.partition) == ("predictions", b"k", None)
    assert dict(answer.headers) == {
        "content-type": b"application/json",
        "si-id": b"id-0",
        "si-status": b"ok",
        "si-schema": b"prediction/1",
        "si-model": b"toy@7",
        "traceparent": b"00-ab",
    }
    assert json.loads(answer.value or b"") == {
        "schema": "streaminfer.prediction/1",
        "id": "id-0",
        "status": "ok",
        "model": {"name": "toy", "version": "7", "digest": "d" * 8},
        "partial": False,
        "timing": {
            "e2e_ms": 1000.0,
            "stages": [{"name": "s0", "queue_ms": 1.5, "compute_ms": 2.5, "batch": 1}],
        },
        "source": {"topic": "images", "partition": 2, "offset": 0},
        "meta": {"camera": "7"},
        "predictions": [
            {"index": 0, "label": "cat", "score": 0.75},
            {"index": 0, "label": "cat", "score": 0.25},
        ],
    }


async def test_a_record_without_key_is_answered_in_its_own_partition() -> None:
    made = await order()
    keyless = Sample(0, 0, "x", None, 0)
    (answer,) = (await made([item(0, [keyless])])).answers
    assert (answer.key, answer.partition) == (None, 2)


async def test_what_is_early_waits_and_its_record_is_not_settled() -> None:
    made = await order()
    held = await made([item(0, [sample(1), sample(2)])])
    assert (held.answers, held.settled) == ((), ())
    result = await made([item(1, [sample(0)])])
    assert offsets(result) == [0, 1, 2]
    assert {s.position.offset for s in result.settled} == {0, 1}
    assert watermark(result.notes[TP]) == 3


async def test_what_comes_again_is_dropped_and_settled() -> None:
    made = await order('{"watermark": 5}')
    result = await made([item(0, [sample(3), sample(4)]), item(1, [sample(5)])])
    assert offsets(result) == [5]
    assert len(result.settled) == 2


async def test_tombstones_are_covered_by_the_next_interval() -> None:
    made = await order('{"watermark": 2}')
    assert offsets(await made([item(0, [sample(9, start=2)])])) == [9]


async def test_an_error_is_an_answer_in_its_turn() -> None:
    made = await order()
    bad = sample(1, failure=Failure("error", "s0", "decode", "not an image"))
    await made([item(0, [bad])])
    result = await made([item(1, [sample(0)])])
    body = json.loads(result.answers[1].value or b"")
    assert body["status"] == "error"
    assert body["error"] == {"stage": "s0", "kind": "decode", "message": "not an image"}
    assert "predictions" not in body


async def test_an_answer_too_large_for_the_topic_is_an_error_not_a_stuck_sink() -> None:
    made = await order(max_bytes=500)
    result = await made([item(0, [sample(0, meta={"note": "x" * 600})])])
    assert dict(result.answers[0].headers)["si-status"] == b"error"
    assert watermark(result.notes[TP]) == 1


async def test_a_revoked_partition_is_forgotten() -> None:
    made = await order()
    await made([item(0, [sample(1)])])
    await made.forget([TP])
    assert (await made([item(1, [sample(0)])])).answers == ()
    await made.assign({TP: ""})
    assert offsets(await made([item(1, [sample(0)])])) == [0]


@settings(max_examples=150)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_order_with_any_repeats_gives_each_once_in_order(
    sizes: list[int], gaps: list[int], rng: random.Random
) -> None:
    import asyncio

    asyncio.run(_shuffled(sizes, gaps, rng))


async def _shuffled(sizes: list[int], gaps: list[int], rng: random.Random) -> None:
    batches: list[list[Sample]] = []
    offset = end = 0
    for k, size in enumerate(sizes):
        batch = []
        for _ in range(size):
            offset += gaps[k] if k < len(gaps) else 0
            batch.append(sample(offset, start=end))
            offset += 1
            end = offset
        batches.append(batch)
    items = [item(i, b) for i, b in enumerate([*batches, *rng.sample(batches, len(batches) // 2)])]
    rng.shuffle(items)
    made = await order()
    seen: list[int] = []
    settled: list[int] = []
    while items:
        take = rng.randint(1, len(items))
        result = await made(items[:take])
        items = items[take:]
        seen += offsets(result)
        settled += [s.position.offset for s in result.settled]
    assert seen == [s.offset for b in batches for s in b]
    assert len(settled) == len(set(settled)) == len(batches) + len(batches) // 2
