"""What is planned: a pipeline file, or a model named by import string → a pipeline of one stage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from streaminfer.errors import ConfigError
from streaminfer.planning.source import file_of_factory
from streaminfer.ranges import Range
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load

__all__ = ["Example", "Subject", "parse_examples", "subject"]

SIZE = r"\d+(?:\.\.\d+(?:/\d+)?)?"
EXAMPLE = rf"({SIZE}(?:x{SIZE})*)(?::([A-Za-z0-9_]+)(?:<(\d+))?)?"
LEAST = 2  # whole numbers are 0 or 1 unless told: what every vocabulary and mask has
IMAGENET = 224  # the side of `--example` where a model is named without one


@dataclass(frozen=True)
class Example:
    """One input of the model: the shape of a sample without the batch, and its dtype.

    `max`: whole numbers are below it.
    """

    shape: tuple[int | Range, ...]
    dtype: str = "float32"
    max: int | None = None


@dataclass(frozen=True)
class Subject:
    """A pipeline, and the document that a planned file is made from."""

    spec: PipelineSpec
    document: Mapping[str, Any]  # as written, before environment and defaults
    folder: Path  # where its relative paths start


def subject(text: str, kwargs: str = "{}", example: str = "") -> Subject:
    """Read `PIPELINE.yaml`, `package.module:factory` or `path.py:name`.

    Args:
        text: what the user named.
        kwargs: JSON, arguments of the factory.
        example: "3x224x224[:dtype]"; several inputs are separated by commas; a size may be a
            range, "3x64..512x64..512/32".

    Raises:
        ConfigError: no such file or model, or the other arguments don't fit.
    """
    if text.endswith((".yaml", ".yml")):
        if example or kwargs != "{}":
            raise ConfigError(
                "a pipeline file names its model's arguments and example itself",
                where="--example" if example else "--kwargs",
                hint="leave the flag out, or name the model instead of the file",
            )
        path = Path(text)
        spec = load(path)
        return Subject(spec, yaml.safe_load(path.read_text(encoding="utf-8")), path.parent)
    if ":" not in text:
        raise ConfigError(
            f"{text!r} is neither a pipeline file nor a model",
            where="MODEL|PIPELINE",
            hint="pipeline.yaml, torchvision.models:resnet50, or path/to/model.py:build",
        )
    document = _document(text, _options(kwargs), parse_examples(example))
    try:
        spec = PipelineSpec.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][:2]))
        if place == "model.example":
            raise ConfigError(
                f"{example!r} is not what a model takes: {first['msg']}",
                where="--example",
                hint="3x224x224 for images, 77:int64<1000,77:int64 for two inputs",
            ) from None
        raise ConfigError(first["msg"], where=place or "MODEL") from None
    return Subject(spec, document, Path())


def parse_examples(text: str) -> tuple[Example, ...]:
    """Read "3x224x224" or "3x224x224:float32,77:int64<49408". Raises ConfigError.

    Whole numbers without a bound are 0 and 1.
    """
    if not text:
        return ()
    found = []
    for part in text.split(","):
        match = re.fullmatch(EXAMPLE, part.strip())
        if match is None or "0" in match[1].split("x"):
            raise ConfigError(
                f"{part!r} is no example input",
                where="--example",
                hint="sizes of one sample joined by x, and a dtype: 3x224x224 or 77:int64, or "
                "77:int64<1000 for numbers below 1000; several inputs are separated by commas",
            )
        shape = tuple(_size(n) for n in match[1].split("x"))
        whole = (match[2] or "").startswith(("int", "uint"))
        bound = int(match[3]) if match[3] else LEAST if whole else None
        found.append(Example(shape, match[2] or "float32", bound))
    return tuple(found)


def _size(text: str) -> int | Range:
    try:
        return int(text) if text.isdecimal() else Range.parse(text)
    except ValueError as error:
        raise ConfigError(str(error), where="--example") from None


def _declared(examples: tuple[Example, ...]) -> list[Any]:
    """Return `model.example`: the shape of the one float input, or each input with its dtype."""
    if not examples:
        raise ConfigError(
            "no example input: its shape says what the model takes",
            where="--example",
            hint=f"--example 3x{IMAGENET}x{IMAGENET} for images",
        )
    if examples == (Example(examples[0].shape),):
        return _shape(examples[0])
    return [
        {"shape": _shape(e), "dtype": e.dtype, **({"max": e.max} if e.max else {})}
        for e in examples
    ]


def _shape(example: Example) -> list[int | str]:
    return [str(n) if isinstance(n, Range) else n for n in example.shape]


def _options(kwargs: str) -> dict[str, Any]:
    try:
        options = json.loads(kwargs)
    except ValueError as error:
        raise ConfigError(
            f"no JSON: {error}", where="--kwargs", hint="'{\"weights\": null}'"
        ) from None
    if not isinstance(options, dict):
        raise ConfigError(
            f"expected a JSON object, found {type(options).__name__}", where="--kwargs"
        )
    return options


def _ranged(size: int | Range) -> bool:
    return isinstance(size, Range)


def _document(
    factory: str, kwargs: Mapping[str, Any], examples: tuple[Example, ...]
) -> dict[str, Any]:
    model: dict[str, Any] = {"factory": factory, "example": _declared(examples)}
    if kwargs:
        model["kwargs"] = dict(kwargs)
    shape, image = examples[0].shape, False
    alone = examples == (Example(shape),)
    if alone and len(shape) == 3 and shape[0] in (1, 3) and any(map(_ranged, shape)):
        source: dict[str, Any] = {"channels": shape[0]}  # images keep their sizes
    elif alone and len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2]:
        image = True
        source = {"resize": shape[1], "crop": shape[1], "channels": shape[0]}
    else:
        source = {"decode": "tensor"}
    if image and shape == (3, IMAGENET, IMAGENET):
        source |= {"resize": 256}
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", factory.rpartition(":")[2]).strip("-")
    if file_of_factory(factory) and name in ("build", "make", "model", "Model", "create"):
        name = Path(factory.rpartition(":")[0]).stem
    return {
        "pipeline": name[:64] or "model",
        "model": model,
        "input": source,
        "stages": [{"name": "all"}],
    }
