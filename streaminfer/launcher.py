"""Start, watch, restart and stop the local workers of a pipeline: one process each.

A worker that ends by itself is started again after a pause that doubles from 0.5 to 30 seconds and
begins anew once it has been up for a minute. What it had in hand is read again: nothing is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Command", "Launcher", "free_ports", "scrape_targets"]

STEADY = 60.0  # seconds up after which a fall is a new one
PAUSE = (0.5, 30.0)
GRACE = 30.0  # seconds that a worker may drain before it is killed


@dataclass(frozen=True, slots=True)
class Command:
    """One worker to run: its name on the screen, and the arguments of `streaminfer`."""

    name: str
    arguments: Sequence[str]
    port: int  # of its /metrics
    stages: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Launcher:
    """Runs commands until `stop` is set, then sends SIGTERM and waits for each."""

    def __init__(
        self,
        commands: Iterable[Command],
        stop: asyncio.Event,
        *,
        say: Callable[[str, str], None],
        ready: Callable[[], None],
        patience: int = 5,
    ) -> None:
        self._commands, self._stop = list(commands), stop
        self._say, self._on_ready, self._patience = say, ready, patience
        self._ready: set[str] = set()
        self._gave_up: str | None = None
        self.restarts = 0

    async def run(self) -> int:
        """Return 0 after a clean stop, 1 if a worker never came up or would not end."""
        codes = await asyncio.gather(*[self._keep(command) for command in self._commands])
        if self._gave_up:
            self._say("run", f"gave up: {self._gave_up}")
            return 1
        return 0 if all(code == 0 for code in codes) else 1

    async def _keep(self, command: Command) -> int:
        """Run one worker, again and again, until the stop."""
        pause, falls = PAUSE[0], 0
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            code = await self._once(command)
            if self._stop.is_set():
                # one that was still loading has read nothing: it may end at once, by the signal
                loading = command.name not in self._ready
                return 0 if loading and code == -signal.SIGTERM else code
            self._ready.discard(command.name)
            falls += 1
            if loop.time() - began > STEADY:
                pause, falls = PAUSE[0], 1
            if falls >= self._patience and loop.time() - began < STEADY:
                self._gave_up = f"{command.name} ended {falls} times in a row (last code {code})"
                self._stop.set()
                return 1
            self._say(command.name, f"ended with code {code}, again in {pause:.1f} s")
            self.restarts += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
                return 0
            pause = min(pause * 2, PAUSE[1])

    async def _once(self, command: Command) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "streaminfer",
            *command.arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **command.environment},
            start_new_session=True,  # Ctrl-C is for the launcher, which then drains in order
        )
        lines = asyncio.create_task(self._read(command, process))
        stopping = asyncio.create_task(self._stop.wait())
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait([stopping, ended], return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await self._end(command, process)
            code = await ended
            await lines
            return code
        finally:
            stopping.cancel()
            if process.returncode is None:
                process.kill()

    async def _read(self, command: Command, process: asyncio.subprocess.Process) -> None:
        """Pass a worker's lines on; the line `ready …` counts it in."""
        if process.stdout is None:
            return
        async for raw in process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            if line.startswith("ready"):
                self._ready.add(command.name)
                if len(self._ready) == len(self._commands):
                    self._on_ready()
            elif line:
                self._say(command.name, line)

    async def _end(self, command: Command, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), GRACE)
        except TimeoutError:
            self._say(command.name, f"did not end within {GRACE:.0f} s: killed")
            with contextlib.suppress(ProcessLookupError):
                process.kill()


def free_ports(host: str, first: int, count: int) -> list[int]:
    """Return ports to listen on: `first` and those behind it if free, else any (0: any)."""
    ports: list[int] = []
    holders: list[socket.socket] = []
    try:
        for i in range(count):
            holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holders.append(holder)
            try:
                holder.bind((host, first + i if first else 0))
            except OSError:
                holder.bind((host, 0))
            ports.append(holder.getsockname()[1])
    finally:
        for holder in holders:
            holder.close()
    return ports


def scrape_targets(pipeline: str, host: str, commands: Iterable[Command], path: Path) -> None:
    """Write the workers' addresses as Prometheus reads them (`file_sd_configs`)."""
    targets = [
        {
            "targets": [f"{host}:{command.port}"],
            "labels": {"pipeline": pipeline, "worker": command.name},
        }
        for command in commands
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(targets, indent=1) + "\n")
    part.replace(path)
