"""Says pydantic's errors as a person would: what was expected, what was found, what is near."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from streaminfer.spec.checks import Problem, did_you_mean, nearest
from streaminfer.spec.models import PipelineSpec
from streaminfer.spec.stages import TensorExample
from streaminfer.spec.tree import KeyPath

__all__ = ["problems_of"]

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping (key: value)",
    "model": "a mapping (key: value)",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length}",
    "literal": "{expected}",
}  # by how pydantic's error type begins


FORMS = ("one", "several", "named")  # pydantic's words for the forms of model.example, not keys


def problems_of(error: ValidationError) -> Iterator[Problem]:
    """Yield the problems of a PipelineSpec that was refused."""
    details = error.errors(include_url=False)
    for detail in details:
        detail["loc"] = _keys_only(detail["loc"])
    within = {detail["loc"][:n] for detail in details for n in range(len(detail["loc"]))}
    for detail in details:
        if detail["type"] == "too_short" and detail["loc"] in within:
            continue  # pydantic does not count the items that are wrong themselves
        context: dict[str, Any] = detail.get("ctx", {})
        if detail["type"] == "refused":
            for path, message, hint in context["problems"]:
                yield Problem((*detail["loc"], *path), message, hint)
        else:
            yield _problem(detail, context)


def _keys_only(path: KeyPath) -> KeyPath:
    formed = path[:2] == ("model", "example") and path[2:3] and path[2] in FORMS
    return (*path[:2], *path[3:]) if formed else path


def _problem(detail: ErrorDetails, context: dict[str, Any]) -> Problem:
    kind, path, value = detail["type"], detail["loc"], detail["input"]
    if kind == "extra_forbidden":
        return Problem(path, "unknown key", did_you_mean(str(path[-1]), _keys(path[:-1])))
    if kind == "missing":
        return Problem(path, "is missing")
    found = "" if _field(path) is SecretStr else f", found {_show(value)}"
    if kind == "value_error":
        message = str(context["error"])
        return Problem(path, message + (found if message.startswith("expected") else ""))
    for start, words in EXPECTED.items():
        if kind.startswith(start):
            words = words.format_map(context)
            hint = nearest(str(value), re.findall(r"'([^']*)'", words))
            return Problem(path, f"expected {words}{found}", hint)
    return Problem(path, detail["msg"])


def _show(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys(path: KeyPath) -> list[str]:
    kind = _field(path)
    return list(kind.model_fields) if _is_model(kind) else []


def _field(path: KeyPath) -> Any:
    """Return the type that the models have at a key path, None where they have none."""
    kind: Any = PipelineSpec
    if path[:2] == ("model", "example") and len(path) > 2:
        kind, path = TensorExample, path[3:]
    for key in path:
        if _is_model(kind):
            field = kind.model_fields.get(key)
            kind = field.annotation if field else None
        else:
            kind = next(iter(get_args(kind)[get_origin(kind) is dict :]), None)
        members = [arg for arg in get_args(kind) if _is_model(arg) or arg is SecretStr]
        if members and type(None) in get_args(kind):
            kind = members[0]
    return kind


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
