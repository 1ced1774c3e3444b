"""From the bytes of one input record to the pixels of one sample.

    value ─▶ what is it? ─▶ how large? ─▶ plain JPEG ─▶ simplejpeg ─┐
             magic bytes    header only   all else   ─▶ Pillow ─────┴▶ upright ─▶ resize ─▶ crop

Pixels are those that torchvision's transforms give on a Pillow image, to the bit, so a model sees
what it saw in training: transparency is dropped, 16 bits keep their high byte. Pure and free of
shared state: it runs in a pool of threads.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from streaminfer.errors import DecodeError, SchemaError
from streaminfer.ranges import Range
from streaminfer.spec import InputSpec

__all__ = ["Ranges", "decode_image"]

Pixels = NDArray[np.uint8]
Ranges = Sequence[Range | None]  # of channels, height and width; () where the model takes one size

ACCEPTED = "send a still image as raw JPEG, PNG or WebP bytes"
# The readers by name, not Image.open: that warns of "decompression bombs" by a limit of its own,
# which is global and is not the user's.
READERS: dict[str, type[ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
}
# A progressive JPEG decodes the whole picture once per scan, and an empty scan costs ten bytes:
# 10 MB could keep a thread busy for an hour. Real encoders write about ten.
MAX_SCANS = 100
ORIENTATION = 0x0112  # EXIF tag; 1 = upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"/9j/", "base64 text of a JPEG image"),
    (b"iVBORw0KGgo", "base64 text of a PNG image"),
    (b"UklGR", "base64 text of a WebP image"),
    (b"data:image/", "a data: URL"),
    (b"<svg", "an SVG image"),
)
HEAD = 1 << 16  # bytes in which a JPEG's segments of metadata begin
BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image", b"heic": "a HEIC image"}


def decode_image(
    value: bytes, content_type: str | None, spec: InputSpec, ranges: Ranges = ()
) -> Pixels:
    """Decode, resize and crop one image: uint8 [C, H, W], contiguous and writable.

    C is `spec.channels`; H and W are the picture's own where `spec` sets neither resize nor crop.
    Where `ranges` have steps, they are the nearest sizes of these: nothing is padded.
    The magic bytes decide the format, whatever image/* `content_type` says.

    Raises:
        DecodeError: The value is no JPEG, PNG or WebP, is damaged, or is beyond the limits.
        SchemaError: Its sides are not in the ranges.
    """
    _check_content_type(content_type)
    if not value:
        raise DecodeError(f"the value is empty: {ACCEPTED}")
    if len(value) > spec.max_bytes:
        raise DecodeError(
            f"the value has {len(value):,} bytes, the limit is {spec.max_bytes:,}: "
            "send a smaller image or raise input.max_bytes"
        )
    kind = _recognise(value)
    if kind not in READERS:
        raise DecodeError(f"the value is {kind}: {ACCEPTED}")
    try:
        pixels = _fit(_read(value, kind, spec), spec, ranges)
    except (DecodeError, SchemaError):
        raise
    except Exception as error:  # on damaged bytes Pillow raises nearly anything
        raise DecodeError(f"the {kind} image is damaged ({error}): send the whole file") from error
    return _planes(pixels, spec.channels)


def _check_content_type(content_type: str | None) -> None:
    mime = (content_type or "").partition(";")[0].strip().lower()
    if mime and mime != "application/octet-stream" and not mime.startswith("image/"):
        raise DecodeError(
            f"content-type {mime[:80]!r} is no image: {ACCEPTED}, "
            "with content-type image/* or none at all"
        )


def _recognise(value: bytes) -> str:
    """Name what the bytes are: a key of READERS, or words for a message."""
    if value[:4] == b"RIFF" and value[8:12] == b"WEBP":
        return "WebP"
    if value[4:8] == b"ftyp":
        return BRANDS.get(value[8:12], "a video or a HEIF image")
    for magic, name in MAGIC:
        if value.startswith(magic):
            return name
    start = value[:24].decode("ascii", errors="replace")
    if all(c.isprintable() or c.isspace() for c in start) and "\ufffd" not in start:
        return f"text ({start!r})"
    return f"in no image format known here (first bytes {value[:8].hex(' ')})"


def _read(value: bytes, kind: str, spec: InputSpec) -> Pixels:
    """Return the picture upright and whole: [H, W] grey or [H, W, 3] colour."""
    if kind == "JPEG":
        if value.count(b"\xff\xda") > MAX_SCANS:
            raise DecodeError(
                f"the JPEG image has over {MAX_SCANS} scans: save it again as baseline"
            )
        head = value[:HEAD]
        if b"Exif\0" not in head and b"MPF\0" not in head:  # upright, and one picture
            plain = _plain_jpeg(value, spec)
            if plain is not None:
                return plain
    else:
        _check_size(_claimed_size(value, kind), spec)
    image = READERS[kind](io.BytesIO(value))
    _check_size(image.size, spec)
    if getattr(image, "n_frames", 1) > 1:
        raise DecodeError(f"the {kind} image is animated: {ACCEPTED}")
    orientation = _orientation(image)
    if kind == "JPEG" and orientation == 1:
        plain = _plain_jpeg(value, spec)
        if plain is not None:
            return plain
    image.load()
    return np.asarray(_upright(_eight_bit(image), orientation))


def _claimed_size(value: bytes, kind: str) -> tuple[int, int]:
    """Read a PNG's or WebP's (width, height): Pillow's WebP reader allocates by it on opening.

    PNG     signature 8 │ length 4 │ "IHDR" │ width u32 │ height u32            (big endian)
    WebP    "RIFF" size "WEBP" │ "VP8X" size 4 │ flags 4 │ width-1 u24 │ height-1 u24
                               │ "VP8L" size 4 │ 0x2f │ width-1 14 bits │ height-1 14 bits
                               │ "VP8 " size 4 │ frame tag 3 │ 9d 01 2a │ width u14 │ height u14
    """
    if kind == "PNG":
        return _unpack(">II", value, 16)
    if value[12:16] == b"VP8X":
        width = int.from_bytes(value[24:27], "little") + 1
        return width, int.from_bytes(value[27:30], "little") + 1
    if value[12:16] == b"VP8L":
        bits = int.from_bytes(value[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = _unpack("<HH", value, 26)
    return width & 0x3FFF, height & 0x3FFF


def _unpack(layout: str, value: bytes, at: int) -> tuple[int, int]:
    try:
        first, second = struct.unpack_from(layout, value, at)
    except struct.error:
        raise DecodeError("the image ends within its header: send the whole file") from None
    return first, second


def _check_size(size: tuple[int, int], spec: InputSpec) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DecodeError(f"the image has no pixels ({width}x{height})")
    if width * height > spec.max_pixels:
        raise DecodeError(
            f"the image has {width}x{height} pixels, the limit is {spec.max_pixels:,}: "
            "send a smaller image or raise input.max_pixels"
        )


def _orientation(image: ImageFile) -> int:
    """Return the EXIF orientation; 1 where there is none that can be read."""
    if "exif" not in image.info:
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        return int(exif.get(ORIENTATION, 1))
    except Exception:  # a damaged note beside the picture is no damaged picture
        return 1


def _plain_jpeg(value: bytes, spec: InputSpec) -> Pixels | None:
    """Decode a grey, YCbCr or RGB JPEG; None where Pillow is to judge."""
    try:
        # The parser that allocates is the one whose size is checked: Pillow has another.
        height, width, colours, _ = simplejpeg.decode_jpeg_header(value)
        if colours not in ("Gray", "YCbCr", "RGB"):
            return None
        _check_size((width, height), spec)
        pixels: Pixels = simplejpeg.decode_jpeg(value, "GRAY" if colours == "Gray" else "RGB")
    except ValueError:
        return None
    return pixels[:, :, 0] if colours == "Gray" else pixels


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return the image in mode L or RGB, 8 bits a channel."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode == "P":  # straight to RGB, Pillow warns of palettes with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _fit(pixels: Pixels, spec: InputSpec, ranges: Ranges) -> Pixels:
    """Convert to grey, resize and crop as `spec` asks: [H, W] or [H, W, 3]."""
    grey = spec.channels == 1 and pixels.ndim == 3
    size = _in_range(_resized(pixels.shape[1], pixels.shape[0], spec), ranges)
    if grey or size != (pixels.shape[1], pixels.shape[0]):
        image: Any = Image.fromarray(pixels)
        if grey:
            image = image.convert("L")
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    return pixels if spec.crop is None else _crop(pixels, spec.crop)


def _resized(width: int, height: int, spec: InputSpec) -> tuple[int, int]:
    """Return the size with the shorter side at `spec.resize`, rounded as torchvision's Resize."""
    if spec.resize is None:
        return width, height
    longer = int(spec.resize * max(width, height) / min(width, height))
    size = (spec.resize, longer) if width <= height else (longer, spec.resize)
    if longer * spec.resize > spec.max_pixels:  # 1x1,000,000 pixels are few until they are scaled
        raise DecodeError(
            f"the image ({width}x{height}) is too long: resized it would be {size[0]}x{size[1]}, "
            f"the limit is {spec.max_pixels:,} pixels"
        )
    return size


def _in_range(size: tuple[int, int], ranges: Ranges) -> tuple[int, int]:
    """Return the nearest (width, height) that the model takes: at most half a step is lost."""
    if not ranges:
        return size
    _, height, width = ranges
    fitting = [
        (given.nearest(n) if given else n) for n, given in zip(size, (width, height), strict=True)
    ]
    for n, given, what in zip(fitting, (width, height), ("width", "height"), strict=True):
        if given and n not in given:
            raise SchemaError(
                f"the image is {size[0]}x{size[1]}; its {what} must be in {given}: send another "
                "size, or set input.resize, which scales the shorter side"
            )
    return fitting[0], fitting[1]


def _crop(pixels: Pixels, side: int) -> Pixels:
    """Cut the centre out, with torchvision's CenterCrop's rounding: half to even."""
    height, width = pixels.shape[:2]
    if min(height, width) < side:
        raise DecodeError(
            f"the image ({width}x{height}) is smaller than the crop of {side}x{side}: "
            "send a larger image or set input.resize"
        )
    top, left = round((height - side) / 2), round((width - side) / 2)
    return pixels[top : top + side, left : left + side]


def _planes(pixels: Pixels, channels: int) -> Pixels:
    """Return [C, H, W] in memory of its own: Pillow's is read-only."""
    planes = np.empty((channels, *pixels.shape[:2]), np.uint8)
    planes[:] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return planes
