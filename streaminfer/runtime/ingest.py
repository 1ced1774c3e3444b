"""The first step: raw records become samples, samples become micro-batches.

A micro-batch is formed once, here, of records of ONE input partition in offset order. Every sample
gets its interval `[start, offset]`: where the one before it ended, up to itself. So tombstones,
transaction markers and compacted records are covered, and the sink needs one number per partition.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from streaminfer.errors import DecodeError, Kind, SampleError, SchemaError
from streaminfer.metrics import StageMetrics
from streaminfer.plan import Plan, TensorSpec
from streaminfer.runtime.decode import decode_image
from streaminfer.runtime.flow import Window
from streaminfer.runtime.steps import Item, Plain, Result, Settled
from streaminfer.spec import did_you_mean
from streaminfer.transport import Record, TopicPartition
from streaminfer.wire import (
    MAX_KEY,
    MAX_META,
    MAX_TEXT,
    TENSOR_INPUT,
    Envelope,
    Failure,
    Sample,
    Tensor,
    TensorInput,
    decode_tensor_input,
)

__all__ = ["TENSOR", "Ingest", "chain_at", "chained"]

TENSOR = TENSOR_INPUT
META = "si-meta-"
MAX_ID = 512  # characters: ids travel with every hop

_Row = dict[str, Tensor]  # one sample's inputs by name; no batch dimension


def chained(note: str) -> int:
    """Read where the interval chain goes on out of ingest's commit metadata."""
    return int(json.loads(note)["from"]) if note else 0


def chain_at(offset: int) -> str:
    """Write the metadata that makes the chain go on at `offset`."""
    return f'{{"from": {offset}}}'


