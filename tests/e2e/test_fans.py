"""Split stages and ensembles on a real Kafka, with workers that die or stand still."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from PIL import Image

from stages.digits.demo import uncut
from stages.digits.images import scans
from streaminfer import Client, LocalPipeline
from streaminfer.commands import plan_of
from streaminfer.spec.file import load
from tests.e2e.conftest import DIGITS, Bus, Run, digits_file, streaminfer
from tests.e2e.test_replicas import published

SPLIT = {
    "stages": [
        {"name": "stem", "until": "stem"},
        {"name": "trunk", "until": "early", "split": {"by": "channels", "parts": 2}},
        {"name": "head"},
    ],
    # a micro-batch is many chunks, and who dies leaves some of them
    "kafka": {"max_record_bytes": 8192, "session_timeout": "6s"},
    "batch": {"max": 16, "wait": "2ms"},
}
MODEL = {
    "factory": f"{DIGITS.parent / 'model.py'}:build",
    "weights": str(DIGITS.parent / "weights.safetensors"),
    "example": [1, 8, 8],
}


@asynccontextmanager
async def running(file: Path, address: str) -> AsyncIterator[tuple[Run, Client]]:
    async with streaminfer("run", str(file), "--kafka", address, cwd=file.parent) as run:
        await run.line("ready")
        async with Client(address, pipeline=file) as client:
            yield run, client
        assert await run.stop() == 0, run.text


async def pid(run: Run, stage: str, *, but: Collection[int] = ()) -> int:
    """Return a worker's process, once there is one that is not among `but`."""
    while (found := run.children().get(stage)) is None or found in but:  # noqa: ASYNC110 - comes back
        await asyncio.sleep(0.05)
    return found


