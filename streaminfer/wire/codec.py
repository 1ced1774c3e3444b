"""Envelope ↔ bytes, and the user's tensor message ↔ bytes: the only place that knows msgpack.

An envelope of version 1 (integers little endian; `…` = zeros up to the next multiple of 64):

    0        3         4              8
    ├────────┼─────────┼──────────────┼────────────┬───┬──────────┬───┬──────────┤
    │ "SIE"  │ version │ header bytes │  header    │ … │ tensor 0 │ … │ tensor 1 │
    │        │ u8      │ u32          │  msgpack   │   │ raw      │   │ raw      │
    └────────┴─────────┴──────────────┴────────────┴───┴──────────┴───┴──────────┘

The header is an array; what is marked with n is a column with one entry per sample, or empty where
every sample has the default:

    partition · digest (32 bytes) · incarnation · sender · [part k, of n]
    [[stage, queue, compute, batch]]
    n gaps        start - end of the sample before; of the first sample: its start
    n spans       offset - start; no delta is negative, so offsets rise and intervals never overlap
    n ids · n keys · n timestamps (difference to the sample before) · n deadlines · n meta
    n failures    nil or [status, stage, kind, message] · n partials
    tensors       [[name, dtype, [dim…], codec, bytes as they travel]]

A tensor is never copied: `encode` hands out its buffer, `decode` a view of the message. A reader
knows one version; a new layout is a new version, read beside the old one until the topics are dry.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from streaminfer.errors import SchemaError, WireError
from streaminfer.wire import tensors as wire_tensors
from streaminfer.wire.columns import (
    FIELDS,
    MAX_HOPS,
    MAX_KEY,
    MAX_META,
    MAX_SAMPLES,
    MAX_TENSORS,
    MAX_TEXT,
    check_columns,
    from_columns,
    to_columns,
)
from streaminfer.wire.envelope import Envelope, Tensor
from streaminfer.wire.tensors import Buffer

__all__ = [
    "TENSOR_INPUT",
    "TensorInput",
    "decode",
    "decode_tensor_input",
    "encode",
    "encode_tensor_input",
    "encoded_size",
]

TENSOR_INPUT = "application/vnd.streaminfer+msgpack"  # content-type of a user's tensor

MAGIC = b"SIE"
VERSION = 1
ALIGN = 64
BUFFER = 16_384  # msgpack's own first buffer is 1 MB: its page faults cost more than the packing
PREFIX = struct.Struct("<3sBI")

MAX_INPUTS = 64  # tensors in a user's message
MAX_HEADER = 4 * 2**20  # bytes

# Lists and maps in a header that is in order: the header, its columns, and one meta and one failure
# per sample, one hop and one shape. An empty list is 1 byte on the wire and 56 in memory: without
# this a header of 4 MB could ask for 300.
CONTAINERS = 2 + FIELDS + 2 * MAX_SAMPLES + MAX_HOPS + 2 * MAX_TENSORS


def encode(envelope: Envelope) -> list[Buffer]:
    """Return the buffers that are the message when written one after another.

    Tensors are in there as they are, without a copy: don't change them until it is written.
    Raises WireError for what `decode` would not take.
    """
    columns = to_columns(envelope)
    check_columns(columns)
    _check_rows(envelope.tensors, len(envelope.samples))
    try:
        header: bytes = msgpack.packb(columns, buf_size=BUFFER)
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"envelope cannot be written: {error}") from None
    if len(header) > MAX_HEADER:
        raise WireError(
            f"header of {len(header)} bytes for {len(envelope.samples)} samples, at most "
            f"{MAX_HEADER}: take smaller batches, or less si-meta"
        )
    end = PREFIX.size + len(header)
    buffers: list[Buffer] = [PREFIX.pack(MAGIC, VERSION, len(header)) + header]
    for tensor in envelope.tensors.values():
        buffers += (bytes(-end % ALIGN), tensor.data)
        end += -end % ALIGN + tensor.data.nbytes
    return buffers


def encoded_size(buffers: Sequence[Buffer]) -> int:
    """Return the bytes of a message given as flat buffers."""
    return sum(map(len, buffers))


def decode(buffer: Buffer, *, max_bytes: int) -> Envelope:
    """Read an envelope; its tensors are views of `buffer`, at multiples of 64 in it.

    `max_bytes` caps the message and, apart from it, its tensors' uncompressed bytes. Raises
    WireError, and nothing else, for bytes that are no envelope of version 1.
    """
    view = memoryview(buffer)
    if len(view) > max_bytes:
        raise WireError(f"message of {len(view)} bytes: over the limit of {max_bytes}")
    if len(view) < PREFIX.size:
        raise WireError(f"message of {len(view)} bytes: too short for an envelope")
    magic, version, header_bytes = PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise WireError(f"message starts with {magic!r}, an envelope starts with {MAGIC!r}")
    if version != VERSION:
        raise WireError(
            f"envelope of version {version}, this release reads version {VERSION}: "
            "run one release on all workers of a pipeline"
        )
    end = PREFIX.size + header_bytes
    if header_bytes > MAX_HEADER or end > len(view):
        raise WireError(f"header of {header_bytes} bytes in a message of {len(view)}")
    columns = _unpack(
        view[PREFIX.size : end],
        CONTAINERS,
        max_str_len=4 * MAX_TEXT,
        max_bin_len=MAX_KEY,
        max_array_len=MAX_SAMPLES,
        max_map_len=MAX_META,
    )
    check_columns(columns)
    return from_columns(columns, _cut(view, end, columns[-1], max_bytes))


def _unpack(data: Buffer, containers: int, **limits: int) -> Any:
    """Read one msgpack value with at most so many lists and maps in it."""
    seen = 0

    def count(value: object) -> object:
        nonlocal seen
        seen += 1
        if seen > containers:
            raise WireError(f"more than {containers} lists and maps")
        return value

    try:
        return msgpack.unpackb(data, list_hook=count, object_hook=count, max_ext_len=0, **limits)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack within the limits: {error}") from None


def _cut(view: memoryview, end: int, rows: list[list[Any]], max_bytes: int) -> dict[str, Tensor]:
    """Cut the tensors out of the message; nothing may be left over, no padding may hold a byte."""
    found: dict[str, Tensor] = {}
    left = max_bytes
    for name, dtype, shape, codec, nbytes in rows:
        start = end + -end % ALIGN
        if start + nbytes > len(view):
            raise WireError(f"tensor {name!r:.80} ends behind the message")
        if any(view[end:start]):
            raise WireError(f"padding before tensor {name!r:.80} is not zero")
        tensor = Tensor(dtype, tuple(shape), view[start : start + nbytes], codec)
        left -= wire_tensors.check(tensor, left)
        found[name] = tensor
        end = start + nbytes
    if end != len(view):
        raise WireError(f"{len(view) - end} bytes behind the last tensor")
    return found


def _check_rows(tensors: Mapping[str, Tensor], n: int) -> None:
    for name, tensor in tensors.items():
        try:
            wire_tensors.check(tensor)
        except WireError as error:
            raise WireError(f"tensor {name!r:.80}: {error}") from None


@dataclass(frozen=True, slots=True)
class TensorInput:
    """A user's message: one sample, so shapes have no batch dimension.

    On the wire: the msgpack map `{v: 1, id?, tensor: {dtype, shape, data: bin}, meta?,
    deadline_ms?}`; `dtype` is "F32" or "float32", `data` C-contiguous and little endian. A model
    with several inputs takes `tensors: {name: {dtype, shape, data}}` in place of `tensor`; one with
    a single input takes either.
    """

    tensor: Tensor | None = None
    id: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict)
    deadline_ms: int | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # by input, where `tensor` is None


def encode_tensor_input(message: TensorInput) -> bytes:
    """Write a user's message. Raises WireError if a tensor is compressed or not whole."""
    if (message.tensor is None) != bool(message.tensors):
        raise WireError("a message holds one tensor, or several by name, and not both")
    body: dict[str, object] = {"v": VERSION}
    if message.id is not None:
        body["id"] = message.id
    if message.tensor is not None:
        body["tensor"] = _user_fields(message.tensor)
    else:
        body["tensors"] = {name: _user_fields(tensor) for name, tensor in message.tensors.items()}
    if message.meta:
        body["meta"] = dict(message.meta)
    if message.deadline_ms is not None:
        body["deadline_ms"] = message.deadline_ms
    try:
        packed: bytes = msgpack.packb(body)
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"message cannot be written: {error}") from None
    return packed


