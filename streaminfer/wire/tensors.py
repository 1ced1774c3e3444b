"""Tensors as bytes: which dtypes and shapes there are, what they weigh, and their compression.

`data` is what the dtype and the shape say to the byte, or the compressed form of it. Nothing is
allocated before the claim (dtype, shape) has passed its caps, and decompression gives exactly the
claimed size or an error: a few bytes can't ask for gigabytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import Literal, TypeAlias

import lz4.frame
import zstandard

from streaminfer.errors import WireError
from streaminfer.wire.envelope import Tensor

__all__ = [
    "ITEMSIZE",
    "MAX_BYTES",
    "MAX_DIMS",
    "Buffer",
    "Compression",
    "check",
    "compress",
    "decompress",
    "dtype_name",
    "pack",
    "raw_size",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
Compression: TypeAlias = Literal["zstd", "lz4"]

_NAMES = {  # safetensors' name: (torch's and numpy's name, bytes of an element)
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
ITEMSIZE: Mapping[str, int] = MappingProxyType({name: size for name, (_, size) in _NAMES.items()})
_CANONICAL = {alias: name for name, (alias, _) in _NAMES.items()} | {name: name for name in _NAMES}

MAX_DIMS = 8
MAX_DIM = 2**31 - 1
MAX_BYTES = 2**31 - 1  # of one tensor, uncompressed


def dtype_name(name: str) -> str:
    """Return safetensors' name of a dtype given as "F32" or "float32". Raises WireError."""
    try:
        return _CANONICAL[name]
    except (KeyError, TypeError):
        raise WireError(f"dtype {name!r:.40}: only {', '.join(ITEMSIZE)} travel") from None


def raw_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of an uncompressed tensor. Raises WireError where no such tensor travels."""
    if dtype not in ITEMSIZE:
        raise WireError(f"dtype {dtype!r:.40}: only {', '.join(ITEMSIZE)} travel")
    if len(shape) > MAX_DIMS:
        raise WireError(f"{len(shape)} dimensions: at most {MAX_DIMS} travel")
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_DIM:
            raise WireError(f"dimension {size!r:.40}: 0 to {MAX_DIM} travel")
    nbytes = prod(shape) * ITEMSIZE[dtype]
    if nbytes > MAX_BYTES:
        raise WireError(f"{dtype} of {list(shape)} is {nbytes} bytes: at most {MAX_BYTES} travel")
    return nbytes


def pack(dtype: str, shape: tuple[int, ...], data: Buffer) -> Tensor:
    """Wrap C-contiguous bytes as a tensor, without a copy. Raises WireError if they don't fit.

    `dtype` may be "F32" or "float32"; `data` may be a memoryview of any format and shape.
    """
    view = memoryview(data)
    if not view.c_contiguous:
        raise WireError("data is not C-contiguous: call .contiguous() first")
    if view.format != "B" or view.ndim != 1:
        # a view with a 0 in its shape cannot be cast
        view = view.cast("B") if view.nbytes else memoryview(b"")
    tensor = Tensor(dtype_name(dtype), tuple(shape), view)
    check(tensor)
    return tensor


def check(tensor: Tensor, cap: int = MAX_BYTES) -> int:
    """Return a tensor's uncompressed bytes. Raises WireError if it is not what it says it is."""
    nbytes = raw_size(tensor.dtype, tensor.shape)
    if nbytes > cap:
        raise WireError(f"{tensor.dtype} of {list(tensor.shape)} is {nbytes} bytes: over {cap}")
    data = tensor.data
    if data.format != "B" or data.ndim != 1 or not data.contiguous:
        raise WireError("data is not a flat view of bytes: tensors.pack() makes one")
    if tensor.codec == "":
        if data.nbytes != nbytes:
            raise WireError(
                f"{tensor.dtype} of {list(tensor.shape)} is {nbytes} bytes, found {data.nbytes}"
            )
    elif tensor.codec not in _DECOMPRESS:
        raise WireError(f"codec {tensor.codec!r:.40}: only '', {', '.join(_DECOMPRESS)} are known")
    elif not 0 < data.nbytes < nbytes:
        raise WireError(f"{data.nbytes} bytes of {tensor.codec} for a tensor of {nbytes}")
    return nbytes


def compress(tensor: Tensor, codec: Compression, level: int | None = None) -> Tensor:
    """Compress (zstd level 1, lz4 level 0 unless told). Returns `tensor` itself if that is smaller.

    Releases the GIL; any thread may call it. What is compressed already stays as it is.
    """
    if tensor.codec or not tensor.data.nbytes:
        return tensor
    data = _COMPRESS[codec](tensor.data, level)
    if len(data) >= tensor.data.nbytes:
        return tensor
    return replace(tensor, data=memoryview(data), codec=codec)


def decompress(tensor: Tensor, cap: int = MAX_BYTES) -> Tensor:
    """Undo `compress`: an uncompressed tensor of at most `cap` bytes, or WireError."""
    nbytes = check(tensor, cap)
    if tensor.codec == "":
        return tensor
    data = _DECOMPRESS[tensor.codec](tensor.data, nbytes)
    if len(data) != nbytes:
        raise WireError(f"{tensor.codec} holds {len(data)} bytes, the shape says {nbytes}")
    return replace(tensor, data=memoryview(data), codec="")


class _Contexts(threading.local):
    """A thread's zstd contexts: two threads in one context corrupt it, making one costs 100 µs."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self.compressors:
            self.compressors[level] = zstandard.ZstdCompressor(level=level)
        return self.compressors[level]


_CONTEXTS = _Contexts()


def _zstd(data: memoryview, level: int | None) -> bytes:
    return _CONTEXTS.compressor(1 if level is None else level).compress(data)


def _lz4(data: memoryview, level: int | None) -> bytes:
    packed: bytes = lz4.frame.compress(data, compression_level=level or 0)
    return packed


def _unzstd(data: memoryview, nbytes: int) -> bytes:
    """Decompress. The frame's own claim is what zstandard allocates, so it is compared first."""
    try:
        claim = zstandard.frame_content_size(data)
        if claim != nbytes:
            raise WireError(f"zstd frame claims {claim} bytes, the shape says {nbytes}")
        return _CONTEXTS.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"damaged zstd frame: {error}") from None


def _unlz4(data: memoryview, nbytes: int) -> bytes:
    """Decompress. Stops at `nbytes` whatever the frame claims; `eof` tells if that was all."""
    context = lz4.frame.LZ4FrameDecompressor()
    try:
        raw: bytes = context.decompress(data, max_length=nbytes)
    except (RuntimeError, EOFError, ValueError) as error:
        raise WireError(f"damaged lz4 frame: {error}") from None
    if not context.eof or context.unused_data:
        raise WireError(f"lz4 frame does not end with the {nbytes} bytes that the shape says")
    return raw


_COMPRESS: dict[str, Callable[[memoryview, int | None], bytes]] = {"zstd": _zstd, "lz4": _lz4}
_DECOMPRESS: dict[str, Callable[[memoryview, int], bytes]] = {"zstd": _unzstd, "lz4": _unlz4}
