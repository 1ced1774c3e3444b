"""The editor agrees with the loader: what it underlines is refused, what it accepts is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from streaminfer.spec import PipelineSpec, json_schema, load

STAGES = Path(__file__).parents[3] / "stages"
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KNOWN = {
    "$defs", "$id", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default",
    "description", "enum", "exclusiveMinimum", "format", "items", "maxItems", "maximum", "minItems",
    "minLength", "minProperties", "minimum", "oneOf", "pattern", "prefixItems", "properties",
    "required", "title", "type", "writeOnly",
}  # fmt: skip
GOOD: dict[str, Any] = {
    "pipeline": "toy",
    "model": {"factory": "m:f", "example": [3, 8, 8], "kwargs": {"any": [1, {"x": None}]}},
    "batch": {"max": 4, "wait": "4ms"},
    "stages": [
        {"name": "a", "until": "x", "device": "cuda:1", "replicas": 2, "shares": "measured"},
        {
            "name": "b",
            "batch": {"max": 2},
            "replicas": 2,
            "device": ["cuda:0", "cpu"],
            "shares": [2, 1],
        },
    ],
    "edges": {"default": {"dtype": "float16"}, "b": {"dtype": "int8", "compress": "zstd"}},
    "input": {"crop": 8, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "max_bytes": "16MB"},
    "output": {"labels": ["cat", 1], "top_k": 0},
    "kafka": {"bootstrap": None, "history": "10m", "max_record_bytes": 900000},
    "memory": 1000000,
}


def wrong(value: object, schema: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    """Yield what JSON Schema says against a value (the words of it that our schema uses)."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        yield from wrong(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    for word in ("anyOf", "oneOf"):
        if word in schema and all(any(wrong(value, s, root)) for s in schema[word]):
            yield f"{value!r} is none of them"
    kind = schema.get("type")
    if kind and type(value) not in TYPES[kind]:  # a bool is an int, but not here
        yield f"{value!r} is no {kind}"
    elif value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{value!r} is no choice"
    elif isinstance(value, dict):
        yield from wrong_mapping(value, schema, root)
    elif isinstance(value, list):
        placed, others = schema.get("prefixItems", []), schema.get("items", {})
        for at, item in enumerate(value):
            yield from wrong(item, placed[at] if at < len(placed) else others, root)
    if not within(value, schema):
        yield f"{value!r} is out of bounds"


def within(value: object, schema: dict[str, Any]) -> bool:
    if isinstance(value, str):
        return bool(re.search(schema.get("pattern", ""), value)) and len(value) >= schema.get(
            "minLength", 0
        )
    if isinstance(value, int | float):
        above = value > schema.get("exclusiveMinimum", value - 1)
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value)) and above
    if isinstance(value, dict):
        return len(value) >= int(schema.get("minProperties", 0))
    if not isinstance(value, list):
        return True
    count = len(value)
    return bool(schema.get("minItems", 0) <= count <= schema.get("maxItems", count))


def wrong_mapping(
    value: dict[str, object], schema: dict[str, Any], root: dict[str, Any]
) -> Iterator[str]:
    yield from (f"no {key}" for key in schema.get("required", ()) if key not in value)
    known = schema.get("properties", {})
    others = schema.get("additionalProperties", {})
    for key, item in value.items():
        if key not in known and others is False:
            yield f"unknown {key}"
        else:
            yield from wrong(item, known.get(key, others), root)


def judge(data: object) -> list[str]:
    schema = json_schema()
    return list(wrong(data, schema, schema))


def test_the_schema_is_one_json_document_that_names_itself() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == "urn:streaminfer:pipeline:1"
    assert schema["title"] == "streaminfer pipeline"
    assert set(schema["required"]) == {"pipeline", "stages"}


def test_a_good_file_is_good_for_both() -> None:
    assert judge(GOOD) == []
    assert PipelineSpec.model_validate(GOOD).edge("b").dtype == "int8"


@pytest.mark.parametrize(
    "example", [[[3], [4, 4]], {"a": [3], "b": {"shape": [4], "dtype": "int64", "max": 2}}]
)
def test_examples_of_several_inputs_are_good_for_both(example: object) -> None:
    several = {"model": {"factory": "m:f", "example": example}, "input": {"decode": "tensor"}}
    assert judge(GOOD | several) == []
    PipelineSpec.model_validate(GOOD | several)


@pytest.mark.parametrize(
    "change",
    [
        {"batc": {}},
        {"pipeline": "a/b"},
        {"stages": []},
        {"stages": [{"name": "a", "devise": "cpu"}]},
        {"stages": [{"name": "a", "device": "gpu"}]},
        {"stages": [{"name": "a", "device": ["cpu", "gpu"], "replicas": 2}]},
        {"stages": [{"name": "a", "device": []}]},
        {"stages": [{"name": "a", "shares": "fair"}]},
        {"stages": [{"name": "a", "shares": [0]}]},
        {"stages": [{"name": "a", "shares": []}]},
        {"stages": [{"until": "x"}]},
        {"stages": [{"name": "a", "split": {"by": "tiles", "grid": [2, 2, 2]}}]},
        {"stages": [{"name": "a", "split": {"by": "tiles", "grid": [0, 2]}}]},
        {"stages": [{"name": "a", "split": {"by": "rows", "parts": 2}}]},
        {"stages": [{"name": "a", "exit": {"factory": "m:f", "threshold": 2}}]},
        {"batch": {"max": 0}},
        {"batch": {"wait": "4 fortnights"}},
        {"memory": "lots"},
        {"delivery": "exactly_once"},
        {"edges": {"b": {"dtype": "int4"}}},
        {"edges": {"b": 3}},
        {"input": {"channels": 2}},
        {"input": {"topic": "a b"}},
        {"output": {"labels": 3}},
        {"model": {"factory": "resnet", "example": [3, 8, 8]}},
        {"model": {"factory": "m:f"}},
        {"model": {"factory": "m:f", "example": {"a": {"shape": [3], "dtype": "int46"}}}},
        {"model": {"factory": "m:f", "example": {}}},
        {"kafka": {"security_protocol": "TLS"}},
        {"metrics": {"port": 70000}},
    ],
)
def test_a_bad_file_is_bad_for_both(change: dict[str, Any]) -> None:
    assert judge(GOOD | change) != []
    with pytest.raises(ValidationError):
        PipelineSpec.model_validate(GOOD | change)


@pytest.mark.parametrize(
    "path", sorted(STAGES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_stages_files_are_good_for_both(path: Path) -> None:
    assert judge(yaml.load(path.read_text(), yaml.CSafeLoader)) == []
    assert load(path, {}, {}).path == path
