"""Rows that went several ways, side by side again: one envelope of what its sources made of them.

from trunk.0    rows 10 11 12 13        a = …
from trunk.1    rows 10 11    13        b = …      12 failed there
──────────────────────────────────────────────────────────────────
output          rows 10 11    13        a = …, b = …
outcome         row        12           error of trunk.1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple, TypeAlias

from streaminfer.plan import ITEMSIZE, PRESENT, StagePlan, TensorSpec
from streaminfer.runtime.rows import select
from streaminfer.wire import Envelope, Failure, Hop, Sample, Tensor

__all__ = ["Join", "Joined", "Piece", "Row"]


class Piece(NamedTuple):
    """One row of one source's envelope."""

    envelope: Envelope
    row: int

    @property
    def sample(self) -> Sample:
        """Whose row it is."""
        return self.envelope.samples[self.row]


Row: TypeAlias = Sequence[Piece | None]  # one per source, in the plan's order; None: it is missing


@dataclass(frozen=True, slots=True)
class Joined:
    """What became of rows."""

    outputs: tuple[Envelope, ...] = ()
    outcomes: tuple[Envelope, ...] = ()
    partial: int = 0  # rows that go on though a source is missing


@dataclass
class _Group:
    """Rows whose pieces lie in the same envelopes."""

    envelopes: tuple[Envelope | None, ...]
    rows: list[Row] = field(default_factory=list)


class Join:
    """Joins rows for one stage of the plan. `quorum`: how many sources must have succeeded."""

    def __init__(self, stage: StagePlan, quorum: int | None = None) -> None:
        self.sources = tuple(source.stage for source in stage.sources)
        self.quorum = quorum or len(self.sources)
        self._name = stage.name
        specs = {spec.name: spec for spec in stage.inputs}
        self._present = PRESENT in specs
        self._tensors = [[specs[name] for name in s.tensors] for s in stage.sources]

    def __call__(self, rows: Sequence[Row], missing: str = "") -> Joined:
        """Put rows together; `missing` says why a row has no piece of a source."""
        groups: dict[tuple[int, ...], _Group] = {}
        failed: dict[int, tuple[Envelope, list[Sample]]] = {}
        for row in sorted(rows, key=_offset):  # rows of an envelope rise, however they came
            good = tuple(p.envelope if p and p.sample.failure is None else None for p in row)
            if len(row) - good.count(None) >= self.quorum:
                key = tuple(map(id, good))
                groups.setdefault(key, _Group(good)).rows.append(row)
                continue
            piece, failure = self._failure(row, missing)
            _, gone = failed.setdefault(id(piece.envelope), (piece.envelope, []))
            gone.append(replace(piece.sample, failure=failure))
        outcomes = tuple(
            replace(envelope, samples=tuple(samples), tensors={}, hops=_hops([envelope]))
            for envelope, samples in failed.values()
        )
        outputs = tuple(self._output(group) for group in groups.values())
        partial = sum(s.partial for output in outputs for s in output.samples)
        return Joined(outputs, outcomes, partial)

    def _failure(self, row: Row, missing: str) -> tuple[Piece, Failure]:
        """Return why a row fails: what its first failed source said, or that one is missing."""
        there = [piece for piece in row if piece is not None]
        for piece in there:
            if piece.sample.failure is not None:
                return piece, piece.sample.failure
        absent = [name for name, piece in zip(self.sources, row, strict=True) if piece is None]
        text = f"nothing came from {', '.join(absent)} {missing}".rstrip()
        return there[0], Failure("error", self._name, "timeout", text)

    def _output(self, group: _Group) -> Envelope:
        there = [k for k, envelope in enumerate(group.envelopes) if envelope is not None]
        samples = [_sample(row, there) for row in group.rows]
        tensors: dict[str, Tensor] = {}
        for k, envelope in enumerate(group.envelopes):
            if envelope is None:
                sizes = self._sizes(group.envelopes)
                tensors |= {s.name: _zeros(s, len(samples), sizes) for s in self._tensors[k]}
                continue
            at = [piece.row for row in group.rows if (piece := row[k]) is not None]
            tensors |= _rows_of(envelope, at).only(spec.name for spec in self._tensors[k])
        if self._present:
            tensors[PRESENT] = _present(group.envelopes, len(samples))
        envelopes = [e for e in group.envelopes if e is not None]
        return replace(
            envelopes[0],
            samples=tuple(samples),
            tensors=tensors,
            hops=_hops(envelopes),
            sender="",
        )

    def _sizes(self, envelopes: Sequence[Envelope | None]) -> tuple[int, ...]:
        """Return the shape of a row of what did come: sources that one may miss give all alike."""
        for envelope, specs in zip(envelopes, self._tensors, strict=True):
            if envelope is not None:
                return envelope.tensors[specs[0].name].shape[1:]
        return ()


def _offset(row: Row) -> int:
    return next(piece.sample.offset for piece in row if piece is not None)


def _sample(row: Row, there: Sequence[int]) -> Sample:
    piece = row[there[0]]
    assert piece is not None  # noqa: S101 - as `there` says
    whole = len(there) == len(row)
    return piece.sample if whole else replace(piece.sample, partial=True)


def _rows_of(envelope: Envelope, rows: list[int]) -> Envelope:
    if rows == list(range(len(envelope.samples))):
        return envelope
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return select(envelope, range(rows[0], rows[0] + len(rows)))
    return select(envelope, rows)


def _hops(envelopes: Sequence[Envelope]) -> tuple[Hop, ...]:
    """Return what all of them went through, each stage once."""
    seen: Mapping[str, Hop] = {hop.stage: hop for e in envelopes for hop in e.hops}
    return tuple(seen.values())


def _zeros(spec: TensorSpec, rows: int, sizes: tuple[int, ...]) -> Tensor:
    """Make rows of zeros; sizes that only the data settles are those of the rows beside them."""
    declared = spec.shape[1:]
    known = sizes if len(sizes) == len(declared) else (1,) * len(declared)
    shape = (rows, *(found if n is None else n for n, found in zip(declared, known, strict=True)))
    return Tensor(spec.dtype, shape, memoryview(bytes(prod(shape) * ITEMSIZE[spec.dtype])))


def _present(envelopes: Sequence[Envelope | None], rows: int) -> Tensor:
    one, nil = b"\x00\x00\x80\x3f", bytes(4)  # float32, little endian
    row = b"".join(nil if envelope is None else one for envelope in envelopes)
    return Tensor("F32", (rows, len(envelopes)), memoryview(row * rows))
