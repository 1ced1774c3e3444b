"""Reads a pipeline: flag > environment > file > default, and who won for every key.

file.yaml ─ tree.py ─▶ data ◀─ KAFKA_*, STREAMINFER_<SECTION>__<KEY> ◀─ flags ("kafka.prefix")
└─▶ models.py ─▶ PipelineSpec, or one ConfigError with all problems
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from streaminfer.errors import ConfigError
from streaminfer.spec.checks import Problem, did_you_mean
from streaminfer.spec.models import PipelineSpec
from streaminfer.spec.problems import problems_of
from streaminfer.spec.tree import FREE, Data, KeyPath, Tree, flow_value, parse, plain_value

__all__ = ["load", "origins"]

MAX_BYTES = 1_000_000
PREFIX = "STREAMINFER_"
KAFKA = {
    "KAFKA_BOOTSTRAP_SERVERS": "bootstrap",
    "KAFKA_SECURITY_PROTOCOL": "security_protocol",
    "KAFKA_SASL_MECHANISM": "sasl_mechanism",
    "KAFKA_SASL_USERNAME": "sasl_username",
    "KAFKA_SASL_PASSWORD": "sasl_password",
    "KAFKA_SSL_CAFILE": "ssl_cafile",
    "KAFKA_SSL_CERTFILE": "ssl_certfile",
    "KAFKA_SSL_KEYFILE": "ssl_keyfile",
    "KAFKA_SSL_CHECK_HOSTNAME": "ssl_check_hostname",
}
TOP = ("pipeline", "delivery", "memory")  # the keys without a section
RAW = ("sasl_username", "sasl_password")  # whatever they look like, they are texts


def load(
    path: str | os.PathLike[str],
    overrides: Mapping[str, str] = {},
    environ: Mapping[str, str] = os.environ,
) -> PipelineSpec:
    """Read a pipeline file; `overrides` are flags by dotted key. Raises ConfigError."""
    return _Reading(Path(path), overrides, environ).spec()


def origins(
    path: str | os.PathLike[str],
    overrides: Mapping[str, str] = {},
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return for every key who set it: "file.yaml:12", "environment NAME", "flag" or "default".

    Raises ConfigError.
    """
    reading = _Reading(Path(path), overrides, environ)
    leaves = _leaves(reading.spec().model_dump(mode="json"), ())
    return {reading.dotted(keys): reading.places.get(keys, "default") for keys, _ in leaves}


