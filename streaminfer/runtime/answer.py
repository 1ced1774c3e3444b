"""A sample's record on the predictions topic: its JSON and its headers.

    {"schema":…,"id":█,"status":█,"model":{…},"partial":█,
     "timing":{"e2e_ms":█,"stages":[…]},"source":{"topic":…,"partition":…,"offset":█},
     "meta":█, "predictions":[{"index":…,"label":…,"score":█}, …]}

Only what is marked differs within an envelope. The rest is written once a plan or once an envelope
and spliced in: a dict and a `json.dumps` for each sample were half of all that the sink did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streaminfer.plan import Plan
from streaminfer.transport import Headers, Outgoing
from streaminfer.wire import Envelope, Failure, Hop, Sample, Tensor

__all__ = ["Answers", "Form"]

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
TRACE = "traceparent"  # travels as meta, comes back as a header

_json = json.JSONEncoder(separators=(",", ":")).encode


class Form:
    """What all answers of a plan share."""

    def __init__(self, plan: Plan, topic: str, max_bytes: int = 1_000_000) -> None:
        self.topic, self.max_bytes, self.top_k = topic, max_bytes, plan.top_k
        model = {"name": plan.model, "version": plan.model_version, "digest": plan.digest[:8]}
        self.model = _json(model)
        self.source = _json(plan.input.topic)
        self.headers: Headers = (
            ("si-schema", b"prediction/1"),
            ("si-model", f"{plan.model}@{plan.model_version}".encode()),
        )
        self._classes = [
            f'"index":{k},"label":{_json(label)}' for k, label in enumerate(plan.labels)
        ]

    def ranked(self, index: int, score: str) -> str:
        """Return a class and its score."""
        if not self._classes:
            return f'{{"index":{index},"label":"{index}","score":{score}}}'
        return f'{{{self._classes[index]},"score":{score}}}'


class Answers:
    """The answers to the samples of one envelope at the sink."""

    def __init__(self, form: Form, envelope: Envelope) -> None:
        self._form, self._envelope = form, envelope
        self._stages = _json([_hop(hop) for hop in envelope.hops])
        self._source = f'"topic":{form.source},"partition":{envelope.partition}'
        values = {name: _rows(tensor) for name, tensor in envelope.tensors.items()}
        self._results = self._ranked(values) if form.top_k else self._raw(values)

    def write(self, row: int, now: float) -> tuple[str, Outgoing]:
        """Return the status of a row's sample and its record; `now` is Unix time in seconds."""
        sample = self._envelope.samples[row]
        status, value = self._value(sample, row, now, sample.failure)
        if len(value) > self._form.max_bytes:
            text = f"the answer has {len(value)} bytes, the topic takes {self._form.max_bytes}"
            failure = Failure("error", "sink", "schema", text)
            status, value = self._value(sample, row, now, failure)
        headers: Headers = (
            ("content-type", b"application/json"),
            ("si-id", sample.id.encode()),
            ("si-status", status.encode()),
            *self._form.headers,
        )
        if TRACE in sample.meta:
            headers += ((TRACE, sample.meta[TRACE].encode()),)
        where = None if sample.key is not None else self._envelope.partition
        return status, Outgoing(self._form.topic, value, sample.key, where, headers)

    def _value(
        self, sample: Sample, row: int, now: float, failure: Failure | None
    ) -> tuple[str, bytes]:
        status = failure.status if failure else "ok"
        outcome = _error(failure) if failure else self._results[row]
        waited = round(max(0.0, now * 1000 - sample.timestamp_ms), 2)
        meta = _json({k: v for k, v in sample.meta.items() if k != TRACE}) if sample.meta else "{}"
        text = (
            f'{{"schema":"streaminfer.prediction/1","id":{_json(sample.id)},"status":"{status}",'
            f'"model":{self._form.model},"partial":{"true" if sample.partial else "false"},'
            f'"timing":{{"e2e_ms":{waited},"stages":{self._stages}}},'
            f'"source":{{{self._source},"offset":{sample.offset}}},"meta":{meta},{outcome}}}'
        )
        return status, text.encode()

    def _ranked(self, values: Mapping[str, Any]) -> Sequence[str]:
        """Return each row's best classes."""
        if not values:
            return ()  # an envelope of outcomes
        # All scores in one call, for what json makes of a NaN: "[[0.9,0.1],[0.8,0.2]]".
        text = _json(values["score"].astype(float).round(6).tolist())
        scores = [row.split(",") for row in text[2:-2].split("],[")]
        return [
            f'"predictions":[{",".join(map(self._form.ranked, classes, row))}]'
            for classes, row in zip(values["index"].tolist(), scores, strict=True)
        ]

    def _raw(self, values: Mapping[str, Any]) -> Sequence[str]:
        """Return each row of all outputs."""
        columns = {name: rows.tolist() for name, rows in values.items()}
        return [
            f'"outputs":{_json({name: rows[k] for name, rows in columns.items()})}'
            for k in range(len(self._envelope.samples))
        ]


def _error(failure: Failure) -> str:
    fields = {"stage": failure.stage, "kind": failure.kind, "message": failure.message}
    return f'"error":{_json(fields)}'


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