@pytest.mark.kafka
@pytest.mark.timeout(800)
async def test_who_cuts_computes_or_joins_parts_may_be_killed(
    kafka_address: str, folder: Path
) -> None:
    """Parts of a row meet again though each was sent once, twice, or by another than began."""
    victims = ("stem", "trunk.0", "trunk.gather")
    images = [(f"{k}-{name}", label, value) for k, (name, label, value) in enumerate(scans() * 2)]
    file = digits_file(folder, **SPLIT)
    spec = load(file, {"kafka.bootstrap": kafka_address})
    async with running(file, kafka_address) as (run, client):
        seen = Counter[str]()

        async def killer() -> None:
            killed = set[int]()
            for k in range(3 * len(victims)):  # each three times; answers go on once it is back
                while seen.total() < 200 + 350 * k:  # noqa: ASYNC110 - another task counts
                    await asyncio.sleep(0.005)
                # what was behind it may be answered before anyone sees that it is gone
                killed.add(victim := await pid(run, victims[k // 3], but=killed))
                os.kill(victim, signal.SIGKILL)

        killing = asyncio.create_task(killer())
        named = ((name, value) for name, _, value in images)
        wrong = 0
        answers = client.stream(named, concurrency=512, timeout=150)
        labels = (label for _, label, _ in images)
        async for answer in answers:
            assert answer.status == "ok", answer.error
            assert not answer.partial
            wrong += answer.top1.index != next(labels)
            seen[answer.id] += 1
        await killing
        assert wrong < 0.02 * len(images), "each image has its own answer"
        offsets = await published(client.transport, spec.output.topic, len(images))
    ended = [line for line in run.lines if "ended with code" in line]
    for worker in ("stem", "trunk.0", "head"):  # the gather is in the head's
        assert sum(worker in line for line in ended) >= 3, f"{worker}: {ended}"
    for order in offsets.values():
        assert order == list(range(len(order))), "in order, without a gap, none twice"
    assert sum(map(len, offsets.values())) == len(images)


def ensemble(folder: Path, **vote: object) -> Path:
    branches = [{"name": "a", "model": MODEL}, {"name": "b", "model": MODEL}]
    stages = [{"name": "vote", "branches": branches, **vote}]
    return digits_file(folder, model=None, stages=stages)


@pytest.mark.kafka
@pytest.mark.timeout(400)
async def test_a_quorum_answers_in_time_while_a_branch_stands_still(
    kafka_address: str, folder: Path
) -> None:
    images = [(name, value) for name, _, value in scans()[:40]]
    file = ensemble(folder, quorum=1, deadline="500ms")
    async with running(file, kafka_address) as (run, client):
        assert {a.partial async for a in client.stream(images, timeout=60)} == {False}
        still = await pid(run, "vote.b")
        os.kill(still, signal.SIGSTOP)
        try:
            began = time.monotonic()
            answers = [a async for a in client.stream(images, timeout=60)]
            took = time.monotonic() - began
        finally:
            os.kill(still, signal.SIGCONT)
        assert {(a.status, a.partial) for a in answers} == {("ok", True)}
        assert took < 15, "half of the deadline of a gather without a quorum"
        async with asyncio.timeout(60):
            whole = False
            while not whole:  # once it has caught up
                whole = True not in {a.partial async for a in client.stream(images, timeout=60)}


@pytest.mark.kafka
@pytest.mark.timeout(400)
async def test_without_a_quorum_images_wait_for_the_branch(
    kafka_address: str, folder: Path
) -> None:
    images = [(name, value) for name, _, value in scans()[:40]]
    async with running(ensemble(folder), kafka_address) as (run, client):
        assert {a.partial async for a in client.stream(images, timeout=60)} == {False}
        still = await pid(run, "vote.b")
        os.kill(still, signal.SIGSTOP)

        async def all_of_them() -> list[tuple[str, bool]]:
            return [(a.status, a.partial) async for a in client.stream(images, timeout=100)]

        asking = asyncio.create_task(all_of_them())
        try:
            await asyncio.sleep(8)  # longer than the group waits for a member
            assert not asking.done(), "somebody answered for the branch"
        finally:
            os.kill(still, signal.SIGCONT)
        assert set(await asking) == {("ok", False)}


FUSSY = """
import torch
from torch import nn


class Fussy(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 10)

    def forward(self, x):
        return self.table((x[:, 0, 0, 0] > 1).long() * 9)


def build():
    torch.manual_seed(0)
    return Fussy()
"""


def white() -> bytes:
    """An image that has no entry in the table of `Fussy`."""
    file = io.BytesIO()
    Image.new("L", (8, 8), 255).save(file, "PNG")
    return file.getvalue()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("quorum", [None, 1])
async def test_what_fails_in_one_branch_fails_once_or_is_outvoted(
    bus: Bus, folder: Path, quorum: int | None
) -> None:
    (folder / "fussy.py").write_text(FUSSY)
    fussy = {"factory": f"{folder / 'fussy.py'}:build", "example": [1, 8, 8]}
    branches = [{"name": "a", "model": MODEL}, {"name": "b", "model": fussy}]
    vote = {"name": "vote", "branches": branches, "quorum": quorum}
    file = digits_file(folder, model=None, stages=[vote])
    bad = {5, 6, 20}
    images = [(f"{k}", white() if k in bad else scans()[k][2]) for k in range(40)]
    async with bus.running(file) as client:
        answers = [a async for a in client.stream(images, timeout=60)]
        offsets = await published(client.transport, load(file).output.topic, len(images))
    for k, answer in enumerate(answers):
        failed = k in bad and quorum is None
        assert (answer.status, answer.partial) == (
            "error" if failed else "ok",
            k in bad and not failed,
        )
        if failed:
            assert answer.error is not None
            assert answer.error.stage == "vote.b"
    assert sum(map(len, offsets.values())) == len(images), "none is answered twice"


TILED = [{"name": "u", "until": "early", "split": {"by": "tiles", "grid": [2, 1]}}, {"name": "v"}]
HALVED = [
    {"name": "u", "until": "stem", "split": {"by": "channels", "parts": 2}},
    {"name": "v", "until": "down", "split": {"by": "tiles", "grid": [2, 2]}},
    {"name": "w"},
]


@pytest.mark.parametrize("edge", [{}, {"transport": "local"}, {"dtype": "float16"}])
async def test_branches_that_are_split_themselves_give_the_whole_s_answers(
    folder: Path, edge: dict[str, str]
) -> None:
    """A branch that begins with tiles must not keep the image from the branch beside it."""
    branches = [
        {"name": name, "model": MODEL, "stages": stages}
        for name, stages in (("p", TILED), ("q", HALVED), ("r", []))
    ]
    vote = {"name": "vote", "branches": branches}
    spec = load(digits_file(folder, model=None, stages=[vote], edges={"default": edge}))
    where, plan = plan_of(spec, folder / "plan", False)
    images = scans()[:200]
    async with LocalPipeline(spec, plan, where) as pipeline, pipeline.client() as client:
        named = ((name, value) for name, _, value in images)
        answers = [a async for a in client.stream(named, timeout=60)]
    assert [a.status for a in answers] == ["ok"] * len(images)
    whole = uncut([value for _, _, value in images]).argmax(1).tolist()
    assert [a.top1.index for a in answers] == whole
