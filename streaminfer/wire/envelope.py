"""The record of a micro-batch: who is in it, what happened to it, and its tensors.

An envelope carries samples of ONE input partition, in offset order. Rows of its tensors belong to
its samples one to one: row i of every batched tensor is sample i. What failed leaves the envelope
and travels alone, as an envelope of outcomes without tensors, straight to the sink.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

__all__ = ["SCALE", "Envelope", "Failure", "Hop", "Sample", "Tensor"]

Status = Literal["ok", "error", "expired", "lost"]
SCALE = "@scale"  # behind a quantised tensor's name: that of its scales, which travel with it
STATUSES: tuple[Status, ...] = ("ok", "error", "expired", "lost")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sample has no prediction: the stage, the error's kind, and a text for its owner."""

    status: Status
    stage: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One input record = one image = one row.

    `offset` is its place in the input partition; `start` is where the sample before it ended, so
    `[start, offset]` is the interval it accounts for (gaps by tombstones and markers included).
    """

    offset: int
    start: int
    id: str
    key: bytes | None
    timestamp_ms: int  # of the input record
    deadline_ms: int = 0  # Unix time; 0 = none
    meta: Mapping[str, str] = field(default_factory=dict)  # si-meta-* and traceparent, returned
    failure: Failure | None = None
    partial: bool = False  # not every branch of an ensemble answered


class Hop(NamedTuple):
    """What one stage did to the micro-batch."""

    stage: str
    queue_us: int  # from the record's timestamp to the start of the batch
    compute_us: int
    batch: int  # samples in the device's batch, not in this envelope


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as bytes: C-contiguous, little endian.

    `dtype` is safetensors' name ("F32", "F16", "BF16", "I64", "U8", "BOOL", …); `data` holds
    `prod(shape) * itemsize` bytes, or the compressed form of them when `codec` is not "".
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    codec: Literal["", "zstd", "lz4"] = ""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A micro-batch on its way. Its id is (partition, first, last, incarnation)."""

    partition: int  # of the input topic: the origin's
    samples: tuple[Sample, ...]
    digest: str  # of the plan that made it
    incarnation: str  # of the ingest that formed it
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    hops: tuple[Hop, ...] = ()
    part: tuple[int, int] = (0, 1)  # part k of n of the micro-batch
    sender: str = ""  # whose output it is: a gather tells its parts by that

    @property
    def first(self) -> int:
        """Where the micro-batch's interval begins."""
        return self.samples[0].start

    @property
    def last(self) -> int:
        """The offset of its last sample."""
        return self.samples[-1].offset

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors as they travel."""
        return sum(t.data.nbytes for t in self.tensors.values())

    def only(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of these names, with the scales of those that are quantised."""
        found: dict[str, Tensor] = {}
        for name in names:
            found[name] = self.tensors[name]
            if scales := self.tensors.get(name + SCALE):
                found[name + SCALE] = scales
        return found

    def outcomes(self, failures: Mapping[int, Failure]) -> Envelope:
        """Return the envelope of outcomes: the samples at the offsets in `failures`, no tensors."""
        gone = tuple(
            replace(s, failure=failures[s.offset]) for s in self.samples if s.offset in failures
        )
        return replace(self, samples=gone, tensors={})
