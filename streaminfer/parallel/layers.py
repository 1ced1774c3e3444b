"""The names a user knows (`layer3.0`, `layer3.0.conv1`) and where they lie in the graph."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import fx

from streaminfer.errors import CaptureError

__all__ = ["Layer", "Layers", "path_of"]


class Layer(NamedTuple):
    """A module of the model: `first` and `last` are positions of its nodes, both inclusive."""

    path: str
    kind: str  # its class
    first: int
    last: int


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """Return (path, class) of the modules around a node, outermost first, without the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [(str(path), str(kind).rsplit(".", 1)[-1]) for path, kind in stack.values()]
    return [(path, kind) for path, kind in paths if path and not path.startswith("_empty_nn")]


def path_of(node: fx.Node) -> str:
    """Return the innermost module that made a node; "" for the model itself."""
    stack = _stack(node)
    return stack[-1][0] if stack else ""


class Layers:
    """All modules that computed something, in the order in which they end."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._stacks = [_stack(node) for node in nodes]
        spans: dict[str, Layer] = {}
        for position, stack in enumerate(self._stacks):
            for path, kind in stack:
                first = spans[path].first if path in spans else position
                spans[path] = Layer(path, kind, first, position)
        self._spans = dict(sorted(spans.items(), key=lambda item: item[1].last))

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._spans.values())

    def __contains__(self, path: object) -> bool:
        return path in self._spans

    def find(self, path: str) -> Layer:
        """Return the layer of that name.

        Raises:
            CaptureError: there is none; names the nearest.
        """
        if path in self._spans:
            return self._spans[path]
        near = difflib.get_close_matches(path, self._spans, n=3, cutoff=0.6)
        top = [name for name in self._spans if "." not in name]
        hint = f"did you mean {', '.join(near)}?" if near else f"layers are: {', '.join(top)}"
        raise CaptureError(f"the model has no layer {path!r}", hint=hint)

    def within(self, first: int, last: int) -> tuple[str, ...]:
        """Name a range of positions by the fewest modules that lie in it as a whole."""
        names: dict[str, None] = {}
        for stack in self._stacks[first : last + 1]:
            for path, _ in stack:
                span = self._spans[path]
                if first <= span.first and span.last <= last:
                    names.setdefault(path)
                    break
        return tuple(names)
