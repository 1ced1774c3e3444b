"""The composition root: the only place that wires spec, plan and transport into workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias

from streaminfer.client import Client
from streaminfer.errors import ConfigError, StreaminferError
from streaminfer.malloc import tune_malloc
from streaminfer.metrics import Metrics
from streaminfer.plan import Plan, StagePlan
from streaminfer.runtime.flow import Trimmer, Window, WindowWatch
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.receive import Envelopes, Raw
from streaminfer.runtime.sink import Order, watermark
from streaminfer.runtime.speed import combined
from streaminfer.runtime.steps import Step, chain
from streaminfer.runtime.worker import Limits, Upkeep, Worker
from streaminfer.spec import PipelineSpec
from streaminfer.spec.stages import PartSpec, StageSpec
from streaminfer.telemetry import serve
from streaminfer.topics import topic_specs, window
from streaminfer.topology import SINK, Topology, WorkerSpec, build
from streaminfer.transport import Admin, Consumer, Listener, Producer, TopicPartition, Transport
from streaminfer.transport.memory import MemoryTransport
from streaminfer.wire import Patience as HalfMessages

if TYPE_CHECKING:
    from streaminfer.runtime.gather import Patience

__all__ = ["Deployment", "LocalPipeline", "run_worker"]

Consume: TypeAlias = Callable[[Listener], Consumer]

STALE = 60.0  # seconds without a turn of the loop after which /livez says no
KEPT = 20_000  # answers that the memory bus keeps per partition


class _Place(NamedTuple):
    """One replica of a worker."""

    role: WorkerSpec
    replica: int


@dataclass(frozen=True)
class Deployment:
    """A pipeline on its topics: all that a worker is made of."""

    spec: PipelineSpec
    plan: Plan
    folder: Path  # of the plan
    topology: Topology
    transport: Transport
    partitions: int
    history: bool = True  # keep read records for a while, as the file says

    @classmethod
    async def open(
        cls, spec: PipelineSpec, plan: Plan, folder: Path, transport: Transport, **options: bool
    ) -> Self:
        """Look at the topics. Raises TopicError if one is missing or has other partitions."""
        topology = build(spec, plan)
        async with transport.admin() as admin:
            found = await admin.topics(topology.topics())
        partitions = topology.check(found)
        return cls(spec, plan, folder, topology, transport, partitions, **options)

    @asynccontextmanager
    async def worker(
        self, name: str, metrics: Metrics, stop: asyncio.Event, replica: int = 0
    ) -> AsyncIterator[Worker]:
        """Make the worker of a stage (or "sink") and its connections; run it inside the block.

        `replica` says which of its devices and shares are this one's. Raises ConfigError.
        """
        role = self.topology.worker(name)
        async with self.transport.admin() as admin, self.transport.producer() as producer:
            outbox = self._outbox(role, metrics, producer)
            if role.name == SINK:
                yield self._sink(role, metrics, stop, admin, outbox)
            else:
                yield self._stage(_Place(role, replica), metrics, stop, admin, outbox)

    def _outbox(self, role: WorkerSpec, metrics: Metrics, producer: Producer) -> Outbox:
        return Outbox(
            producer,
            metrics.stage(role.name),
            role.routes,
            max_record_bytes=self.spec.kafka.max_record_bytes,
            partitions=self.partitions,
        )

    def _sink(
        self, role: WorkerSpec, metrics: Metrics, stop: asyncio.Event, admin: Admin, outbox: Outbox
    ) -> Worker:
        stage = metrics.stage(role.name)
        return Worker(
            lambda listener: self.transport.consumer([role.source], role.group, listener),
            Envelopes(role.name, None, stage, max_bytes=self._message_bytes()),
            Order(self.plan, self.topology.output_topic, metrics),
            outbox,
            stage,
            stop,
            limits=Limits(serial=True, commit_every=0.1),
            upkeep=Upkeep(self._trimmer(admin, role)),
        )

    def _stage(
        self, place: _Place, metrics: Metrics, stop: asyncio.Event, admin: Admin, outbox: Outbox
    ) -> Worker:
        role = place.role
        step, consume = self._compute(place, metrics)
        limits = Limits(samples=self._inflight(role), nbytes=self._budget())
        stage = metrics.stage(role.name)
        if role.source != self.topology.input_topic:
            intake = Envelopes(
                role.name, self.plan.digest, stage,
                max_bytes=self._message_bytes(), patience=self._half_messages(role),
            )  # fmt: skip
            return Worker(
                consume, intake, step, outbox, stage, stop,
                limits=limits, upkeep=Upkeep(self._trimmer(admin, role)),
            )  # fmt: skip
        flow = Window(window(self.spec, self.plan, self.partitions))
        metrics.window.labels(self.spec.pipeline).set(flow.size)
        return Worker(
            consume,
            Raw(role.batch, flow),
            chain(self._ingest(flow, metrics), step),
            outbox,
            stage,
            stop,
            limits=limits,
            upkeep=Upkeep(
                None if self.history else self._trimmer(admin, role), (self._watch(admin, flow),)
            ),
        )

    def _compute(self, place: _Place, metrics: Metrics) -> tuple[Step, Consume]:
        """Make a worker's step, and what joins its group with its share once that has started."""
        from streaminfer.runtime.compute import forward  # torch: only where it computes

        role, replica = place
        share = role.share(replica)
        steps = {
            stage: forward(
                self.spec, self.plan, self.folder, stage, metrics.stage(stage),
                device=role.device(stage, replica), timed=share is None,
            )
            for stage in role.stages
        }  # fmt: skip

        def consume(listener: Listener) -> Consumer:
            weight = share
            if weight is None:
                weight = combined((step.device, step.speed) for step in steps.values())
            metrics.stage(role.name).share(replica, weight)
            return self.transport.consumer([role.source], role.group, listener, weight=weight)

        return self._joined(role, steps, metrics), consume

    def _joined(self, role: WorkerSpec, steps: Mapping[str, Step], metrics: Metrics) -> Step:
        """Join the stages of a worker; the parts that come through its topic are gathered first."""
        from streaminfer.runtime.gather import Gather
        from streaminfer.runtime.graph import Graph

        stages = [self.plan.stage(name) for name in role.stages]
        waits = {stage.name: self._patience(stage) for stage in stages if len(stage.sources) > 1}
        quorums = {name: p.quorum for name, p in waits.items() if p.quorum is not None}
        first = stages[0]
        made = steps[first.name] if len(stages) == 1 else Graph(stages, steps, quorums)
        if not role.gathers:
            return made
        return chain(Gather(first, waits[first.name], metrics.stage(first.name)), made)

    def _patience(self, stage: StagePlan) -> Patience:
        from streaminfer.runtime.gather import Patience

        declared = self.spec.stage(stage.path)
        if not isinstance(declared, PartSpec):
            raise ConfigError(f"{stage.path!r} is a branch: it gathers nothing")
        quorum = declared.quorum if isinstance(declared, StageSpec) else None
        return Patience(declared.deadline, quorum, strict=quorum is not None)

    def _ingest(self, flow: Window, metrics: Metrics) -> Step:
        from streaminfer.runtime.ingest import Ingest

        threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        return Ingest(self.plan, flow, metrics.stage(self.plan.stages[0].name), threads=threads)

    def _watch(self, admin: Admin, flow: Window) -> WindowWatch:
        from streaminfer.runtime.ingest import chain_at

        sink = self.topology.worker(SINK)
        return WindowWatch(
            admin, flow, group=sink.group, topic=sink.source, read=watermark, write=chain_at
        )

    def _trimmer(self, admin: Admin, role: WorkerSpec) -> Trimmer:
        kafka = self.spec.kafka
        share = max(1, kafka.history_bytes // self.partitions) if self.history else 0
        return Trimmer(admin, kafka.history if self.history else 0.0, share, role.sharers)

    def _inflight(self, role: WorkerSpec) -> int:
        """Samples in hand: one batch received, one computed, one sent, and one per local edge."""
        return role.batch.max * (3 + len(role.stages))

    def _budget(self) -> int:
        return max(self.spec.memory // 4, 16_000_000)

    def _half_messages(self, role: WorkerSpec) -> HalfMessages | None:
        """How long a half message may wait: the group notices a death in a session's time."""
        if not role.balanced:
            return None
        return HalfMessages(seconds=max(60.0, 3 * self.spec.kafka.session_timeout))

    def _message_bytes(self) -> int:
        """The largest message a stage may be sent: a batch of the widest edge, and its header."""
        widest = max(sum(t.row_bytes() for t in (*s.inputs, *s.outputs)) for s in self.plan.stages)
        return 64_000_000 + 1024 * widest


async def run_worker(
    deployment: Deployment,
    name: str,
    stop: asyncio.Event,
    *,
    port: int,
    host: str,
    said: Callable[[str], None],
    replica: int = 0,
) -> None:
    """Run one worker with its /metrics until `stop`; `said` gets the address once it is ready."""
    from streaminfer import __version__

    plan = deployment.plan
    metrics = Metrics(
        plan.pipeline, version=__version__, model=plan.model, model_version=plan.model_version
    )
    async with deployment.worker(name, metrics, stop, replica) as worker:

        def live() -> bool:
            return not worker.polled or time.monotonic() - worker.polled < STALE

        async with serve(metrics, host, port, live=live, ready=worker.ready.is_set) as address:
            await worker.run(ready=lambda: said(address))


@dataclass
class LocalPipeline:
    """All workers of a pipeline in this process, on the memory bus or another transport.

        async with LocalPipeline(spec, plan, folder) as pipeline:
            async with pipeline.client() as client: ...

    Raises what a worker raises, at the latest when the block ends.
    """

    spec: PipelineSpec
    plan: Plan
    folder: Path
    port: int | None = None  # of /metrics; None: not served
    transport: Transport = field(default_factory=MemoryTransport)
    metrics: Metrics = field(init=False)
    address: str = field(init=False, default="")
    _stop: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(init=False, default_factory=list)
    _keepers: list[asyncio.Task[None]] = field(init=False, default_factory=list)
    _workers: list[Worker] = field(init=False, default_factory=list)
    _stack: contextlib.AsyncExitStack = field(init=False, default_factory=contextlib.AsyncExitStack)

    async def __aenter__(self) -> Self:
        """Create the topics, start every worker, wait until each can take work."""
        from streaminfer import __version__

        tune_malloc()
        self.metrics = Metrics(
            self.plan.pipeline,
            version=__version__,
            model=self.plan.model,
            model_version=self.plan.model_version,
        )
        topology = build(self.spec, self.plan)
        async with self.transport.admin() as admin:
            await admin.create(topic_specs(topology, self.spec, self.spec.kafka.partitions))
        in_memory = isinstance(self.transport, MemoryTransport)
        deployment = await Deployment.open(
            self.spec, self.plan, self.folder, self.transport, history=not in_memory
        )
        try:
            for role in topology.workers:
                for replica in range(role.replicas):
                    context = deployment.worker(role.name, self.metrics, self._stop, replica)
                    worker = await self._stack.enter_async_context(context)
                    self._workers.append(worker)
                    self._tasks.append(asyncio.create_task(worker.run(), name=role.name))
            if in_memory:
                self._keepers.append(asyncio.create_task(self._forget_answers(topology)))
            await self._all_ready()
            if self.port is not None:
                self.address = await self._stack.enter_async_context(self._serve())
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain and stop every worker."""
        await self._close()
        for task in self._tasks:
            if kind is None and not task.cancelled() and (failure := task.exception()):
                raise failure

    def client(self) -> Client:
        """Make a client of this pipeline."""
        return Client(pipeline=self.spec, transport=self.transport)

    async def failed(self) -> None:
        """Wait until a worker ends by itself, and raise what it raised."""
        running = [*self._tasks, *self._keepers]
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    def _serve(self) -> contextlib.AbstractAsyncContextManager[str]:
        return serve(
            self.metrics,
            self.spec.metrics.host,
            self.port or 0,
            live=lambda: not any(task.done() for task in self._tasks),
            ready=lambda: all(w.ready.is_set() for w in self._workers),
        )

    async def _all_ready(self) -> None:
        failed = asyncio.create_task(self.failed())
        try:
            for worker in self._workers:
                ready = asyncio.create_task(worker.ready.wait())
                await asyncio.wait([ready, failed], return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    ready.cancel()
                    failed.result()
                    raise StreaminferError("a worker ended before it was ready")
        finally:
            failed.cancel()

    async def _forget_answers(self, topology: Topology) -> None:
        """Keep the last answers only: in memory nothing else bounds the predictions topic."""
        async with self.transport.admin() as admin:
            info = await admin.topics([topology.output_topic])
            count = info[topology.output_topic].partitions
            partitions = [TopicPartition(topology.output_topic, n) for n in range(count)]
            while True:
                await asyncio.sleep(1.0)
                ends = await admin.offsets(partitions)
                await admin.trim({tp: end - KEPT for tp, (_, end) in ends.items() if end > KEPT})

    async def _close(self) -> None:
        self._stop.set()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._tasks, *self._keepers, return_exceptions=True)
        await self._stack.aclose()
