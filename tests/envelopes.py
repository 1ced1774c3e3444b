"""Envelopes for the tests of the wire: every kind that may travel, and bytes gone wrong."""

from __future__ import annotations

import random
from math import prod

from hypothesis import strategies as st

from streaminfer.wire import (
    ITEMSIZE,
    Compression,
    Envelope,
    Failure,
    Hop,
    Sample,
    Tensor,
    compress,
    pack,
)

DIGEST = "0123456789abcdef" * 4
WORDS = st.text("0123456789abcdef-._", max_size=16)
TEXTS = st.text(max_size=20)
UNIX_MS = st.integers(0, 2**53)


def envelope(first: int, count: int, row: bytes = b"", partition: int = 3) -> Envelope:
    """A micro-batch of `count` samples from offset `first` on, with the same row each."""
    samples = tuple(
        Sample(i, i, f"cat-{i}", b"cat-%d" % i, 1_700_000_000_000 + i)
        for i in range(first, first + count)
    )
    tensors = {"x": pack("U8", (count, len(row)), row * count)} if row else {}
    return Envelope(partition, samples, DIGEST, "a1b2", tensors)


@st.composite
def samples(draw: st.DrawFn) -> tuple[Sample, ...]:
    """One to six samples, with holes between and within their intervals."""
    found: list[Sample] = []
    end = draw(st.integers(0, 2**40))
    for _ in range(draw(st.integers(1, 6))):
        start = end + draw(st.integers(0, 3))
        offset = start + draw(st.integers(0, 3))
        found.append(
            Sample(
                offset,
                start,
                draw(TEXTS),
                draw(st.none() | st.binary(max_size=20)),
                draw(st.just(-1) | UNIX_MS),
                draw(st.just(0) | UNIX_MS),
                draw(st.dictionaries(TEXTS, TEXTS, max_size=2)),
                draw(st.none() | st.builds(Failure, st.just("error"), TEXTS, TEXTS, TEXTS)),
                draw(st.booleans()),
            )
        )
        end = offset + 1
    return tuple(found)


@st.composite
def tensors(draw: st.DrawFn, rows: int) -> Tensor:
    """A tensor of any dtype with so many rows; some are empty, some compressed."""
    dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
    shape = (rows, *draw(st.lists(st.integers(0, 4), max_size=7)))
    size = prod(shape) * ITEMSIZE[dtype]
    data = draw(st.binary(min_size=min(size, 32), max_size=min(size, 32)))
    tensor = pack(dtype, shape, (data * (size // 32 + 1))[:size])
    codec: Compression | None = draw(st.sampled_from([None, "zstd", "lz4"]))
    return compress(tensor, codec) if codec else tensor


@st.composite
def envelopes(draw: st.DrawFn) -> Envelope:
    """Any envelope."""
    members = draw(samples())
    parts = draw(st.integers(1, 4096))
    hops = st.builds(
        Hop, TEXTS, st.integers(-(2**40), 2**40), st.integers(0, 2**40), st.integers(1, 64)
    )
    return Envelope(
        draw(st.integers(0, 2**31 - 1)),
        members,
        draw(st.binary(min_size=32, max_size=32)).hex(),
        draw(WORDS),
        draw(st.dictionaries(TEXTS, tensors(len(members)), max_size=3)),
        tuple(draw(st.lists(hops, max_size=2))),
        (draw(st.integers(0, parts - 1)), parts),
        draw(WORDS),
    )


def mutate(data: bytes, dice: random.Random, reach: int) -> bytes:
    """Damage bytes in one to three ways, most often in the first `reach` of them."""
    body = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(min(reach, len(body)) if dice.random() < 0.9 else len(body))
        match dice.randrange(7):
            case 0:
                body[at] ^= 1 << dice.randrange(8)
            case 1:  # another msgpack type, or another length of it
                body[at] = dice.choice((0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0)))
            case 2:  # a length field
                width = dice.choice((1, 2, 4, 8))
                body[at : at + width] = dice.choice((0, 1, 2**31, 2**64 - 1)).to_bytes(8)[-width:]
            case 3:
                del body[at:]
            case 4:
                del body[at : at + dice.randint(1, 8)]
            case 5:
                body[at:at] = dice.randbytes(dice.randint(1, 8))
            case _:
                end = at + dice.randint(1, 64)
                body[at:at] = body[at:end]
        if not body:
            break
    return bytes(body)
