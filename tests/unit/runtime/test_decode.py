"""What a user loses: right pixels for every picture that the web holds, and a worker that lives."""

from __future__ import annotations

import io
import random
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import transforms

from streaminfer.errors import DecodeError
from streaminfer.runtime.decode import decode_image
from streaminfer.spec import InputSpec
from tests.corpus import CORPUS, Case, corpus, encode, picture, png

AS_IT_IS = InputSpec(channels=3)
GREY = InputSpec(channels=1)
IMAGENET = InputSpec(resize=256, crop=224)
Pixels = NDArray[np.uint8]


def pillow(value: bytes, mode: str = "RGB") -> Image.Image:
    """Read as torchvision's image folder does."""
    return Image.open(io.BytesIO(value)).convert(mode)


def planes(image: Image.Image) -> Pixels:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def refusal(value: bytes, spec: InputSpec = AS_IT_IS, content_type: str | None = None) -> str:
    with pytest.raises(DecodeError) as caught:
        decode_image(value, content_type, spec)
    return str(caught.value)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_every_odd_record_has_its_outcome(case: Case) -> None:
    value = case.value
    if value is None:
        return  # a tombstone holds nothing to decode
    if case.outcome == "ok":
        pixels = decode_image(value, case.content_type, GREY)
        assert pixels.shape == (1, 8, 8)
        assert pixels.dtype == np.uint8
    elif case.name == "image of another size":  # the pipeline's to refuse: it knows the model
        assert decode_image(value, case.content_type, GREY).shape == (1, 16, 24)
    else:
        assert len(refusal(value, GREY, case.content_type)) < 300


def test_odd_records_of_a_colour_pipeline_have_their_shape() -> None:
    spec = InputSpec(resize=40, crop=32)
    fine = [case for case in corpus((3, 30, 50), cropped=True) if case.outcome == "ok"]
    assert len(fine) > 10
    for case in fine:
        assert decode_image(case.value or b"", case.content_type, spec).shape == (3, 32, 32)


SIZES = [(256, 256), (375, 500), (500, 375), (257, 256), (100, 60), (224, 301), (31, 1000)]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pixels_are_torchvisions(height: int, width: int, kind: str) -> None:
    value = encode(picture(height, width), kind)
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    expected = planes(reference(pillow(value)))
    assert np.array_equal(decode_image(value, None, IMAGENET), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(15, 70), st.integers(15, 70), st.integers(15, 40), st.integers(1, 15))
def test_sizes_are_rounded_as_torchvision_does(h: int, w: int, resize: int, crop: int) -> None:
    value = encode(picture(h, w, "L"), "PNG")
    for spec, reference in (
        (
            InputSpec(channels=1, resize=resize, crop=crop),
            transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop)]),
        ),
        (InputSpec(channels=1, crop=crop), transforms.CenterCrop(crop)),
        (InputSpec(channels=1, resize=resize), transforms.Resize(resize)),
    ):
        expected = planes(reference(pillow(value, "L")))
        assert np.array_equal(decode_image(value, None, spec), expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}, {"quality": 5}])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (1, "L")])
def test_the_fast_road_gives_the_slow_roads_pixels(
    options: dict[str, object], subsampling: int, channels: int, mode: str
) -> None:
    value = encode(picture(61, 47), "JPEG", subsampling=subsampling, **options)
    spec = AS_IT_IS if channels == 3 else GREY
    assert np.array_equal(decode_image(value, None, spec), planes(pillow(value, mode)))


def test_the_array_is_our_own() -> None:
    for kind in ("JPEG", "PNG"):
        for mode in ("RGB", "L"):
            pixels = decode_image(encode(picture(9, 9, mode), kind), None, AS_IT_IS)
            assert pixels.flags.c_contiguous
            assert pixels.flags.writeable
            assert pixels.flags.owndata


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    pixels = decode_image(encode(Image.fromarray(deep), "PNG"), None, GREY)
    assert np.array_equal(pixels[0], deep >> 8)


@pytest.mark.parametrize("colour, samples", [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha_keep_their_high_byte(colour: int, samples: int) -> None:
    pixel = [0xFFFF, 0x80FF, 0x0100, 0x1234][:samples]
    row = b"\0" + struct.pack(f">{samples}H", *pixel) * 2
    pixels = decode_image(png(2, 2, row * 2, depth=16, colour=colour), None, AS_IT_IS)
    expected = [0xFF] * 3 if samples == 2 else [0xFF, 0x80, 0x01]
    assert pixels[:, 0, 0].tolist() == expected


def test_one_bit_is_black_and_white() -> None:
    checks = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8))
    pixels = decode_image(encode(checks.convert("1"), "PNG"), None, GREY)
    assert np.array_equal(pixels[0], np.asarray(checks))


