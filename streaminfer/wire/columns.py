"""The header's fields: an envelope without its tensors' bytes as a list of columns, and its rules.

The rules are asked by `encode` and by `decode`, so that nothing is written that cannot be read.
What the columns are is drawn in codec.py.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from streaminfer.errors import WireError
from streaminfer.wire.envelope import STATUSES, Envelope, Failure, Hop, Sample, Tensor

__all__ = [
    "FIELDS",
    "MAX_HOPS",
    "MAX_KEY",
    "MAX_META",
    "MAX_SAMPLES",
    "MAX_TENSORS",
    "MAX_TEXT",
    "check_columns",
    "from_columns",
    "to_columns",
]

FIELDS = 16
MAX_SAMPLES = 4096  # in an envelope
MAX_TEXT = 4096  # characters of an id, a meta key or value, a name; a longer failure text is cut
MAX_KEY = 65536  # bytes of a record's key
MAX_META = 64  # entries of a sample
MAX_TENSORS = 256
MAX_HOPS = 256
MAX_INCARNATION = 64  # visible ASCII characters, for it stands in a record header too
MAX_SENDER = 255  # the same; a stage's name with those around it
INT64 = 2**63 - 1


def to_columns(envelope: Envelope) -> list[Any]:
    """Return the columns, unchecked. Raises WireError for what is no envelope at all."""
    samples = envelope.samples
    try:
        digest = bytes.fromhex(envelope.digest)
        ends = [0, *(s.offset + 1 for s in samples)]
        times = [0, *(s.timestamp_ms for s in samples)]
        return [
            envelope.partition,
            digest if digest.hex() == envelope.digest else b"",
            envelope.incarnation,
            envelope.sender,
            list(envelope.part),
            [list(hop) for hop in envelope.hops],
            [s.start - end for s, end in zip(samples, ends, strict=False)],
            [s.offset - s.start for s in samples],
            [s.id for s in samples],
            _column([s.key for s in samples], None),
            [s.timestamp_ms - time for s, time in zip(samples, times, strict=False)],
            _column([s.deadline_ms for s in samples], 0),
            _column([dict(s.meta) for s in samples], {}),
            _column([_failure_row(s.failure) for s in samples], None),
            _column([s.partial for s in samples], False),
            [
                [name, t.dtype, list(t.shape), t.codec, t.data.nbytes]
                for name, t in envelope.tensors.items()
            ],
        ]
    except (TypeError, ValueError, AttributeError) as error:
        raise WireError(f"envelope cannot be written: {error}") from None


def _column(values: list[Any], default: object) -> list[Any]:
    return [] if values.count(default) == len(values) else values


def _failure_row(failure: Failure | None) -> list[str] | None:
    if failure is None:
        return None
    return [failure.status, failure.stage, failure.kind, failure.message[:MAX_TEXT]]


def from_columns(columns: list[Any], tensors: dict[str, Tensor]) -> Envelope:
    """Build the envelope of columns that have been checked."""
    partition, digest, incarnation, sender, part, hops, gaps, spans, ids = columns[:9]
    keys, times, deadlines, meta, failures, partials = columns[9:15]
    n = len(ids)
    # start of i = all gaps up to i + all spans before i + i
    steps = accumulate(gap + span + 1 for gap, span in zip(gaps, spans, strict=True))
    samples = tuple(
        Sample(end - 1, end - 1 - span, id_, key, time, deadline, extra, failure, partial)
        for end, span, id_, key, time, deadline, extra, failure, partial in zip(
            steps,
            spans,
            ids,
            keys or [None] * n,
            accumulate(times),
            deadlines or [0] * n,
            meta or [{} for _ in range(n)],
            [row and Failure(*row) for row in failures] or [None] * n,
            partials or [False] * n,
            strict=True,
        )
    )
    return Envelope(
        partition,
        samples,
        digest.hex(),
        incarnation,
        tensors,
        tuple(Hop(*hop) for hop in hops),
        (part[0], part[1]),
        sender,
    )


def check_columns(columns: Any) -> None:
    """Raise WireError unless these are the columns of an envelope."""
    if type(columns) is not list or len(columns) != FIELDS:
        raise WireError(f"header is not a list of {FIELDS} fields")
    partition, digest, incarnation, sender, part, hops, gaps, spans, ids = columns[:9]
    keys, times, deadlines, meta, failures, partials, tensors = columns[9:]
    n = _check_list("ids", ids, str)
    if not 1 <= n <= MAX_SAMPLES:
        raise WireError(f"{n} samples, an envelope has 1 to {MAX_SAMPLES}")
    _check_ints("partition", [partition], 0, 2**31 - 1)
    if type(digest) is not bytes or len(digest) != 32:
        raise WireError("digest is not 64 lower-case hexadecimal digits")
    if type(incarnation) is not str or not _is_word(incarnation):
        raise WireError(f"incarnation is not up to {MAX_INCARNATION} visible ASCII characters")
    if type(sender) is not str or not _is_word(sender, MAX_SENDER):
        raise WireError(f"sender is not up to {MAX_SENDER} visible ASCII characters")
    _check_part(part)
    _check_hops(hops)
    _check_texts("id", ids)
    _check_intervals(gaps, spans, n)
    _check_keys(keys, n)
    _check_list("timestamps", times, int, n)
    _check_ints("timestamp", list(accumulate(times)), -1, INT64)
    if deadlines != []:
        _check_list("deadlines", deadlines, int, n)
        _check_ints("deadline", deadlines, 0, INT64)
    _check_meta(meta, n)
    _check_failures(failures, n)
    if partials != []:
        _check_list("partials", partials, bool, n)
    _check_tensor_rows(tensors)
    if any(row[2][:1] != [n] for row in tensors):
        raise WireError(f"a tensor whose dimension 0 is not the {n} samples of the envelope")


def _check_list(name: str, values: Any, kind: type, n: int | None = None) -> int:
    """Return the length of a list of exactly this type (so that True is no int)."""
    if type(values) is not list or (values and set(map(type, values)) != {kind}):
        raise WireError(f"{name}: not a list of {kind.__name__}")
    if n is not None and len(values) != n:
        raise WireError(f"{name}: {len(values)} entries for {n} samples")
    return len(values)


def _check_ints(name: str, values: list[Any], low: int, high: int) -> None:
    _check_list(name, values, int)
    if values and not (low <= min(values) and max(values) <= high):
        raise WireError(f"{name}: {min(values)} to {max(values)}, must be in {low} to {high}")


def _check_texts(name: str, values: list[str]) -> None:
    if max(map(len, values)) > MAX_TEXT:
        raise WireError(f"{name}: over {MAX_TEXT} characters")


def _is_word(text: str, most: int = MAX_INCARNATION) -> bool:
    return len(text) <= most and text.isascii() and text.isprintable() and " " not in text


def _check_part(part: Any) -> None:
    if type(part) is not list or len(part) != 2:
        raise WireError("part is not [k, n]")
    _check_ints("part", part, 0, 4096)
    if part[0] >= part[1]:
        raise WireError(f"part {part[0]} of {part[1]}")


def _check_hops(hops: Any) -> None:
    if _check_list("hops", hops, list) > MAX_HOPS:
        raise WireError(f"{len(hops)} hops, at most {MAX_HOPS}")
    for hop in hops:
        if len(hop) != 4 or type(hop[0]) is not str:
            raise WireError("hop is not [stage, queue, compute, batch]")
        _check_texts("stage", hop[:1])
        # a client's clock may be ahead of ours, then its records waited less than nothing
        _check_ints("hop", hop[1:], -INT64, INT64)


def _check_intervals(gaps: Any, spans: Any, n: int) -> None:
    for name, values in (("gaps", gaps), ("spans", spans)):
        _check_list(name, values, int, n)
        if min(values) < 0:
            raise WireError(f"{name}: offsets must rise, start ≤ offset, intervals not overlap")
    if sum(gaps) + sum(spans) + n > INT64:
        raise WireError("offsets: over 63 bits")


def _check_keys(keys: Any, n: int) -> None:
    if keys == []:
        return
    if type(keys) is not list or len(keys) != n or not set(map(type, keys)) <= {bytes, type(None)}:
        raise WireError(f"keys: not a list of {n} byte strings")
    if max((len(key) for key in keys if key is not None), default=0) > MAX_KEY:
        raise WireError(f"key: over {MAX_KEY} bytes")


def _check_meta(meta: Any, n: int) -> None:
    if meta == []:
        return
    _check_list("meta", meta, dict, n)
    for entries in meta:
        if len(entries) > MAX_META:
            raise WireError(f"meta: {len(entries)} entries, at most {MAX_META}")
        if entries:
            texts = [*entries, *entries.values()]
            _check_list("meta", texts, str)
            _check_texts("meta", texts)


def _check_failures(failures: Any, n: int) -> None:
    if failures == []:
        return
    if type(failures) is not list or len(failures) != n:
        raise WireError(f"failures: not a list of {n}")
    for row in failures:
        if row is None:
            continue
        if _check_list("failure", row, str) != 4 or row[0] not in STATUSES:
            raise WireError("failure is not [status, stage, kind, message]")
        _check_texts("failure", row)


def _check_tensor_rows(rows: Any) -> None:
    if _check_list("tensors", rows, list) > MAX_TENSORS:
        raise WireError(f"{len(rows)} tensors, at most {MAX_TENSORS}")
    for row in rows:
        if [type(value) for value in row] != [str, str, list, str, int] or row[4] < 0:
            raise WireError("tensor is not [name, dtype, shape, codec, bytes]")
        _check_texts("tensor", [row[0]])
    if len({row[0] for row in rows}) != len(rows):
        raise WireError("two tensors of one name")
