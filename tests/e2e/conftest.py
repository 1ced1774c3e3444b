"""A running pipeline, on either bus, as a person would start it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from streaminfer import Client, LocalPipeline
from streaminfer.commands import plan_of
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "stages" / "digits" / "pipeline.yaml"
PLANS = ROOT / "build" / "plans"


def digits_file(folder: Path, **changes: object) -> Path:
    """Write a copy of the digits pipeline with its own topics, so that tests don't meet."""
    raw = yaml.safe_load(DIGITS.read_text())
    name = f"digits-{uuid4().hex[:8]}"
    raw |= {"pipeline": name, "metrics": {"port": 0}}
    raw["model"]["factory"] = f"{DIGITS.parent / 'model.py'}:build"
    raw["model"]["weights"] = str(DIGITS.parent / "weights.safetensors")
    raw["input"]["topic"] = f"{name}.images"
    raw["output"]["topic"] = f"{name}.predictions"
    raw["kafka"] = {"partitions": 4, "session_timeout": "6s"}
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


@dataclass
class Run:
    """A `streaminfer` process whose lines are kept."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    reading: asyncio.Task[None] | None = None

    async def line(self, start: str, seconds: float = 180) -> str:
        """Wait for a line that begins with `start`."""
        async with asyncio.timeout(seconds):
            while True:
                for line in self.lines:
                    if line.startswith(start):
                        return line
                if self.process.returncode is not None:
                    raise AssertionError(f"ended {self.process.returncode}:\n{self.text}")
                await asyncio.sleep(0.05)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(120):
            return await self.process.wait()

    def children(self) -> dict[str, int]:
        """Return the pid of each worker by the name of its stage."""
        return workers_of(self.process.pid)


def workers_of(launcher: int) -> dict[str, int]:
    """Return the pid of each worker that a process has started, by the name of its stage."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            parent = re.search(r"PPid:\s+(\d+)", (folder / "status").read_text())
        except OSError:
            continue
        if parent and int(parent[1]) == launcher and b"worker" in command:
            stage = command[command.index(b"--stage") + 1] if b"--stage" in command else b"sink"
            found[stage.decode()] = int(folder.name)
    return found


@asynccontextmanager
async def streaminfer(*arguments: str, cwd: Path, **environment: str) -> AsyncIterator[Run]:
    """Run `python -m streaminfer …`; it is ended at the end of the block, whatever happens."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "streaminfer",
        *arguments,
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
    )
    run = Run(process)

    async def read() -> None:
        assert process.stdout is not None
        async for raw in process.stdout:
            run.lines.append(raw.decode().rstrip())

    run.reading = asyncio.create_task(read())
    try:
        yield run
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 60)
            except TimeoutError:
                process.kill()
                await process.wait()
        await run.reading


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@dataclass(frozen=True)
class Bus:
    """Starts a pipeline file on one of the two carriers and gives a client of it."""

    name: str
    address: str | None = None

    @asynccontextmanager
    async def running(self, file: Path) -> AsyncIterator[Client]:
        if self.address is None:
            async with self.local(load(file)) as pipeline, pipeline.client() as client:
                yield client
            return
        async with streaminfer("run", str(file), "--kafka", self.address, cwd=file.parent) as run:
            await run.line("ready")
            async with Client(self.address, pipeline=file) as client:
                yield client
            assert await run.stop() == 0, run.text

    @asynccontextmanager
    async def local(self, spec: PipelineSpec) -> AsyncIterator[LocalPipeline]:
        folder, plan = plan_of(spec, PLANS / "digits", False)
        async with LocalPipeline(spec, plan, folder) as pipeline:
            yield pipeline


@pytest.fixture(scope="module", params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def bus(request: pytest.FixtureRequest) -> Bus:
    if request.param == "memory":
        return Bus("memory")
    return Bus("kafka", request.getfixturevalue("kafka_address"))


def ids(answers: Sequence[object]) -> list[str]:
    return [answer.id for answer in answers]  # type: ignore[attr-defined]
