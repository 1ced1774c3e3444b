"""Samples of many sizes in a pipeline file: read as meant, and refused with the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streaminfer.errors import ConfigError
from streaminfer.ranges import Range
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load
from streaminfer.spec.models import json_schema

Read = Callable[[str], PipelineSpec]
BASE = """\
pipeline: toy
model: {factory: "toy.py:build", example: EXAMPLE}
input: {INPUT}
stages: [{name: front, until: a SPLIT}, {name: back}]
"""


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(text: str) -> PipelineSpec:
        (tmp_path / "toy.yaml").write_text(text)
        return load(tmp_path / "toy.yaml", environ={})

    return read


def file(example: str, source: str = "", split: str = "") -> str:
    return BASE.replace("EXAMPLE", example).replace("INPUT", source).replace("SPLIT", split)


def test_a_size_of_an_image_may_be_a_range(read: Read) -> None:
    spec = read(file("[3, 64..512, 64..512/32]"))
    (one,) = spec.first_model.examples().values()
    assert one.ranges == (None, Range(64, 512), Range(64, 512, 32))
    assert spec.first_model.varies
    assert one.sizes() == (3, 512, 512)
    assert one.sizes((0.0,)) == (3, 64, 64)
    assert one.sizes((0.0, 1.0)) == (3, 64, 512)
    assert spec.first_model.model_dump(mode="json")["example"] == [3, "64..512", "64..512/32"]


def test_so_may_the_length_of_a_sequence_by_the_argument(read: Read) -> None:
    example = "{ids: {shape: [16..128], dtype: int64, max: 9}, mask: [16..128]}"
    spec = read(file(example, "decode: tensor"))
    assert [one.ranges for one in spec.first_model.examples().values()] == [(Range(16, 128),)] * 2
    listed = read(file("[[16..128], {shape: [4]}]", "decode: tensor"))
    assert [one.ranges for one in listed.first_model.examples().values()] == [(Range(16, 128),), ()]


def test_one_size_is_declared_and_dumped_as_before(read: Read) -> None:
    spec = read(file("[3, 8, 8]"))
    assert not spec.first_model.varies
    assert spec.first_model.model_dump(mode="json")["example"] == [3, 8, 8]


@pytest.mark.parametrize(
    ("example", "source", "split", "key", "words"),
    [
        ("[3, 512..64, 8]", "", "", "model.example.1", 'the lower end is not below'),
        ("[3, 64..500/32, 8]", "", "", "model.example.1", '"64..480/32" or "64..512/32"'),
        ("[3, 64..512, 8.5]", "", "", "model.example.2", "or a range"),
        ("[2..4, 8, 8]", "", "", "model.example", "a fixed number of channels, not 2..4"),
        ("[3, 64..512, 64..512]", "crop: 224", "", "model.example", "or drop input.crop"),
        ("[3, 64..512, 64..512]", "resize: 600", "", "input.resize", "takes no such side"),
        ("[3, 64..512, 64..512]", "", ", split: {by: tiles, grid: [2, 2]}", "stages.front.split",
         "by: channels takes every size"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_its_line(
    read: Read, example: str, source: str, split: str, key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read(file(example, source, split))
    assert re.search(rf"toy\.yaml:\d+: {re.escape(key)}: ", str(error.value))
    assert words in str(error.value)


def test_a_resize_within_the_step_of_a_range_is_fine(read: Read) -> None:
    assert read(file("[3, 64..512/64, 64..512/64]", "resize: 250")).input.resize == 250


def test_branches_on_the_input_take_the_same_sizes() -> None:
    def branch(name: str, size: Any) -> dict[str, Any]:
        return {"name": name, "model": {"factory": "toy.py:build", "example": [3, size, size]}}

    def ensemble(*sizes: Any) -> PipelineSpec:
        branches = [branch(f"b{k}", size) for k, size in enumerate(sizes)]
        whole = {"pipeline": "toy", "stages": [{"name": "all", "branches": branches}]}
        return PipelineSpec.model_validate(whole)

    assert ensemble("8..16", "8..16").first_model.varies
    with pytest.raises(ValueError, match="'b1' takes other sizes than 'b0'"):
        ensemble("8..16", "8..32")
    with pytest.raises(ValueError, match="'b1' takes other sizes than 'b0'"):
        ensemble("8..16", 16)


def test_the_schema_takes_a_range_and_nothing_like_it() -> None:
    sizes = json_schema()["$defs"]["TensorExample"]["properties"]["shape"]["items"]["anyOf"]
    (pattern,) = [kind["pattern"] for kind in sizes if kind["type"] == "string"]
    assert re.search(pattern, "64..512/32")
    assert re.search(pattern, "64..512")
    assert not re.search(pattern, "64-512")
    assert {"minimum": 1, "type": "integer"} in sizes
