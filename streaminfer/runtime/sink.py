"""The sink's step: put the samples of each input partition in order, answer each exactly once.

    watermark 12          arrives [15,17] [12,12] [10,11] [13,14]
    every sample before it is answered   held    go      again   go, and then [15,17] → 18

An interval that begins at or below the watermark goes out and moves the watermark behind it; one
that ends below it came again; what begins above it is held until the gap is filled.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from streaminfer.metrics import Metrics
from streaminfer.plan import Plan
from streaminfer.runtime.steps import Acked, Item, Plain, Result, Settled
from streaminfer.transport import Headers, Outgoing, TopicPartition
from streaminfer.wire import Envelope, Failure, Hop, Sample, Tensor

__all__ = ["Order", "watermark"]

NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
}
NUMPY |= {"U8": "u1", "BOOL": "?"}


def watermark(note: str) -> int:
    """Read the watermark out of the sink's commit metadata ("" = nothing answered yet)."""
    return int(json.loads(note)["watermark"]) if note else 0


class _Arrival:
    """An item of the sink's topic, and how many of its samples still wait."""

    __slots__ = ("envelope", "left", "positions", "since", "values")

    def __init__(self, item: Item, envelope: Envelope, now: float) -> None:
        self.envelope, self.positions, self.since = envelope, item.positions, now
        self.left = len(envelope.samples)
        self.values = {name: _rows(tensor) for name, tensor in envelope.tensors.items()}


class _Waiting(NamedTuple):
    start: int
    offset: int
    arrived: int  # makes every entry of the heap different
    arrival: _Arrival
    row: int


@dataclass
class _Lane:
    """One input partition at the sink."""

    watermark: int
    heap: list[_Waiting] = field(default_factory=list)


