"""WHAT travels: pure bytes. No asyncio, no torch, no Kafka."""

from streaminfer.wire.chunks import (
    CHUNK_BYTES,
    Added,
    Assembler,
    BrokenMessage,
    Message,
    Patience,
    records,
    split,
)
from streaminfer.wire.codec import (
    TENSOR_INPUT,
    TensorInput,
    decode,
    decode_tensor_input,
    encode,
    encode_tensor_input,
    encoded_size,
)
from streaminfer.wire.columns import MAX_KEY, MAX_META, MAX_SAMPLES, MAX_TEXT
from streaminfer.wire.envelope import SCALE, Envelope, Failure, Hop, Sample, Tensor
from streaminfer.wire.headers import Origin, headers, read_origin
from streaminfer.wire.tensors import (
    ITEMSIZE,
    Buffer,
    Compression,
    compress,
    decompress,
    dtype_name,
    pack,
)

__all__ = [
    "CHUNK_BYTES",
    "ITEMSIZE",
    "MAX_KEY",
    "MAX_META",
    "MAX_SAMPLES",
    "MAX_TEXT",
    "SCALE",
    "TENSOR_INPUT",
    "Added",
    "Assembler",
    "BrokenMessage",
    "Buffer",
    "Compression",
    "Envelope",
    "Failure",
    "Hop",
    "Message",
    "Origin",
    "Patience",
    "Sample",
    "Tensor",
    "TensorInput",
    "compress",
    "decode",
    "decode_tensor_input",
    "decompress",
    "dtype_name",
    "encode",
    "encode_tensor_input",
    "encoded_size",
    "headers",
    "pack",
    "read_origin",
    "records",
    "split",
]
