"""Records as the world sends them: good, odd and broken, each with the outcome it must have.

`corpus(shape)` makes them for a pipeline whose samples are [C, H, W], so that what is fine fits a
pipeline without resize and crop; `tensor_corpus(shape)` for one with `decode: tensor`.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgpack
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "CORPUS",
    "TENSORS",
    "Case",
    "corpus",
    "encode",
    "picture",
    "png",
    "tensor_corpus",
    "tensor_message",
]

TENSOR_TYPE = b"application/vnd.streaminfer+msgpack"
Make = Callable[[], bytes | None]
Headers = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Case:
    """One input record and what must become of it; `kind` is the error's, None where it is fine.

    The value is made when asked for: one of them is large.
    """

    name: str
    make: Make
    outcome: Literal["ok", "error", "none"] = "error"
    kind: str | None = "decode"
    headers: Headers = ()

    @property
    def key(self) -> bytes:
        """The record's key: its name."""
        return self.name.encode()

    @property
    def value(self) -> bytes | None:
        """The record's value; None = a tombstone."""
        return self.make()

    @property
    def content_type(self) -> str | None:
        """What its header says."""
        return next((v.decode() for k, v in self.headers if k == "content-type"), None)


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return a picture with soft and hard parts, the same one every time."""
    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.array(soft.resize((width, height), Image.Resampling.BICUBIC))
    pixels[: height // 3, : width // 3] = random.integers(0, 256, 3, dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the image as a file of a format that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """Return a PNG by hand, for what Pillow does not write; `rows` each begin with a filter byte.

    Colour: 0 grey, 2 RGB, 4 grey + alpha, 6 RGBA. The header need not be true.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(rows, 9)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def tensor_message(
    sample: tuple[int, ...], array: NDArray[np.generic] | None = None, /, **changes: object
) -> bytes:
    """Return an input message with a float32 tensor of one sample; None in `changes` drops a key.

    Keys of the tensor itself (dtype, shape, data) may be changed too.
    """
    if array is None:
        array = np.linspace(-1, 1, int(np.prod(sample)), dtype=np.float32).reshape(sample)
    tensor: dict[str, object] = {"dtype": "F32", "shape": list(sample), "data": array.tobytes()}
    message: dict[str, object] = {"v": 1, "id": "t", "tensor": tensor, "meta": {"from": "corpus"}}
    message["deadline_ms"] = 600_000  # after the record's timestamp
    for name, value in changes.items():
        target = tensor if name in tensor else message
        target[name] = value
        if value is None:
            del target[name]
    packed: bytes = msgpack.packb(message)
    return packed


