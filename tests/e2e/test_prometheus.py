"""A real Prometheus looks at a running pipeline: a panel that stays empty is found here."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.digits.images import scans
from streaminfer import Client
from tests.docker.tools import DOCKER, dashboard_queries, program, rules
from tests.e2e.conftest import digits_file, streaminfer

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(400)]

VARIABLES = {"$pipeline": ".+", "$stage": ".+", "$__rate_interval": "15s", "$__range": "15s"}

# every kind of metric has a series: a gather, its parts, and an exit that takes about half
FANS = {
    "stages": [
        {"name": "stem", "until": "stem", "exit": {"factory": "exit.py:build", "threshold": 0.2}},
        {"name": "trunk", "until": "early", "split": {"by": "channels", "parts": 2}},
        {"name": "head"},
    ]
}
EXIT = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12 * 8 * 8, 10))
"""


@asynccontextmanager
async def prometheus(folder: Path, targets: Path) -> AsyncIterator[str]:
    """Run Prometheus with our rules over the workers in `targets`; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = yaml.safe_load((DOCKER / "prometheus" / "local.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DOCKER / "prometheus" / "rules.yml")]
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(targets)]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    process = await asyncio.create_subprocess_exec(
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        await process.wait()


def asked(address: str, expression: str) -> dict[str, Any]:
    query = urllib.parse.urlencode({"query": expression})
    url = f"{address}/api/v1/query?{query}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - our own address
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        found = json.load(error)
    return found


async def scraped(address: str, workers: int) -> None:
    """Wait until every worker was scraped for a while."""
    until = time.monotonic() + 150
    while time.monotonic() < until:
        await asyncio.sleep(0.5)
        try:
            found = await asyncio.to_thread(asked, address, "count_over_time(up[1m]) > 12")
        except OSError:
            continue
        if len(found["data"]["result"]) == workers:
            return
    raise AssertionError("Prometheus did not scrape all workers within 150 s")


async def test_every_query_of_dashboard_and_rules_answers(kafka_address: str, folder: Path) -> None:
    program("prometheus")
    (folder / "exit.py").write_text(EXIT)
    file = digits_file(folder, **FANS)
    images = [(name, value) for name, _, value in scans()[:400]]
    async with streaminfer("run", str(file), "--kafka", kafka_address, cwd=folder) as run:
        await run.line("ready")
        (targets,) = (folder / ".streaminfer").glob("*.targets.json")
        async with prometheus(folder, targets) as address:
            async with Client(kafka_address, pipeline=file) as client:
                watching = asyncio.create_task(scraped(address, 5))
                while not watching.done():
                    async for answer in client.stream(images):
                        assert answer.status == "ok"
                    assert (await client.predict(b"not an image")).status == "error"
                await watching
            share = "sum(streaminfer_stage_exits_total)"
            found = await asyncio.to_thread(asked, address, share)
            assert float(found["data"]["result"][0]["value"][1]) > 0, "nobody leaves at the exit"
            loose = "streaminfer_stage_ready == 0"  # what StageNotReady would ring for
            found = await asyncio.to_thread(asked, address, loose)
            assert not found["data"]["result"], "a stage within another's worker is never ready"
            empty = []
            for _, expression in dashboard_queries():
                for name, value in VARIABLES.items():
                    expression = expression.replace(name, value)
                found = await asyncio.to_thread(asked, address, expression)
                assert found["status"] == "success", f"{expression}: {found.get('error')}"
                if not found["data"]["result"]:
                    empty.append(expression)
            assert not empty, "panels without a series:\n" + "\n".join(empty)
            for rule in rules():
                found = await asyncio.to_thread(asked, address, rule["expr"])
                assert found["status"] == "success", f"{rule['expr']}: {found.get('error')}"
                if "record" in rule:
                    kept = await asyncio.to_thread(asked, address, rule["record"])
                    assert kept["data"]["result"], f"nothing recorded: {rule['record']}"
        assert await run.stop() == 0