def _user_fields(tensor: Tensor) -> dict[str, object]:
    wire_tensors.check(tensor)
    if tensor.codec:
        raise WireError(f"tensor is compressed by {tensor.codec}: decompress() it first")
    return {"dtype": tensor.dtype, "shape": tensor.shape, "data": tensor.data}


def decode_tensor_input(value: bytes, *, max_bytes: int) -> TensorInput:
    """Read a user's message. Raises SchemaError with the key, what it must be, what it is."""
    if len(value) > max_bytes:
        raise _wrong("message", f"at most {max_bytes} bytes", f"{len(value)}")
    try:
        body = _unpack(
            value,
            3 + 2 * MAX_INPUTS,  # message, tensors, meta; a tensor and its shape each
            max_str_len=4 * MAX_TEXT,
            max_bin_len=max_bytes,
            max_array_len=wire_tensors.MAX_DIMS,
            max_map_len=max(MAX_META, MAX_INPUTS),
        )
    except WireError as error:
        raise _wrong("message", "a msgpack map", str(error)) from None
    optional = {"id": str, "meta": dict, "deadline_ms": int}
    several = type(body) is dict and "tensors" in body and "tensor" not in body
    fields = _fields("", body, {"v": int, "tensors" if several else "tensor": dict}, optional)
    if fields["v"] != VERSION:
        raise _wrong("v", str(VERSION), repr(fields["v"]))
    id_, deadline = fields["id"], fields["deadline_ms"]
    if id_ is not None and not 1 <= len(id_) <= MAX_TEXT:
        raise _wrong("id", f"1 to {MAX_TEXT} characters", str(len(id_)))
    if deadline is not None and not 0 <= deadline < 2**63:
        raise _wrong("deadline_ms", "Unix time in ms", str(deadline))
    for key, text in (fields["meta"] or {}).items():
        if type(key) is not str or type(text) is not str or max(len(key), len(text)) > MAX_TEXT:
            raise _wrong(
                f"meta.{key!s:.80}", f"a str of at most {MAX_TEXT} characters", _kind(text)
            )
    meta = fields["meta"] or {}
    if several:
        return TensorInput(None, id_, meta, deadline, _user_tensors(fields["tensors"]))
    return TensorInput(_user_tensor("tensor", fields["tensor"]), id_, meta, deadline)


