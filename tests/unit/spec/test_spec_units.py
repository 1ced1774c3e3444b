"""Sizes and durations mean what people think they mean; names are safe where they end up."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from streaminfer.spec import parse_duration, parse_size
from streaminfer.spec.units import (
    DEVICE,
    DURATION,
    FACTORY,
    NAME,
    PREFIX,
    SIZE,
    TOPIC,
    Device,
    Name,
    Prefix,
    Topic,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (900_000, 900_000),
        ("900000", 900_000),
        ("900kB", 900_000),
        ("900KB", 900_000),
        ("16MB", 16_000_000),
        ("16 MB", 16_000_000),
        ("16MiB", 16 * 2**20),
        ("512Mi", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("1TB", 10**12),
        ("12B", 12),
    ],
)
def test_a_size_in_any_unit_is_the_same_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "16mb!", "-1", -1, "1e9", 1.5, True, None, [1], "16 bytes"]
)
def test_a_size_that_is_none_is_refused_with_examples(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size as 900000"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0.004, 0.004),
        (1, 1.0),
        ("4ms", 0.004),
        ("100us", 1e-4),
        ("100µs", 1e-4),
        ("1s", 1.0),
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ("10m", 600.0),
        ("10min", 600.0),
        ("2h", 7200.0),
        ("1d", 86400.0),
        ("0", 0.0),
    ],
)
def test_a_duration_in_any_unit_is_the_same_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", "ms", "4mss", "-1s", -1, float("nan"), float("inf"), "inf", True, None, "4 fortnights"],
)
def test_a_duration_that_is_none_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@given(st.integers(0, 10**6), st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_whole_sizes_lose_no_byte(number: int, unit: str) -> None:
    base = 1024 if "i" in unit else 1000
    assert parse_size(f"{number}{unit}") == number * base ** " KMG".index(
        unit[0].upper().replace("B", " ")
    )


@given(st.text(max_size=12))
def test_any_text_is_a_value_or_a_clear_refusal(text: str) -> None:
    for parse in (parse_size, parse_duration):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert str(error).startswith("expected a ")


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (
            NAME,
            ["a", "s0", "res-net_50", "A" * 64],
            ["", "a.b", "a/b", "..", "-a", "a b", "ä", "A" * 65],
        ),
        (TOPIC, ["images", "team.images-1_x", "__x"], ["", ".", "..", "a b", "a/b", "x" * 250]),
        (PREFIX, ["si", "team.si"], ["", ".si", "a b"]),
        (
            DEVICE,
            ["cpu", "cuda", "cuda:0", "cuda:12", "mps"],
            ["gpu", "cuda:", "cuda:a", "cuda0", "cpu:0"],
        ),
        (
            FACTORY,
            ["torchvision.models:resnet50", "model.py:build", "../m/model.py:Net.make", "m:f"],
            ["resnet50", "a.b", ":f", "a:", "a-b:f", "model.txt/x:f", "a:b:c", "1a:f"],
        ),
        (SIZE, ["1", "16MB"], ["MB", "16XB"]),
        (DURATION, ["1", "4ms"], ["ms", "4x"]),
    ],
)
def test_patterns(pattern: str, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not re.fullmatch(pattern, text)] == []
    assert [text for text in bad if re.fullmatch(pattern, text)] == []


@pytest.mark.parametrize("kind", [Name, Topic, Prefix, Device])
def test_a_line_end_does_not_slip_into_a_topics_name(kind: type[str]) -> None:
    adapter = TypeAdapter(kind)
    assert adapter.validate_python("cpu") == "cpu"
    with pytest.raises(ValueError, match="expected"):
        adapter.validate_python("cpu\n")