class Order(Plain):
    """Restores order per input partition, drops what comes again, writes the answers."""

    def __init__(
        self,
        plan: Plan,
        output: str,
        metrics: Metrics,
        *,
        max_bytes: int = 1_000_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan, self._output, self._metrics = plan, output, metrics
        self._max_bytes, self._clock = max_bytes, clock
        self._lanes: dict[TopicPartition, _Lane] = {}
        self._count = 0
        metrics.start_sink()
        self._stage = metrics.stage("sink")

    async def assign(self, partitions: Mapping[TopicPartition, str]) -> None:
        """Go on from the watermark in the note of the last commit."""
        for tp, note in partitions.items():
            self._lanes[tp] = _Lane(watermark(note))

    async def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop what is held: the next owner reads it again."""
        for tp in partitions:
            self._lanes.pop(tp, None)

    async def __call__(self, items: Sequence[Item]) -> Result:
        """Answer what is in turn; hold the rest."""
        now = self._clock()
        done: list[Settled] = []
        answers: list[Outgoing] = []
        times: list[int] = []
        touched = set()
        for item in items:
            tp = item.positions[0].tp
            envelope = item.envelope
            lane = self._lanes.get(tp)
            if envelope is None or lane is None:
                continue
            touched.add(tp)
            arrival = _Arrival(item, envelope, now)
            for row, sample in enumerate(envelope.samples):
                self._count += 1
                heapq.heappush(
                    lane.heap, _Waiting(sample.start, sample.offset, self._count, arrival, row)
                )
        for tp in touched:
            self._release(tp, now, answers, done, times)
        self._metrics.held.labels(self._plan.pipeline).set(
            sum(len(lane.heap) for lane in self._lanes.values())
        )
        notes = {tp: json.dumps({"watermark": self._lanes[tp].watermark}) for tp in touched}
        return Result(
            answers=tuple(answers),
            settled=tuple(done),
            notes=notes,
            acked=lambda: self._observe(times),
        )

    def _release(
        self,
        tp: TopicPartition,
        now: float,
        answers: list[Outgoing],
        done: list[Settled],
        times: list[int],
    ) -> None:
        lane = self._lanes[tp]
        wait = self._metrics.order_wait.labels(self._plan.pipeline)
        while lane.heap and lane.heap[0].start <= lane.watermark:
            _, offset, _, arrival, row = heapq.heappop(lane.heap)
            if offset < lane.watermark:
                self._metrics.duplicates.labels(self._plan.pipeline).inc()
            else:
                sample = arrival.envelope.samples[row]
                lane.watermark = offset + 1
                answers.append(self._answer(sample, arrival, row, tp.partition, now))
                times.append(sample.timestamp_ms)
                wait.observe(now - arrival.since)
            arrival.left -= 1
            if not arrival.left:
                done += [Settled(position) for position in arrival.positions]

    def _answer(
        self, sample: Sample, arrival: _Arrival, row: int, partition: int, now: float
    ) -> Outgoing:
        status = sample.failure.status if sample.failure else "ok"
        body = self._body(sample, arrival.envelope, partition, now)
        if sample.failure is None:
            body |= self._values(arrival, row)
        value = json.dumps(body, separators=(",", ":")).encode()
        if len(value) > self._max_bytes:
            status = "error"
            text = f"the answer has {len(value)} bytes, the topic takes {self._max_bytes}"
            failure = Failure("error", "sink", "schema", text)
            body = self._body(sample, arrival.envelope, partition, now, failure)
            value = json.dumps(body, separators=(",", ":")).encode()
        self._stage.samples[
            "ok" if status == "ok" else "expired" if status == "expired" else "error"
        ].inc()
        headers: Headers = (
            ("content-type", b"application/json"),
            ("si-id", sample.id.encode()),
            ("si-status", status.encode()),
            ("si-schema", b"prediction/1"),
            ("si-model", f"{self._plan.model}@{self._plan.model_version}".encode()),
        )
        if "traceparent" in sample.meta:
            headers += (("traceparent", sample.meta["traceparent"].encode()),)
        where = None if sample.key is not None else partition
        return Outgoing(self._output, value, sample.key, where, headers)

    def _body(
        self,
        sample: Sample,
        envelope: Envelope,
        partition: int,
        now: float,
        failure: Failure | None = None,
    ) -> dict[str, Any]:
        failure = failure or sample.failure
        body: dict[str, Any] = {
            "schema": "streaminfer.prediction/1",
            "id": sample.id,
            "status": failure.status if failure else "ok",
            "model": {
                "name": self._plan.model,
                "version": self._plan.model_version,
                "digest": self._plan.digest[:8],
            },
            "partial": sample.partial,
            "timing": {
                "e2e_ms": round(max(0.0, now * 1000 - sample.timestamp_ms), 2),
                "stages": [_hop(hop) for hop in envelope.hops],
            },
            "source": {
                "topic": self._plan.input.topic,
                "partition": partition,
                "offset": sample.offset,
            },
            "meta": {k: v for k, v in sample.meta.items() if k != "traceparent"},
        }
        if failure:
            body["error"] = {
                "stage": failure.stage,
                "kind": failure.kind,
                "message": failure.message,
            }
        return body

    def _values(self, arrival: _Arrival, row: int) -> dict[str, Any]:
        values = arrival.values
        if not self._plan.top_k:
            return {"outputs": {name: rows[row].tolist() for name, rows in values.items()}}
        labels = self._plan.labels
        return {
            "predictions": [
                {
                    "index": index,
                    "label": labels[index] if labels else str(index),
                    "score": round(score, 6),
                }
                for index, score in zip(
                    values["index"][row].tolist(), values["score"][row].tolist(), strict=True
                )
            ]
        }

    def _observe(self, times: Sequence[int]) -> Acked:
        now_ms = self._clock() * 1000
        e2e = self._metrics.e2e.labels(self._plan.pipeline)
        for sent in times:
            if sent > now_ms:
                self._metrics.clock_skew.labels(self._plan.pipeline).inc()
            e2e.observe(max(0.0, now_ms - sent) / 1000)
        return Acked()


def _rows(tensor: Tensor) -> Any:
    if tensor.dtype == "BF16":  # numpy has no bfloat16: it is the upper half of a float32
        raw = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        return raw.view("<f4").reshape(tensor.shape)
    return np.frombuffer(tensor.data, NUMPY[tensor.dtype]).reshape(tensor.shape)


def _hop(hop: Hop) -> dict[str, Any]:
    return {
        "name": hop.stage,
        "queue_ms": round(hop.queue_us / 1000, 2),
        "compute_ms": round(hop.compute_us / 1000, 2),
        "batch": hop.batch,
    }
