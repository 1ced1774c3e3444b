"""YAML text as plain data in which every key knows its line and every ${VAR} has its value.

YAML is composed to nodes and built here, because the usual constructors forget the lines, take the
last of two equal keys, and read dates where people write versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from streaminfer.errors import ConfigError
from streaminfer.spec.checks import Problem

__all__ = ["Data", "KeyPath", "Tree", "flow_value", "parse", "plain_value"]

KeyPath = tuple[str | int, ...]
Data = dict[str, object]

MAX_VALUES = 20_000  # aliases of aliases multiply; no pipeline is that long
MAX_DEPTH = 32
TAG = "tag:yaml.org,2002:"
PLAIN = {TAG + name for name in ("bool", "int", "float", "null", "str")}
AS_WRITTEN = {TAG + "timestamp", TAG + "value"}
REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")
VARIABLE = re.compile(r"([A-Za-z_]\w*)(?::-(.*))?", re.DOTALL)
MAY_BE_UNSET: KeyPath = ("kafka", "bootstrap")  # then everything runs in one process
FREE: KeyPath = ("model", "kwargs")  # no model says which types these have


@dataclass
class Tree:
    """A file's data; `lines` by key path; `unset` are values whose variable is missing."""

    data: Data = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unset: dict[KeyPath, Problem] = field(default_factory=dict)


def parse(text: str, file: str, environ: Mapping[str, str]) -> Tree:
    """Build the tree of one YAML document. Raises ConfigError if it is not a mapping."""
    try:
        _refuse_depth(text, file)
        loader = yaml.CSafeLoader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _syntax(error, text, file) from None
    if node is None:
        raise ConfigError("the file is empty", where=file, hint="it needs pipeline, model, stages")
    builder = _Builder(yaml.CSafeLoader(""), environ, file)
    data = builder.build(node, ())
    if not isinstance(data, dict):
        raise ConfigError(
            "expected a mapping (key: value)", where=f"{file}:1", hint="begin with pipeline: NAME"
        )
    builder.tree.data = data
    return builder.tree


def flow_value(text: str) -> object:
    """Return what "[1, 2]" or "{a: 1}" means in YAML; the text itself if it is none."""
    try:
        _refuse_depth(text, "")
        value: object = yaml.load(text, yaml.CSafeLoader)
    except (yaml.YAMLError, ConfigError, ValueError):
        return text
    return value


def plain_value(text: str) -> object:
    """Return what an unquoted scalar means in YAML: "8" is a number, "null" nothing."""
    loader = yaml.CSafeLoader("")
    tag = str(loader.resolve(yaml.ScalarNode, text, (True, False)))  # type: ignore[no-untyped-call]
    if tag not in PLAIN:
        return text
    value: object = loader.construct_object(yaml.ScalarNode(tag, text))
    return value


def _refuse_depth(text: str, file: str) -> None:
    # by events, because composing recurses in C and would end the process
    depth = 0
    for event in yaml.parse(text, yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ConfigError(f"more than {MAX_DEPTH} levels", where=f"{file}:{line}")


def _syntax(error: yaml.YAMLError, text: str, file: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    message = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None:
        return ConfigError(f"not YAML: {message}", where=file)
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "nesting depth" in message:  # libyaml's own limit, where its scanner reads ahead
        return ConfigError(f"more than {MAX_DEPTH} levels", where=f"{file}:{mark.line + 1}")
    hint = 'inside { } put it in quotes: "${NAME}"' if "${" in line else ""
    return ConfigError(f"not YAML: {message}", where=f"{file}:{mark.line + 1}", hint=hint)


class _Builder:
    """One walk over the nodes."""

    def __init__(self, loader: yaml.CSafeLoader, environ: Mapping[str, str], file: str) -> None:
        self.loader, self.environ, self.file = loader, environ, file
        self.tree = Tree()
        self.left = MAX_VALUES
        self.depth = 0

    def build(self, node: yaml.Node, path: KeyPath) -> object:
        """Return the node's data; `path` is where it stands."""
        line = self.tree.lines.setdefault(path, node.start_mark.line + 1)
        self.left -= 1
        if self.left < 0 or self.depth >= MAX_DEPTH:
            raise ConfigError(
                f"more than {MAX_VALUES} values or {MAX_DEPTH} levels",
                where=f"{self.file}:{line}",
                hint="is it an alias of aliases?",
            )
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        self.depth += 1
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        finally:
            self.depth -= 1

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> Data:
        """Build a mapping; `<<` gives what its own keys do not say."""
        inherited: Data = {}
        own: Data = {}
        for key_node, value_node in node.value:
            if key_node.tag == TAG + "merge":
                base = self.build(value_node, path)
                inherited |= base if isinstance(base, dict) else {"<<": base}
                continue
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            here, line = (*path, key), key_node.start_mark.line + 1
            if key in own:
                first = self.tree.lines[here]
                self.tree.problems.append(Problem(here, f"again in line {line}; the first is here"))
                self.tree.lines[here] = first
                continue
            self.tree.lines[here] = line
            own[key] = self.build(value_node, here)
        return inherited | own

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> object:
        """Build a scalar; texts have their variables put in."""
        if node.tag == TAG + "str":
            return self.expand(node, path) if "${" in node.value else node.value
        if node.tag in AS_WRITTEN:
            return node.value
        try:
            if node.tag in PLAIN:
                return self.loader.construct_object(node)
        except (ValueError, LookupError):
            pass  # "!!int x", or an integer of thousands of digits
        kind = str(node.tag).removeprefix(TAG)
        self.tree.problems.append(Problem(path, f"this is no {kind} that a pipeline file may have"))
        return None

    def expand(self, node: yaml.ScalarNode, path: KeyPath) -> object:
        """Put in ${VAR} and ${VAR:-default}; $${ is a plain ${. All of it empty means nothing."""
        missing: list[str] = []

        def value(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            name = VARIABLE.fullmatch(match[1])
            if not name or not match[0].endswith("}"):
                self.tree.problems.append(
                    Problem(path, f"{match[0]!r} is no variable", "${NAME} or ${NAME:-default}")
                )
                return ""
            found = self.environ.get(name[1]) or name[2]
            if found is None and name[1] not in self.environ:
                missing.append(name[1])
            return found or ""

        text = REFERENCE.sub(value, node.value)
        if missing and path != MAY_BE_UNSET:
            self.tree.unset[path] = Problem(
                path,
                f"the environment has no {' and no '.join(missing)}",
                f"set it, or write ${{{missing[0]}:-default}}",
            )
        if not text or (missing and path == MAY_BE_UNSET):
            return None
        return plain_value(text) if not node.style and path[:2] == FREE else text
