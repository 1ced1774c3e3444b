"""The main job: every image in is one prediction out, the same the whole model gives, in order."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio

from stages.digits.demo import uncut
from stages.digits.images import scans
from streaminfer import Client, Prediction
from streaminfer.client import connect
from streaminfer.errors import RecordTooLarge
from streaminfer.spec.file import load
from streaminfer.transport import Outgoing
from tests.corpus import corpus, tensor_corpus
from tests.e2e.conftest import Bus, digits_file

pytestmark = [pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(bus: Bus, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    """One pipeline on each bus, for all tests that only send it something else."""
    async with bus.running(digits_file(tmp_path_factory.mktemp("stream"))) as client:
        yield client


async def test_every_scan_is_answered_once_as_the_whole_model_would(client: Client) -> None:
    images = scans()
    answers = [a async for a in client.stream((name, value) for name, _, value in images)]
    assert [a.id for a in answers] == [name for name, _, _ in images]
    assert len({(a.source.partition, a.source.offset) for a in answers}) == len(images)
    assert {a.status for a in answers} == {"ok"}
    whole = uncut([value for _, _, value in images])
    for answer, row in zip(answers, whole, strict=True):
        assert answer.top1.index == int(row.argmax())
        for label in answer.predictions:
            assert label.score == pytest.approx(float(row[label.index]), abs=2e-6)


async def test_answers_of_one_partition_come_in_the_order_of_its_records(client: Client) -> None:
    images = [(f"ordered-{name}", value) for name, _, value in scans()[:300]]
    watched: list[Prediction] = []

    async def watch() -> None:
        async with aclosing(client.watch(from_beginning=True)) as answers:
            async for answer in answers:
                if answer.id.startswith("ordered-"):
                    watched.append(answer)
                if len(watched) == len(images):
                    return

    watching = asyncio.create_task(watch())
    async for _ in client.stream(images):
        pass
    await asyncio.wait_for(watching, 90)
    order = defaultdict(list)
    for answer in watched:
        order[answer.source.partition].append(answer.source.offset)
    assert sum(map(len, order.values())) == len(images)
    for offsets in order.values():
        assert offsets == sorted(offsets)


async def test_every_odd_or_broken_input_has_its_one_outcome(client: Client) -> None:
    """What is broken is an error of its own; the good images around it go through untouched."""
    cases = [c for c in corpus((1, 8, 8)) if c.name != "60 MB"]
    odd = {"image to a tensor pipeline", "empty value"}  # fine here; an empty image is above
    cases += [c for c in tensor_corpus((1, 8, 8)) if c.outcome == "error" and c.name not in odd]
    good = scans()[: len(cases)]
    sent: list[tuple[str, str, str | None, asyncio.Task[Prediction]]] = []
    for case, (name, _, value) in zip(cases, good, strict=True):
        if case.outcome == "none":
            await client.send(None, id=case.name)
        else:
            bad = client.predict(case.value or b"", id=case.name, headers=case.headers)
            sent.append((case.name, case.outcome, case.kind, asyncio.create_task(bad)))
        fine = client.predict(value, id=name)
        sent.append((name, "ok", None, asyncio.create_task(fine)))
    for name, outcome, kind, task in sent:
        answer = await task
        assert answer.id == name
        assert answer.status == outcome, f"{name}: {answer.error}"
        assert (answer.error.kind if answer.error else None) == kind, name


async def test_a_body_beyond_the_limit_is_refused_or_answered(bus: Bus, folder: Path) -> None:
    """The topic refuses it at the door; where somebody opened the door, it is one error."""
    name, _, value = scans()[0]
    body = value + bytes(60_000_000)
    file = digits_file(folder)
    async with bus.running(file) as client:
        with pytest.raises(RecordTooLarge):
            await client.predict(body, id="60 MB")
        transport = client.transport
        if bus.address is not None:
            transport = connect(
                load(file, {"kafka.bootstrap": bus.address}), max_record_bytes=70_000_000
            )
        topic = load(file).input.topic
        async with transport.admin() as admin, transport.producer() as producer:
            await admin.configure(topic, {"max.message.bytes": "70000000"})
            async with asyncio.timeout(90):  # a broker takes a setting before its logs obey it
                while True:
                    try:
                        await (await producer.send(Outgoing(topic, body, b"60 MB")))
                        break
                    except RecordTooLarge:
                        await asyncio.sleep(0.5)
            async with asyncio.timeout(60), aclosing(client.watch(from_beginning=True)) as answers:
                answer = await anext(answers)
        assert (answer.id, answer.status) == ("60 MB", "error")
        assert answer.error is not None and "input.max_bytes" in answer.error.message
        assert (await client.predict(value, id=name)).status == "ok"


async def test_meta_and_deadlines_travel(client: Client) -> None:
    name, label, value = scans()[0]
    answer = await client.predict(value, id=name, meta={"camera": "7"}, deadline_ms=60_000)
    assert (answer.status, answer.meta, answer.top1.index) == ("ok", {"camera": "7"}, label)
    bad = await client.predict(value, id="late", headers=(("si-deadline-ms", b"soon"),))
    assert bad.error is not None and "si-deadline-ms" in bad.error.message
