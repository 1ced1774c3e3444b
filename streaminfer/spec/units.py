"""Single values as people write them: sizes, durations, names, topics, devices, import strings.

Each is an annotated type: pydantic parses it, says what it expected, and puts its pattern into the
JSON Schema. Sizes are bytes, durations seconds.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator

from streaminfer.ranges import PATTERN, Range

__all__ = [
    "Channels",
    "DType",
    "Device",
    "Devices",
    "Duration",
    "Factory",
    "FileName",
    "Labels",
    "Name",
    "Positive",
    "Prefix",
    "Shares",
    "Sides",
    "Size",
    "Topic",
    "Version",
    "at_least",
    "parse_duration",
    "parse_size",
]

SIZE = r"^\s*(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?))?B?\s*$"
DURATION = r"^\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(us|µs|ms|s|m|min|h|d)?\s*$"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
TOPIC = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,248}$"
PREFIX = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DEVICE = r"^(cpu|mps|cuda(:\d+)?)$"
FACTORY = r"^([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^:]+\.py):[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_size(value: object) -> int:
    """Return bytes of 900, "900kB", "16MB" (10^6) or "16MiB" (2^20). Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if not isinstance(value, str) or not (match := re.match(SIZE, value)):
        raise ValueError('expected a size as 900000, "900kB", "16MB" or "16MiB"')
    number, unit, binary = match.groups()
    power = " kMGT".index(unit.replace("K", "k")) if unit else 0
    return round(float(number) * float((1024 if binary else 1000) ** power))


def parse_duration(value: object) -> float:
    """Return seconds of 0.004, "4ms", "100us", "10m". Raises ValueError."""
    if isinstance(value, str) and (match := re.match(DURATION, value)):
        value = round(float(match[1]) * SECONDS[match[2] or "s"], 12)  # 9ms is 0.009
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError('expected a duration as 0.5 (seconds), "4ms", "30s" or "10m"')
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("expected a duration of 0 or more")
    return float(value)


def _like(pattern: str, expected: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):  # match() takes a line's end at the end
            raise ValueError(f"expected {expected}")
        return value

    return AfterValidator(check)


def at_least(least: float) -> AfterValidator:
    """Return a lower bound that leaves a Size's or a Duration's JSON Schema as it is."""

    def check(value: float) -> float:
        if value < least:
            raise ValueError(f"expected at least {least:g}")
        return value

    return AfterValidator(check)


def _version(value: object) -> object:
    # YAML reads 1.10 as the number 1.1: a float's digits are not what was written
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _channels(value: object) -> object:
    # the environment has texts only, and a Literal of numbers takes none
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _labels(value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    words = [_version(v) for v in value] if isinstance(value, list | tuple) else []
    if not words or not all(isinstance(word, str) for word in words):
        raise ValueError('expected the path of a text file, "imagenet", or a list of texts')
    return tuple(words)


def _devices(value: object) -> object:
    one = re.compile(DEVICE)
    words = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not words or not all(isinstance(word, str) and one.fullmatch(word) for word in words):
        raise ValueError("expected cpu, cuda, cuda:N or mps, or a list of them")
    return words if isinstance(value, list | tuple) else value


def _shares(value: object) -> object:
    if value in ("equal", "measured"):
        return value
    try:
        numbers = tuple(
            float(share)
            for share in (value if isinstance(value, list | tuple) else ())
            if not isinstance(share, bool)
        )
    except (TypeError, ValueError):
        numbers = ()
    fits = isinstance(value, list | tuple) and len(numbers) == len(value)
    if not numbers or not fits or not all(math.isfinite(n) and n > 0 for n in numbers):
        raise ValueError('expected "measured", "equal", or a list of numbers above 0')
    return numbers


def _sides(value: object) -> int | Range:
    if isinstance(value, Range):
        return value
    if isinstance(value, str) and not value.strip().isdecimal():
        return Range.parse(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('expected a whole number, or a range as "64..512" or "64..512/32"')
    if int(value) < 1:
        raise ValueError("expected at least 1")
    return int(value)


def _plain(value: int | Range) -> int | str:
    return str(value) if isinstance(value, Range) else value


Size = Annotated[
    int,
    BeforeValidator(parse_size, json_schema_input_type=int | Annotated[str, Field(pattern=SIZE)]),
]
Duration = Annotated[
    float,
    BeforeValidator(
        parse_duration, json_schema_input_type=float | Annotated[str, Field(pattern=DURATION)]
    ),
]
Name = Annotated[
    str,
    _like(NAME, "a name of at most 64 letters, digits, - and _"),
    Field(json_schema_extra={"pattern": NAME}),
]
Topic = Annotated[
    str,
    _like(TOPIC, "a topic's name of letters, digits, . - and _"),
    Field(json_schema_extra={"pattern": TOPIC}),
]
Prefix = Annotated[
    str,
    _like(PREFIX, "a prefix of at most 64 letters, digits, . - and _"),
    Field(json_schema_extra={"pattern": PREFIX}),
]
Device = Annotated[
    str,
    _like(DEVICE, "cpu, cuda, cuda:N or mps"),
    Field(json_schema_extra={"pattern": DEVICE}),
]
Devices = Annotated[
    str | tuple[str, ...],
    BeforeValidator(
        _devices, json_schema_input_type=Device | Annotated[tuple[Device, ...], Field(min_length=1)]
    ),
]
Shares = Annotated[
    Literal["measured", "equal"] | tuple[float, ...],
    BeforeValidator(
        _shares,
        json_schema_input_type=Literal["measured", "equal"]
        | Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)],
    ),
]
Factory = Annotated[
    str,
    _like(FACTORY, 'an import string as "package.module:attr" or "folder/file.py:attr"'),
    Field(json_schema_extra={"pattern": FACTORY}),
]
Positive = Annotated[int, Field(ge=1)]
Sides = Annotated[
    int | Range,
    PlainValidator(
        _sides, json_schema_input_type=Positive | Annotated[str, Field(pattern=PATTERN)]
    ),
    PlainSerializer(_plain),
]  # of one dimension of a sample: one size, or those of a range
FileName = Annotated[str, Field(min_length=1)]
Version = Annotated[str, BeforeValidator(_version, json_schema_input_type=str | int)]
Labels = Annotated[
    str | tuple[str, ...] | None,
    BeforeValidator(_labels, json_schema_input_type=str | tuple[str | int, ...] | None),
]
DType = Literal[
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
]  # torch's names of what may cross a cut
Channels = Annotated[Literal[1, 3], BeforeValidator(_channels)]
