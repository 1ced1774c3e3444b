"""Replicas that share a hot key: every image has its one answer, in order, whoever dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest

from stages.digits.images import scans
from streaminfer import Client, LocalPipeline
from streaminfer.commands import plan_of
from streaminfer.errors import ConfigError
from streaminfer.metrics import Metrics, parse
from streaminfer.spec.file import load
from streaminfer.topology import build
from streaminfer.transport import TopicPartition, Transport
from tests.e2e.conftest import PLANS, Bus, digits_file, streaminfer

HOT = {
    "stages": [
        {"name": "stem", "until": "stem"},
        {"name": "trunk", "until": "early", "replicas": 3},
        {"name": "head"},
    ],
    "edges": {"trunk": {"partitioning": "balance"}},
    # 24 x 64 floats an image: a micro-batch is many chunks, and who dies leaves some of them
    "kafka": {"max_record_bytes": 8192, "session_timeout": "6s"},
    "batch": {"max": 16, "wait": "2ms"},
}


def skewed() -> list[tuple[str, int, bytes]]:
    """Nine of ten images with one key: they are one partition of the input."""
    return [
        ("hot" if k % 10 else f"cold-{k}", label, value)
        for k, (_, label, value) in enumerate(scans())
    ]


async def published(transport: Transport, topic: str, count: int) -> dict[int, list[int]]:
    """Return the input offsets that were answered, by input partition, in the topic's order."""
    found: dict[int, list[int]] = defaultdict(list)
    async with transport.consumer([topic], None) as consumer, asyncio.timeout(120):
        quiet = 0
        while quiet < 5:  # what comes once too often comes late
            records = await consumer.poll(0.2)
            quiet = 0 if records or sum(map(len, found.values())) < count else quiet + 1
            for record in records:
                source = json.loads(record.value or b"")["source"]
                found[source["partition"]].append(source["offset"])
    return found


async def test_a_hot_key_is_the_work_of_all_and_its_answers_come_in_order(
    bus: Bus, folder: Path
) -> None:
    images = skewed()
    file = digits_file(folder, **HOT)
    spec = load(file)
    async with bus.running(file) as client:
        named = ((name, value) for name, _, value in images)
        answers = [a async for a in client.stream(named, concurrency=512, timeout=60)]
        assert [a.status for a in answers] == ["ok"] * len(images)
        pairs = zip(answers, images, strict=True)
        wrong = sum(a.top1.index != label for a, (_, label, _) in pairs)
        assert wrong < 0.02 * len(images), "each image has its own answer"
        transport = client.transport
        offsets = await published(transport, spec.output.topic, len(images))
        inner = build(spec, plan_of(spec, PLANS / "digits", False)[1]).inner_topics()[0]
        async with transport.admin() as admin:
            ends = await admin.offsets([TopicPartition(inner, p) for p in range(4)])
    assert sum(map(len, offsets.values())) == len(images)
    assert max(map(len, offsets.values())) >= 0.9 * len(images)
    for order in offsets.values():
        assert order == list(range(len(order))), "in order, without a gap, none twice"
    sent = [end for _, end in ends.values()]
    assert min(sent) > 0.5 * max(sent), f"the hot key is on all partitions: {sent}"


