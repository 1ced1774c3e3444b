"""What the road costs on this machine: a hop on each bus, and how long a broker takes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from statistics import median

import torch

from streaminfer.client import connect
from streaminfer.errors import TransportError
from streaminfer.metrics import Metrics
from streaminfer.planning.profile import Link
from streaminfer.planning.simulation.scenario import Link as Transit
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.receive import Envelopes
from streaminfer.runtime.steps import Acked, Item, Plain, Result, Settled
from streaminfer.runtime.worker import Limits, Worker
from streaminfer.spec import PipelineSpec
from streaminfer.topology import Route, Routes
from streaminfer.transport import Outgoing, TopicSpec, Transport
from streaminfer.transport.memory import MemoryTransport
from streaminfer.wire import Envelope, Sample, Tensor

__all__ = ["KAFKA", "LOCAL", "hop", "transit"]

LOCAL = Link(name="local", alpha=0.0, per_byte=0.0, source="the same process")
# Measured once, one broker on the same machine, tuned malloc, records of 800 kB: 376 MB/s out and
# 585 MB/s in; an envelope costs about a millisecond on the event loops of both ends.
KAFKA = Link(
    name="kafka",
    alpha=1e-3,
    per_byte=1 / 376e6 + 1 / 585e6,
    source="typical figures: --kafka HOST:PORT measures yours",
)
SIZES = (64, 500_000)  # float32 values of the envelopes sent
HOPS = 40
LOST = 10.0  # seconds
PINGS = {256: 60, 800_000: 20}  # bytes of records that are sent one by one, and how many
UNTIMED = 10  # before them


class _Pass(Plain):
    """The step that does nothing; it notes when each micro-batch was acked."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.acked: list[float] = []
        self._now = now

    async def __call__(self, items: Sequence[Item]) -> Result:
        return Result(
            outputs=tuple(item.envelope for item in items if item.envelope),
            settled=tuple(Settled(at) for item in items for at in item.positions),
            acked=self._note,
        )

    def _note(self) -> Acked:
        self.acked.append(self._now())
        return Acked()


async def hop(spec: PipelineSpec, bootstrap: str | None = None) -> Link:
    """Send envelopes of two sizes through a worker that computes nothing: seconds per hop and byte.

    Args:
        spec: its Kafka settings.
        bootstrap: a broker; None: the memory bus.

    Raises:
        TransportError: no broker answers there.
    """
    times = []
    for values in SIZES:
        transport: Transport = MemoryTransport()
        if bootstrap:
            kafka = spec.kafka.model_copy(update={"bootstrap": bootstrap})
            transport = connect(spec.model_copy(update={"kafka": kafka}))
        times.append(await _hops(transport, values))
    (small, large), (few, many) = times, (4 * SIZES[0], 4 * SIZES[1])
    per_byte = max(0.0, (large - small) / (many - few))
    name = "kafka" if bootstrap else "memory"
    where = f"measured at {bootstrap}" if bootstrap else "measured here"
    return Link(name=name, alpha=max(0.0, small - few * per_byte), per_byte=per_byte, source=where)


async def transit(spec: PipelineSpec) -> Transit:
    """Send records of two sizes to the broker, one by one: seconds until they are read again.

    Raises:
        TransportError: no broker answers there.
    """
    transport = connect(spec)
    topic = f"{spec.kafka.prefix}-{uuid.uuid4().hex[:8]}-probe"
    async with transport.admin() as admin, transport.producer() as producer:
        await admin.create([TopicSpec(topic, 1)])
        try:
            async with transport.consumer([topic], None, from_end=True) as consumer:

                async def ping(nbytes: int) -> float:
                    began = time.perf_counter()
                    await producer.send(Outgoing(topic, bytes(nbytes), None, 0))
                    while not await consumer.poll(1.0):
                        if time.perf_counter() - began > LOST:
                            raise TransportError(f"a record sent to {topic} did not come back")
                    return time.perf_counter() - began

                few, many = PINGS
                for _ in range(UNTIMED):
                    await ping(few)
                small, large = [
                    median([await ping(nbytes) for _ in range(count)])
                    for nbytes, count in PINGS.items()
                ]
        finally:
            await admin.delete([topic])
    return Transit(small, max(0.0, large - small) / (many - few))


async def _hops(transport: Transport, values: int) -> float:
    """Return the seconds between acks of one worker over a topic that is full."""
    # On the memory bus all is this thread's work, and its own clock runs for nobody else's.
    step = _Pass(time.thread_time if isinstance(transport, MemoryTransport) else time.perf_counter)
    metrics, stop = Metrics("probe").stage("probe"), asyncio.Event()
    mark = uuid.uuid4().hex[:8]
    before, behind = f"streaminfer-probe-{mark}.in", f"streaminfer-probe-{mark}.out"
    async with transport.admin() as admin, transport.producer() as producer:
        limit = {"max.message.bytes": str(1 << 21)}
        await admin.create([TopicSpec(name, 1, limit) for name in (before, behind)])
        try:
            fill = Outbox(producer, metrics, Routes((Route(before),), behind))
            for k in range(HOPS):
                await fill.publish(Result(outputs=(_envelope(k, values),)))
            worker = Worker(
                lambda listener: transport.consumer([before], f"probe-{mark}", listener),
                Envelopes("probe", None, metrics, max_bytes=1 << 24),
                step,
                Outbox(producer, metrics, Routes((Route(behind),), behind)),
                metrics,
                stop,
                limits=Limits(),
            )
            await worker.run(burst=True)
        finally:
            await admin.delete([before, behind])
    return (step.acked[-1] - step.acked[0]) / (HOPS - 1)


def _envelope(k: int, values: int) -> Envelope:
    data = torch.zeros(values).numpy().data.cast("B")
    return Envelope(
        partition=0,
        samples=(Sample(k, k, f"probe-{k}", None, 0),),
        digest="0" * 64,
        incarnation="probe",
        tensors={"x": Tensor("F32", (1, values), data)},
    )
