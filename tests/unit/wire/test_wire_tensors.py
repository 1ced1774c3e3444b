"""A tensor is what it says it is, or it is refused before memory is taken for it."""

from __future__ import annotations

import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from streaminfer.errors import WireError
from streaminfer.wire import ITEMSIZE, Compression, Tensor, compress, decompress, dtype_name, pack
from streaminfer.wire.tensors import MAX_BYTES, check, raw_size
from tests.envelopes import tensors

CODECS: list[Compression] = ["zstd", "lz4"]
both = pytest.mark.parametrize("codec", CODECS)


@pytest.mark.parametrize(("name", "size"), ITEMSIZE.items())
def test_every_dtype_has_its_size(name: str, size: int) -> None:
    assert pack(name, (3, 2), bytes(6 * size)).data.nbytes == 6 * size
    with pytest.raises(WireError, match=f"is {6 * size} bytes, found {6 * size - 1}"):
        pack(name, (3, 2), bytes(6 * size - 1))


def test_dtypes_have_the_names_that_numpy_and_torch_give_them() -> None:
    assert dtype_name("float32") == dtype_name("F32") == "F32"
    assert dtype_name("bfloat16") == "BF16"
    with pytest.raises(WireError, match=r"'complex64'.*F64, F32"):
        dtype_name("complex64")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,) * 8])
def test_scalars_and_empty_tensors_are_tensors(shape: tuple[int, ...]) -> None:
    data = bytes(raw_size("F32", shape))
    tensor = pack("F32", shape, data)
    assert (tensor.shape, bytes(tensor.data)) == (shape, data)
    for codec in CODECS:
        assert decompress(compress(tensor, codec)) == tensor


def test_any_contiguous_view_is_taken_as_it_is() -> None:
    data = bytearray(48)
    grid = memoryview(data).cast("i", (3, 4))
    tensor = pack("int32", (3, 4), grid)
    data[5] = 9
    assert tensor.data[5] == 9
    assert tensor.data.nbytes == 48
    assert pack("F32", (0, 4), memoryview(b"").cast("B")).data.nbytes == 0
    with pytest.raises(WireError, match="contiguous"):
        pack("U8", (24,), memoryview(data)[::2])


@pytest.mark.parametrize(
    ("dtype", "shape", "says"),
    [
        ("f32", (1,), "dtype 'f32'"),
        ("F32", (1,) * 9, "9 dimensions"),
        ("F32", (-1,), "dimension -1"),
        ("F32", (2**31,), "dimension 2147483648"),
        ("F32", (True,), "dimension True"),
        ("F32", (1.0,), "dimension 1.0"),
        ("U8", (2**31 - 1, 2**31 - 1, 0, 2**31 - 1), ""),
        ("U8", (2**31 - 1,) * 8, f"at most {MAX_BYTES}"),
        ("F32", (2**29,), f"at most {MAX_BYTES}"),
    ],
)
def test_impossible_shapes_are_refused(dtype: str, shape: tuple[int, ...], says: str) -> None:
    """They would be multiplied into sizes that wrap around, or that nobody has."""
    if not says:
        assert raw_size(dtype, shape) == 0
        return
    with pytest.raises(WireError, match=says):
        raw_size(dtype, shape)


def test_a_view_that_is_not_flat_is_refused() -> None:
    """Its length would be counted in elements, and the message be written wrong."""
    with pytest.raises(WireError, match=r"pack\(\)"):
        check(Tensor("I32", (2,), memoryview(bytes(8)).cast("i")))


@given(st.integers(0, 3).flatmap(tensors))
def test_compression_gives_back_every_byte(tensor: Tensor) -> None:
    raw = decompress(tensor)
    assert raw.codec == ""
    for codec in CODECS:
        packed = compress(raw, codec)
        assert packed.data.nbytes <= raw.data.nbytes
        assert decompress(packed) == raw


@both
def test_the_compressed_form_is_kept_only_if_smaller(codec: Compression) -> None:
    noise = pack("U8", (256,), bytes(range(256)))
    zeros = pack("U8", (256,), bytes(256))
    assert compress(noise, codec) is noise
    assert compress(zeros, codec).codec == codec
    assert compress(compress(zeros, codec), "zstd").codec == codec


@both
def test_levels_are_obeyed(codec: Compression) -> None:
    dice = random.Random(0)
    data = b" ".join(dice.choice((b"stage", b"shard", b"tile", b"part")) for _ in range(20_000))
    tensor = pack("U8", (len(data),), data)
    fast, small = compress(tensor, codec), compress(tensor, codec, 12)
    assert small.data.nbytes != fast.data.nbytes
    assert decompress(small) == decompress(fast) == tensor


def bombs() -> list[tuple[Compression, bytes]]:
    zeros = bytes(50_000_000)
    return [
        ("zstd", zstandard.ZstdCompressor().compress(zeros)),
        ("zstd", zstandard.ZstdCompressor(write_content_size=False).compress(zeros)),
        ("lz4", lz4.frame.compress(zeros)),
        ("lz4", lz4.frame.compress(zeros, store_size=False)),
    ]


@pytest.mark.parametrize(("codec", "bomb"), bombs(), ids=["zstd", "zstd-?", "lz4", "lz4-?"])
def test_a_bomb_gets_no_more_memory_than_its_shape_says(codec: Compression, bomb: bytes) -> None:
    tensor = Tensor("U8", (1_000_000,), memoryview(bomb), codec)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decompress(tensor)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@both
def test_more_or_less_than_the_shape_says_is_refused(codec: Compression) -> None:
    packed = compress(pack("U8", (1000,), bytes(1000)), codec)
    for rows in (999, 1001, 2000):
        with pytest.raises(WireError, match="the shape says"):
            decompress(replace(packed, shape=(rows,)))


@both
def test_damaged_frames_are_refused(codec: Compression) -> None:
    data = b"".join(b"%d " % (i * i) for i in range(300))
    whole = pack("U8", (len(data),), data)
    good = bytes(compress(whole, codec).data)
    for bad in (good[:-1], good[:9], good + b"\0", b"\0" * 40, good[:20] + good[25:]):
        with pytest.raises(WireError):
            decompress(replace(whole, data=memoryview(bad), codec=codec))


def test_the_cap_comes_before_the_memory() -> None:
    packed = compress(pack("U8", (1000,), bytes(1000)), "lz4")
    assert decompress(packed, 1000).data.nbytes == 1000
    with pytest.raises(WireError, match="over 999"):
        decompress(packed, 999)


def test_unknown_codecs_are_refused() -> None:
    with pytest.raises(WireError, match="'gzip'"):
        decompress(Tensor("U8", (9,), memoryview(b"abc"), "gzip"))  # type: ignore[arg-type]


@both
def test_any_thread_may_compress(codec: Compression) -> None:
    """zstd contexts corrupt each other's output when two threads share one."""

    def there_and_back(seed: int) -> bool:
        data = b"".join(b"%d " % (i * seed) for i in range(20_000))
        tensor = pack("U8", (len(data),), data)
        return all(decompress(compress(tensor, codec)) == tensor for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(there_and_back, range(1, 17)))