@pytest.mark.kafka
@pytest.mark.timeout(800)
async def test_who_sends_or_shares_a_hot_key_may_be_killed(
    kafka_address: str, folder: Path
) -> None:
    """Half messages of the dead lie in partitions where no heir sends the rest."""
    victims = ("stem", "trunk")
    images = skewed() * 2
    file = digits_file(folder, **HOT)
    spec = load(file, {"kafka.bootstrap": kafka_address})
    async with streaminfer("run", str(file), "--kafka", kafka_address, cwd=folder) as run:
        await run.line("ready")
        async with Client(kafka_address, pipeline=file) as client:
            seen = 0

            async def killer() -> None:
                for k in range(3 * len(victims)):  # each three times
                    while seen < 200 + 500 * k:  # noqa: ASYNC110 - another task counts
                        await asyncio.sleep(0.005)
                    victim = victims[k // 3]
                    while victim not in (children := run.children()):  # noqa: ASYNC110 - comes back
                        await asyncio.sleep(0.05)
                    os.kill(children[victim], signal.SIGKILL)

            killing = asyncio.create_task(killer())
            named = ((name, value) for name, _, value in images)
            async for answer in client.stream(named, concurrency=512, timeout=120):
                assert answer.status == "ok", answer.error
                seen += 1
            await killing
            offsets = await published(client.transport, spec.output.topic, len(images))
        assert await run.stop() == 0, run.text
    ended = [line for line in run.lines if "ended with code" in line]
    for victim in victims:
        assert sum(victim in line for line in ended) >= 3, f"{victim}: {ended}"
    for order in offsets.values():
        assert order == list(range(len(order)))
    assert sum(map(len, offsets.values())) == len(images)


def stages(**trunk: object) -> dict[str, object]:
    return {
        "stages": [
            {"name": "stem", "until": "stem"},
            {"name": "trunk", "until": "early", "replicas": 2, **trunk},
            {"name": "head"},
        ],
        "metrics": {"port": 0},
    }


def weights(metrics: Metrics) -> dict[str, float]:
    return {
        reading.labels["replica"]: reading.value
        for reading in metrics.readings()
        if reading.name == "streaminfer_stage_share_weight" and reading.labels["stage"] == "trunk"
    }


async def test_shares_reach_the_group(folder: Path) -> None:
    spec = load(digits_file(folder, **stages(shares=[3, 1])))
    where, plan = plan_of(spec, PLANS / "digits", False)
    async with LocalPipeline(spec, plan, where) as pipeline:
        assert weights(pipeline.metrics) == {"0": 3, "1": 1}
        owned = [w._consumer.assignment() for w in pipeline._workers]
        assert sorted(map(len, owned)) == [1, 3, 4, 4, 4]


async def test_measured_shares_are_samples_a_second(folder: Path) -> None:
    spec = load(digits_file(folder, **stages(shares="measured")))
    where, plan = plan_of(spec, PLANS / "digits", False)
    async with LocalPipeline(spec, plan, where) as pipeline, pipeline.client() as client:
        assert all(weight > 50 for weight in weights(pipeline.metrics).values())
        named = ((name, value) for name, _, value in scans()[:100])
        assert {a.status async for a in client.stream(named)} == {"ok"}


async def test_a_device_that_is_not_there_is_named(folder: Path) -> None:
    spec = load(digits_file(folder, **stages(device=["cpu", "cuda:77"])))
    where, plan = plan_of(spec, PLANS / "digits", False)
    with pytest.raises(ConfigError, match="no device 'cuda:77' on this machine"):
        async with LocalPipeline(spec, plan, where):
            pass


@pytest.mark.kafka
async def test_run_numbers_the_replicas_and_a_worker_alone_is_told_its_number(
    kafka_address: str, folder: Path
) -> None:
    file = digits_file(folder, **stages(device=["cpu", "cpu"], shares=[3, 1]))
    worker = ("worker", str(file), "--kafka", kafka_address, "--stage", "trunk")
    async with streaminfer("run", str(file), "--kafka", kafka_address, cwd=folder) as run:
        await run.line("ready")
        found = {}
        targets = json.loads(next((folder / ".streaminfer").glob("*.targets.json")).read_text())
        for target in targets:
            if "trunk" in target["labels"]["worker"]:
                text = await asyncio.to_thread(fetched, f"http://{target['targets'][0]}/metrics")
                (found[target["labels"]["worker"]],) = (
                    reading.value
                    for reading in parse(text)
                    if reading.name == "streaminfer_stage_share_weight"
                )
        assert found == {"trunk.0": 3, "trunk.1": 1}
        for more, words in (((), "which one is this?"), (("--replica", "2"), "from 0 to 1")):
            async with streaminfer(*worker, *more, cwd=folder) as alone:
                assert await alone.process.wait() == 1
            assert words in alone.text
        assert await run.stop() == 0, run.text


def fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - our own address
        return str(answer.read(), "utf-8")