@pytest.mark.parametrize("transparency", [None, 3, b"\x00\x80\xff"])
def test_a_palette_gives_its_colours(transparency: int | bytes | None) -> None:
    colours = picture(20, 20).quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    value = encode(colours, "PNG", **options)
    assert np.array_equal(decode_image(value, None, AS_IT_IS), planes(colours.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped(mode: str) -> None:
    image = picture(12, 12, mode)
    image.putalpha(picture(12, 12, "L", seed=1))
    value = encode(image, "PNG")
    assert np.array_equal(decode_image(value, None, AS_IT_IS), planes(pillow(value)))


def test_cmyk_has_its_colours_and_not_their_negative() -> None:
    image = picture(32, 32)
    value = encode(image.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    seen = decode_image(value, None, AS_IT_IS).astype(int)
    assert np.abs(seen - planes(image)).mean() < 3


def test_ycck_has_its_colours() -> None:
    """Green ink as Adobe stores it: inverted, then Y 105, Cb 212, Cr 235, and K apart."""
    stored = (105, 212, 235, 255)
    inverted = [Image.new("L", (16, 16), 255 - v) for v in stored]  # Pillow inverts on writing
    value = bytearray(encode(Image.merge("CMYK", inverted), "JPEG", quality=100))
    value[value.index(b"Adobe") + 11] = 2  # the transform: these four channels are YCCK
    seen = decode_image(bytes(value), None, AS_IT_IS)[:, 8, 8].astype(int)
    assert np.abs(seen - [0, 255, 0]).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_stands_as_its_camera_says(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    value = encode(picture(20, 31), kind, exif=exif)
    with Image.open(io.BytesIO(value)) as stored:
        expected = planes(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(decode_image(value, None, AS_IT_IS), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow says so, once, and goes on
@pytest.mark.parametrize("tiff", [b"", b"garbage", b"II*\0\xff\xff\xff\xff"])
def test_a_damaged_exif_note_does_not_damage_the_picture(tiff: bytes) -> None:
    value = encode(picture(8, 8), "JPEG", exif=b"Exif\0\0" + tiff)
    assert np.array_equal(decode_image(value, None, AS_IT_IS), planes(pillow(value)))


def claim(value: bytes, kind: str, side: int) -> bytes:
    """Write side x side into the header of a 16x16 image."""
    changed = bytearray(value)
    if kind == "PNG":
        return png(side, side, b"\0" * 100)
    if kind == "JPEG":
        struct.pack_into(">HH", changed, value.index(b"\xff\xc0") + 5, side, side)
    elif value[12:16] == b"VP8X":
        changed[24:30] = (side - 1).to_bytes(3, "little") * 2
    elif value[12:16] == b"VP8L":
        kept = int.from_bytes(value[21:25], "little") >> 28 << 28
        changed[21:25] = (kept | (side - 1) << 14 | side - 1).to_bytes(4, "little")
    else:
        struct.pack_into("<HH", changed, 26, side, side)
    return bytes(changed)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("JPEG", {}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0MM\0*"}),
    ],
)
def test_a_size_over_the_limit_is_refused_by_the_header(
    kind: str, options: dict[str, object]
) -> None:
    value = encode(picture(16, 16), kind, **options)
    assert decode_image(value, None, AS_IT_IS).shape == (3, 16, 16)
    text = refusal(claim(value, kind, 16_000))
    assert "16000x16000" in text
    assert "50,000,000" in text


def test_limits_hold_to_the_pixel_and_the_byte() -> None:
    value = encode(picture(20, 10), "PNG")
    fits = InputSpec(max_pixels=200, max_bytes=len(value))
    assert decode_image(value, None, fits).shape == (3, 20, 10)
    assert "199" in refusal(value, InputSpec(max_pixels=199))
    assert f"{len(value) - 1:,}" in refusal(value, InputSpec(max_bytes=len(value) - 1))


def test_a_line_of_pixels_is_not_scaled_to_a_bomb() -> None:
    value = encode(Image.new("L", (10_000, 1)), "PNG")
    assert "too long" in refusal(value, IMAGENET.model_copy(update={"max_pixels": 500_000}))


def test_scans_without_end_are_refused() -> None:
    value = encode(picture(16, 16), "JPEG", progressive=True)
    scan = value[value.rindex(b"\xff\xda") : -2]
    assert "scans" in refusal(value[:-2] + scan * 200 + value[-2:])


@pytest.mark.parametrize(
    "value, words",
    [
        (b"", "empty"),
        (b"hello", "text ('hello')"),
        (encode(picture(8, 8), "GIF"), "a GIF image"),
        (encode(picture(8, 8), "TIFF"), "a TIFF image"),
        (encode(picture(8, 8), "BMP"), "a BMP image"),
        (b"\0\0\0\x20ftypavif", "an AVIF image"),
        (b"/9j/4AAQSkZJRg", "base64 text of a JPEG"),
        (b"\xff\xfe\xfd\xfc\xfb", "first bytes ff fe fd fc fb"),
    ],
)
def test_what_is_no_image_is_named_with_what_is_accepted(value: bytes, words: str) -> None:
    text = refusal(value)
    assert words in text
    assert "JPEG, PNG or WebP" in text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_truncation_is_refused(kind: str) -> None:
    value = encode(picture(16, 16), kind)
    for length in range(1, len(value) * 9 // 10, 5):
        assert refusal(value[:length])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_films_are_refused_and_films_of_one_frame_are_not(kind: str) -> None:
    still, other = picture(8, 8), picture(8, 8, seed=1)
    film = encode(still, kind, save_all=True, append_images=[other])
    assert "animated" in refusal(film)
    one = encode(still, kind, save_all=True)
    assert decode_image(one, None, AS_IT_IS).shape == (3, 8, 8)


def test_a_camera_file_of_two_pictures_gives_the_first() -> None:
    first, second = picture(16, 16), picture(16, 16, seed=1)
    value = encode(first, "MPO", save_all=True, append_images=[second])
    assert np.array_equal(decode_image(value, None, AS_IT_IS), planes(pillow(value)))


@pytest.mark.parametrize(
    "said, fine",
    [
        (None, True),
        ("", True),
        ("image/jpeg", True),
        ("IMAGE/PNG; q=1", True),
        ("application/octet-stream", True),
        ("text/plain; charset=utf-8", False),
        ("application/vnd.streaminfer+msgpack", False),
        ("application/json", False),
    ],
)
def test_content_type_is_believed_only_when_it_is_no_image(said: str | None, fine: bool) -> None:
    value = encode(picture(8, 8), "PNG")
    if fine:
        assert decode_image(value, said, AS_IT_IS).shape == (3, 8, 8)
    else:
        assert str(said).partition(";")[0] in refusal(value, AS_IT_IS, said)


def test_an_image_smaller_than_the_crop_is_refused() -> None:
    assert "smaller than the crop" in refusal(encode(picture(8, 8), "PNG"), InputSpec(crop=9))


def test_threads_see_what_one_thread_sees() -> None:
    values = [encode(picture(40, 50, seed=n), kind) for n in range(8) for kind in ("JPEG", "PNG")]
    alone = [decode_image(v, None, IMAGENET) for v in values]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda v: decode_image(v, None, IMAGENET), values * 2))
    assert all(map(np.array_equal, alone * 2, together))


def mutate(value: bytes, chance: random.Random) -> bytes:
    changed = bytearray(value)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(changed) or 1)
        match chance.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[at : at + chance.randint(1, 20)]
            case 2:
                changed[at:at] = chance.randbytes(chance.randint(1, 20))
            case 3:
                other = chance.randrange(len(changed) or 1)
                changed[at:at] = changed[other : other + chance.randint(1, 60)]
            case 4 if chance.random() < 0.3:
                del changed[at:]
            case _:  # headers sit in front: most of what goes wrong, goes wrong there
                changed[at % 64 : at % 64 + 1] = bytes([chance.randrange(256)])
    return bytes(changed)


@pytest.mark.parametrize("seed", range(6))
def test_no_bytes_bring_the_worker_down(seed: int) -> None:
    """500 mutants each: an array or a DecodeError, and no warning about bombs."""
    chance = random.Random(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [
        encode(picture(33, 20), "JPEG", exif=exif),
        encode(picture(33, 20, "L"), "JPEG"),
        encode(picture(33, 20), "JPEG", progressive=True),
        encode(picture(33, 20, "CMYK"), "JPEG"),
        encode(picture(33, 20), "PNG"),
        encode(picture(33, 20).quantize(8), "PNG", transparency=b"\x00\x80"),
        encode(picture(33, 20), "WEBP", exif=exif),
        encode(picture(33, 20, "RGBA"), "WEBP", lossless=True),
        encode(picture(33, 20), "GIF"),
    ]
    spec = InputSpec(resize=24, crop=20, channels=chance.choice([1, 3]), max_pixels=1_000_000)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for n in range(500):
            try:
                pixels = decode_image(mutate(seeds[n % len(seeds)], chance), None, spec)
            except DecodeError:
                continue
            assert pixels.shape == (spec.channels, 20, 20)
    assert not [w for w in heard if issubclass(w.category, Image.DecompressionBombWarning)]
