"""The headers of a record on an inner topic: what it is of, told without decoding it.

    content-type   application/vnd.streaminfer.activation
    si-schema      activation/2
    si-plan        the plan's digest
    si-origin      <input partition>:<first>:<last>:<ingest incarnation>
    si-gaps        <from>-<to>,…   offsets in [first, last] that are none of its samples'; if any
    si-part        <k>:<n>         part k of n of the micro-batch; if n > 1
    si-sender      whose output it is; if there is one
    si-chunk       <id>:<k>:<n>:<total bytes>:<xxh3 hex>   chunk k of n of a message; if n > 1

All numbers are decimal ASCII. Unknown headers are left alone, so that others may add theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from streaminfer.errors import WireError
from streaminfer.wire.columns import MAX_SAMPLES
from streaminfer.wire.envelope import Envelope

__all__ = [
    "CONTENT_TYPE",
    "SCHEMA",
    "Chunk",
    "Headers",
    "Origin",
    "chunk_header",
    "headers",
    "read_chunk",
    "read_origin",
]

Headers: TypeAlias = tuple[tuple[str, bytes], ...]

CONTENT_TYPE = b"application/vnd.streaminfer.activation"
SCHEMA = b"activation/2"
INT64 = 2**63 - 1

_ORIGIN = re.compile(rb"(\d{1,10}):(\d{1,19}):(\d{1,19}):([!-~]{0,64})")
_GAP = re.compile(rb"(\d{1,19})-(\d{1,19})")
_SENDER = re.compile(rb"([!-~]{1,255})")
_PART = re.compile(rb"(\d{1,4}):(\d{1,4})")
_CHUNK = re.compile(rb"([!-9;-~]{1,64}):(\d{1,10}):(\d{1,10}):(\d{1,19}):([0-9a-f]{16})")


class Origin(NamedTuple):
    """Which micro-batch a record is of, and which input offsets it speaks for."""

    partition: int  # of the input topic
    first: int
    last: int
    incarnation: str
    part: tuple[int, int] = (0, 1)
    gaps: tuple[tuple[int, int], ...] = ()  # [from, to] within [first, last], rising
    sender: str = ""

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Yield the [from, to] of offsets that it speaks for, rising."""
        start = self.first
        for low, high in self.gaps:
            yield start, low - 1
            start = high + 1
        yield start, self.last


class Chunk(NamedTuple):
    """Chunk `k` of `n` of the message `id`, which has `total` bytes and, as XXH3, `checksum`."""

    id: str
    k: int
    n: int
    total: int
    checksum: int  # of 64 bits


def headers(envelope: Envelope) -> Headers:
    """Return the headers of an envelope's record; a chunk has one more."""
    origin = f"{envelope.partition}:{envelope.first}:{envelope.last}:{envelope.incarnation}"
    gaps = [
        f"{before.offset + 1}-{after.start - 1}"
        for before, after in pairwise(envelope.samples)
        if before.offset + 1 < after.start
    ]
    found = [
        ("content-type", CONTENT_TYPE),
        ("si-schema", SCHEMA),
        ("si-plan", envelope.digest.encode()),
        ("si-origin", origin.encode()),
    ]
    if gaps:
        found.append(("si-gaps", ",".join(gaps).encode()))
    if envelope.part[1] > 1:
        found.append(("si-part", b"%d:%d" % envelope.part))
    if envelope.sender:
        found.append(("si-sender", envelope.sender.encode()))
    return tuple(found)


def chunk_header(chunk: Chunk) -> tuple[str, bytes]:
    """Return the header that makes a record a chunk."""
    text = f"{chunk.id}:{chunk.k}:{chunk.n}:{chunk.total}:{chunk.checksum:016x}"
    return "si-chunk", text.encode()


def read_origin(fields: Mapping[str, bytes]) -> Origin:
    """Read the origin. Raises WireError if it is missing or makes no sense."""
    match = _match(_ORIGIN, fields, "si-origin", "<partition>:<first>:<last>:<incarnation>")
    partition, first, last = (int(group) for group in match.groups()[:3])
    if partition > 2**31 - 1 or not first <= last <= INT64:
        raise WireError(f"header si-origin: no interval {first} to {last} of {partition}")
    part = (0, 1)
    if "si-part" in fields:
        k, n = (int(group) for group in _match(_PART, fields, "si-part", "<k>:<n>").groups())
        if k >= n:
            raise WireError(f"header si-part: no part {k} of {n}")
        part = (k, n)
    gaps = _read_gaps(fields["si-gaps"], first, last) if "si-gaps" in fields else ()
    sender = _match(_SENDER, fields, "si-sender", "a name")[1] if "si-sender" in fields else b""
    return Origin(partition, first, last, match[4].decode(), part, gaps, sender.decode())


def read_chunk(fields: Mapping[str, bytes]) -> Chunk | None:
    """Read which chunk a record is; None: it is a whole message. Raises WireError."""
    if (schema := fields.get("si-schema")) != SCHEMA:
        raise WireError(
            f"header si-schema: {schema!r:.80}, this release reads {SCHEMA!r}: "
            "run one release on all workers of a pipeline"
        )
    if "si-chunk" not in fields:
        return None
    match = _match(_CHUNK, fields, "si-chunk", "<id>:<k>:<n>:<total bytes>:<xxh3>")
    k, n, total = (int(group) for group in match.groups()[1:4])
    if n < 2 or k >= n:
        raise WireError(f"header si-chunk: no chunk {k} of {n}")
    return Chunk(match[1].decode(), k, n, total, int(match[5], 16))


def _match(
    pattern: re.Pattern[bytes], fields: Mapping[str, bytes], name: str, form: str
) -> re.Match[bytes]:
    value = fields.get(name)
    match = pattern.fullmatch(value) if isinstance(value, bytes) else None
    if match is None:
        raise WireError(f"header {name}: {value!r:.80}, must be {form}")
    return match


def _read_gaps(value: bytes, first: int, last: int) -> tuple[tuple[int, int], ...]:
    gaps: list[tuple[int, int]] = []
    end = first - 1  # of the gap before: a sample must lie between two
    for text in value.split(b",", MAX_SAMPLES):
        match = _GAP.fullmatch(text)
        low, high = (int(match[1]), int(match[2])) if match else (0, -1)
        if not end + 1 < low <= high < last:
            raise WireError(f"header si-gaps: {text!r:.80} in {first} to {last}")
        gaps.append((low, high))
        end = high
    return tuple(gaps)
