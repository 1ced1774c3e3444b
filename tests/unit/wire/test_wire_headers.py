"""A record says in its headers whose it is: so that a broken one still gets its error outcome."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from streaminfer.errors import WireError
from streaminfer.wire import Envelope, Origin, headers, read_origin
from streaminfer.wire.headers import SCHEMA, Chunk, chunk_header, read_chunk
from tests.envelopes import envelope, envelopes

GOOD = {"si-schema": SCHEMA, "si-origin": b"3:10:19:a1"}


@settings(deadline=None, max_examples=40)
@given(envelopes())
def test_the_origin_is_read_back_and_speaks_for_its_samples_only(message: Envelope) -> None:
    origin = read_origin(dict(headers(message)))
    assert origin[:5] == (
        message.partition,
        message.first,
        message.last,
        message.incarnation,
        message.part,
    )
    spoken = [n for low, high in origin.intervals() for n in range(low, high + 1)]
    assert spoken == [n for s in message.samples for n in range(s.start, s.offset + 1)]


def test_most_records_have_four_headers() -> None:
    """They are sent with every chunk."""
    names = [name for name, _ in headers(envelope(0, 64))]
    assert names == ["content-type", "si-schema", "si-plan", "si-origin"]


def test_what_others_add_is_left_alone() -> None:
    assert read_origin({**GOOD, "traceparent": b"\xff"}) == Origin(3, 10, 19, "a1")
    assert read_chunk({**GOOD, "traceparent": b"\xff"}) is None


def test_a_chunk_is_read_back() -> None:
    chunk = Chunk("7f", 2, 3, 2_000_000, 0xBEEF)
    assert read_chunk({**GOOD, **dict([chunk_header(chunk)])}) == chunk


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("si-origin", b""),
        ("si-origin", b"3:10:9:a"),
        ("si-origin", b"-3:10:19:a"),
        ("si-origin", b"3:1_0:19:a"),
        ("si-origin", b"3: 10:19:a"),
        ("si-origin", b"2147483648:10:19:a"),
        ("si-origin", b"3:10:9223372036854775808:a"),
        ("si-origin", "3:10:1٩:a".encode()),
        ("si-origin", b"3:10:19:a b"),
        ("si-origin", b"3:10:19:a\n"),
        ("si-origin", b"9" * 100_000),
        ("si-part", b"1:1"),
        ("si-part", b"1"),
        ("si-gaps", b""),
        ("si-gaps", b"10-11"),
        ("si-gaps", b"18-19"),
        ("si-gaps", b"13-12"),
        ("si-gaps", b"12-13,14-15"),
        ("si-gaps", b"15-15,12-12"),
        ("si-gaps", b"12-12,"),
    ],
)
def test_an_origin_that_makes_no_sense_is_refused(name: str, value: bytes) -> None:
    with pytest.raises(WireError, match=f"header {name}"):
        read_origin({**GOOD, name: value})


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"a:0:2:10",
        b"a:0:1:10:0000000000000000",
        b"a:2:2:10:0000000000000000",
        b"a:0:2:10:0",
        b"a:0:2:-1:0000000000000000",
    ],
)
def test_a_chunk_that_makes_no_sense_is_refused(value: bytes) -> None:
    with pytest.raises(WireError, match="header si-chunk"):
        read_chunk({**GOOD, "si-chunk": value})


def test_missing_headers_are_named() -> None:
    with pytest.raises(WireError, match="si-origin: None"):
        read_origin({})
    with pytest.raises(WireError, match="si-schema: None"):
        read_chunk({})


def test_another_schema_says_what_to_do() -> None:
    with pytest.raises(WireError, match="one release on all workers"):
        read_chunk({**GOOD, "si-schema": b"activation/1"})


def test_an_envelope_of_outcomes_speaks_for_the_failed_alone() -> None:
    """Or the chunks of the others, still on their way, would count as done."""
    sent = envelope(10, 10)
    failed = replace(sent, samples=(sent.samples[0], sent.samples[4], sent.samples[9]))
    assert list(read_origin(dict(headers(failed))).intervals()) == [(10, 10), (14, 14), (19, 19)]