def _fine_images(channels: int, height: int, width: int) -> list[Case]:
    colour, grey = picture(height, width), picture(height, width, "L")
    see_through = picture(height, width, "RGBA")
    see_through.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = encode(colour.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    files = {
        "png": encode(colour, "PNG"),
        "jpeg": encode(colour, "JPEG", quality=95),
        "webp": encode(colour, "WEBP"),
        "progressive jpeg": encode(colour, "JPEG", progressive=True),
        "cmyk jpeg": encode(colour.convert("CMYK"), "JPEG"),
        "grey jpeg": encode(grey, "JPEG"),
        "jpeg rotated by exif": sideways,
        "16-bit png": encode(deep, "PNG"),
        "1-bit png": encode(grey.convert("1"), "PNG"),
        "palette png": encode(colour.quantize(16), "PNG", transparency=b"\x00\x80"),
        "transparent png": encode(see_through, "PNG"),
    }
    cases = [Case(name, lambda v=v: v, "ok", None) for name, v in files.items()]  # type: ignore[misc]
    wrong = (("content-type", b"image/png"),)
    cases.append(Case("jpeg said to be png", lambda: files["jpeg"], "ok", None, wrong))
    octets = (("content-type", b"application/octet-stream"),)
    cases.append(Case("jpeg said to be octets", lambda: files["jpeg"], "ok", None, octets))
    return cases


def _broken_images(height: int, width: int) -> list[Case]:
    colour = picture(height, width)
    jpeg, flat = encode(colour, "JPEG"), encode(colour, "PNG")
    frames = [picture(height, width, seed=n) for n in range(3)]
    film = {"save_all": True, "append_images": frames[1:]}
    text = (("content-type", b"text/plain; charset=utf-8"),)
    return [
        Case("empty value", lambda: b""),
        Case("text", lambda: b"hello, is this the image topic?"),
        Case("base64", lambda: b"iVBORw0KGgoAAAANSUhEUgAAAAE="),
        Case("noise", lambda: bytes(range(128, 256)) * 4),
        Case("truncated jpeg", lambda: jpeg[: len(jpeg) * 3 // 4]),
        Case("truncated png", lambda: flat[: len(flat) * 3 // 4]),
        Case("png cut in its header", lambda: flat[:20]),
        Case("png that claims 60000x60000", lambda: png(60_000, 60_000, b"\0" * 1000)),
        # 400 million true pixels in 50 kB
        Case("png bomb", lambda: png(20_000, 20_000, b"\0" * (2501 * 20_000), depth=1)),
        Case("0x0 png", lambda: png(0, 0, b"")),
        Case("animated gif", lambda: encode(frames[0], "GIF", **film)),
        Case("animated png", lambda: encode(frames[0], "PNG", **film)),
        Case("animated webp", lambda: encode(frames[0], "WEBP", **film)),
        Case("bmp", lambda: encode(colour, "BMP")),
        Case("60 MB", lambda: jpeg + bytes(60_000_000)),
        Case("wrong content-type", lambda: jpeg, headers=text),
    ]


def corpus(shape: tuple[int, int, int], *, cropped: bool = False) -> list[Case]:
    """Return the cases for a pipeline with `decode: image` whose samples are `shape`.

    `cropped`: it has resize and crop, so that an image of any size fits.
    """
    channels, height, width = shape
    large = encode(picture(2 * height, 3 * width), "PNG")
    outcome: Literal["ok", "error"] = "ok" if cropped else "error"
    other = Case("image of another size", lambda: large, outcome, None if cropped else "schema")
    fine, broken = _fine_images(channels, height, width), _broken_images(height, width)
    return [*fine, other, *broken, *_bad_tensors(shape), _tombstone()]


def tensor_corpus(shape: tuple[int, ...]) -> list[Case]:
    """Return the cases for a pipeline with `decode: tensor` whose samples are float32 `shape`."""
    said = (("content-type", TENSOR_TYPE),)
    image = encode(picture(8, 8), "PNG")
    return [
        Case("tensor", lambda: tensor_message(shape), "ok", None, said),
        *_bad_tensors(shape),
        Case("image to a tensor pipeline", lambda: image, "error", "schema"),
        _tombstone(),
    ]


def _bad_tensors(shape: tuple[int, ...]) -> list[Case]:
    double = np.zeros(shape, np.float64)
    messages = {
        "wrong shape": tensor_message((*shape[:-1], shape[-1] + 1)),
        "wrong rank": tensor_message((1, *shape)),
        "wrong dtype": tensor_message(shape, double, dtype="F64"),
        "unknown dtype": tensor_message(shape, dtype="F3"),
        "too few bytes": tensor_message(shape, data=b"\0" * 4),
        "negative size": tensor_message(shape, shape=[-1, *shape[1:]]),
        "no tensor": tensor_message(shape, tensor=None),
        "no shape": tensor_message(shape, shape=None),
        "no data": tensor_message(shape, data=None),
        "unknown version": tensor_message(shape, v=99),
        "no map": b"\x93\x01\x02\x03",
        "no msgpack": b"\xc1\xc1\xc1",
        "cut off": tensor_message(shape)[:-5],
        "empty": b"",
    }
    said = (("content-type", TENSOR_TYPE + b"; v=1"),)
    return [
        Case(f"tensor: {name}", lambda v=v: v, "error", "schema", said)  # type: ignore[misc]
        for name, v in messages.items()
    ]


def _tombstone() -> Case:
    return Case("tombstone", lambda: None, "none", None)


CORPUS = corpus((1, 8, 8))
TENSORS = tensor_corpus((1, 8, 8))
