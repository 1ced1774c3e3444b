"""A pipeline's workers on Kafka, a process each, as `run` starts them: commands of one, and trials.

with Processes(…)      si-1f2e3d4c-check.images ─▶ worker ─▶ … ─▶ sink ─▶ ….predictions
                       └─────────── topics of its own, deleted in the end ───────────┘
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from streaminfer.client import connect
from streaminfer.commands.scraped import look
from streaminfer.errors import ConfigError, StreaminferError
from streaminfer.launcher import Command, Launcher, free_ports
from streaminfer.metrics import Reading
from streaminfer.plan import Plan
from streaminfer.topics import topic_specs
from streaminfer.topology import build

if TYPE_CHECKING:
    from streaminfer.spec import PipelineSpec

__all__ = ["Processes", "worker_commands"]

SOON = 2.0  # seconds in which a worker that is gone is missed
LINES = 5  # of what workers said, that an error repeats
HERE = "127.0.0.1"
PREFIX = 40  # characters of the pipeline's own, which access rules may ask for


def worker_commands(
    spec: PipelineSpec,
    plan: Plan,
    folder: Path,
    random_weights: bool,
    environment: Mapping[str, str] | None = None,
) -> list[Command]:
    """Return the command of every worker, with a free port for its metrics."""
    roles = [(role, k) for role in build(spec, plan).workers for k in range(role.replicas)]
    ports = free_ports(spec.metrics.host, spec.metrics.port, len(roles))
    commands = []
    for (role, k), port in zip(roles, ports, strict=True):
        what = ["--stage", role.stages[0]] if role.stages else ["--sink"]
        what += ["--replica", str(k)] if role.replicas > 1 else []
        random = ["--random-weights"] if random_weights else []
        arguments = ["worker", str(spec.path), *what, "--plan", str(folder), *random]
        arguments += ["--metrics-port", str(port), "--kafka", spec.kafka.bootstrap or ""]
        name = role.name if role.replicas == 1 else f"{role.name}.{k}"
        commands.append(Command(name, arguments, port, role.stages, environment or {}))
    return commands


class Processes:
    """A pipeline on Kafka for a while: its own topics, a process per worker on this machine.

        async with Processes(spec, plan, folder).up() as pipeline: ...

    Raises:
        ConfigError: the file names no broker.
        TransportError: it does not answer.
        StreaminferError: a worker ended; with what it said last.
    """

    alone = False

    def __init__(
        self, spec: PipelineSpec, plan: Plan, folder: Path, *, random_weights: bool = False
    ) -> None:
        prefix = f"{spec.kafka.prefix[:PREFIX]}-{uuid.uuid4().hex[:8]}-check"
        source, target = f"{prefix}.images", f"{prefix}.predictions"
        self.spec = spec.model_copy(
            update={
                "input": spec.input.model_copy(update={"topic": source}),
                "output": spec.output.model_copy(update={"topic": target}),
                "kafka": spec.kafka.model_copy(update={"prefix": prefix}),
                "metrics": spec.metrics.model_copy(update={"host": HERE, "port": 0}),
            }
        )
        self.transport = connect(self.spec, replication=spec.kafka.replication)
        self._topology = build(self.spec, plan)
        environment = {
            "STREAMINFER_KAFKA__PREFIX": prefix,
            "STREAMINFER_INPUT__TOPIC": source,
            "STREAMINFER_OUTPUT__TOPIC": target,
            "STREAMINFER_METRICS__HOST": HERE,
        }
        self._commands = worker_commands(self.spec, plan, folder, random_weights, environment)
        self._said: deque[str] = deque(maxlen=LINES)
        self._stop, self._up = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Self]:
        """Create the topics, start every worker, wait until each can take work; undo all of it."""
        async with self.transport.admin() as admin:
            specs = topic_specs(self._topology, self.spec, self.spec.kafka.partitions)
            await admin.create(specs)
        launcher = Launcher(
            self._commands, self._stop, say=self._hear, ready=self._up.set, patience=1
        )
        self._running = asyncio.create_task(launcher.run())
        up = asyncio.create_task(self._up.wait())
        try:
            await asyncio.wait([self._running, up], return_when=asyncio.FIRST_COMPLETED)
            if self._running.done():
                await self.failed()
            yield self
        finally:
            up.cancel()
            self._stop.set()
            await asyncio.wait([self._running])
            async with self.transport.admin() as admin:
                await admin.delete(self._topology.topics())

    async def read(self, *names: str) -> Sequence[Reading]:
        """Return what the workers' metrics of these names say now."""
        urls = [f"http://{HERE}:{command.port}/metrics" for command in self._commands]
        try:
            found = await look(urls)
        except ConfigError as error:
            with contextlib.suppress(TimeoutError):  # it says more
                await asyncio.wait_for(self.failed(), SOON)
            raise StreaminferError(f"a worker does not answer: {error}") from None
        return [one for one in found.readings if one.name in names]

    async def failed(self) -> None:
        """Wait until a worker ends by itself, and raise what it said last."""
        await asyncio.wait([self._running])
        raise StreaminferError("a worker ended by itself:\n  " + "\n  ".join(self._said))

    def _hear(self, name: str, line: str) -> None:
        self._said.append(f"{name} | {line}")
