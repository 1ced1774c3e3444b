"""Start what is measured as processes of its own; know when it is ready and what CPU it used."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

__all__ = ["READY", "ROOT", "Process", "running", "together"]

ROOT = Path(__file__).resolve().parents[2]
READY = "ready"  # how the line begins with which a system says that it takes work
STARTS = 120.0  # seconds until it must be there
ENDS = 40.0  # seconds after SIGTERM


class Process:
    """A running program; its lines are kept, so that a failure can be told."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process, self.name = process, name
        self.lines: list[str] = []
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def pid(self) -> int:
        """The process' id."""
        return self._process.pid

    async def read(self) -> None:
        """Keep what it prints until it ends."""
        if self._process.stdout is not None:
            async for raw in self._process.stdout:
                self.lines.append(raw.decode(errors="replace").rstrip())
                if self.lines[-1].startswith(READY):
                    self.ready.set()
        self.ended.set()

    async def line(self, seconds: float) -> str:
        """Send one line "go" to it and return the next line that it prints."""
        count = len(self.lines)
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        async with asyncio.timeout(seconds):
            while len(self.lines) == count:
                self._alive()
                await asyncio.sleep(0.01)
        return self.lines[count]

    async def until_ready(self) -> None:
        """Wait for its line. Raises RuntimeError with what it said if it ends or is late."""
        waits = [asyncio.ensure_future(e.wait()) for e in (self.ready, self.ended)]
        await asyncio.wait(waits, timeout=STARTS, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not self.ready.is_set():
            raise RuntimeError(f"{self.name} did not come up:\n{self._tail()}")

    async def end(self) -> None:
        """Send SIGTERM, then SIGKILL. Raises RuntimeError if it did not end well by itself."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            code = await asyncio.wait_for(self._process.wait(), ENDS)
        except TimeoutError:
            for one in self.tree():
                one.kill()
            raise RuntimeError(f"{self.name} did not end:\n{self._tail()}") from None
        if code != 0:
            raise RuntimeError(f"{self.name} ended with {code}:\n{self._tail()}")

    def tree(self) -> list[psutil.Process]:
        """Return the process and all below it."""
        try:
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """Return the CPU time that it and its children used so far."""
        total = 0.0
        for one in self.tree():
            times = one.cpu_times()
            total += times.user + times.system
        return total

    def _alive(self) -> None:
        if self.ended.is_set():
            raise RuntimeError(f"{self.name} ended:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.lines[-15:])


@asynccontextmanager
async def running(
    name: str,
    arguments: Sequence[str],
    *,
    cwd: Path = ROOT,
) -> AsyncIterator[Process]:
    """Run `python …` until the end of the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    run = Process(process, name)
    reading = asyncio.create_task(run.read())
    try:
        await run.until_ready()
        yield run
    finally:
        try:
            await run.end()
        finally:
            reading.cancel()


@asynccontextmanager
async def together(
    starts: Iterable[tuple[str, Sequence[str]]], *, cwd: Path = ROOT
) -> AsyncIterator[list[Process]]:
    """Run several programs at once; the block begins when all are ready."""
    async with AsyncExitStack() as stack:
        tasks = [
            asyncio.ensure_future(stack.enter_async_context(running(name, arguments, cwd=cwd)))
            for name, arguments in starts
        ]
        yield list(await asyncio.gather(*tasks))
