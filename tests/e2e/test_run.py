"""The command line on a real Kafka, with other people's clients and with workers that die."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import urllib.request
from pathlib import Path

import pytest

from stages.digits.images import scans
from streaminfer import Client
from tests.e2e.conftest import DIGITS, ROOT, digits_file, streaminfer

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(400)]


async def test_run_says_ready_serves_metrics_and_senders_and_drains_on_sigterm(
    kafka_address: str, folder: Path
) -> None:
    file = digits_file(folder)
    async with streaminfer("run", str(file), "--kafka", kafka_address, cwd=folder) as run:
        await run.line("ready")
        targets = json.loads(next((folder / ".streaminfer").glob("*.targets.json")).read_text())
        assert len(targets) == 4
        for target in targets:
            for path, text in (("livez", b"ok"), ("readyz", b"ok"), ("metrics", b"streaminfer_")):
                url = f"http://{target['targets'][0]}/{path}"
                body = await asyncio.to_thread(fetched, url)
                assert text in body
        await send_and_watch(file, folder, kafka_address)
        assert await run.stop() == 0, run.text


async def send_and_watch(file: Path, folder: Path, address: str) -> None:
    """Both commands beside a running pipeline: what the one sends, the other sees answered."""
    shots = folder / "shots"
    shots.mkdir()
    for name, _, value in scans()[:20]:
        (shots / name).write_bytes(value)
    async with (
        streaminfer("watch", str(file), "--kafka", address, "--json", "--count", "20",
                    "--from-beginning", cwd=folder) as watch,
        streaminfer("send", str(file), str(shots), "--wait", "--rate", "200",
                    "--kafka", address, cwd=folder) as send,
    ):  # fmt: skip
        assert await send.process.wait() == 0, send.text
        await asyncio.wait_for(watch.process.wait(), 90)
    sent = {json.loads(line)["id"] for line in send.lines}
    assert sent == {p.name for p in shots.iterdir()}
    assert {json.loads(line)["id"] for line in watch.lines} == sent


@pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed")
async def test_kcat_is_a_client(kafka_address: str, folder: Path) -> None:
    file = digits_file(folder)
    name, label, value = scans()[3]
    image = folder / name
    image.write_bytes(value)
    pipeline = digits_name(file)
    async with streaminfer("run", str(file), "--kafka", kafka_address, cwd=folder) as run:
        await run.line("ready")
        await kcat("-b", kafka_address, "-P", "-t", f"{pipeline}.images", "-k", name,
                   "-H", "content-type=image/jpeg", str(image))  # fmt: skip
        out = await kcat("-b", kafka_address, "-C", "-t", f"{pipeline}.predictions", "-c", "1",
                         "-o", "beginning", "-f", "%k %s\n")  # fmt: skip
    key, _, body = out.strip().partition(" ")
    assert key == name
    assert json.loads(body)["predictions"][0]["label"] == str(label)


async def test_workers_killed_under_load_lose_nothing(kafka_address: str, folder: Path) -> None:
    """One of each stage, in turn: answers come again only when the one before is back."""
    file = digits_file(folder)
    images = scans() * 2
    async with streaminfer("run", str(file), "--kafka", kafka_address, cwd=folder) as run:
        await run.line("ready")
        async with Client(kafka_address, pipeline=file) as client:
            seen: set[tuple[int, int]] = set()

            async def killer() -> None:
                for least, victim in ((400, "stem"), (1400, "trunk"), (2400, "head")):
                    while len(seen) < least:  # noqa: ASYNC110 - another task counts
                        await asyncio.sleep(0.01)
                    os.kill(run.children()[victim], signal.SIGKILL)

            killing = asyncio.create_task(killer())
            named = ((f"{k}-{name}", value) for k, (name, _, value) in enumerate(images))
            async for answer in client.stream(named, concurrency=512, timeout=120):
                assert answer.status == "ok", answer.error
                seen.add((answer.source.partition, answer.source.offset))
            await killing
        assert len(seen) == len(images)
        assert await run.stop() == 0
    again = [line for line in run.lines if "ended with code" in line]
    for victim in ("stem", "trunk", "head"):
        assert any(victim in line for line in again), f"{victim} was not started again: {again}"


async def test_a_stop_that_meets_a_worker_still_loading_is_a_clean_one(
    kafka_address: str, folder: Path
) -> None:
    """It is ended by the signal, and has read nothing yet."""
    file = digits_file(folder)
    async with streaminfer("run", str(file), "--kafka", kafka_address, cwd=folder) as run:
        await run.line("ready")
        dead = run.children()["head"]
        os.kill(dead, signal.SIGKILL)
        async with asyncio.timeout(60):
            while run.children().get("head", dead) == dead:  # noqa: ASYNC110 - comes back
                await asyncio.sleep(0.02)
        assert await run.stop() == 0, run.text


async def test_run_on_the_memory_bus_needs_no_kafka(folder: Path) -> None:
    env = {"KAFKA_BOOTSTRAP_SERVERS": ""}
    async with streaminfer(
        "run", str(digits_file(folder)), "--bus", "memory", cwd=folder, **env
    ) as run:
        await run.line("ready")
        assert await run.stop() == 0, run.text


async def test_a_wrong_command_is_2_and_a_failed_one_is_1(folder: Path) -> None:
    async with streaminfer("run", cwd=folder) as run:
        assert await run.process.wait() == 2
    async with streaminfer("run", "nowhere.yaml", cwd=folder) as run:
        assert await run.process.wait() == 1
    assert "nowhere.yaml" in run.text
    async with streaminfer("run", str(DIGITS), "--kafka", "127.0.0.1:1", cwd=ROOT) as run:
        assert await run.process.wait() == 1
    assert "127.0.0.1:1" in run.text


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - our own address
        return bytes(answer.read())


def digits_name(file: Path) -> str:
    import yaml

    return str(yaml.safe_load(file.read_text())["pipeline"])


async def kcat(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "kcat", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await asyncio.wait_for(process.communicate(), 90)
    return out.decode()
