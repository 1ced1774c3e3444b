"""The layout of what lies in topics: workers of two releases meet there, and so do attackers."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings

from streaminfer.errors import SchemaError, WireError
from streaminfer.wire import (
    MAX_KEY,
    MAX_META,
    MAX_SAMPLES,
    MAX_TEXT,
    Assembler,
    BrokenMessage,
    Envelope,
    Failure,
    Hop,
    Patience,
    Sample,
    Tensor,
    TensorInput,
    compress,
    decode,
    decode_tensor_input,
    encode,
    encode_tensor_input,
    encoded_size,
    headers,
    pack,
    records,
)
from streaminfer.wire.headers import Headers
from tests.envelopes import DIGEST, envelope, envelopes, mutate

MB = 2**20

GOLDEN = Envelope(
    partition=5,
    samples=(
        Sample(
            118,
            117,
            "cat-1",
            b"cat-1",
            1_700_000_000_000,
            1_700_000_009_000,
            {"camera": "7"},
            partial=True,
        ),
        Sample(
            121, 120, "käse", None, 1_699_999_999_998, 0, {}, Failure("error", "s0", "oom", "big")
        ),
    ),
    digest=DIGEST,
    incarnation="7f3a",
    tensors={
        "relu": pack("F16", (2, 2), bytes(range(8))),
        "zeros": compress(pack("I64", (2, 16), bytes(256)), "lz4"),
        "none": pack("BOOL", (2, 0), b""),
    },
    hops=(Hop("s0", 3100, 4000, 16),),
    part=(1, 3),
    sender="vote.a",
)
GOLDEN_HEX = (
    "53494501c9000000dc001005c4200123456789abcdef0123456789abcdef0123456789abcdef0123"
    "456789abcdefa437663361a6766f74652e619201039194a27330cd0c1ccd0fa01092750192010192"
    "a56361742d31a56bc3a4736592c4056361742d31c092cf0000018bcfe56800fe92cf0000018bcfe5"
    "8b28009281a663616d657261a1378092c094a56572726f72a27330a36f6f6da362696792c3c29395"
    "a472656c75a3463136920202a00895a57a65726f73a3493634920210a36c7a342295a46e6f6e65a4"
    "424f4f4c920200a00000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000102030405060700000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "04224d1868400001000000000000af0b0000001f000100e750000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000"
)
GOLDEN_HEADERS = (
    ("content-type", b"application/vnd.streaminfer.activation"),
    ("si-schema", b"activation/2"),
    ("si-plan", DIGEST.encode()),
    ("si-origin", b"5:117:121:7f3a"),
    ("si-gaps", b"119-119"),
    ("si-part", b"1:3"),
    ("si-sender", b"vote.a"),
)


def whole(message: Envelope) -> bytes:
    return b"".join(encode(message))


def test_version_1_is_these_bytes() -> None:
    """A change here breaks rolling upgrades: what lies in a topic is no longer read."""
    assert whole(GOLDEN).hex() == GOLDEN_HEX
    assert decode(bytes.fromhex(GOLDEN_HEX), max_bytes=MB) == GOLDEN
    assert headers(GOLDEN) == GOLDEN_HEADERS


@settings(deadline=None)
@given(envelopes())
def test_what_is_sent_is_what_arrives(message: Envelope) -> None:
    buffers = encode(message)
    raw = b"".join(buffers)
    assert encoded_size(buffers) == len(raw)
    assert decode(raw, max_bytes=MB) == message
    assert decode(bytearray(raw), max_bytes=MB) == message
    assert decode(memoryview(raw), max_bytes=MB) == message


def test_tensors_are_never_copied() -> None:
    data = bytearray(64 * 100)
    message = envelope(0, 64)
    message = replace(
        message, tensors={"a": pack("U8", (64, 1), bytes(64)), "b": pack("U8", (64, 100), data)}
    )
    buffers = encode(message)
    raw = bytearray(b"".join(buffers))
    read = decode(raw, max_bytes=MB)
    data[7] = raw[-6400 + 8] = 1
    assert memoryview(buffers[-1])[7] == 1
    assert read.tensors["b"].data[8] == 1


def test_tensors_start_at_multiples_of_64() -> None:
    """What reads them with vector instructions needs it."""
    message = replace(
        GOLDEN, tensors={str(n): pack("U8", (2, n), bytes([n]) * 2 * n) for n in range(1, 9)}
    )
    raw = whole(message)
    for name, tensor in message.tensors.items():
        at = raw.index(bytes(tensor.data).ljust(64, b"\0")) if name != "8" else len(raw) - 16
        assert at % 64 == 0


def test_a_later_version_says_which_are_which() -> None:
    raw = bytearray(whole(GOLDEN))
    raw[3] = 2
    with pytest.raises(WireError, match="version 2, this release reads version 1"):
        decode(raw, max_bytes=MB)


def test_a_message_over_the_cap_is_refused() -> None:
    message = replace(GOLDEN, tensors={"x": compress(pack("U8", (2, 1000), bytes(2000)), "zstd")})
    raw = whole(message)
    assert len(raw) < 1000
    with pytest.raises(WireError, match="over the limit of 100"):
        decode(raw, max_bytes=100)
    with pytest.raises(WireError, match="2000 bytes: over 1000"):
        decode(raw, max_bytes=1000)


def test_a_long_failure_text_is_cut_rather_than_the_outcome_lost() -> None:
    failure = Failure("error", "s0", "compute", "x" * 10 * MAX_TEXT)
    sent = replace(GOLDEN, samples=(replace(GOLDEN.samples[0], failure=failure),), tensors={})
    read = decode(whole(sent), max_bytes=MB).samples[0].failure
    assert read == replace(failure, message="x" * MAX_TEXT)


@pytest.mark.parametrize("text", ["", "é" * MAX_TEXT, "\U0001f431" * MAX_TEXT])
def test_the_longest_texts_travel(text: str) -> None:
    sample = Sample(1, 0, text, b"k" * MAX_KEY, 0, 0, {str(i): text for i in range(MAX_META)})
    sent = replace(GOLDEN, samples=(sample,), tensors={})
    assert decode(whole(sent), max_bytes=4 * MB) == sent


def test_the_most_samples_travel() -> None:
    sent = envelope(2**62, MAX_SAMPLES, b"row")
    assert decode(whole(sent), max_bytes=4 * MB) == sent


ONE = Sample(7, 7, "a", b"a", 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"samples": ()}, "0 samples"),
        ({"samples": tuple(replace(ONE, offset=i, start=i) for i in range(4097))}, "4097 samples"),
        ({"samples": (ONE, ONE)}, "offsets must rise"),
        ({"samples": (replace(ONE, start=8),)}, "start ≤ offset"),
        ({"samples": (ONE, replace(ONE, offset=9, start=6))}, "intervals not overlap"),
        ({"samples": (replace(ONE, start=-1),)}, "offsets must rise"),
        ({"samples": (replace(ONE, offset=2**63),)}, "63 bits"),
        ({"samples": (replace(ONE, id="x" * (MAX_TEXT + 1)),)}, "id: over"),
        ({"samples": (replace(ONE, id="\ud800"),)}, "cannot be written"),
        ({"samples": (replace(ONE, id=b"a"),)}, "ids: not a list of str"),  # type: ignore[arg-type]
        ({"samples": (replace(ONE, key="a"),)}, "keys: not a list"),  # type: ignore[arg-type]
        ({"samples": (replace(ONE, key=bytes(MAX_KEY + 1)),)}, "key: over"),
        ({"samples": (replace(ONE, meta={"a": 1}),)}, "meta: not a list of str"),  # type: ignore[dict-item]
        ({"samples": (replace(ONE, meta={str(i): "" for i in range(65)}),)}, "meta: 65 entries"),
        ({"samples": (replace(ONE, timestamp_ms=-2),)}, "timestamp: -2"),
        ({"samples": (replace(ONE, timestamp_ms=1.5),)}, "timestamps: not a list of int"),  # type: ignore[arg-type]
        ({"samples": (replace(ONE, deadline_ms=-1),)}, "deadline: -1"),
        ({"samples": (replace(ONE, failure=Failure("bad", "", "", "")),)}, "failure is not"),  # type: ignore[arg-type]
        ({"partition": -1}, "partition: -1"),
        ({"digest": DIGEST.upper()}, "digest"),
        ({"digest": DIGEST[:-2]}, "digest"),
        ({"incarnation": "a b"}, "incarnation"),
        ({"incarnation": "a" * 65}, "incarnation"),
        ({"part": (1, 1)}, "part 1 of 1"),
        ({"hops": (Hop("s", 2**63, 0, 0),)}, "hop"),
        ({"hops": (Hop("s", 0, 0, 1),) * 257}, "257 hops"),
        ({"tensors": {"x": pack("U8", (2, 1), b"ab")}}, "dimension 0"),
        ({"tensors": {"x": pack("U8", (), b"a")}}, "dimension 0"),
        ({"tensors": {"x": Tensor("U8", (1, 2), memoryview(b"a"))}}, "'x'.*2 bytes, found 1"),
        ({"tensors": {str(i): pack("U8", (1,), b"a") for i in range(257)}}, "257 tensors"),
    ],
)
def test_nothing_is_written_that_cannot_be_read(change: dict[str, object], says: str) -> None:
    """It would come back as poison, at the next stage, without a hint at who wrote it."""
    good = Envelope(0, (ONE,), DIGEST, "")
    assert decode(whole(good), max_bytes=MB) == good
    with pytest.raises(WireError, match=says):
        encode(replace(good, **change))  # type: ignore[arg-type]


def test_too_much_meta_for_a_header_says_what_to_do() -> None:
    meta = {str(i): "x" * MAX_TEXT for i in range(MAX_META)}
    message = replace(GOLDEN, tensors={})
    many = tuple(Sample(i, i, "", None, 0, 0, meta) for i in range(64))
    with pytest.raises(WireError, match="smaller batches"):
        encode(replace(message, samples=many))


# Damage. Whoever can write into a topic can send these.


@contextmanager
def bounded(peak: int) -> Iterator[Callable[[Callable[[], int]], int]]:
    """Fail if a call takes a second, or all of them more than `peak` bytes of memory at a time.

    What takes more is called again, once: CPython's table of interned strings, which the keys of a
    message go through, grows by megabytes for whichever string is one too many, and stays so large.
    A message that takes memory takes it each time.
    """
    base, forgiven = 0, False

    def run(call: Callable[[], int]) -> int:
        nonlocal base, forgiven
        found = timed(call)
        if tracemalloc.get_traced_memory()[1] - base >= peak and not forgiven:
            base, forgiven = tracemalloc.get_traced_memory()[0], True
            timed(call)
        assert tracemalloc.get_traced_memory()[1] - base < peak
        return found

    def timed(call: Callable[[], int]) -> int:
        tracemalloc.reset_peak()
        began = time.process_time()
        found = call()
        assert time.process_time() - began < 1
        return found

    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        yield run
    finally:
        tracemalloc.stop()


def test_a_message_that_takes_too_much_memory_each_time_is_found() -> None:
    kept: list[bytearray] = []

    def table() -> int:  # grows once, and stays
        if not kept:
            kept.append(bytearray(7 * MB))
        return len(kept)

    with bounded(MB) as run:
        assert run(lambda: len(bytearray(MB // 2))) == MB // 2
        assert run(table) == 1
        assert run(table) == 1
        with pytest.raises(AssertionError):
            run(lambda: len(bytearray(2 * MB)))
    with bounded(MB) as run, pytest.raises(AssertionError):
        run(lambda: len(bytearray(2 * MB)))


def test_memory_that_is_never_given_back_is_found() -> None:
    kept: list[bytearray] = []

    def leak() -> int:
        kept.append(bytearray(MB // 10))
        return len(kept)

    with bounded(MB) as run, pytest.raises(AssertionError):
        for _ in range(100):
            run(leak)


def taken_as_envelope(raw: bytes) -> bool:
    try:
        read = decode(raw, max_bytes=MB)
    except WireError:
        return False
    encode(read)
    return True


@pytest.mark.parametrize("seed", range(4))
def test_damaged_envelopes_raise_wire_errors_only(seed: int) -> None:
    """20,000 in all. What is taken all the same is in order: it can be written again."""
    dice = random.Random(seed)
    seeds = [whole(GOLDEN), whole(envelope(9, 64, b"row")), whole(envelope(1, 1))]
    seeds.append(whole(GOLDEN.outcomes({121: Failure("lost", "s1", "timeout", "late")})))
    taken = 0
    with bounded(8 * MB) as run:
        for i in range(5000):
            raw = seeds[i % len(seeds)]
            reach = 8 + int.from_bytes(raw[4:8], "little")
            taken += run(partial(taken_as_envelope, mutate(raw, dice, reach)))
    assert 0 < taken < 4000


def refusals(raw: bytes) -> int:
    with pytest.raises(WireError):
        decode(raw, max_bytes=8 * MB)
    return 1


@pytest.mark.parametrize(
    "filler", [b"\x90", b"\x80", b"\xc0", b"\xa0", b"\x00", b"\x91", b"\x81\xa0"]
)
def test_a_header_of_4_mb_takes_little_more_memory(filler: bytes) -> None:
    """An empty list is one byte here and 56 in memory; a list may claim more than it holds."""
    lists = b"\xdc\x0f\xff" + filler * 4095
    for body in (lists * 1000, filler * 4 * MB, b"\xdd\x00\x00\x10\x00" * 100_000):
        header = (b"\x9e" + b"\xdc\x10\x00" + body)[: 4 * MB]
        raw = b"SIE\x01" + len(header).to_bytes(4, "little") + header
        with bounded(64 * MB) as run:
            assert run(partial(refusals, raw)) == 1


Sent = tuple[Headers, bytes]
SENT = [
    *(envelope(10 * i, 8, b"some rows of %d" % i) for i in (0, 1, 2, 3, 3)),  # one comes twice
    replace(envelope(20, 1), part=(1, 2)),
]


def flow() -> list[Sent]:
    """Records of all these, chunked, interleaved."""
    queues = [records(e, 100) for e in SENT]
    longest = max(map(len, queues))
    return [queue[k] for k in range(longest) for queue in queues if k < len(queue)]


def damage(sent: Sequence[Sent], dice: random.Random) -> list[tuple[Headers, bytes | None]]:
    """Headers edited, dropped or swapped; values edited or missing; records lost or repeated."""
    found: list[tuple[Headers, bytes | None]] = []
    for heads, body in sent:
        value: bytes | None = body
        match dice.randrange(24):
            case 0 | 1 | 2:
                at = dice.randrange(len(heads))
                key, text = heads[at]
                heads = (*heads[:at], (key, mutate(text, dice, 64)), *heads[at + 1 :])
            case 3:
                at = dice.randrange(len(heads))
                heads = (*heads[:at], *heads[at + 1 :])
            case 4:
                heads = dice.choice(sent)[0]
            case 5:
                value = mutate(body, dice, 100)
            case 6:
                value = None
            case 7:
                continue
            case 8:
                found.append((heads, value))
        found.append((heads, value))
    return found


def assembled(
    stream: Sequence[tuple[Headers, bytes | None]], good: Container[bytes], tally: Counter[str]
) -> int:
    """Add records; every position comes back once, or is still held."""
    assembler = Assembler[tuple[str, int, int]](5000, max_sets=4, patience=Patience(2, 0))
    back: list[tuple[str, int, int]] = []
    for offset, (heads, value) in enumerate(stream):
        try:
            message, settled, lost = assembler.add(("t", 0, offset), heads, value)
        except BrokenMessage as error:
            tally["broken"] += 1
            back += error.positions
        else:
            back += settled
            back += [place for one in lost for place in one.positions]
            if message:
                tally["messages"] += 1
                back += message.positions
                assert len(message.positions) == 1 or bytes(message.buffer) in good
        assert assembler.held_bytes <= 4 * 5000
    held = assembler.held_positions("t", 0)
    assert sorted((*back, *held)) == [("t", 0, n) for n in range(len(stream))]
    return len(stream)


def test_damaged_chunks_lose_no_position_and_raise_broken_messages_only() -> None:
    """A position that never comes back stops the commits of its partition for good."""
    dice = random.Random(7)
    sent = flow()
    good = {whole(e) for e in SENT}
    tally = Counter[str]()
    with bounded(8 * MB) as run:
        for _ in range(400):
            run(partial(assembled, damage(sent, dice), good, tally))
    assert tally["broken"] > 100
    assert tally["messages"] > 100


def taken_as_tensors(raw: bytes) -> bool:
    try:
        read = decode_tensor_input(raw, max_bytes=1000)
    except SchemaError:
        return False
    assert decode_tensor_input(encode_tensor_input(read), max_bytes=1000) == read
    return True


@pytest.mark.parametrize("seed", range(2))
def test_damaged_tensor_messages_raise_schema_errors_only(seed: int) -> None:
    """They come from anyone who may write to the input topic."""
    dice = random.Random(seed)
    tensor = pack("float32", (3, 4), bytes(48))
    raw = encode_tensor_input(TensorInput(tensor, "cat-1", {"camera": "7"}, 250))
    taken = 0
    with bounded(MB) as run:
        for _ in range(5000):
            taken += run(partial(taken_as_tensors, mutate(raw, dice, 60)))
    assert 0 < taken < 4000