class _Reading:
    """One file under one environment: its data, and the place of every key."""

    def __init__(self, file: Path, flags: Mapping[str, str], environ: Mapping[str, str]) -> None:
        self.file = file
        self.tree: Tree = parse(_text(file), str(file), environ)
        self.data: Data = self.tree.data
        self.places = {keys: f"{file}:{line}" for keys, line in self.tree.lines.items()}
        for variable, names in _variables(environ):
            keys = self.locate(names, f"environment {variable}", same=_loose)
            self.put(keys, environ[variable], f"environment {variable}")
        for flag, text in flags.items():
            self.put(self.locate(flag.split("."), "flag", same=str), text, "flag")
        for key in [key for key, value in self.data.items() if value is None]:
            del self.data[key]  # "kafka:" with nothing below it

    def spec(self) -> PipelineSpec:
        """Validate. Raises ConfigError with every problem that was found."""
        problems = [*self.tree.problems, *self.tree.unset.values()]
        known = {problem.path for problem in problems}
        try:
            spec = PipelineSpec.model_validate(self.data)
        except ValidationError as error:
            problems += [p for p in problems_of(error) if p.path not in known]
        if problems:
            raise self.report(problems)
        return spec.at(self.file)

    def put(self, keys: KeyPath | None, text: str, place: str) -> None:
        """Set one value over what the file says."""
        if keys is None:
            return
        owner: object = self.data
        for n, key in enumerate(keys[:-1], 1):
            if isinstance(owner, list) and isinstance(key, int):
                owner = owner[key]
            elif isinstance(owner, dict):
                if owner.get(key) is None:
                    owner[key] = {}
                    self.places.setdefault(keys[:n], place)
                owner = owner[key]
        if not isinstance(owner, dict):
            return  # the file has something else there, and is told so
        owner[keys[-1]] = value = _value(keys, text)
        self.tree.unset.pop(keys, None)
        self.places |= {child: place for child, _ in _leaves(value, keys)} | {keys: place}

    def locate(
        self, names: Sequence[str], place: str, same: Callable[[str], str]
    ) -> KeyPath | None:
        """Return the key path of dotted names; stages go by their names, alike under `same`."""
        head, *rest = names
        if head not in ("stages", "edges") or not rest:
            return tuple(names)
        stages = self.data.get("stages")
        known = [
            str(stage.get("name")) if isinstance(stage, dict) else ""
            for stage in (stages if isinstance(stages, list) else ())
        ]
        found = [i for i, name in enumerate(known) if same(name) == same(rest[0])]
        if head == "edges":
            return ("edges", known[found[0]] if found else rest[0], *rest[1:])
        if found and len(rest) > 1:
            return ("stages", found[0], *rest[1:])
        keys = tuple(names)
        self.places[keys] = place
        hint = "name a key of the stage" if found else did_you_mean(rest[0], known)
        self.tree.problems.append(Problem(keys, f"no stage {rest[0]!r} to set", hint))
        return None

    def dotted(self, keys: KeyPath) -> str:
        """Return the key as people write it: stages by their names."""
        stages = self.data.get("stages")
        if keys[:1] == ("stages",) and len(keys) > 1 and isinstance(stages, list):
            index = keys[1]
            stage = stages[index] if isinstance(index, int) and index < len(stages) else None
            if isinstance(stage, dict) and isinstance(stage.get("name"), str):
                keys = ("stages", stage["name"], *keys[2:])
        return ".".join(map(str, keys))

    def nearest(self, keys: KeyPath) -> KeyPath:
        """Return the key, or the innermost one above it that has a place."""
        while keys and keys not in self.places:
            keys = keys[:-1]
        return keys

    def where(self, keys: KeyPath) -> str:
        """Return the place of a key, and the key."""
        return f"{self.places[self.nearest(keys)]}: {self.dotted(keys)}".removesuffix(": ")

    def report(self, problems: Sequence[Problem]) -> ConfigError:
        """Make one error of them, in the order of the file."""
        if len(problems) == 1:
            (problem,) = problems
            return ConfigError(problem.message, where=self.where(problem.path), hint=problem.hint)
        ordered = sorted(problems, key=lambda p: self.tree.lines.get(self.nearest(p.path), 0))
        lines = [f"{len(problems)} problems"]
        for problem in ordered:
            hint = f" ({problem.hint})" if problem.hint else ""
            lines.append(f"{self.where(problem.path)}: {problem.message}{hint}")
        return ConfigError("\n  ".join(lines), where=str(self.file))


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = (f.name for f in sorted(file.parent.glob("*.y*ml")))
        hint = did_you_mean(file.name, near)
        raise ConfigError("there is no such file", where=str(file), hint=hint) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(file)) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"more than {MAX_BYTES} bytes", where=str(file), hint="a pipeline file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError("not UTF-8 text", where=f"{file}:{line}") from None


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (variable, names) of those that are ours and not empty; the later wins."""
    for variable, key in KAFKA.items():
        if environ.get(variable):
            yield variable, ("kafka", key)
    for variable in sorted(environ):
        names = tuple(variable.removeprefix(PREFIX).lower().split("__"))
        ours = variable.startswith(PREFIX) and (len(names) > 1 or names[0] in TOP)
        if ours and environ[variable]:
            yield variable, names


def _value(keys: KeyPath, text: str) -> object:
    """Return what a text of the environment or a flag means; the models turn texts to numbers."""
    if keys[-1] in RAW:
        return text
    if text[:1] in ("[", "{") and text[-1:] in ("]", "}"):
        return flow_value(text)
    if keys[:2] == FREE:
        return plain_value(text)
    return None if text in ("", "null", "~") else text


def _leaves(value: object, keys: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*keys, key))
        return
    yield keys, value
    for i, child in enumerate(value if isinstance(value, list) else ()):
        if isinstance(child, dict):
            yield from _leaves(child, (*keys, i))


def _loose(name: str) -> str:
    return name.lower().replace("-", "_")