def _user_tensors(body: dict[object, object]) -> dict[str, Tensor]:
    if not 1 <= len(body) <= MAX_INPUTS:
        raise _wrong("tensors", f"1 to {MAX_INPUTS} tensors by name", str(len(body)))
    for name in body:
        if type(name) is not str or not 1 <= len(name) <= MAX_TEXT:
            raise _wrong(f"tensors.{name!s:.80}", f"a name of 1 to {MAX_TEXT} characters", "it")
    return {str(name): _user_tensor(f"tensors.{name!s:.80}", one) for name, one in body.items()}


def _user_tensor(where: str, body: object) -> Tensor:
    fields = _fields(f"{where}.", body, {"dtype": str, "shape": list, "data": bytes}, {})
    shape, data = tuple(fields["shape"]), fields["data"]
    try:
        dtype = wire_tensors.dtype_name(fields["dtype"])
    except WireError:
        names = ", ".join(wire_tensors.ITEMSIZE)
        raise _wrong(f"{where}.dtype", f"one of {names}", repr(fields["dtype"])[:80]) from None
    try:
        nbytes = wire_tensors.raw_size(dtype, shape)
    except WireError as error:
        raise _wrong(f"{where}.shape", "a list of sizes", str(error)) from None
    if len(data) != nbytes:
        raise _wrong(f"{where}.data", f"{nbytes} bytes ({dtype} of {list(shape)})", f"{len(data)}")
    if dtype == "BOOL" and data.translate(None, b"\0\1"):
        raise _wrong(f"{where}.data", "bytes of 0 and 1 (BOOL)", "others")
    return wire_tensors.pack(dtype, shape, data)


def _fields(
    where: str, body: object, required: dict[str, type], optional: dict[str, type]
) -> dict[str, Any]:
    """Return a map's values by key, None for what is left out; no other key, no other type."""
    if type(body) is not dict:
        raise _wrong(where.rstrip(".") or "message", "a map", _kind(body))
    known = required | optional
    for key, value in body.items():
        if key not in known:
            raise _wrong(f"{where}{key!s:.80}", f"no key but {', '.join(known)}", "it")
        if type(value) is not known[key] and not (value is None and key in optional):
            raise _wrong(f"{where}{key}", known[key].__name__, _kind(value))
    for key in required:
        if key not in body:
            raise _wrong(f"{where}{key}", known[key].__name__, "nothing")
    return {key: body.get(key) for key in known}


def _kind(value: object) -> str:
    return type(value).__name__


def _wrong(key: str, expected: str, found: str) -> SchemaError:
    return SchemaError(f"{key}: expected {expected}, found {found}")
