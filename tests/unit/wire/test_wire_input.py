"""A user's tensor message: what is wrong with it is said in the user's words."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from streaminfer.errors import SchemaError, WireError
from streaminfer.wire import TensorInput, compress, decode_tensor_input, encode_tensor_input, pack

TENSOR = {"dtype": "float32", "shape": [2, 3], "data": bytes(24)}


def read(**fields: Any) -> TensorInput:
    body = {
        key: value for key, value in {"v": 1, "tensor": TENSOR, **fields}.items() if value != ...
    }
    return decode_tensor_input(msgpack.packb(body), max_bytes=1000)


def test_the_shortest_message() -> None:
    """What a user writes by hand, with any msgpack library."""
    assert read() == TensorInput(pack("F32", (2, 3), bytes(24)))
    assert read(id=None, meta=None, deadline_ms=None) == read()


@pytest.mark.parametrize("dtype", ["F32", "float32"])
def test_both_names_of_a_dtype_are_taken(dtype: str) -> None:
    tensor = read(tensor={**TENSOR, "dtype": dtype}).tensor
    assert tensor is not None
    assert tensor.dtype == "F32"


@pytest.mark.parametrize(
    "message",
    [
        TensorInput(pack("F32", (2, 3), bytes(24)), "cat-1", {"camera": "7"}, 250),
        TensorInput(pack("U8", (), b"a"), "käse"),
        TensorInput(pack("BF16", (0, 3), b"")),
        TensorInput(tensors={"ids": pack("I64", (2,), bytes(16)), "mask": pack("U8", (2,), b"ab")}),
    ],
)
def test_what_the_client_writes_is_read(message: TensorInput) -> None:
    assert decode_tensor_input(encode_tensor_input(message), max_bytes=1000) == message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"v": 2}, "v: expected 1, found 2"),
        ({"v": ...}, "v: expected int, found nothing"),
        ({"v": True}, "v: expected int, found bool"),
        ({"tensor": ...}, "tensor: expected dict, found nothing"),
        ({"tensor": [1]}, "tensor: expected dict, found list"),
        ({"tensor": {}}, "tensor.dtype: expected str, found nothing"),
        ({"tensor": {**TENSOR, "dtype": "f4"}}, "tensor.dtype: expected one of F64.*found 'f4'"),
        ({"tensor": {**TENSOR, "shape": "2,3"}}, "tensor.shape: expected list, found str"),
        ({"tensor": {**TENSOR, "shape": [2, -3]}}, "tensor.shape: .*dimension -3"),
        ({"tensor": {**TENSOR, "shape": [2, 3.0]}}, "tensor.shape: .*dimension 3.0"),
        ({"tensor": {**TENSOR, "data": "text"}}, "tensor.data: expected bytes, found str"),
        ({"tensor": {**TENSOR, "data": b"ab"}}, r"24 bytes \(F32 of \[2, 3\]\), found 2"),
        ({"tensor": {**TENSOR, "layout": "NCHW"}}, "tensor.layout: expected no key but dtype"),
        ({"tensor": {"dtype": "bool", "shape": [2], "data": b"\0\2"}}, "bytes of 0 and 1"),
        ({"images": []}, "images: expected no key but v, tensor, id, meta, deadline_ms"),
        ({"tensors": {"a": TENSOR}}, "tensors: expected no key but v, tensor"),
        ({"tensor": ..., "tensors": {}}, "tensors: expected 1 to 64 tensors by name, found 0"),
        ({"tensor": ..., "tensors": {str(k): {} for k in range(65)}}, "message: .*65"),
        ({"tensor": ..., "tensors": [TENSOR]}, "tensors: expected dict, found list"),
        ({"tensor": ..., "tensors": {"a": 3}}, "tensors.a: expected a map, found int"),
        ({"tensor": ..., "tensors": {b"a": TENSOR}}, "tensors.b'a': expected a name"),
        (
            {"tensor": ..., "tensors": {"a": TENSOR, "b": {**TENSOR, "data": b"ab"}}},
            r"tensors.b.data: expected 24 bytes \(F32 of \[2, 3\]\), found 2",
        ),
        ({"id": 7}, "id: expected str, found int"),
        ({"id": ""}, "id: expected 1 to 4096 characters, found 0"),
        ({"id": "x" * 5000}, "over|at most"),
        ({"meta": {"camera": 7}}, "meta.camera: expected a str.*found int"),
        ({"meta": {b"camera": "7"}}, "meta.*expected a str"),
        ({"meta": []}, "meta: expected dict, found list"),
        ({"deadline_ms": -1}, "deadline_ms: expected .*found -1"),
        ({"deadline_ms": 1.5}, "deadline_ms: expected int, found float"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        read(**fields)


@pytest.mark.parametrize(
    "value", [b"", b"\xff\xd8\xff\xe0 a jpeg", b"\xc0", b"\x90", b"\xc1", b"\x81"]
)
def test_what_is_no_message_is_said_to_be_none(value: bytes) -> None:
    with pytest.raises(SchemaError, match="message: expected a"):
        decode_tensor_input(value, max_bytes=1000)


def test_a_message_over_the_cap_is_refused() -> None:
    with pytest.raises(SchemaError, match="at most 10 bytes, found"):
        decode_tensor_input(encode_tensor_input(read()), max_bytes=10)


@pytest.mark.parametrize(
    "message", [TensorInput(), TensorInput(read().tensor, tensors={"a": pack("U8", (), b"a")})]
)
def test_neither_no_tensor_nor_two_forms_of_it_are_written(message: TensorInput) -> None:
    with pytest.raises(WireError, match="one tensor, or several by name"):
        encode_tensor_input(message)


def test_a_compressed_tensor_is_not_written() -> None:
    """The format has no codec: the bytes would be read as numbers."""
    tensor = compress(pack("U8", (1000,), bytes(1000)), "zstd")
    with pytest.raises(WireError, match="decompress"):
        encode_tensor_input(TensorInput(tensor))