class Ingest(Plain):
    """Decodes input records in a thread pool; what fails is an outcome, never an exception."""

    def __init__(
        self,
        plan: Plan,
        window: Window,
        metrics: StageMetrics,
        *,
        threads: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan, self._window, self._metrics, self._clock = plan, window, metrics, clock
        self._inputs = {spec.name: spec for spec in plan.stages[0].inputs}
        self._stage = plan.stages[0].name
        self._chain: dict[TopicPartition, int] = {}
        self._incarnation = os.urandom(4).hex()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def stop(self) -> None:
        """Let the decoders end."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def assign(self, partitions: Mapping[TopicPartition, str]) -> None:
        """Go on with the chain where the last commit says."""
        for tp, note in partitions.items():
            self._chain[tp] = chained(note)

    async def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Drop the chains: the next owner reads them from the commit."""
        for tp in partitions:
            self._chain.pop(tp, None)
        self._window.forget(partitions)

    async def __call__(self, items: Sequence[Item]) -> Result:
        """Decode the records of each item into one envelope per shape."""
        # the chain is walked before the first await: calls begin in the order of the records
        walked = [(item.records[0].tp, *self._walk(item)) for item in items]
        settled = tuple(s for _, done, _ in walked for s in done)
        outputs: list[Envelope] = []
        outcomes: list[Envelope] = []
        loop = asyncio.get_running_loop()
        for tp, _, live in walked:
            if live:
                decoded = await loop.run_in_executor(self._pool, self._decode, live)
                formed, failed = self._form(tp, decoded)
                outputs += formed
                outcomes += failed
        return Result(tuple(outputs), tuple(outcomes), settled=settled)

    def _walk(self, item: Item) -> tuple[list[Settled], list[tuple[Sample, Record]]]:
        """Give every record its interval; tombstones only lengthen the next one's."""
        tp = item.records[0].tp
        settled: list[Settled] = []
        live: list[tuple[Sample, Record]] = []
        if tp not in self._chain:  # revoked: the new owner reads these again
            return settled, live
        start = self._chain[tp]
        for record, position in zip(item.records, item.positions, strict=True):
            if record.value is not None:
                live.append((self._sample(record, start), record))
                start = record.offset + 1
                self._window.enter(tp, start)
            settled.append(Settled(position, chain_at(start)))
        self._chain[tp] = start
        return settled, live

    def _sample(self, record: Record, start: int) -> Sample:
        named = record.key
        meta: dict[str, str] = {}
        if record.headers:
            headers = dict(record.headers)
            named = headers.get("si-id") or headers.get("ce_id") or record.key
            meta = _meta(headers)
        text = named.decode("utf-8", "replace") if named else ""
        return Sample(
            offset=record.offset,
            start=start,
            id=text[:MAX_ID] or f"{record.topic}-{record.partition}-{record.offset}",
            # what cannot travel is cut here and refused in `_row_of`
            key=record.key if len(record.key or b"") <= MAX_KEY else None,
            timestamp_ms=record.timestamp_ms,
            meta=meta if not meta or _fits(meta) else {},
        )

    def _decode(self, live: Sequence[tuple[Sample, Record]]) -> list[tuple[Sample, _Row | None]]:
        """Run in the pool: turn each record into a row, or its sample into a failed one."""
        began = time.perf_counter()
        rows: list[tuple[Sample, _Row | None]] = []
        for sample, record in live:
            try:
                rows.append(self._row_of(sample, record))
            except SampleError as error:
                rows.append((self._fail(sample, "error", error.kind, str(error)), None))
            except Exception as error:  # a decoder's bug is one sample's trouble, not the worker's
                text = f"{type(error).__name__}: {error}"
                rows.append((self._fail(sample, "error", "decode", text), None))
        self._metrics.busy["decode"].inc(time.perf_counter() - began)
        return rows

    def _row_of(self, sample: Sample, record: Record) -> tuple[Sample, _Row | None]:
        value = record.value or b""
        headers = dict(record.headers)
        spec = self._plan.input
        if len(value) > spec.max_bytes:
            raise DecodeError(
                f"the value has {len(value):,} bytes; input.max_bytes is {spec.max_bytes:,}"
            )
        _check_sizes(record)
        kind = headers.get("content-type", b"").decode("ascii", "replace")
        if deadline := _deadline(headers, record.timestamp_ms):
            sample = replace(sample, deadline_ms=deadline)
        row: _Row
        if kind.partition(";")[0].strip().lower() == TENSOR:
            sample, row = self._tensor(sample, value)
        elif spec.decode == "image":
            (taken,) = self._inputs.values()
            pixels = decode_image(value, kind or None, spec, taken.ranges)
            _check_shape(pixels.shape, taken, "image")
            row = {taken.name: Tensor("U8", pixels.shape, pixels.data.cast("B"))}
            _check_names(row, self._inputs)
        else:
            raise SchemaError(
                f"content-type is {kind or 'none'!r}; this pipeline takes tensors: {TENSOR}"
            )
        if sample.deadline_ms and self._clock() * 1000 > sample.deadline_ms:
            return self._fail(
                sample, "expired", "timeout", "the deadline passed before decoding"
            ), None
        return sample, row

    def _tensor(self, sample: Sample, value: bytes) -> tuple[Sample, _Row]:
        message = decode_tensor_input(value, max_bytes=self._plan.input.max_bytes)
        row = self._named(message)
        for name, tensor in row.items():
            wanted = self._inputs[name]
            if tensor.dtype != wanted.dtype:
                raise SchemaError(f"tensor has dtype {tensor.dtype}; {name} takes {wanted.dtype}")
            _check_shape(tensor.shape, wanted, "tensor")
        _check_names(row, self._inputs)
        deadline = sample.deadline_ms
        if message.deadline_ms:
            deadline = sample.timestamp_ms + message.deadline_ms
        return (
            replace(
                sample,
                id=(message.id or sample.id)[:MAX_ID],
                meta={**message.meta, **sample.meta},
                deadline_ms=deadline,
            ),
            row,
        )

    def _named(self, message: TensorInput) -> _Row:
        """Give every input of the model its tensor, in the model's order."""
        if message.tensor is not None:
            if len(self._inputs) > 1:
                raise SchemaError(
                    f"one tensor, but the model takes {', '.join(self._inputs)}: send "
                    "`tensors`, a map of them by name"
                )
            return dict.fromkeys(self._inputs, message.tensor)
        for name in message.tensors:
            if name not in self._inputs:
                hint = did_you_mean(name[:80], self._inputs)
                raise SchemaError(f"tensors.{name:.80}: the model has no such input; {hint}")
        if missing := [name for name in self._inputs if name not in message.tensors]:
            raise SchemaError(f"tensors.{missing[0]}: is missing")
        return {name: message.tensors[name] for name in self._inputs}

    def _fail(
        self, sample: Sample, status: Literal["error", "expired"], kind: Kind, text: str
    ) -> Sample:
        self._metrics.samples[status].inc()
        self._metrics.errors[kind].inc()
        return replace(sample, failure=Failure(status, self._stage, kind, text[:1000]))

    def _form(
        self, tp: TopicPartition, decoded: Sequence[tuple[Sample, _Row | None]]
    ) -> tuple[tuple[Envelope, ...], tuple[Envelope, ...]]:
        """Group rows of one dtype and shape into envelopes: batches never pad."""
        groups: dict[tuple[object, ...], list[tuple[Sample, _Row]]] = {}
        failed = []
        for sample, row in decoded:
            if row is None:
                failed.append(sample)
            else:
                key = tuple((tensor.dtype, tensor.shape) for tensor in row.values())
                groups.setdefault(key, []).append((sample, row))
        count = len(groups) + bool(failed)
        envelopes = [
            Envelope(
                partition=tp.partition,
                samples=tuple(sample for sample, _ in group),
                digest=self._plan.digest,
                incarnation=self._incarnation,
                tensors={name: _stack([row[name] for _, row in group]) for name in group[0][1]},
                part=(k, count),
            )
            for k, group in enumerate(groups.values())
        ]
        if not failed:
            return tuple(envelopes), ()
        outcome = Envelope(
            partition=tp.partition,
            samples=tuple(failed),
            digest=self._plan.digest,
            incarnation=self._incarnation,
            part=(count - 1, count),
        )
        return tuple(envelopes), (outcome,)


def _fits(meta: Mapping[str, str]) -> bool:
    return len(meta) <= MAX_META and all(
        len(text) <= MAX_TEXT for pair in meta.items() for text in pair
    )


def _meta(headers: Mapping[str, bytes]) -> dict[str, str]:
    """Return what comes back in the answer, by its name there."""
    meta = {
        name[len(META) :]: value.decode("utf-8", "replace")
        for name, value in headers.items()
        if name.startswith(META)
    }
    if trace := headers.get("traceparent"):
        meta["traceparent"] = trace.decode("ascii", "replace")
    return meta


def _check_sizes(record: Record) -> None:
    """Refuse what an envelope does not carry."""
    if record.key is not None and len(record.key) > MAX_KEY:
        raise SchemaError(f"the key has {len(record.key):,} bytes; at most {MAX_KEY:,}")
    if not record.headers:
        return
    meta = {k: v.decode("utf-8", "replace") for k, v in record.headers if k.startswith(META)}
    if not _fits(meta):
        raise SchemaError(
            f"at most {MAX_META - 1} {META}* headers of at most {MAX_TEXT} characters; "
            f"found {len(meta)}"
        )


def _check_shape(shape: tuple[int, ...], wanted: TensorSpec, what: str) -> None:
    fixed = wanted.shape[1:]
    ranges = wanted.ranges or (None,) * len(fixed)
    fits = len(shape) == len(fixed) and all(
        have in given if given else want is None or have == want
        for have, want, given in zip(shape, fixed, ranges, strict=True)
    )
    if not fits:
        sizes = ", ".join(str(r or n or "any") for n, r in zip(fixed, ranges, strict=True))
        sizes += "," * (len(fixed) == 1)
        raise SchemaError(
            f"{what} has shape {tuple(shape)}; {wanted.name} takes ({sizes})"
            + (": set input.resize and input.crop to fit all images" * (what == "image"))
        )


def _check_names(row: _Row, inputs: Mapping[str, TensorSpec]) -> None:
    """Refuse a sample whose sizes of one name differ: the model takes them for one size."""
    found: dict[str, tuple[int, str]] = {}
    for name, tensor in row.items():
        for at, (size, given) in enumerate(zip(tensor.shape, inputs[name].ranges, strict=False)):
            if given is None or not given.name:
                continue
            here = f"dimension {at} of {name}"
            known, there = found.setdefault(given.name, (size, here))
            if known != size:
                raise SchemaError(
                    f"{here} is {size}, but {there} is {known}: the model takes equal sizes there"
                )


def _stack(rows: Sequence[Tensor]) -> Tensor:
    parts = [row.data for row in rows]
    data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
    return Tensor(rows[0].dtype, (len(rows), *rows[0].shape), data)


def _deadline(headers: Mapping[str, bytes], timestamp_ms: int) -> int:
    text = headers.get("si-deadline-ms")
    if text is None:
        return 0
    try:
        budget = int(text)
    except ValueError:
        budget = 0
    if budget <= 0:
        raise SchemaError(
            f"si-deadline-ms is {text[:32]!r}; it takes the milliseconds after the record's "
            "timestamp that an answer is worth, as text"
        )
    return timestamp_ms + budget
